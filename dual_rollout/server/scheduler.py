"""Continuous batching: one worker thread that owns the model and runs one step after another.

A step takes the sequences that are decoding, the prompts being prefilled and as many waiting ones as fit,
runs one forward over all their new tokens, and samples. Prompts that are a prefix of another prompt started
in the same step cost nothing: their logits are rows of the same forward.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from dual_rollout.server.model_runner import Chunk, ModelRunner
from dual_rollout.server.prefix_cache import KVSequence, PrefixCache
from dual_rollout.server.protocol import SamplingParams
from dual_rollout.server.sampler import TokenLogprobs, sample, top_logprobs

logger = logging.getLogger("dual_rollout.server")

MAX_TOKENS_PER_STEP = 512
# vLLM caches whole blocks of this many tokens. Requests for prompt log-probabilities see the same granularity
# here, because they get rows for the uncached tokens only and would otherwise always miss the first one.
PROMPT_LOGPROBS_BLOCK = 16

T = TypeVar("T")


class ServerClosing(Exception):
    """The server is shutting down and takes no more requests."""


@dataclass(eq=False)
class Sequence:
    """One sequence being generated. ``num_stored`` rows of ``kv`` match its tokens."""

    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    adapter: str | None
    rng: random.Random
    group: Group
    kv: KVSequence | None = None
    num_stored: int = 0
    num_computed: int = 0
    cached_tokens: int | None = None
    reserved_bytes: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_rows: list[TokenLogprobs] = field(default_factory=list)
    prompt_scores: list[np.ndarray] = field(default_factory=list)
    prompt_scores_missed: bool = False
    finish_reason: str | None = None

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def needs_prompt_rows(self) -> bool:
        return self.params.wants_prompt_rows and len(self.tokens) == self.num_prompt


@dataclass(eq=False)
class Group:
    """The sequences of one HTTP request: answered together, failed together."""

    sequences: list[Sequence]
    future: Future[list[Sequence]] = field(default_factory=Future)


@dataclass
class Metrics:
    """Counters since start, in tokens unless said otherwise."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    steps: int = 0
    computed_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0})


@dataclass(eq=False)
class _Work:
    """One sequence's chunk in the step being planned. ``positions`` are those whose logits are wanted."""

    sequence: Sequence
    start: int
    end: int
    positions: set[int]
    followers: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Runs the model in its own thread. ``submit`` and ``between_steps`` may be called from any thread."""

    def __init__(
        self,
        runner: ModelRunner,
        cache: PrefixCache,
        *,
        max_num_seqs: int,
        processed_logprobs: bool,
        eos_ids: frozenset[int],
        seed: int,
    ) -> None:
        self.runner = runner
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.processed_logprobs = processed_logprobs
        self.eos_ids = eos_ids
        self.metrics = Metrics()
        self._seeds = random.Random(seed)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._last_adapter: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check_open(self) -> None:
        """Raise ServerClosing once it has begun to shut down."""
        if self._closing:
            raise ServerClosing("the server is shutting down")

    def submit(self, prompts: list[list[int]], params: SamplingParams, adapter: str | None) -> Group:
        """Queue a sequence per prompt; the group's future gets them when all have finished.

        Raises:
            ServerClosing: it has begun to shut down.
        """
        self.check_open()
        group = Group([])
        # A running future cannot be cancelled by the waiting side, which would race with set_result.
        group.future.set_running_or_notify_cancel()
        for prompt in prompts:
            rng = random.Random(self._seeds.random() if params.seed is None else params.seed)
            group.sequences.append(Sequence(list(prompt), len(prompt), params, adapter, rng, group))
        self._post(lambda: self._waiting.extend(group.sequences))
        return group

    def abort(self, group: Group) -> None:
        """Drop a group whose client has gone."""
        self._post(lambda: self._fail(group, ServerClosing("the client went away"), "abort"))

    def between_steps(self, action: Callable[[], T]) -> Future[T]:
        """Run ``action`` in the model's thread while no step is in progress."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

        self._post(run)
        return future

    def close(self, timeout: float) -> bool:
        """Fail what is unfinished and stop the thread; False when a step outlasts ``timeout`` seconds."""
        self._post(self._shut_down)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def recompute_running(self) -> None:
        """Make running sequences compute their rows anew: the weights have changed. Between steps only."""
        for sequence in self._running:
            self._release(sequence)
            sequence.num_stored = sequence.num_computed = 0
            if sequence.needs_prompt_rows:
                sequence.prompt_rows, sequence.prompt_scores = [], []
        self._waiting = self._running + self._waiting
        self._running = []

    def move_adapter(self, old: str, new: str) -> None:
        """Go on with ``new`` where ``old`` was in use. Between steps only."""
        self.recompute_running()
        for sequence in self._waiting:
            if sequence.adapter == old:
                sequence.adapter = new
        self.cache.clear(old, every_adapter=False)

    def fail_adapter(self, adapter: str, error: Exception) -> None:
        """Fail the requests of an adapter that is going away. Between steps only."""
        for group in {s.group for s in self._running + self._waiting if s.adapter == adapter}:
            self._fail(group, error, "abort")
        self.cache.clear(adapter, every_adapter=False)

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.put(action)

    def _loop(self) -> None:
        while not self._closing:
            idle = not self._running and not self._waiting
            try:
                self._inbox.get(block=idle)()
                continue
            except queue.Empty:
                pass
            self._step()

    def _shut_down(self) -> None:
        self._closing = True
        for group in {sequence.group for sequence in self._running + self._waiting}:
            self._fail(group, ServerClosing("the server is shutting down"), "abort")

    def _step(self) -> None:
        works = self._plan()
        try:
            logits = self.runner.forward(
                [
                    Chunk(
                        work.sequence.kv,  # type: ignore[arg-type]
                        work.start,
                        work.sequence.tokens[work.start : work.end],
                        [position - work.start for position in sorted(work.positions)],
                    )
                    for work in works
                ],
                works[0].sequence.adapter,
            )
            self._collect(works, logits)
        except Exception as error:
            logger.exception("a step failed; its requests get an error")
            for group in {sequence.group for work in works for sequence in (work.sequence, *work.followers)}:
                self._fail(group, error, "abort")

    def _plan(self) -> list[_Work]:
        """The chunks of the next step: running sequences first, then waiting ones while they fit."""
        adapter = self._next_adapter()
        budget = MAX_TOKENS_PER_STEP
        works: list[_Work] = []
        appending: set[int] = set()
        for sequence in self._running:
            if sequence.adapter == adapter and budget > 0:
                works.append(self._work(sequence, budget, appending))
                budget -= works[-1].end - works[-1].start
        room = self.max_num_seqs - len(self._running)
        candidates = [sequence for sequence in self._waiting if sequence.adapter == adapter][: max(room, 0)]
        # Longest first, so that prefixes find the prompt that covers them.
        for sequence in sorted(candidates, key=lambda candidate: -len(candidate.tokens)):
            leader = _leader(works, sequence)
            if leader is not None and self._reserve(sequence, shares_rows=True):
                leader.followers.append(sequence)
                leader.positions.add(len(sequence.tokens) - 1)
                self._count_cached(sequence, len(sequence.tokens) - 1)
            elif budget > 0 and self._admit(sequence):
                works.append(self._work(sequence, budget, appending))
                budget -= works[-1].end - works[-1].start
                self._running.append(sequence)
            else:
                break
            self._waiting.remove(sequence)
        return works

    def _next_adapter(self) -> str | None:
        """A step serves one adapter: take turns among those with work."""
        adapters = list(dict.fromkeys(sequence.adapter for sequence in self._running + self._waiting))
        others = [adapter for adapter in adapters if adapter != self._last_adapter]
        self._last_adapter = others[-1] if others else adapters[0]
        return self._last_adapter

    def _reserve(self, sequence: Sequence, shares_rows: bool) -> bool:
        """Set aside what the finished sequence will hold; False when that does not fit now."""
        final = min(sequence.num_prompt + sequence.params.max_tokens - 1, self.cache.max_model_len)
        needs_none = shares_rows and final == len(sequence.tokens)
        sequence.reserved_bytes = 0 if needs_none else self.cache.bytes_for(final)
        used = sum(running.reserved_bytes for running in self._running)
        return not self._running or used + sequence.reserved_bytes <= self.cache.budget_bytes

    def _admit(self, sequence: Sequence) -> bool:
        """Find or make the rows that a waiting sequence starts from."""
        if not self._reserve(sequence, shares_rows=False):
            return False
        length = len(sequence.tokens)
        if sequence.params.skip_reading_prefix_cache:
            sequence.kv, sequence.num_stored = self.cache.new(sequence.adapter, length), 0
        else:
            token_ids = np.array(sequence.tokens, dtype=np.int32)
            sequence.kv, sequence.num_stored = self.cache.acquire(token_ids, sequence.adapter)
        sequence.num_computed = min(sequence.num_stored, length - 1)
        if sequence.needs_prompt_rows:
            sequence.num_computed -= sequence.num_computed % PROMPT_LOGPROBS_BLOCK
            sequence.prompt_scores_missed = sequence.num_computed > (sequence.params.prompt_logprob_start or 0)
        self._count_cached(sequence, sequence.num_computed)
        return True

    def _count_cached(self, sequence: Sequence, num_cached: int) -> None:
        if not sequence.params.skip_reading_prefix_cache:
            self.metrics.prefix_cache_queries += len(sequence.tokens)
            self.metrics.prefix_cache_hits += num_cached
        if sequence.cached_tokens is None:
            sequence.cached_tokens = num_cached
            self.metrics.prompt_tokens += sequence.num_prompt

    def _work(self, sequence: Sequence, budget: int, appending: set[int]) -> _Work:
        """The next chunk of a sequence, with room for its rows in a buffer that it alone appends to."""
        assert sequence.kv is not None
        start = sequence.num_computed
        end = min(len(sequence.tokens), start + budget)
        if end > sequence.num_stored:
            if sequence.kv.length != sequence.num_stored or id(sequence.kv) in appending:
                shared = sequence.kv
                sequence.kv = self.cache.fork(shared, sequence.num_stored, capacity=end)
                self.cache.release(shared)
            self.cache.grow(sequence.kv, end)
            appending.add(id(sequence.kv))
        positions = set(_prompt_positions(sequence, start, end))
        if end == len(sequence.tokens):
            positions.add(end - 1)
        return _Work(sequence, start, end, positions)

    def _collect(self, works: list[_Work], logits: Any) -> None:
        """Store what the forward computed and sample where a sequence is up to date."""
        self.metrics.steps += 1
        drawing: list[tuple[Sequence, int]] = []
        first_row = 0
        for work in works:
            sequence = work.sequence
            row_of = {position: first_row + row for row, position in enumerate(sorted(work.positions))}
            first_row += len(row_of)
            self.metrics.computed_tokens += work.end - work.start
            assert sequence.kv is not None
            self.cache.commit(sequence.kv, work.start, sequence.tokens[work.start : work.end])
            sequence.num_computed = work.end
            sequence.num_stored = max(sequence.num_stored, work.end)
            _collect_prompt_rows(sequence, work, row_of, logits)
            if work.end == len(sequence.tokens):
                drawing.append((sequence, row_of[work.end - 1]))
            for follower in work.followers:
                follower.kv = self.cache.share(sequence.kv)
                follower.num_stored = follower.num_computed = len(follower.tokens)
                self._running.append(follower)
                drawing.append((follower, row_of[len(follower.tokens) - 1]))
        if drawing:
            rows = [row for _, row in drawing]
            wanted = logits if rows == list(range(len(logits))) else logits[rows]
            self._draw([sequence for sequence, _ in drawing], wanted)

    def _draw(self, sequences: list[Sequence], logits_BV: Any) -> None:
        params, rngs = [sequence.params for sequence in sequences], [sequence.rng for sequence in sequences]
        token_ids, logprobs = sample(logits_BV, params, rngs, processed=self.processed_logprobs)
        self.metrics.generation_tokens += len(token_ids)
        for sequence, token_id, listed in zip(sequences, token_ids, logprobs, strict=True):
            sequence.tokens.append(token_id)
            if listed is not None:
                sequence.logprobs.append(listed)
            self._check_stop(sequence, token_id)
        done = {sequence.group for sequence in sequences if sequence.finish_reason is not None}
        for group in done:
            if all(sequence.finish_reason is not None for sequence in group.sequences):
                group.future.set_result(group.sequences)

    def _check_stop(self, sequence: Sequence, token_id: int) -> None:
        params = sequence.params
        if token_id in params.stop_token_ids or (token_id in self.eos_ids and not params.ignore_eos):
            sequence.finish_reason = "stop"
        elif (
            len(sequence.tokens) >= self.cache.max_model_len
            or len(sequence.tokens) - sequence.num_prompt >= params.max_tokens
        ):
            sequence.finish_reason = "length"
        else:
            return
        self.metrics.finished[sequence.finish_reason] += 1
        self._running.remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.kv is not None:
            self.cache.release(sequence.kv)
            sequence.kv = None

    def _fail(self, group: Group, error: Exception, reason: str) -> None:
        self._running = [sequence for sequence in self._running if sequence.group is not group]
        self._waiting = [sequence for sequence in self._waiting if sequence.group is not group]
        for sequence in group.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = reason
                self.metrics.finished[reason] += 1
            self._release(sequence)
        if not group.future.done():
            group.future.set_exception(error)


def _leader(works: list[_Work], sequence: Sequence) -> _Work | None:
    """The chunk of this step that computes the last token of ``sequence`` on exactly its tokens, if any."""
    if sequence.params.skip_reading_prefix_cache or sequence.needs_prompt_rows:
        return None
    last = len(sequence.tokens) - 1
    for work in works:
        if (
            work.start <= last < work.end
            and work.sequence.tokens[last] == sequence.tokens[last]
            and work.sequence.tokens[: last + 1] == sequence.tokens
        ):
            return work
    return None


def _prompt_positions(sequence: Sequence, start: int, end: int) -> range:
    """The positions of a chunk whose logits score the next prompt token."""
    if not sequence.needs_prompt_rows:
        return range(0)
    first = start
    if sequence.params.prompt_logprobs is None:
        first = max(start, sequence.params.prompt_logprob_start or 0)
    return range(first, min(end, sequence.num_prompt - 1))


def _collect_prompt_rows(sequence: Sequence, work: _Work, row_of: dict[int, int], logits: Any) -> None:
    positions = _prompt_positions(sequence, work.start, work.end)
    if not positions:
        return
    params = sequence.params
    rows_RV = logits[[row_of[position] for position in positions]]
    if params.prompt_logprobs is not None:
        count = rows_RV.shape[1] if params.prompt_logprobs == -1 else params.prompt_logprobs
        next_ids = [sequence.tokens[position + 1] for position in positions]
        sequence.prompt_rows.extend(top_logprobs(rows_RV, next_ids, [count] * len(next_ids)))
    if params.prompt_logprob_token_ids is not None and not sequence.prompt_scores_missed:
        start = params.prompt_logprob_start or 0
        first, end = (max(0, position - start) for position in (positions.start, positions.stop))
        ids_RN = _padded(params.prompt_logprob_token_ids, first, end)
        scored_RV = rows_RV[len(positions) - len(ids_RN) :]
        scores_RN = scored_RV.gather(-1, ids_RN.clamp_min(0)) - scored_RV.logsumexp(-1, keepdim=True)
        sequence.prompt_scores.append(scores_RN.masked_fill(ids_RN < 0, -math.inf).numpy())


def _padded(rows: tuple[tuple[int, ...], ...], first: int, end: int) -> torch.Tensor:
    """`rows[first:end]`, each as long as the longest of all, with -1 where it is shorter."""
    width = max(map(len, rows))
    padded = [[*row, *[-1] * (width - len(row))] for row in rows[first:end]]
    return torch.tensor(padded, dtype=torch.int64).reshape(-1, width)
