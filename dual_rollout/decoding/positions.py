"""From two top-k lists to the distributions of R positions, and from drawn columns to recorded tokens.

What every mode that samples from q* does with a position once both lists are there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dual_rollout.decoding.call import DecodingCall, both
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.tail import TailToken, draw_tail_tokens
from dual_rollout.functional.candidates import Candidates, merge_lists
from dual_rollout.functional.diagnostics import log_diagnostics
from dual_rollout.functional.distribution import NextTokenDistribution, next_token_distribution
from dual_rollout.functional.top_k import NO_TOKEN, TopK, extended
from dual_rollout.record import NOT_KNOWN_YET

NamedLogprobs = Callable[[list[list[int]]], Awaitable[list[np.ndarray]]]
"""Log-probabilities of named tokens: for each row those of its list of ids, which may be empty."""


@dataclass(frozen=True, slots=True)
class Positions:
    """R positions.

    Attributes:
        candidates: S of each.
        q: α and q* of each, on S.
        top_theta, top_t: `(R,)` log-probability of the most likely token, nats.
        diagnostics: lists of R floats by name.
    """

    candidates: Candidates
    q: NextTokenDistribution
    top_theta: np.ndarray
    top_t: np.ndarray
    diagnostics: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Draws:
    """What was drawn at N of R positions.

    Attributes:
        sequences: N, the owner of each; one may occur several times, its tokens in order.
        rows: `(N,)` the position of each, among R.
        columns: `(N,)` the column of S that was drawn.
        drafted: `(N,)` token ids that π_θ drafted, for the tail's column; `NO_TOKEN` where none was kept.
    """

    sequences: Sequence[DecodingSequence]
    rows: np.ndarray
    columns: np.ndarray
    drafted: np.ndarray


async def build_positions(
    call: DecodingCall, top_theta: TopK, top_t: TopK, name_theta: NamedLogprobs, name_t: NamedLogprobs
) -> Positions:
    """Candidates, α and q* of all rows at once; with missing="exact" what a list lacks is asked for by name."""
    candidates = merge_lists(top_theta, top_t, call.config.support)
    if call.config.missing == "exact":
        rows = range(len(candidates.token_ids))
        top_theta, top_t = await both(
            _completed(top_theta, [candidates.missing(row, candidates.exact_theta) for row in rows], name_theta),
            _completed(top_t, [candidates.missing(row, candidates.exact_t) for row in rows], name_t),
        )
        candidates = merge_lists(top_theta, top_t, call.config.support)
    q = next_token_distribution(candidates, call.config.alpha_rule)
    call.stats.count_lists(candidates)
    diagnostics = _diagnostics(candidates, q) if call.settings.with_diagnostics else {}
    return Positions(candidates, q, top_theta.logprobs.max(axis=1), top_t.logprobs.max(axis=1), diagnostics)


async def append_draws(call: DecodingCall, draws: Draws, positions: Positions) -> None:
    """Append to each sequence the tokens that were drawn for it; what comes after its end is dropped.

    A column of the tail stands for the drafted token. Where there is none it may only be a sequence's last, and becomes
    a token once those before it stand.
    """
    candidates, q = positions.candidates, positions.q
    call.stats.disjoint_positions += int(q.disjoint[draws.rows].sum())
    tail = draws.columns == (candidates.token_ids.shape[1] - 1 if candidates.has_tail else -1)
    outside = {
        i: TailToken(int(draws.drafted[i]), float(candidates.exact_tail[draws.rows[i]]))
        for i in np.flatnonzero(tail & (draws.drafted != NO_TOKEN)).tolist()
    }
    waiting = [i for i in np.flatnonzero(tail).tolist() if i not in outside]
    _append(call, draws, positions, [i for i in range(len(draws.rows)) if i not in waiting], outside)

    waiting = [i for i in waiting if not draws.sequences[i].done]
    drawn = await draw_tail_tokens(
        call, [draws.sequences[i] for i in waiting], candidates, [int(draws.rows[i]) for i in waiting]
    )
    outside = {i: token for i, token in zip(waiting, drawn, strict=True) if token is not None}
    _append(call, draws, positions, list(outside), outside)


def _append(
    call: DecodingCall, draws: Draws, positions: Positions, indices: list[int], outside: dict[int, TailToken]
) -> None:
    """Append the draws `indices`; those that are `outside` S have their tokens there."""
    candidates, (rows, columns) = positions.candidates, (draws.rows[indices], draws.columns[indices])
    values = {
        "token": candidates.token_ids[rows, columns],
        "alpha": positions.q.alpha[rows],
        "logprobs_q": positions.q.log_q[rows, columns],
        "logprobs_theta": candidates.exact_theta[rows, columns],
        "logprobs_t": candidates.exact_t[rows, columns],
    }
    tops = zip(positions.top_theta[rows].tolist(), positions.top_t[rows].tolist(), strict=True)
    table = zip(*(array.tolist() for array in values.values()), strict=True)
    for i, row, top, numbers in zip(indices, rows.tolist(), tops, table, strict=True):
        sequence, token = draws.sequences[i], dict(zip(values, numbers, strict=True))
        if sequence.done:
            continue
        if i in outside:  # its share of the tail's mass follows from log π_θ, which no list holds
            token["token"], token["log_weight"] = outside[i].token_id, outside[i].log_mass - token["logprobs_q"]
            token["logprobs_q"] = NOT_KNOWN_YET
            call.stats.tail_tokens += 1
        diagnostics = {name: column[row] for name, column in positions.diagnostics.items()}
        sequence.append(**token, tops=top, diagnostics=diagnostics)
        call.count_token(sequence)


def _diagnostics(candidates: Candidates, q: NextTokenDistribution) -> dict[str, list[float]]:
    rows = log_diagnostics(candidates.logp_theta, candidates.logp_t, q.log_q, q.alpha)
    rows |= {"coverage_theta": candidates.coverage_theta, "coverage_t": candidates.coverage_t}
    return {name: row.tolist() for name, row in rows.items() if name != "alpha"}


async def _completed(top: TopK, missing: list[list[int]], name: NamedLogprobs) -> TopK:
    """The lists with the missing tokens added."""
    return extended(top, missing, await name(missing)) if any(missing) else top
