"""What joins, cuts and extends top-k lists, against the same done with dictionaries."""

from __future__ import annotations

import numpy as np
import pytest

from dual_rollout.functional.top_k import (
    NO_TOKEN,
    TopK,
    extended,
    filled,
    joined,
    most_likely,
    replaced,
    taken,
)

Row = dict[int, float]


def top_k(rows: list[Row], *, complete: list[bool] | None = None, vocab_size: int | None = None) -> TopK:
    lengths = np.array([len(row) for row in rows])
    ids, logprobs = ([x for row in rows for x in part(row)] for part in (dict.keys, dict.values))
    top = filled(np.array(ids), np.array(logprobs), lengths)
    return TopK(top.token_ids, top.logprobs, np.array(complete) if complete is not None else False, vocab_size)


def rows_of(top: TopK) -> list[Row]:
    assert ((top.token_ids == NO_TOKEN) == np.isneginf(top.logprobs)).all()
    return [
        {token: logprob for token, logprob in zip(*row, strict=True) if token != NO_TOKEN}
        for row in zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True)
    ]


@pytest.fixture
def rows() -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        dict(zip(rng.permutation(50)[:k].tolist(), np.log(rng.dirichlet(np.ones(k + 1))[:k]).tolist(), strict=True))
        for k in (3, 1, 5, 2)
    ]


def test_rows_of_any_length_are_filled_in(rows: list[Row]):
    top = top_k(rows)
    assert rows_of(top) == rows and top.lengths.tolist() == [3, 1, 5, 2] and top.token_ids.shape == (4, 5)


def test_what_is_impossible_is_no_token():
    top = filled(np.array([4, 5, 6]), np.array([-0.5, -np.inf, -1.0]), np.array([2, 1]))
    assert rows_of(top) == [{4: -0.5}, {6: -1.0}] and top.lengths.tolist() == [1, 1]


def test_joined_taken_and_replaced(rows: list[Row]):
    first, second = top_k(rows[:2], complete=[True, False], vocab_size=50), top_k(rows[2:], vocab_size=50)
    both = joined([first, second])
    assert rows_of(both) == rows and both.vocab_size == 50
    assert np.broadcast_to(both.complete, 4).tolist() == [True, False, False, False]
    some = taken(both, np.array([3, 0]))
    assert rows_of(some) == [rows[3], rows[0]] and np.broadcast_to(some.complete, 2).tolist() == [False, True]
    other = top_k([rows[2], rows[3]], complete=[True, True], vocab_size=50)
    changed = replaced(first, np.array([1]), taken(other, np.array([0])))
    assert rows_of(changed) == [rows[0], rows[2]] and np.broadcast_to(changed.complete, 2).tolist() == [True, True]


def test_extended(rows: list[Row]):
    more = [[60], [], [61, 62], []]
    top = extended(top_k(rows), more, [np.full(len(ids), -3.0) for ids in more])
    assert rows_of(top) == [row | dict.fromkeys(ids, -3.0) for row, ids in zip(rows, more, strict=True)]


def test_the_most_likely_of_each_row(rows: list[Row]):
    counts = np.array([2, 1, 3, 1])
    cut = most_likely(top_k(rows, complete=[True] * 4), counts)
    expected = [dict(sorted(row.items(), key=lambda item: -item[1])[:k]) for row, k in zip(rows, counts, strict=True)]
    assert rows_of(cut) == expected
    assert np.broadcast_to(cut.complete, 4).tolist() == [False, True, False, False], "what was cut off is not listed"
