"""Top-k lists: what a server says of the next token, and every way to put such lists together or to cut them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dual_rollout.types import NO_TOKEN, TopK


def filled(token_ids: np.ndarray, logprobs: np.ndarray, lengths: np.ndarray) -> TopK:
    """Rows of `lengths` `(B,)` tokens each, which stand one after the other in both arrays. Impossible tokens (`-inf`)
    are left out."""
    shape = len(lengths), int(lengths.max())
    if len(token_ids) == shape[0] * shape[1]:  # all are equally long
        ids, values = token_ids.reshape(shape), logprobs.reshape(shape)
    else:
        ids, values = np.full(shape, NO_TOKEN, dtype=np.int64), np.full(shape, -np.inf)
        present = np.arange(shape[1]) < lengths[:, None]
        ids[present], values[present] = token_ids, logprobs
    return TopK(np.where(values == -np.inf, NO_TOKEN, ids), values)


def joined(lists: Sequence[TopK]) -> TopK:
    """The rows of all, in order, as wide as the widest."""
    if len(lists) == 1:
        return lists[0]
    width = max(top.token_ids.shape[1] for top in lists)
    complete = [np.broadcast_to(top.complete, len(top.token_ids)) for top in lists]
    return TopK(
        np.concatenate([_padded(top.token_ids, width, NO_TOKEN) for top in lists]),
        np.concatenate([_padded(top.logprobs, width, -np.inf) for top in lists]),
        np.concatenate(complete),
        lists[0].vocab_size,
    )


def taken(top: TopK, rows: np.ndarray) -> TopK:
    """Some rows, in that order."""
    complete = np.broadcast_to(top.complete, len(top.token_ids))
    return replace(top, token_ids=top.token_ids[rows], logprobs=top.logprobs[rows], complete=complete[rows])


def replaced(top: TopK, rows: np.ndarray, others: TopK) -> TopK:
    """The same lists, with those of `others` in `rows`."""
    order = np.arange(len(top.token_ids))
    order[rows] = len(order) + np.arange(len(rows))
    return replace(taken(joined([top, others]), order), vocab_size=others.vocab_size)


def extended(top: TopK, token_ids: Sequence[Sequence[int]], logprobs: Sequence[np.ndarray]) -> TopK:
    """Each row with more tokens, which it does not have yet; `token_ids[row]` may be empty."""
    width = max(map(len, token_ids))
    more_ids = np.full((len(token_ids), width), NO_TOKEN, dtype=np.int64)
    more = np.full(more_ids.shape, -np.inf)
    for row, (ids, values) in enumerate(zip(token_ids, logprobs, strict=True)):
        more_ids[row, : len(ids)], more[row, : len(ids)] = ids, values
    return replace(top, token_ids=np.hstack([top.token_ids, more_ids]), logprobs=np.hstack([top.logprobs, more]))


def tokens_to_mass(top: TopK, mass: float) -> np.ndarray:
    """How many of each row's most likely tokens hold `mass` together, `(B,)`; K + 1 where all of the list do not."""
    reached = np.cumsum(np.exp(-np.sort(-top.logprobs, axis=1)), axis=1) >= mass
    return np.where(reached.any(axis=1), reached.argmax(axis=1), top.logprobs.shape[1]) + 1


def most_likely(top: TopK, counts: np.ndarray) -> TopK:
    """Each row cut to its `counts[row]` most likely tokens, the most likely first; of equals the lower id."""
    order = np.lexsort((top.token_ids, -top.logprobs), axis=1)[:, : counts.max()]
    ids, logprobs = (np.take_along_axis(array, order, axis=1) for array in (top.token_ids, top.logprobs))
    kept = np.arange(order.shape[1]) < counts[:, None]
    complete = top.complete & (counts >= top.lengths)
    return TopK(np.where(kept, ids, NO_TOKEN), np.where(kept, logprobs, -np.inf), complete, top.vocab_size)


def at_temperature(top: TopK, temperature: float) -> TopK:
    """Raw (temperature 1) lists turned into those of softmax(logits / temperature).

    The normaliser needs Σ π^(1/T) over the whole vocabulary. What the list leaves open enters as if it were made
    of tokens as likely as the last one listed: exact when the list holds all mass, an upper bound for T < 1, an
    approximation otherwise. Servers that report processed log-probabilities need none of this.
    """
    with np.errstate(divide="ignore"):
        open_mass = np.maximum(1.0 - np.exp(top.logprobs).sum(axis=1, keepdims=True), 0.0)
        smallest = np.where(np.isfinite(top.logprobs), top.logprobs, np.inf).min(axis=1, keepdims=True)
        open_log = np.log(open_mass) + (1.0 / temperature - 1.0) * smallest
    scaled = top.logprobs / temperature
    peak = scaled.max(axis=1, keepdims=True)  # at low temperatures every one of them underflows
    log_listed = peak + np.log(np.exp(scaled - peak).sum(axis=1, keepdims=True))
    return replace(top, logprobs=scaled - np.logaddexp(log_listed, open_log))


def _padded(array: np.ndarray, width: int, value: float) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=value)
