"""From two top-k lists to two distributions over one set of candidates.

S is the union of both lists, without the tokens that one of the models does not have: where vocabularies are padded to
different sizes, an id beyond the smaller one has probability 0 there, and so under q*. A candidate that one list lacks
gets there the smallest probability listed, capped so that all such candidates together never exceed the mass that the
list leaves open. What lies outside S is either cut off (`support="union"`) or kept as one more atom, the tail
(`support="tail"`), with each model's remaining open mass, of which floors leave it its share.

Servers round to float32, so that the probabilities of a peaked list may add up to 1 or more. A list that does not hold
every possible token leaves open what that rounding can hide, at least: "too little to be seen" is not "impossible".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dual_rollout.functional.top_k import NO_TOKEN, TopK

Support = Literal["union", "tail"]

ROUNDING = float(np.finfo(np.float32).eps)
"""Mass that may hide in the rounding of a list: the least that a list leaves open which is not complete."""

TAIL_TOKEN = NO_TOKEN
"""Stands for "some token outside S" where a candidate's id is expected."""

_LAST = 2**40  # sorts padding behind every token id


@dataclass(frozen=True, slots=True)
class Candidates:
    """S for B positions, with both models' log-probabilities on it (nats, normalised over S and, if kept, the tail).

    Attributes:
        token_ids: `(B, S)` int64, ascending among the valid ones; `NO_TOKEN` at holes and for the tail.
        logp_theta, logp_t: `(B, S)`, `-inf` at holes. With `support="tail"` the last column is the tail, `-inf` where
            π_θ has nothing outside S.
        exact_theta, exact_t: `(B, S)` log π_θ and log π_t as the servers listed them; NaN where floored.
        coverage_theta, coverage_t: `(B,)` mass of each list.
        has_tail: whether the last column is the tail.
        exact_tail: `(B,)` log of π_θ's exact mass on what the tail stands for; NaN where it is not known, because
            candidates are floored or π_θ has tokens that π_t lacks, and where no tail is kept.
        theta_alone: token ids that π_θ has and π_t has not; none of them is a candidate, nor in the tail.
    """

    token_ids: np.ndarray
    logp_theta: np.ndarray
    logp_t: np.ndarray
    exact_theta: np.ndarray
    exact_t: np.ndarray
    coverage_theta: np.ndarray
    coverage_t: np.ndarray
    has_tail: bool
    exact_tail: np.ndarray
    theta_alone: range

    def missing(self, row: int, exact: np.ndarray) -> list[int]:
        """Ids of S in `row` that are not listed in `exact` (one of `exact_theta`, `exact_t`)."""
        ids = self.token_ids[row]
        return ids[(ids != NO_TOKEN) & np.isnan(exact[row])].tolist()


def merge_top_k_candidates(
    logprobs_theta: Mapping[int, float],
    logprobs_t: Mapping[int, float],
    *,
    support: Support = "union",
    vocab_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both models' probabilities on the union of their lists.

    Args:
        logprobs_theta, logprobs_t: `{token id: log-probability in nats}`; `-inf` means impossible.
        support: "union" truncates to S and renormalises; "tail" appends one atom, id `TAIL_TOKEN`, for the rest.
        vocab_size: tokens that both models have. Ids beyond it, which only one of them has, are no candidates, and the
            tail is impossible where S holds all of them. Without it, only a mapping that names an impossible token is
            known to hold every possible one.

    Returns:
        `(candidates, probs_theta, probs_t)`, each `(S,)`; ids ascending (the tail last), probabilities summing to 1.

    Raises:
        ValueError: an empty list, a negative id, a NaN or positive log-probability, an unknown `support`.
    """
    theta = _as_row("logprobs_theta", logprobs_theta, vocab_size)
    t = _as_row("logprobs_t", logprobs_t, vocab_size)
    merged = merge_lists(theta, t, support)
    keep = merged.token_ids[0] != NO_TOKEN
    if merged.has_tail:
        keep[-1] = True
    return merged.token_ids[0][keep], np.exp(merged.logp_theta[0][keep]), np.exp(merged.logp_t[0][keep])


def merge_lists(theta: TopK, t: TopK, support: Support = "union") -> Candidates:
    """The batched form of `merge_top_k_candidates`: `(B, K)` lists to `(B, S)` candidates with S = 2K (+ 1).

    Where both lists tell the size of their model's vocabulary, ids that only one of them has are no candidates.
    """
    if support not in ("union", "tail"):
        raise ValueError(f'support must be "union" or "tail", got {support!r}')
    has_tail = support == "tail"
    size = min((top.vocab_size for top in (theta, t) if top.vocab_size is not None), default=_LAST)
    token_ids, places = _union(np.concatenate([theta.token_ids, t.token_ids], axis=1), size)
    of_theta, of_t = np.split(places, [theta.token_ids.shape[1]], axis=1)
    exact_theta, exact_t = _placed(theta.logprobs, of_theta, token_ids), _placed(t.logprobs, of_t, token_ids)

    keep = token_ids != NO_TOKEN
    outside = (keep.sum(axis=1) < size) & has_tail
    on_theta, coverage_theta = _on_candidates(exact_theta, keep, theta, outside=outside)
    on_t, coverage_t = _on_candidates(exact_t, keep, t, outside=outside)
    theta_alone = range(size, theta.vocab_size) if theta.vocab_size is not None else range(0)
    known = (~keep | ~np.isnan(exact_theta)).all(axis=1) & (not theta_alone) & has_tail
    exact_tail = np.where(known, on_theta[:, -1], np.nan)
    if has_tail:
        on_t[np.isneginf(on_theta[:, -1]), -1] = -np.inf  # the tail is drawn from π_θ
    columns = slice(None if has_tail else -1)
    return Candidates(
        token_ids=token_ids[:, columns],
        logp_theta=_normalise(on_theta[:, columns]),
        logp_t=_normalise(on_t[:, columns]),
        exact_theta=exact_theta[:, columns],
        exact_t=exact_t[:, columns],
        coverage_theta=coverage_theta,
        coverage_t=coverage_t,
        has_tail=has_tail,
        exact_tail=exact_tail,
        theta_alone=theta_alone,
    )


def _union(ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The different ids below `size` of each row of S, `(B, S + 1)`, ascending, then `NO_TOKEN`; and the column there
    of every given id, which for those that are left out is the last.

    An id and its column are sorted as one number, which takes a tenth of a stable `argsort`.
    """
    ids = np.where((ids == NO_TOKEN) | (ids >= size), _LAST, ids)
    bits = ids.shape[1].bit_length()
    keys = np.sort(ids << bits | np.arange(ids.shape[1]), axis=1)
    ids, columns = keys >> bits, keys & (1 << bits) - 1
    first = ids != _LAST
    first[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    sorted_places = np.cumsum(first, axis=1) - 1
    sorted_places[ids == _LAST] = ids.shape[1]
    union = np.full((len(ids), ids.shape[1] + 1), NO_TOKEN, dtype=np.int64)
    np.put_along_axis(union, sorted_places, np.where(ids == _LAST, NO_TOKEN, ids), axis=1)
    places = np.empty_like(columns)
    np.put_along_axis(places, columns, sorted_places, axis=1)
    return union, places


def _placed(logprobs: np.ndarray, places: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Log-probabilities in their columns of the union; NaN where there is none."""
    placed = np.full(token_ids.shape, np.nan)
    np.put_along_axis(placed, places, logprobs, axis=1)
    placed[:, -1] = np.nan
    return placed


def _on_candidates(
    exact: np.ndarray, keep: np.ndarray, top: TopK, *, outside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities on S, missing candidates floored and `-inf` at holes, and in the last column of what is
    `outside`; and the mass of the whole list, which may hold tokens that are no candidates.

    The open mass is shared with the tail, if there is one: floors that used it up would leave the tail nothing, and
    q* would lose the support that the tail is there to keep.
    """
    missing = keep & np.isnan(exact)
    coverage = np.exp(top.logprobs).sum(axis=1)
    count = missing.sum(axis=1)
    smallest = np.where(top.token_ids != NO_TOKEN, top.logprobs, np.inf).min(axis=1)
    open_mass = np.where(top.complete, 0.0, np.maximum(1.0 - coverage, ROUNDING))
    with np.errstate(divide="ignore"):
        floor = np.minimum(smallest, np.log(open_mass) - np.log(np.maximum(count + outside, 1)))
        tail = np.log(np.where(outside, open_mass - count * np.exp(floor), 0.0))
    logp = np.where(missing, floor[:, None], np.where(keep, exact, -np.inf))
    logp[:, -1] = tail
    return logp, coverage


def _normalise(logp: np.ndarray) -> np.ndarray:
    """Rows that sum to one, but for those without any mass: a model may have all of it on ids of its own."""
    peak = logp.max(axis=1, keepdims=True)
    peak = np.where(peak > -np.inf, peak, 0.0)
    total = np.exp(logp - peak).sum(axis=1, keepdims=True)
    return logp - (peak + np.log(np.where(total > 0, total, 1.0)))


def _as_row(name: str, logprobs: Mapping[int, float], vocab_size: int | None) -> TopK:
    ids = np.fromiter(logprobs.keys(), dtype=np.int64, count=len(logprobs))
    values = np.fromiter(logprobs.values(), dtype=np.float64, count=len(logprobs))
    possible = values > -np.inf
    if not possible.any() or ((ids < 0) | (ids >= _LAST)).any() or np.isnan(values).any() or (values > 1e-6).any():
        raise ValueError(f"{name} must map token ids in [0, 2^40) to log-probabilities <= 0, at least one above -inf")
    complete = bool(np.isneginf(values).any()) or len(ids) == vocab_size
    return TopK(ids[None], values[None], complete, vocab_size)
