"""Lockstep decoding: one position per step from both servers, all sequences of a step in one request per server.

This is the reference that defines the law; every other decoding mode must give the same one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.sequence import NOT_KNOWN_YET, DecodingSequence
from dual_rollout.engines.base import Engine
from dual_rollout.exceptions import DualRolloutError, EngineProtocolError, EngineRejectedError
from dual_rollout.functional.candidates import Candidates, merge_lists
from dual_rollout.functional.diagnostics import compute_diagnostics
from dual_rollout.functional.law import Law, position_law
from dual_rollout.functional.sampling import sample_rows
from dual_rollout.types import NO_TOKEN, TopK

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")
OnToken = Callable[[DecodingSequence], None]

_MAX_TAIL_DRAWS = 1000


@dataclass(slots=True)
class DecodingStats:
    """Counts over a coordinator's life.

    Attributes:
        steps: positions asked from both servers (each for many sequences at once).
        tokens: tokens sampled.
        tail_tokens: of those, tokens outside both lists.
        tail_draws: draws from π_θ spent on tail tokens.
        scored_tokens: log-probabilities fetched afterwards because a list lacked the sampled token.
        approximate_tail_weights: of the tail tokens, those whose weight uses floored candidates because the server
            does not report named tokens.
        disjoint_positions: positions where the lists shared no token; sampled from the policy there.
    """

    steps: int = 0
    tokens: int = 0
    tail_tokens: int = 0
    tail_draws: int = 0
    scored_tokens: int = 0
    approximate_tail_weights: int = 0
    disjoint_positions: int = 0


async def decode_lockstep(
    sequences: Iterable[DecodingSequence],
    theta: Engine,
    t: Engine,
    config: CoordinatorConfig,
    stats: DecodingStats,
    *,
    with_diagnostics: bool = False,
    on_token: OnToken | None = None,
) -> None:
    """Decode all sequences to their end, in place.

    At most `config.max_concurrency` are in flight; a finished one is replaced at once. A fault of one prompt ends
    that sequence only, with its `failure` set.
    """
    lockstep = _Lockstep(theta, t, config, stats, with_diagnostics, on_token)
    waiting, active = deque(sequences), list[DecodingSequence]()
    settling: list[asyncio.Task[None]] = []
    while waiting or active:
        while waiting and len(active) < config.max_concurrency:
            active.append(waiting.popleft())
        await lockstep.advance(active)
        settling += [asyncio.create_task(lockstep.settle(s)) for s in active if s.done]
        active = [s for s in active if not s.done]
    await asyncio.gather(*settling)


class _Lockstep:
    def __init__(
        self,
        theta: Engine,
        t: Engine,
        config: CoordinatorConfig,
        stats: DecodingStats,
        with_diagnostics: bool,
        on_token: OnToken | None,
    ):
        self._theta, self._t = theta, t
        self._config = config
        self._stats = stats
        self._with_diagnostics = with_diagnostics
        self._on_token = on_token

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """Give every sequence its next token, or its error."""
        try:
            candidates, law = await self._next_law(sequences)
        except EngineRejectedError as error:
            if len(sequences) == 1:
                sequences[0].fail(error)
                return
            # One bad prompt makes a server refuse the whole list: find it, so that the others go on.
            middle = len(sequences) // 2
            await self.advance(sequences[:middle])
            await self.advance(sequences[middle:])
            return
        except DualRolloutError as error:
            for sequence in sequences:
                sequence.fail(error)
            return
        uniforms = np.array([sequence.rng.random() for sequence in sequences])
        columns = sample_rows(np.exp(law.log_q), uniforms)
        tail = await self._draw_tails(sequences, candidates, columns) if candidates.has_tail else {}
        self._record(sequences, candidates, law, columns, tail)

    async def settle(self, sequence: DecodingSequence) -> None:
        """Fetch what no list held, and complete the record: log w = log π_θ − log q*."""
        try:
            await asyncio.gather(
                self._score(self._theta, sequence, sequence.context_theta, sequence.logp_theta, sequence.top_theta),
                self._score(self._t, sequence, sequence.context_t, sequence.logp_t, sequence.top_t),
            )
        except DualRolloutError as error:
            sequence.fail(error)
        for i, log_weight in enumerate(sequence.log_weight):
            if math.isnan(log_weight):
                sequence.log_weight[i] = sequence.logp_theta[i] - sequence.log_q[i]
            else:  # a tail token: its weight is known, its own share of the tail follows from log π_θ
                sequence.log_q[i] = sequence.logp_theta[i] - log_weight

    async def _next_law(self, sequences: list[DecodingSequence]) -> tuple[Candidates, Law]:
        config = self._config
        contexts_theta = [sequence.context_theta for sequence in sequences]
        contexts_t = [sequence.context_t for sequence in sequences]
        top_theta, top_t = await _both(
            self._theta.next_top_k(contexts_theta, config.top_k, config.temperature),
            self._t.next_top_k(contexts_t, config.top_k, config.temperature),
        )
        candidates = merge_lists(top_theta, top_t, config.support)
        if config.missing == "exact":
            rows = range(len(sequences))
            missing_theta = [candidates.missing(row, candidates.exact_theta) for row in rows]
            missing_t = [candidates.missing(row, candidates.exact_t) for row in rows]
            top_theta, top_t = await _both(
                self._completed(self._theta, contexts_theta, top_theta, missing_theta),
                self._completed(self._t, contexts_t, top_t, missing_t),
            )
            candidates = merge_lists(top_theta, top_t, config.support)
        law = position_law(
            candidates,
            method=config.alpha_method,
            fixed_alpha=config.fixed_alpha,
            alpha_min=config.alpha_min,
            alpha_max=config.alpha_max,
        )
        self._stats.steps += 1
        self._stats.disjoint_positions += int(law.disjoint.sum())
        return candidates, law

    async def _completed(self, engine: Engine, contexts: list[list[int]], top: TopK, missing: list[list[int]]) -> TopK:
        """The list with the named tokens added."""
        width = max(map(len, missing))
        extra_ids = np.full((len(contexts), width), NO_TOKEN, dtype=np.int64)
        extra = np.full((len(contexts), width), -np.inf)
        rows = [row for row, ids in enumerate(missing) if ids]
        values = await engine.named_logprobs(
            [contexts[row] for row in rows], [missing[row] for row in rows], self._config.temperature
        )
        for row, logprobs in zip(rows, values, strict=True):
            extra_ids[row, : len(logprobs)] = missing[row]
            extra[row, : len(logprobs)] = logprobs
        return TopK(np.hstack([top.token_ids, extra_ids]), np.hstack([top.logprobs, extra]))

    async def _draw_tails(
        self, sequences: list[DecodingSequence], candidates: Candidates, columns: np.ndarray
    ) -> dict[int, tuple[int, float]]:
        """Token and log of π_θ's mass outside S, for each row whose sampled column is the tail.

        A row where this fails is missing from the result, and its sequence marked.
        """
        rows = np.flatnonzero(columns == candidates.token_ids.shape[1] - 1).tolist()

        async def draw(row: int) -> tuple[int, float]:
            return await _both(
                self._draw_tail(sequences[row], candidates.token_ids[row]),
                self._tail_mass(sequences[row], candidates, row),
            )

        results = await asyncio.gather(*map(draw, rows), return_exceptions=True)
        drawn = {}
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, DualRolloutError):
                sequences[row].fail(result)
            elif isinstance(result, BaseException):
                raise result
            else:
                drawn[row] = result
        return drawn

    async def _draw_tail(self, sequence: DecodingSequence, candidate_ids: np.ndarray) -> int:
        """y ~ π_θ given y outside S, by rejection; the server's exclusion only makes the first draw succeed."""
        excluded = candidate_ids[candidate_ids != NO_TOKEN].tolist()
        inside = set(excluded)
        self._stats.tail_tokens += 1
        for _ in range(_MAX_TAIL_DRAWS):
            self._stats.tail_draws += 1
            seed = int(sequence.rng.integers(2**31))
            token = await self._theta.draw_excluding(sequence.context_theta, excluded, self._config.temperature, seed)
            if token not in inside:
                return token
        raise EngineProtocolError(
            f"{_MAX_TAIL_DRAWS} draws gave no token outside the candidates; the server seems to ignore logit_bias. "
            'Use support="union" with it.',
            url=self._theta.url,
        )

    async def _tail_mass(self, sequence: DecodingSequence, candidates: Candidates, row: int) -> float:
        """log of π_θ's exact mass outside S. The law was built with floors in S; the weight must not be."""
        missing = candidates.missing(row, candidates.exact_theta)
        if not missing:
            return float(candidates.logp_theta[row, -1])
        try:
            (logprobs,) = await self._theta.named_logprobs(
                [sequence.context_theta], [missing], self._config.temperature
            )
        except (EngineProtocolError, EngineRejectedError) as error:
            if not self._stats.approximate_tail_weights:
                logger.warning("tail weights are approximate (floors instead of exact candidates): %s", error)
            self._stats.approximate_tail_weights += 1
            return float(candidates.logp_theta[row, -1])
        mass = 1.0 - candidates.coverage_theta[row] - np.exp(logprobs).sum()
        # A drawn token shows that there is mass; the lists' float32 rounding may hide it.
        return float(np.log(max(mass, np.finfo(np.float32).eps)))

    def _record(
        self,
        sequences: list[DecodingSequence],
        candidates: Candidates,
        law: Law,
        columns: np.ndarray,
        tail: dict[int, tuple[int, float]],
    ) -> None:
        rows = np.arange(len(sequences))
        fields = (
            candidates.token_ids[rows, columns],
            law.alpha,
            law.log_q[rows, columns],
            candidates.exact_theta[rows, columns],
            candidates.exact_t[rows, columns],
            np.nanmax(candidates.exact_theta, axis=1),
            np.nanmax(candidates.exact_t, axis=1),
        )
        diagnostics = self._diagnostics(candidates, law)
        for row, values in enumerate(zip(*(field.tolist() for field in fields), strict=True)):
            sequence = sequences[row]
            if sequence.done:  # its tail draw failed
                continue
            token, alpha, log_q, logp_theta, logp_t, top_theta, top_t = values
            log_weight = NOT_KNOWN_YET
            if row in tail:
                token, log_mass = tail[row]
                log_q, log_weight = NOT_KNOWN_YET, log_mass - log_q
            sequence.append(
                token,
                alpha=alpha,
                log_q=log_q,
                logp_theta=logp_theta,
                logp_t=logp_t,
                log_weight=log_weight,
                top_theta=top_theta,
                top_t=top_t,
                diagnostics={name: column[row] for name, column in diagnostics.items()},
            )
            self._stats.tokens += 1
            if self._on_token is not None:
                self._on_token(sequence)

    def _diagnostics(self, candidates: Candidates, law: Law) -> dict[str, list[float]]:
        if not self._with_diagnostics:
            return {}
        rows = compute_diagnostics(
            np.exp(candidates.logp_theta),
            np.exp(candidates.logp_t),
            np.exp(law.log_q),
            law.alpha,
            coverage_theta=candidates.coverage_theta,
            coverage_t=candidates.coverage_t,
        )
        return {name: np.asarray(row).tolist() for name, row in rows.items() if name != "alpha"}

    async def _score(
        self,
        engine: Engine,
        sequence: DecodingSequence,
        context: list[int],
        logprobs: list[float],
        tops: list[float],
    ) -> None:
        """Replace NaN in `logprobs` by exact values, with one request for the whole sequence.

        Servers score a text at temperature 1. The most likely token of each position was listed at the temperature
        in use, which fixes the normaliser: log p_T(y) = (log p(y) − log p(top)) / T + log p_T(top).
        """
        unknown = [i for i, value in enumerate(logprobs) if math.isnan(value)]
        if not unknown:
            return
        first = len(context) - len(logprobs)
        last = first + unknown[-1] + 1
        own, top = await engine.score(context[:last], first)
        for i in unknown:
            logprobs[i] = (own[i] - top[i]) / self._config.temperature + tops[i]
        self._stats.scored_tokens += len(unknown)


async def _both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    """Await both, and only then raise what failed, so that no request is left behind unwatched."""
    a, b = await asyncio.gather(first, second, return_exceptions=True)
    for result in (a, b):
        if isinstance(result, BaseException):
            raise result
    return a, b  # type: ignore[return-value]
