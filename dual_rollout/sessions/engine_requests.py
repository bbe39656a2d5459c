"""Requests to vLLM's engine: of one token, and a session, which stays there. Lists come as the arrays that it made."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.logprobs import LogprobsProcessor

from dual_rollout.sessions.request import Draw, Text
from dual_rollout.sessions.wire import CARRIED

_PREFIX = "dual-rollout-list-"  # of our requests' ids
_UNLIKELY = -100.0  # the least that vLLM takes
_MAX_NAMED = 128  # vLLM's own cap on logprob_token_ids
_ABORTED = "the engine aborted a request, as it does on /pause"


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
        raise RuntimeError(_ABORTED)
    named = [_lists(output, len(names)).logprobs for output, names in zip(outputs, parts, strict=False)]
    return outputs[0].outputs[0].token_ids[0], np.concatenate([np.empty(0, np.float32), *named])


async def _once(engine: Any, token_ids: list[int], sampling: SamplingParams, lora: Any) -> Any:
    stream = engine.generate(tokens_input(token_ids), sampling, _request_id(), lora_request=lora)
    async with contextlib.aclosing(stream):
        return await anext(stream, None)


def _lists(output: Any, k: int) -> Lists:
    """The list in an answer of the engine, without the token that was sampled, which comes first."""
    if output is None or not output.outputs[0].logprobs:
        raise RuntimeError(_ABORTED)
    arrays = output.outputs[0].logprobs[-1]
    return Lists(arrays.logprob_token_ids[0, 1 : k + 1].copy(), arrays.logprobs[0, 1 : k + 1].copy())
