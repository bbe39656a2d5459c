"""Requests to vLLM's engine: of one token, and a session, which stays there. Lists come as the arrays that it made."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from vllm import SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from dual_rollout.sessions.request import Draw, Text
from dual_rollout.sessions.wire import CARRIED, SESSION_PREFIX

_ONCE_PREFIX = "dual-rollout-list-"  # of the ids of requests for one token; sessions have another
_UNLIKELY = -100.0  # the least that vLLM takes
_MAX_NAMED = 128  # vLLM's own cap on logprob_token_ids
_NOTHING: Mapping[str, list[int]] = {}
_NO_RANKS = np.zeros(1, np.int32)
_numbers = itertools.count()
ABORTED = "the engine aborted a request, as it does on /pause"


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


class Lists(NamedTuple):
    """One list: `(k,)` token ids and log-probabilities, the most likely first; rows of arrays that a step made."""

    token_ids: np.ndarray
    logprobs: np.ndarray


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
        self._request_id = f"{SESSION_PREFIX}{next(_numbers)}"
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

    async def go_on(
        self, engine: Any, token_ids: list[int], params: ListOf, lora: Any, carried: Mapping[str, list[int]] = _NOTHING
    ) -> Lists:
        """The list after these tokens more. The message brings the engine those of other sessions too, by its name."""
        self.begin_work(token_ids)
        sampling = params.sampling(RequestOutputKind.DELTA, list(carried.items()))
        self._inputs.put_nowait(StreamingInput(tokens_input(token_ids), sampling))
        if self._outputs is None:
            self._outputs = engine.generate(self._stream(), sampling, self._request_id, lora_request=lora)
        lists = _lists(await anext(self._outputs, None), params.k)
        self.end_work(token_ids, params, lists)
        return lists

    def begin_work(self, token_ids: list[int]) -> None:
        """These tokens more are on their way to the engine."""
        self.idle_since = None
        self.length += len(token_ids)

    def end_work(self, token_ids: list[int], params: ListOf, lists: Lists) -> None:
        """The list after them has come."""
        self._last = token_ids, params, lists
        self.idle_since = time.monotonic()

    async def end(self) -> None:
        """Free what it holds."""
        if self._outputs is not None:
            await self._outputs.aclose()

    async def _stream(self) -> AsyncIterator[StreamingInput]:
        while True:
            yield await self._inputs.get()


class ListsAsArrays(LogprobsProcessor):
    """vLLM's, without making an object of every listed token. Of a session it keeps the latest list alone."""

    def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
        self.logprobs = [logprobs_lists]


class EngineOutputs:
    """Takes our requests' lists out of what the engine answers, as the arrays that they are.

    Of the sessions in a step the first may bring the lists of all (`scheduler.py`). The lists of those that are
    `expected` need no work of vLLM's and go to who waits for them; other sessions get theirs back, in vLLM's form.

    Args:
        engine: of the API server, whose output processor is changed.

    Raises:
        AttributeError: it has not the parts that are changed here.
    """

    def __init__(self, engine: Any) -> None:
        processor = engine.output_processor
        self._add_request, self._process, self._states = (
            processor.add_request,
            processor.process_outputs,
            processor.request_states,
        )
        processor.external_req_ids, LogprobsProcessor._update_sample_logprobs  # noqa: B018  used, overridden elsewhere
        processor.add_request, processor.process_outputs = self._add, self._processed
        self._expected: dict[str, _Round] = {}
        self._rows: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())

    @contextlib.contextmanager
    def expected(self, request_ids: Sequence[str], k: int) -> Iterator[asyncio.Future[list[Lists | None]]]:
        """The lists of sessions that another brings their tokens, in order; None for one that the engine has ended."""
        made = _Round(request_ids, k)
        self._expected |= dict.fromkeys(request_ids, made)
        try:
            yield made.complete
        finally:
            for request_id in request_ids:
                self._expected.pop(request_id, None)

    def _add(self, request: Any, *args: Any, **kwargs: Any) -> None:
        begins = request.request_id not in self._states
        self._add_request(request, *args, **kwargs)
        if begins and request.request_id.startswith((_ONCE_PREFIX, SESSION_PREFIX)):
            self._states[request.request_id].logprobs_processor = ListsAsArrays.from_new_request(None, request)

    def _processed(self, outputs: Sequence[Any], timestamp: Any = None, stats: Any = None, **others: Any) -> Any:
        left = []
        for output in outputs:
            if not output.request_id.startswith(SESSION_PREFIX):
                left.append(output)
                continue
            row = self._row(output) if output.new_token_ids else None
            waiting = self._expected.pop(output.request_id, None)
            if waiting is not None:
                waiting.note(output.request_id, row)
            if waiting is None or row is None:
                output.new_logprobs = row and LogprobsLists(row[0][None], row[1][None], _NO_RANKS)
                left.append(output)
            elif stats is not None:
                stats.num_generation_tokens += 1
        return self._process(left, timestamp, stats, **others)

    def _row(self, output: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """The list of one session: the next of those that came with this one or an earlier one of the step."""
        if output.new_logprobs is not None:
            self._rows = zip(output.new_logprobs.logprob_token_ids, output.new_logprobs.logprobs, strict=True)
        return next(self._rows, None)


class _Round:
    """Lists that are awaited together.

    Attributes:
        complete: all of them, in order, once they are there.
    """

    def __init__(self, request_ids: Sequence[str], k: int) -> None:
        self._lists: dict[str, Lists | None] = dict.fromkeys(request_ids)
        self._left, self._k = len(request_ids), k
        self.complete: asyncio.Future[list[Lists | None]] = asyncio.get_running_loop().create_future()

    def note(self, request_id: str, row: tuple[np.ndarray, np.ndarray] | None) -> None:
        self._lists[request_id] = row and _without_sampled(*row, self._k)
        self._left -= 1
        if not self._left and not self.complete.done():
            self.complete.set_result(list(self._lists.values()))


def _once_id() -> str:
    return f"{_ONCE_PREFIX}{next(_numbers)}"


async def lists_once(engine: Any, token_ids: list[int], params: ListOf, lora: Any) -> Lists:
    """The list after a text that is not kept."""
    return _lists(await _once(engine, token_ids, params.sampling(RequestOutputKind.FINAL_ONLY), lora), params.k)


async def drawn_once(engine: Any, draw: Draw, temperature: float, lora: Any) -> tuple[int, np.ndarray]:
    """A token after a text, and the log-probabilities of those that are named."""

    async def part(names: list[int]) -> Any:
        sampling = SamplingParams(
            max_tokens=1,
            temperature=temperature,
            seed=draw.seed,
            logit_bias=dict.fromkeys(draw.excluded, _UNLIKELY) or None,
            logprob_token_ids=names or None,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        return await _once(engine, draw.token_ids, sampling, lora)

    parts = [draw.named[i : i + _MAX_NAMED] for i in range(0, len(draw.named), _MAX_NAMED)]
    outputs = await asyncio.gather(*map(part, parts or [[]]))
    if any(output is None or not output.outputs[0].token_ids for output in outputs):
        raise RuntimeError(ABORTED)
    named = [_lists(output, len(names)).logprobs for output, names in zip(outputs, parts, strict=False)]
    return outputs[0].outputs[0].token_ids[0], np.concatenate([np.empty(0, np.float32), *named])


async def _once(engine: Any, token_ids: list[int], sampling: SamplingParams, lora: Any) -> Any:
    stream = engine.generate(tokens_input(token_ids), sampling, _once_id(), lora_request=lora)
    async with contextlib.aclosing(stream):
        return await anext(stream, None)


def _lists(output: Any, k: int) -> Lists:
    """The list in an answer of the engine, without the token that was sampled, which comes first."""
    if output is None or not output.outputs[0].logprobs:
        raise RuntimeError(ABORTED)
    arrays = output.outputs[0].logprobs[-1]
    return _without_sampled(arrays.logprob_token_ids[0], arrays.logprobs[0], k)


def _without_sampled(token_ids: np.ndarray, logprobs: np.ndarray, k: int) -> Lists:
    return Lists(token_ids[1 : k + 1], logprobs[1 : k + 1])
