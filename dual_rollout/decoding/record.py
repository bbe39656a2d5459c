"""From laws to recorded tokens: what every decoding mode does with a position once both lists are there."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.lists import Lists
from dual_rollout.decoding.outage import patiently, until_back
from dual_rollout.decoding.sequence import NOT_KNOWN_YET, DecodingSequence
from dual_rollout.decoding.weights import PolicyWeights
from dual_rollout.engines.base import Context, Engine
from dual_rollout.exceptions import DualRolloutError, EngineError, EngineProtocolError
from dual_rollout.functional.candidates import ROUNDING, Candidates, merge_lists
from dual_rollout.functional.diagnostics import log_diagnostics
from dual_rollout.functional.law import Law, position_law
from dual_rollout.types import NO_TOKEN, TopK

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")
OnToken = Callable[[DecodingSequence], None]
Name = Callable[[list[list[int]]], Awaitable[list[np.ndarray]]]
"""Log-probabilities of named tokens: for each row those of its list of ids, which may be empty."""

_MAX_TAIL_DRAWS = 1000
_NAMED_COST = 32  # tokens of a text that cost as much as a request, which computes part of a block of the cache again


@dataclass(slots=True)
class DecodingStats:
    """Counts over a coordinator's life.

    Attributes:
        positions: laws built; in block decoding more than tokens, since a rejection wastes what follows it.
        listed_tokens, listed_mass: tokens of all lists that laws were built from, and their mass; two lists a position.
        received_tokens: tokens of all lists that came, with those that `top_k: auto` cut off or asked for again.
        repeated_lists: lists that `top_k: auto` asked for again, because the first did not hold enough mass.
        tokens: tokens sampled.
        draft_tokens, accepted_tokens: tokens drafted from π_θ, and those of them that q* accepted.
        tail_tokens: tokens outside both lists.
        tail_draws: draws from π_θ spent on tail tokens.
        scored_tokens: log-probabilities fetched afterwards because a list lacked the sampled token.
        approximate_tail_weights: tail tokens whose weight uses floored candidates, because the server does not report
            named tokens.
        policy_tokens: tokens drawn from π_θ alone, because their prompt has no target or π_t's server was gone.
        lost_target_tokens: those of them for which π_t's server was gone.
        disjoint_positions: positions where complete lists shared no token; sampled from the policy there.
    """

    positions: int = 0
    listed_tokens: int = 0
    listed_mass: float = 0.0
    received_tokens: int = 0
    repeated_lists: int = 0
    tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    tail_tokens: int = 0
    tail_draws: int = 0
    scored_tokens: int = 0
    approximate_tail_weights: int = 0
    policy_tokens: int = 0
    lost_target_tokens: int = 0
    disjoint_positions: int = 0

    @property
    def top_k_mean(self) -> float:
        """Mean length of the lists that laws were built from; 0 before the first."""
        return self.listed_tokens / (2 * self.positions) if self.positions else 0.0

    @property
    def top_k_mass_mean(self) -> float:
        """Mean mass of these lists; 0 before the first."""
        return self.listed_mass / (2 * self.positions) if self.positions else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 without drafts."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0


@dataclass(frozen=True, slots=True)
class Positions:
    """R positions.

    Attributes:
        candidates, law: S and q* of each.
        top_theta, top_t: `(R,)` log-probability of the most likely token, nats.
        diagnostics: lists of R floats by name.
    """

    candidates: Candidates
    law: Law
    top_theta: np.ndarray
    top_t: np.ndarray
    diagnostics: dict[str, list[float]]


class Recorder:
    """Builds laws from lists, completes sampled columns to tokens, and keeps the record exact."""

    def __init__(
        self,
        theta: Engine,
        t: Engine,
        config: CoordinatorConfig,
        stats: DecodingStats,
        *,
        with_diagnostics: bool = False,
        on_token: OnToken | None = None,
        weights: PolicyWeights | None = None,
    ):
        self.theta, self.t = theta, t
        self.lists_theta, self.lists_t = Lists(theta, config, stats), Lists(t, config, stats)
        self.config = config
        self.stats = stats
        self.with_diagnostics = with_diagnostics
        self.on_token = on_token
        self.weights = weights or PolicyWeights()

    async def positions(self, top_theta: TopK, top_t: TopK, name_theta: Name, name_t: Name) -> Positions:
        """Candidates, α and q* of all rows at once; with missing="exact" what a list lacks is asked for by name."""
        candidates = merge_lists(top_theta, top_t, self.config.support)
        if self.config.missing == "exact":
            rows = range(len(candidates.token_ids))
            top_theta, top_t = await both(
                _completed(top_theta, [candidates.missing(row, candidates.exact_theta) for row in rows], name_theta),
                _completed(top_t, [candidates.missing(row, candidates.exact_t) for row in rows], name_t),
            )
            candidates = merge_lists(top_theta, top_t, self.config.support)
        law = position_law(
            candidates,
            method=self.config.alpha_method,
            fixed_alpha=self.config.fixed_alpha,
            kl_budget=self.config.kl_budget,
            alpha_min=self.config.alpha_min,
            alpha_max=self.config.alpha_max,
        )
        self._count(candidates)
        return Positions(
            candidates,
            law,
            top_theta.logprobs.max(axis=1),
            top_t.logprobs.max(axis=1),
            self._diagnostics(candidates, law),
        )

    def _count(self, candidates: Candidates) -> None:
        self.stats.positions += len(candidates.token_ids)
        self.stats.listed_tokens += int(
            np.isfinite(candidates.exact_theta).sum() + np.isfinite(candidates.exact_t).sum()
        )
        self.stats.listed_mass += float(candidates.coverage_theta.sum() + candidates.coverage_t.sum())

    async def record(
        self,
        sequences: Sequence[DecodingSequence],
        rows: np.ndarray,
        columns: np.ndarray,
        positions: Positions,
        drafted: np.ndarray | None = None,
    ) -> None:
        """Append to `sequences[i]` the token in column `columns[i]` of row `rows[i]`.

        A sequence may occur several times, its tokens in order; what comes after its end is dropped. The tail is the
        token `drafted[i]`; where that is `NO_TOKEN`, it may only be a sequence's last column, and is completed to a
        token once the tokens before it stand.
        """
        candidates = positions.candidates
        self.stats.disjoint_positions += int(positions.law.disjoint[rows].sum())
        tail = columns == (candidates.token_ids.shape[1] - 1 if candidates.has_tail else -1)
        ids = candidates.token_ids[rows, columns]
        log_weights = np.full(len(rows), NOT_KNOWN_YET)
        log_q = positions.law.log_q[rows, columns]
        if drafted is not None:
            outside = tail & (drafted != NO_TOKEN)
            tail &= ~outside
            ids[outside] = drafted[outside]
            log_weights[outside] = candidates.exact_tail[rows[outside]] - log_q[outside]
            log_q[outside] = NOT_KNOWN_YET
        tokens: list[int | None] = ids.tolist()
        self._append(np.flatnonzero(~tail), sequences, rows, columns, positions, tokens, log_q, log_weights)

        pending = [i for i in np.flatnonzero(tail) if not sequences[i].done]
        drawn = await asyncio.gather(*(self._draw_tail(sequences[i], candidates, int(rows[i])) for i in pending))
        for i, (token, log_mass) in zip(pending, drawn, strict=True):
            tokens[i], log_weights[i], log_q[i] = token, log_mass - log_q[i], NOT_KNOWN_YET
        self._append(np.array(pending, dtype=int), sequences, rows, columns, positions, tokens, log_q, log_weights)

    def _append(
        self,
        indices: np.ndarray,
        sequences: Sequence[DecodingSequence],
        rows: np.ndarray,
        columns: np.ndarray,
        positions: Positions,
        tokens: list[int | None],
        log_q: np.ndarray,
        log_weights: np.ndarray,
    ) -> None:
        candidates = positions.candidates
        rows, columns = rows[indices], columns[indices]
        fields = (
            indices,
            rows,
            positions.law.alpha[rows],
            log_q[indices],
            candidates.exact_theta[rows, columns],
            candidates.exact_t[rows, columns],
            log_weights[indices],
            positions.top_theta[rows],
            positions.top_t[rows],
        )
        for values in zip(*(field.tolist() for field in fields), strict=True):
            i, row, alpha, q, logp_theta, logp_t, log_weight, top_theta, top_t = values
            sequence, token = sequences[i], tokens[i]
            if sequence.done or token is None:
                continue
            sequence.append(
                token,
                alpha=alpha,
                log_q=q,
                logp_theta=logp_theta,
                logp_t=logp_t,
                log_weight=log_weight,
                top_theta=top_theta,
                top_t=top_t,
                diagnostics={name: column[row] for name, column in positions.diagnostics.items()},
            )
            self.stats.tokens += 1
            self.stats.tail_tokens += math.isnan(q)
            if self.on_token is not None:
                self.on_token(sequence)

    async def settle(self, sequence: DecodingSequence) -> None:
        """Fetch what no list held, and complete the record: log w = log π_θ − log q*."""

        async def score_t() -> None:
            await self._score(self.t, sequence.context_t, sequence.logp_t, sequence.top_t, in_t)

        in_theta, in_t = (np.isnan(values) for values in (sequence.logp_theta, sequence.logp_t))
        in_t &= ~np.array(sequence.without_target, dtype=bool)
        try:
            if sequence.failure is None:  # else the same server would fail again
                await both(
                    self._score(self.theta, sequence.context_theta, sequence.logp_theta, sequence.top_theta, in_theta),
                    until_back(score_t, self.t.url) if self.config.on_target_failure == "wait" else score_t(),
                )
        except DualRolloutError as error:
            lost = isinstance(error, EngineError) and error.url == self.t.url
            if lost and self.config.on_target_failure == "policy":
                logger.warning("some log π_t stay NaN (on_target_failure is policy): %s", error)
            else:
                sequence.fail(error)
        for i, log_weight in enumerate(sequence.log_weight):
            if math.isnan(log_weight):
                sequence.log_weight[i] = sequence.logp_theta[i] - sequence.log_q[i]
            else:  # a tail token: its weight is known, its own share of the tail follows from log π_θ
                sequence.log_q[i] = sequence.logp_theta[i] - log_weight

    async def _draw_tail(
        self, sequence: DecodingSequence, candidates: Candidates, row: int
    ) -> tuple[int | None, float]:
        """A token outside S, and the log of π_θ's mass there; None, and the sequence marked, where that fails."""
        try:
            return await both(self._draw_outside(sequence, candidates, row), self._tail_mass(sequence, candidates, row))
        except DualRolloutError as error:
            sequence.fail(error)
            return None, NOT_KNOWN_YET

    async def _draw_outside(self, sequence: DecodingSequence, candidates: Candidates, row: int) -> int:
        """y ~ π_θ given that y is outside S and π_t has it, by rejection; the server's exclusion only makes the first
        draw succeed."""
        likeliest_first = candidates.token_ids[row][np.argsort(-candidates.logp_theta[row])]
        excluded = [*likeliest_first[likeliest_first != NO_TOKEN].tolist(), *candidates.theta_alone]
        rejected = set(excluded)
        for _ in range(_MAX_TAIL_DRAWS):
            self.stats.tail_draws += 1
            seed = int(sequence.rng.integers(2**31))
            token = await patiently(
                partial(self.theta.draw_excluding, sequence.context_theta, excluded, self.config.temperature, seed),
                self.config.max_retries,
            )
            if token not in rejected:
                return token
        raise EngineProtocolError(
            f"{_MAX_TAIL_DRAWS} draws gave no token outside the candidates; the server seems to ignore logit_bias. "
            'Use support="union" with it.',
            url=self.theta.url,
        )

    async def _tail_mass(self, sequence: DecodingSequence, candidates: Candidates, row: int) -> float:
        """log of π_θ's exact mass on what the tail stands for. The law was built with floors in S, and without knowing
        what π_θ has on tokens that π_t lacks; the weight must not be."""
        if not math.isnan(candidates.exact_tail[row]):
            return float(candidates.exact_tail[row])
        temperature = self.config.temperature
        served = await self.theta.probe(sequence.context_theta)
        if not served.names_tokens_at(temperature):
            if not self.stats.approximate_tail_weights:
                logger.warning(
                    "%s does not report named tokens%s: tail weights are approximate (floors for exact candidates)",
                    self.theta.url,
                    f" at temperature {temperature:g}" if served.named_logprobs else "",
                )
            self.stats.approximate_tail_weights += 1
            return float(candidates.logp_theta[row, -1])
        names = [*candidates.missing(row, candidates.exact_theta), *candidates.theta_alone]
        (logprobs,) = await patiently(
            lambda: self.theta.named_logprobs([sequence.context_theta], [names], temperature),
            self.config.max_retries,
        )
        mass = 1.0 - np.nansum(np.exp(candidates.exact_theta[row])) - np.exp(logprobs).sum()
        return math.log(max(mass, ROUNDING))

    def _diagnostics(self, candidates: Candidates, law: Law) -> dict[str, list[float]]:
        if not self.with_diagnostics:
            return {}
        rows = log_diagnostics(candidates.logp_theta, candidates.logp_t, law.log_q, law.alpha)
        rows |= {"coverage_theta": candidates.coverage_theta, "coverage_t": candidates.coverage_t}
        return {name: row.tolist() for name, row in rows.items() if name != "alpha"}

    async def _score(
        self, engine: Engine, context: Context, logprobs: list[float], tops: list[float], unknown: np.ndarray
    ) -> None:
        """Replace `logprobs` where they are `unknown` by exact values.

        A few tokens are asked for by name, each after its prefix, which the server still has in its cache. For more,
        one request scores the whole text, which servers do at temperature 1. The most likely token of each position
        was listed at the temperature in use, which fixes the normaliser:
        log p_T(y) = (log p(y) − log p(top)) / T + log p_T(top).
        """
        indices = np.flatnonzero(unknown).tolist()
        if not indices:
            return
        first = len(context) - len(logprobs)
        last = first + indices[-1] + 1
        temperature, retries = self.config.temperature, self.config.max_retries
        served = await engine.probe(context)
        few = len(indices) * _NAMED_COST <= last
        if few and served.prefix_caching and served.names_tokens_at(temperature):
            prefixes = [Context.like(context, context[: first + i]) for i in indices]
            names = [[context[first + i]] for i in indices]
            values = await patiently(lambda: engine.named_logprobs(prefixes, names, temperature), retries)
            exact = [float(value[0]) for value in values]
        else:
            text = Context.like(context, context[:last])
            own, top = await patiently(lambda: engine.score(text, first), retries)
            exact = [(own[i] - top[i]) / temperature + tops[i] for i in indices]
        for i, logprob in zip(indices, exact, strict=True):
            logprobs[i] = logprob
        self.stats.scored_tokens += len(indices)


async def _completed(top: TopK, missing: list[list[int]], name: Name) -> TopK:
    """The lists with the missing tokens added."""
    width = max(map(len, missing))
    if width == 0:
        return top
    extra_ids = np.full((len(missing), width), NO_TOKEN, dtype=np.int64)
    extra = np.full((len(missing), width), -np.inf)
    for row, (ids, logprobs) in enumerate(zip(missing, await name(missing), strict=True)):
        extra_ids[row, : len(ids)], extra[row, : len(ids)] = ids, logprobs
    return replace(top, token_ids=np.hstack([top.token_ids, extra_ids]), logprobs=np.hstack([top.logprobs, extra]))


async def both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    """Await both, and only then raise what failed, so that no request is left behind unwatched."""
    a, b = await asyncio.gather(first, second, return_exceptions=True)
    for result in (a, b):
        if isinstance(result, BaseException):
            raise result
    return a, b  # type: ignore[return-value]
