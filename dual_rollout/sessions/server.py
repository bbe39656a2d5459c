"""Which texts stay in vLLM's engine, and for how long.

A session holds memory and one of the --max-num-seqs places, also while it waits. So there are only as many as leave
room for other requests, the rest of the texts are ordinary requests of one token, and a session that nobody goes on
with ends by itself. All of them end before anything is asked that may change the weights or the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

import numpy as np

from dual_rollout.sessions.engine_requests import (
    ABORTED,
    EngineOutputs,
    ListOf,
    Lists,
    Session,
    drawn_once,
    lists_once,
)
from dual_rollout.sessions.request import DrawRequest, Limits, ListRequest, Text
from dual_rollout.sessions.wire import SCHEDULER, UNKNOWN_SESSION, encoded, encoded_draws
from dual_rollout.vllm_routes import RefusedError, adapter_of, cache_tokens, served_names

T = TypeVar("T")

_IDLE_S = 10.0
_SHARE_OF_PLACES, _SHARE_OF_CACHE = 0.75, 0.5
_LONGEST_WAIT_S = 30.0  # for requests under way, before something that may change the model


class UnknownSessionError(RefusedError):
    """A text that is gone on with is not here, or not at that position."""

    status = UNKNOWN_SESSION


class SessionServer:
    """Answers requests with the engine of an API server, whose `app.state` and outputs it is given.

    Attributes:
        paused: whether the engine is, so that new requests wait.
    """

    def __init__(self, state: Any, outputs: EngineOutputs):
        self.paused = False
        self._state, self._outputs = state, outputs
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

    async def answer(self, request: ListRequest) -> bytes:
        """The lists after all texts, as the answer's content.

        Raises:
            UnknownSessionError: a session is not here; none has gone on.
            ValueError, VLLMClientError: a text is refused; its session has ended, and those that went on with it.
            RuntimeError: the engine has aborted some; likewise.
        """
        await self._unchanging.wait()
        for name in request.ended:
            await self._end_when_idle(name)
        params = ListOf(request.k, float(request.temperature))
        before = [self._answered(text, request.model, params) for text in request.texts]
        asked = [text for text, lists in zip(request.texts, before, strict=True) if lists is None]
        found = await self._lists(asked, request.model, params)
        answers = iter(found)
        rows = [next(answers) if lists is None else lists for lists in before]
        answer = {
            "request_id": request.request_id,
            "model": request.model,
            "usage": {"prompt_tokens": sum(text.known + len(text.token_ids) for text in request.texts)},
            "kept": [text.session in self._sessions for text in request.texts],
        }
        return encoded(answer, np.stack([row.token_ids for row in rows]), np.stack([row.logprobs for row in rows]))

    async def draw(self, request: DrawRequest) -> bytes:
        """The tokens after all texts and the log-probabilities of named ones, as the answer's content. None is kept.

        Raises:
            ValueError, VLLMClientError: a text is refused.
            RuntimeError: the engine has aborted some.
        """
        await self._unchanging.wait()
        engine, lora = self._state.engine_client, adapter_of(self._state, request.model)
        self._at_work += 1
        try:
            asked = (drawn_once(engine, draw, float(request.temperature), lora) for draw in request.draws)
            found = [_raised(answer) for answer in await asyncio.gather(*asked, return_exceptions=True)]
        finally:
            self._at_work -= 1
        answer = {
            "request_id": request.request_id,
            "model": request.model,
            "usage": {"prompt_tokens": sum(len(draw.token_ids) for draw in request.draws)},
        }
        return encoded_draws(answer, *zip(*found, strict=True))

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
            for name in list(self._sessions):
                await self._end_when_idle(name)
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

    async def _lists(self, texts: Sequence[Text], model: str, params: ListOf) -> list[Lists]:
        """The lists after all texts, or, once all have been answered, why one has none. Up to the last `await` nothing
        else runs in between."""
        lora = adapter_of(self._state, model)
        going_on = [text for text in texts if text.known]
        for text in going_on:
            self._session(text).idle_since = None
        together = self._together and len(going_on) > 1
        parts = [[text] for text in texts if not (together and text.known)] + [going_on] * together
        self._at_work += len(texts)
        tasks = []
        for part in parts:
            work = self._asked(part[0], model, params, lora) if len(part) == 1 else self._round(part, params, lora)
            tasks.append(asyncio.create_task(work))
            tasks[-1].add_done_callback(functools.partial(self._left, part))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        pairs = (zip(part, _raised(lists), strict=True) for part, lists in zip(parts, found, strict=True))
        lists = {id(text): mine for part in pairs for text, mine in part}
        return [lists[id(text)] for text in texts]

    def _left(self, texts: Sequence[Text], task: asyncio.Task[list[Lists]]) -> None:
        """Texts are not at work any more. If they have no lists, their sessions end."""
        self._at_work -= len(texts)
        if not task.cancelled() and task.exception() is None:
            return
        self._ending = {ending for ending in self._ending if not ending.done()}
        names = [text.session for text in texts if text.session is not None]
        self._ending |= {asyncio.create_task(self._end(name)) for name in names if name in self._sessions}

    async def _round(self, texts: Sequence[Text], params: ListOf, lora: Any) -> list[Lists]:
        """The lists of sessions that go on together: the message of the first brings the engine the tokens of all."""
        engine, (first, *others) = self._state.engine_client, texts
        carrier, *carried = sessions = [self._session(text) for text in texts]
        self._held += sum(len(text.token_ids) for text in texts)
        tokens = {}
        for text, session in zip(others, carried, strict=True):
            session.begin_work(text.token_ids)
            tokens[session.engine_id(engine)] = text.token_ids
        with self._outputs.expected(list(tokens), params.k) as expected:
            lists = [await carrier.go_on(engine, first.token_ids, params, lora, tokens)]
            for text, session, mine in zip(others, carried, await expected, strict=True):
                if mine is None:
                    raise RuntimeError(ABORTED)
                session.end_work(text.token_ids, params, mine)
                lists.append(mine)
        if any(session.ends for session in sessions) or not self._room_for(0):
            for text, session in zip(texts, sessions, strict=True):
                await self._end_unless_kept(text, session)
        return lists

    async def _asked(self, text: Text, model: str, params: ListOf, lora: Any) -> list[Lists]:
        """The list after one text: of its session, which may begin here, or of a request of one token."""
        engine, name = self._state.engine_client, text.session
        if name is not None and not text.known:
            await self._end(name)  # it is begun again
            if self._room_for(len(text.token_ids)):
                self._sessions[name] = Session(model)
                self._watch()
        if name is None or (name not in self._sessions and not text.known):
            return [await lists_once(engine, text.token_ids, params, lora)]
        session = self._session(text)
        self._held += len(text.token_ids)
        lists = await session.go_on(engine, text.token_ids, params, lora)
        await self._end_unless_kept(text, session)
        return [lists]

    def _session(self, text: Text) -> Session:
        return self._sessions[str(text.session)]

    async def _end_unless_kept(self, text: Text, session: Session) -> None:
        if session.ends or not self._room_for(0):
            await self._end(str(text.session))

    def _room_for(self, tokens: int) -> bool:
        """Whether one session more, or a longer one, leaves room for other requests."""
        places = self._places() - (tokens > 0)
        fits = self._held + tokens <= cache_tokens(self._state.engine_client.vllm_config) * _SHARE_OF_CACHE
        return not self._changes and self._keeps() and len(self._sessions) <= places and fits

    def _keeps(self) -> bool:
        """Of several API servers or engines, the next token of a session may reach another one."""
        parallel = self._state.engine_client.vllm_config.parallel_config
        return getattr(parallel, "_api_process_count", 1) == parallel.data_parallel_size == 1

    def _places(self) -> int:
        return int(self._state.engine_client.vllm_config.scheduler_config.max_num_seqs * _SHARE_OF_PLACES)

    async def _end_when_idle(self, name: str) -> None:
        """At once, or with the answer that it is at work for."""
        session = self._sessions.get(name)
        if session is not None and session.idle_since is None:
            session.ends = True
        else:
            await self._end(name)

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


def _raised(answer: T | BaseException) -> T:
    if isinstance(answer, BaseException):
        raise answer
    return answer
