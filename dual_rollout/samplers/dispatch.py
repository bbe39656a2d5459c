"""From requests to sequences: each is encoded, and drawn by the sampler of its target."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dual_rollout.config import CoordinatorConfig, did_you_mean
from dual_rollout.decoding.call import CallSettings, OnToken
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.prompt_encoder import PromptEncoder
from dual_rollout.samplers.base import Sampler, Served
from dual_rollout.text import is_text
from dual_rollout.types import GenerationRequest


@dataclass(frozen=True, slots=True)
class Call:
    """The options of one call, checked.

    Attributes:
        config: with the temperature, the seed and the rule for α of this call.
        max_tokens: per sequence at most, where a request does not say otherwise.
        stop_token_ids: besides EOS.
        entropy: where the random streams of its sequences begin.
        with_diagnostics, on_token: as in `CallSettings`.
    """

    config: CoordinatorConfig
    max_tokens: int
    stop_token_ids: Collection[int]
    entropy: int
    with_diagnostics: bool = False
    on_token: OnToken | None = None


class Dispatcher:
    """Draws requests with the samplers of their targets, those of different targets side by side."""

    def __init__(self, samplers: Mapping[str | None, Sampler], prompts: PromptEncoder):
        self._samplers = samplers
        self._prompts = prompts

    def sampler_of(self, request: GenerationRequest) -> Sampler:
        """The sampler of a request's target.

        Raises:
            ValueError: there is no such target, or it cannot be asked so.
        """
        name, known = request.target, [name for name in self._samplers if name is not None]
        if name not in self._samplers:
            near = did_you_mean(name, known) if isinstance(name, str) else ""
            raise ValueError(f"unknown target {name!r}: it must be None or one of {', '.join(known)}{near}")
        self._samplers[name].check_request(request)
        return self._samplers[name]

    async def draw(
        self, requests: Iterable[GenerationRequest], call: Call, *, look_ahead: int
    ) -> AsyncGenerator[tuple[GenerationRequest, DecodingSequence]]:
        """Every request with its sequence, once that has come to its end. When they are not taken, no new ones begin.

        Args:
            look_ahead: requests whose targets' servers are checked before the first token is drawn.
        """
        begun: dict[DecodingSequence, GenerationRequest] = {}
        finished: asyncio.Queue[DecodingSequence | None] = asyncio.Queue()
        places = asyncio.Semaphore(call.config.concurrency)  # for finished sequences that wait to be taken

        async def hand_over(sequence: DecodingSequence) -> None:
            await places.acquire()
            finished.put_nowait(sequence)

        async def draw_all() -> None:
            routes = Routes(requests, look_ahead)
            try:
                while by_target := routes.look_ahead():
                    parts = [
                        await self._prepare(target, first, routes, call, begun) for target, first in by_target.items()
                    ]
                    for sequence in itertools.chain.from_iterable(part.bad for part in parts):
                        await hand_over(sequence)  # now: what follows the first requests may be long
                    await _draw_side_by_side([part for part in parts if part.sampler is not None], call, hand_over)
            finally:
                finished.put_nowait(None)

        task = asyncio.create_task(draw_all())
        try:
            while (sequence := await finished.get()) is not None:
                places.release()
                yield begun.pop(sequence), sequence
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _prepare(
        self,
        target: str | None,
        first: list[GenerationRequest],
        routes: Routes,
        call: Call,
        begun: dict[DecodingSequence, GenerationRequest],
    ) -> _Part:
        """Check the servers of a target with its first requests; what follows is encoded as places become free."""
        sampler = self.sampler_of(first[0])
        served = await sampler.served(call.config)
        text = any(is_text(request.prompt) or is_text(request.t_prompt or ()) for request in first)
        self._prompts.find_tokenizer(served.theta, needed=text)
        stop_ids = self._prompts.stop_ids(call.stop_token_ids, served.theta, ignore_eos=call.config.ignore_eos)

        def begin(request: GenerationRequest) -> DecodingSequence:
            sampler.check_request(request)
            sequence = self._sequence(request, served, call, stop_ids)
            begun[sequence] = request
            return sequence

        sequences = [begin(request) for request in first]
        good = [sequence for sequence in sequences if not sequence.done]
        bad = [sequence for sequence in sequences if sequence.done]
        if not good:  # nothing to try the servers with
            return _Part(None, (), bad, 0)
        rest = map(begin, routes.take(target))
        return _Part(await sampler.ready(good, call.config), itertools.chain(good, rest), bad, len(good))

    def _sequence(
        self, request: GenerationRequest, served: Served, call: Call, stop_ids: Collection[int]
    ) -> DecodingSequence:
        """A sequence with a random stream of its own; failed if its prompt is bad."""
        error, ids, ids_t = None, list[int](), list[int]()
        max_tokens = request.max_tokens or call.max_tokens
        try:
            if request.t_prompt is None:
                ids = ids_t = self._prompts.encode(request.prompt, max_tokens, {"π_θ": served.theta, "π_t": served.t})
            else:
                ids = self._prompts.encode(request.prompt, max_tokens, {"π_θ": served.theta})
                ids_t = self._prompts.encode(request.t_prompt, max_tokens, {"π_t": served.t})
        except ValueError as fault:
            error = fault
        key = (call.entropy if request.seed is None else request.seed % 2**64, request.index)
        sequence = DecodingSequence(ids, ids_t, max_tokens=max_tokens, stop_ids=stop_ids, key=key)
        if error is not None:
            sequence.fail(error)
        return sequence


@dataclass(frozen=True, slots=True)
class _Part:
    """The sequences of one target: `count` good ones and those that follow; the bad ones, which need no sampler."""

    sampler: Sampler | None
    sequences: Iterable[DecodingSequence]
    bad: list[DecodingSequence]
    count: int


async def _draw_side_by_side(
    parts: list[_Part], call: Call, hand_over: Callable[[DecodingSequence], Awaitable[None]]
) -> None:
    """Draw all parts to their end, each with its share of the places."""
    if not parts:
        return
    places = call.config.concurrency
    drawing = []
    for part, share in zip(parts, shares([part.count for part in parts], places), strict=True):
        assert part.sampler is not None
        config = replace(call.config, max_concurrency=share)
        settings = CallSettings(config, call.with_diagnostics, call.on_token, hand_over, call.on_token is not None)
        drawing.append(part.sampler.sample(part.sequences, settings))
    if len(drawing) <= places:
        await asyncio.gather(*drawing)
    else:
        for work in drawing:
            await work


class Routes:
    """The requests of an iterable of any length by their targets.

    A request is taken from the iterable when a sampler has a place for it. Those of other targets that come before it
    wait, `limit` at most: a sampler that would have to look further is told that there are no more, and goes on when
    the others have caught up.
    """

    def __init__(self, requests: Iterable[GenerationRequest], limit: int):
        self._requests = iter(requests)
        self._limit = limit
        self._waiting: dict[str | None, deque[GenerationRequest]] = {}

    def look_ahead(self) -> dict[str | None, list[GenerationRequest]]:
        """The next `limit` requests by target, which count as taken; empty at the end of the input."""
        for request in itertools.islice(self._requests, self._limit - self._count()):
            self._waiting.setdefault(request.target, deque()).append(request)
        found = {target: list(queue) for target, queue in self._waiting.items() if queue}
        self._waiting.clear()
        return found

    def take(self, target: str | None) -> Iterator[GenerationRequest]:
        """Further requests of one target."""
        while True:
            if queue := self._waiting.get(target):
                yield queue.popleft()
                continue
            request = next(self._requests, None) if self._count() < self._limit else None
            if request is None:
                return
            self._waiting.setdefault(request.target, deque()).append(request)

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))


def shares(counts: list[int], places: int) -> list[int]:
    """Of `places` sequences in flight, those of each target: at least one, else in proportion to its requests."""
    found = [-(-places * count // sum(counts)) for count in counts]
    while sum(found) > places and max(found) > 1:
        found[found.index(max(found))] -= 1
    return found
