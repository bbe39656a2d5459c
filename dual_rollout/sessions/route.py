"""`POST /v1/dual_rollout/next_top_k` on vLLM's API server, `--middleware`: top-k lists after texts that grow.

A text that is asked for again and again is a session: a request that stays in vLLM's engine (its streaming input),
with its keys and values. Each further token is sent alone, and nothing of the text is parsed, hashed, looked up or
computed a second time. Lists come back as the arrays that the engine made.

A session holds memory and one of the --max-num-seqs places, also while it waits. So there are only as many as leave
room for other requests, the rest of the texts are ordinary requests of one token, and a session that nobody goes on
with ends by itself. All of them end before anything is asked that may change the weights or the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from vllm import SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.logprobs import LogprobsProcessor

from dual_rollout.sessions.wire import CARRIED, PATH, SCHEDULER, SESSIONS_PATH, UNKNOWN_SESSION, encoded
from dual_rollout.vllm_routes import RefusedError, answered, cache_tokens, check_served, is_int, served_names

logger = logging.getLogger(__name__)

_PREFIX = "dual-rollout-list-"  # of our requests' ids
_IDLE_S = 10.0
_SHARE_OF_PLACES, _SHARE_OF_CACHE = 0.75, 0.5
_ASKING = (
    "/v1/",
    "/v2/",
    "/inference/",
    "/tokenize",
    "/detokenize",
    "/ping",
)  # routes that change nothing, but for these
_CHANGING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_PAUSES = {"/pause": True, "/resume": False, "/sleep": True, "/wake_up": False}
_LONGEST_WAIT_S = 30.0  # for requests under way, before something that may change the model


class SessionMiddleware:
    """Adds the route when the server starts, and ends the sessions before a request that may change the model."""

    def __init__(self, app: Any):
        self._app = app
        self._server: SessionServer | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self._server = add_route(scope["app"])
        if self._server is None or scope["type"] != "http" or not may_change_model(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        async with self._server.without_sessions():
            await self._app(scope, receive, send)
            if scope["path"] in _PAUSES:
                self._server.paused = _PAUSES[scope["path"]]


def may_change_model(method: str, path: str) -> bool:
    """Whether a request may change the weights or the cache: any that is not known to ask only."""
    return method == "POST" and (path in _CHANGING or not path.startswith(_ASKING))


def add_route(app: FastAPI) -> SessionServer | None:
    """None, with a line in the log, where this vLLM is not what the route is written for."""
    try:
        lists_as_arrays(app.state.engine_client)
    except AttributeError as error:
        logger.error("no sessions (dual_rollout.sessions): this version of vLLM is not known (%s)", error)
        return None
    router, server = APIRouter(), SessionServer(app.state)

    @router.get(SESSIONS_PATH)
    async def describe() -> dict[str, int]:
        return server.describe()

    @router.post(PATH)
    async def next_top_k(request: Request) -> JSONResponse:
        async def work(body: Any) -> dict[str, Any]:
            return await server.answer(ListRequest.from_json(body, server.limits()))

        return await answered(request, work)

    app.include_router(router)
    return server


class UnknownSessionError(RefusedError):
    """A text that is gone on with is not here, or not at that position."""

    status = UNKNOWN_SESSION


@dataclass(frozen=True)
class Limits:
    """What a request must keep to; `names` are those of the model, `adapters` of what is loaded on top of it."""

    vocab_size: int
    max_logprobs: int
    max_model_len: int
    names: frozenset[str]
    adapters: frozenset[str]


@dataclass(frozen=True)
class ListOf:
    """What is asked for after a text: `k` tokens, at a temperature as vLLM's completions take it."""

    k: int
    temperature: float

    def sampling(self, kind: RequestOutputKind, carried: Sequence[tuple[str, list[int]]] = ()) -> SamplingParams:
        return SamplingParams(
            max_tokens=1,
            temperature=self.temperature,
            logprobs=self.k,
            ignore_eos=True,
            detokenize=False,
            output_kind=kind,
            extra_args={CARRIED: list(carried)} if carried else None,
            skip_clone=True,
        )


@dataclass(frozen=True)
class Text:
    """One text of a request.

    Attributes:
        session: its name, unless it is asked for once.
        known: tokens of it that the session has; 0 begins one.
        token_ids: the others.
    """

    session: str | None
    known: int
    token_ids: list[int]


@dataclass(frozen=True)
class ListRequest:
    """The body of a request.

    Attributes:
        model: the served name of the model or of an adapter.
        k: tokens of each list.
        temperature: as in vLLM's completions; 0 for log-probabilities at temperature 1.
        texts: `[session, known, token_ids]` each.
        ended: sessions that are not gone on with.
        request_id: comes back in the answer.
    """

    model: str
    k: int
    temperature: float
    texts: list[Text]
    ended: list[str]
    request_id: str | None

    @classmethod
    def from_json(cls, body: Any, limits: Limits) -> ListRequest:
        """Raises `ValueError` with the field to mend, `UnknownModelError` for a model that is not served."""
        try:
            texts = [Text(*text) for text in body["texts"]]
            made = cls(
                body["model"], body["k"], body["temperature"], texts, body.get("ended", []), body.get("request_id")
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a request for lists ({type(error).__name__}: {error})") from error
        made._check(limits)
        return made

    def _check(self, limits: Limits) -> None:
        check_served(self.model, limits.names | limits.adapters)
        if not is_int(self.k) or not 1 <= self.k <= limits.max_logprobs:
            raise ValueError(f"k must be in [1, {limits.max_logprobs}] (--max-logprobs), got {self.k!r:.80}")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float):
            raise ValueError(f"temperature must be a number, got {self.temperature!r:.80}")
        if not self.texts or not isinstance(self.ended, list):
            raise ValueError("texts must be a list of at least one, and ended a list")
        for text in self.texts:
            if not isinstance(text.session, str | None) or not is_int(text.known) or text.known < 0:
                raise ValueError(f"a text must be [session or null, known >= 0, token ids], got {text!r:.200}")
            if not isinstance(text.token_ids, list) or not text.token_ids or not all(map(is_int, text.token_ids)):
                raise ValueError("token ids of a text must be a list of at least one whole number")
            if not 0 <= min(text.token_ids) <= max(text.token_ids) < limits.vocab_size:
                raise ValueError(f"a token id outside [0, {limits.vocab_size})")
            if text.known + len(text.token_ids) >= limits.max_model_len:
                raise ValueError(
                    f"a text of {text.known + len(text.token_ids)} tokens leaves no room for one more in the model's "
                    f"context of {limits.max_model_len} (--max-model-len)"
                )
        named = [text.session for text in self.texts if text.session is not None]
        if len(set(named)) < len(named):
            raise ValueError("a session may have one text in a request")


@dataclass(frozen=True)
class Lists:
    """One list: `(k,)` token ids and log-probabilities, the most likely first."""

    token_ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Carry:
    """How the tokens of a session come to the engine: with those of `others`, or `by_another`."""

    others: Sequence[tuple[str, list[int]]] = ()
    by_another: bool = False


class Session:
    """A request that stays in the engine.

    Attributes:
        length: tokens of its text.
        idle_since: `time.monotonic` seconds of its last answer; None while it is at work.
        ends: whether it ends with the answer that it is at work for.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.length = 0
        self.idle_since: float | None = None
        self.ends = False
        self._request_id = _request_id()
        self._inputs: asyncio.Queue[StreamingInput] = asyncio.Queue()
        self._outputs: AsyncGenerator[Any, None] | None = None
        self._last: tuple[list[int], ListOf, Lists] | None = None

    def repeats(self, text: Text, params: ListOf) -> Lists | None:
        """The answer, where the same was asked before: the client has not got it, and asks again."""
        if self._last is None or text.known + len(text.token_ids) != self.length:
            return None
        token_ids, asked, lists = self._last
        return lists if token_ids == text.token_ids and asked == params else None

    def engine_id(self, engine: Any) -> str:
        """Its request's name in the engine."""
        return engine.output_processor.external_req_ids[self._request_id][0]

    async def go_on(self, engine: Any, token_ids: list[int], params: ListOf, lora: Any, carry: Carry) -> Lists:
        """The list after these tokens more."""
        self.idle_since = None
        self.length += len(token_ids)
        if not carry.by_another:
            sampling = params.sampling(RequestOutputKind.DELTA, carry.others)
            self._inputs.put_nowait(StreamingInput(tokens_input(token_ids), sampling))
            if self._outputs is None:
                self._outputs = engine.generate(self._stream(), sampling, self._request_id, lora_request=lora)
        assert self._outputs is not None, "what another brings is for a session that has begun"
        lists = _lists(await anext(self._outputs, None), params.k)
        self._last = token_ids, params, lists
        self.idle_since = time.monotonic()
        return lists

    async def end(self) -> None:
        """Free what it holds."""
        if self._outputs is not None:
            await self._outputs.aclose()

    async def _stream(self) -> AsyncIterator[StreamingInput]:
        while True:
            yield await self._inputs.get()


class SessionServer:
    """Answers requests with the engine of an API server, whose `app.state` it is given.

    Attributes:
        paused: whether the engine is, so that new requests wait.
    """

    def __init__(self, state: Any):
        self.paused = False
        self._state = state
        self._sessions: dict[str, Session] = {}
        self._held = 0  # tokens of all sessions
        self._changes = 0  # under way, of the model
        self._unchanging = asyncio.Event()  # whether none is
        self._unchanging.set()
        self._at_work = 0
        self._together = state.engine_client.vllm_config.scheduler_config.scheduler_cls == SCHEDULER
        self._reaper: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def limits(self) -> Limits:
        model = self._state.engine_client.model_config
        return Limits(model.get_vocab_size(), model.max_logprobs, model.max_model_len, *served_names(self._state))

    def describe(self) -> dict[str, int]:
        return {"sessions": len(self._sessions), "places": self._places() if self._keeps() else 0}

    async def answer(self, request: ListRequest) -> dict[str, Any]:
        """The lists after all texts, as the answer's JSON.

        Raises:
            UnknownSessionError: a session is not here; none has gone on.
            ValueError, VLLMClientError: a text is refused; its session has ended, the others have gone on.
            RuntimeError: the engine has aborted some.
        """
        await self._unchanging.wait()
        for name in request.ended:
            await self._end(name)
        params = ListOf(request.k, float(request.temperature))
        before = [self._answered(text, request.model, params) for text in request.texts]
        asked = [text for text, lists in zip(request.texts, before, strict=True) if lists is None]
        found = await self._lists(asked, request.model, params)
        answers = iter([_raised(lists) for lists in found])
        rows = [next(answers) if lists is None else lists for lists in before]
        kept = [text.session in self._sessions for text in request.texts]
        return {
            "request_id": request.request_id,
            "model": request.model,
            "usage": {"prompt_tokens": sum(text.known + len(text.token_ids) for text in request.texts)},
            "kept": kept,
            **encoded(np.stack([row.token_ids for row in rows]), np.stack([row.logprobs for row in rows])),
        }

    @contextlib.asynccontextmanager
    async def without_sessions(self) -> AsyncIterator[None]:
        """No session is in the engine during the block, and none has what it computed before; requests wait."""
        self._changes += 1
        self._unchanging.clear()
        try:
            deadline = time.monotonic() + _LONGEST_WAIT_S
            # What is at work in a paused engine has not begun, and does so afterwards.
            while self._at_work and not self.paused and time.monotonic() < deadline:
                await asyncio.sleep(0.001)
            for name, session in list(self._sessions.items()):
                if session.idle_since is None:
                    session.ends = True
                else:
                    await self._end(name)
            yield
        finally:
            self._changes -= 1
            if not self._changes:
                self._unchanging.set()

    def _answered(self, text: Text, model: str, params: ListOf) -> Lists | None:
        """The list after a text where it was given before; raises `UnknownSessionError` where it cannot be gone on."""
        session = self._sessions.get(text.session) if text.session is not None else None
        if session is not None and session.idle_since is None:
            raise UnknownSessionError(f"session {text.session!r:.80} is at work")
        if not text.known:
            return None
        if session is None or session.model != model:
            raise UnknownSessionError(f"no session {text.session!r:.80} of {model!r:.80}: send the whole text")
        lists = session.repeats(text, params)
        if lists is None and session.length != text.known:
            raise UnknownSessionError(f"session {text.session!r:.80} has {session.length} tokens, not {text.known}")
        return lists

    async def _lists(self, texts: Sequence[Text], model: str, params: ListOf) -> list[Lists | BaseException]:
        """The lists after all texts, or why there is none. Up to the last line nothing else runs in between."""
        engine = self._state.engine_client
        going_on = [(text, self._sessions[str(text.session)]) for text in texts if text.known]
        together = going_on if self._together else []
        others = [(session.engine_id(engine), text.token_ids) for text, session in together[1:]]
        carries = {id(text): Carry(by_another=True) for text, _ in together[1:]}
        carries |= {id(text): Carry(others) for text, _ in together[:1]}
        for _, session in going_on:
            session.idle_since = None
        self._at_work += len(texts)
        tasks = {}
        for text in texts:
            task = asyncio.create_task(self._asked(text, model, params, carries.get(id(text), Carry())))
            task.add_done_callback(functools.partial(self._left, text))
            tasks[id(text)] = task
        if others:
            carrier, *carried = (tasks[id(text)] for text, _ in together)
            carrier.add_done_callback(functools.partial(_give_up, carried))
        return await asyncio.gather(*tasks.values(), return_exceptions=True)

    def _left(self, text: Text, task: asyncio.Task[Lists]) -> None:
        """A text is not at work any more. If it has no list, its session ends."""
        self._at_work -= 1
        if _failed(task) and text.session is not None and text.session in self._sessions:
            self._ending = {ending for ending in self._ending if not ending.done()}
            self._ending.add(asyncio.create_task(self._end(text.session)))

    async def _asked(self, text: Text, model: str, params: ListOf, carry: Carry) -> Lists:
        """The list after a text: of its session, which may begin here, or of a request of one token."""
        engine, lora = self._state.engine_client, self._state.openai_serving_models.lora_requests.get(model)
        name = text.session
        if name is not None and not text.known:
            await self._end(name)  # it is begun again
            if self._room_for(len(text.token_ids)):
                self._sessions[name] = Session(model)
                self._watch()
        if name is None or (name not in self._sessions and not text.known):
            stream = engine.generate(
                tokens_input(text.token_ids),
                params.sampling(RequestOutputKind.FINAL_ONLY),
                _request_id(),
                lora_request=lora,
            )
            async with contextlib.aclosing(stream):
                return _lists(await anext(stream, None), params.k)
        session = self._sessions[name]
        self._held += len(text.token_ids)
        lists = await session.go_on(engine, text.token_ids, params, lora, carry)
        if session.ends or not self._room_for(0):
            await self._end(name)
        return lists

    def _room_for(self, tokens: int) -> bool:
        """Whether one session more, or a longer one, leaves room for other requests."""
        places = self._places() - (tokens > 0)
        fits = self._held + tokens <= cache_tokens(self._state.engine_client.vllm_config) * _SHARE_OF_CACHE
        return not self._changes and self._keeps() and len(self._sessions) <= places and fits

    def _keeps(self) -> bool:
        """Of several API servers, the next request of a session may reach another one."""
        return getattr(self._state.engine_client.vllm_config.parallel_config, "_api_process_count", 1) == 1

    def _places(self) -> int:
        return int(self._state.engine_client.vllm_config.scheduler_config.max_num_seqs * _SHARE_OF_PLACES)

    async def _end(self, name: str) -> None:
        if (session := self._sessions.pop(name, None)) is not None:
            self._held -= session.length
            await session.end()

    def _watch(self) -> None:
        """End sessions that nobody goes on with, as long as there are any."""
        if self._reaper is None or self._reaper.done():
            self._reaper = asyncio.create_task(self._reap())

    async def _reap(self) -> None:
        while self._sessions:
            await asyncio.sleep(_IDLE_S / 4)
            since = time.monotonic() - _IDLE_S
            for name, session in list(self._sessions.items()):
                if session.idle_since is not None and session.idle_since < since:
                    await self._end(name)


class ListsAsArrays(LogprobsProcessor):
    """vLLM's, without making an object of every listed token. Of a session it keeps the latest list alone."""

    def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
        self.logprobs = [logprobs_lists]


def lists_as_arrays(engine: Any) -> None:
    """Let the engine's client keep the lists of our requests as arrays.

    Raises:
        AttributeError: it has not the parts that are changed here.
    """
    processor = engine.output_processor
    add_request, states, _ = processor.add_request, processor.request_states, processor.external_req_ids
    LogprobsProcessor._update_sample_logprobs  # noqa: B018  what `ListsAsArrays` overrides

    def add(request: Any, *args: Any, **kwargs: Any) -> None:
        begins = request.request_id not in states
        add_request(request, *args, **kwargs)
        if begins and (request.external_req_id or request.request_id).startswith(_PREFIX):
            states[request.request_id].logprobs_processor = ListsAsArrays.from_new_request(None, request)

    processor.add_request = add


_numbers = itertools.count()


def _request_id() -> str:
    return f"{_PREFIX}{next(_numbers)}"


def _lists(output: Any, k: int) -> Lists:
    """The list in an answer of the engine, without the token that was sampled, which comes first."""
    if output is None or not output.outputs[0].logprobs:
        raise RuntimeError("the engine aborted a request, as it does on /pause")
    arrays = output.outputs[0].logprobs[-1]
    return Lists(arrays.logprob_token_ids[0, 1 : k + 1].copy(), arrays.logprobs[0, 1 : k + 1].copy())


def _give_up(carried: Sequence[asyncio.Task[Any]], carrier: asyncio.Task[Any]) -> None:
    """What a message carries that does not arrive would be waited for in vain."""
    if _failed(carrier):
        for task in carried:
            task.cancel()


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


def _raised(lists: Lists | BaseException) -> Lists:
    if isinstance(lists, BaseException):
        raise lists
    return lists
