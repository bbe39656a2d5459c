"""Acceptance and residual of block decoding together give q*, by enumeration; and the tests would notice if not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dual_rollout.config import AlphaRule
from dual_rollout.decoding import block
from dual_rollout.decoding.positions import Positions
from dual_rollout.functional import TAIL_TOKEN, merge_lists, next_token_distribution
from dual_rollout.functional.top_k import NO_TOKEN, TopK
from tests.chi_square import chi_square_p_value
from tests.integration.test_coordinator_distribution import (
    CASES,
    FALSE_ALARM,
    THETA,
    Case,
    T,
    V,
    sequence_probabilities,
)

Accept = Callable[..., tuple[np.ndarray, np.ndarray]]
Residual = Callable[..., np.ndarray]


def top_k(p: np.ndarray, k: int, rows: int) -> TopK:
    """The list of the k most likely tokens as an engine gives it, in `rows` rows."""
    ids = np.argsort(-p, kind="stable")[:k]
    ids = ids[p[ids] > 0]
    return TopK(np.tile(ids, (rows, 1)), np.tile(np.log(p[ids]), (rows, 1)), len(ids) < k or len(ids) == len(p), len(p))


def positions(p: np.ndarray, r: np.ndarray, k: int, support: Any, **distribution: Any) -> Positions:
    """One position, once for each token that may have been drafted there."""
    theta, t = top_k(p, k, len(p)), top_k(r, k, len(p))
    candidates = merge_lists(theta, t, support)
    return Positions(
        candidates,
        next_token_distribution(candidates, AlphaRule(**distribution)),
        theta.logprobs[:, 0],
        t.logprobs[:, 0],
        {},
    )


def acceptance(accept: Accept, at: Positions, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The probability that each of `count` tokens is kept once drafted, and its column: bisection on the uniforms."""
    drafted = np.arange(count)
    low, high = np.zeros(count), np.ones(count)
    for _ in range(60):
        middle = 0.5 * (low + high)
        kept, columns = accept(drafted, at, middle)
        low, high = np.where(kept, middle, low), np.where(kept, high, middle)
    return np.where(high == 1.0, 1.0, low), columns


def output_distribution(p: np.ndarray, at: Positions, accept: Accept, residual: Residual) -> np.ndarray:
    """What comes of a draft from `p`: the probability of each column."""
    kept, columns = acceptance(accept, at, len(p))
    distribution = np.zeros(at.candidates.token_ids.shape[1])
    np.add.at(distribution, columns, p * kept)
    rest = residual(at, np.array([0]))[0]
    return distribution + max(1.0 - distribution.sum(), 0.0) * rest / rest.sum()


def distributions(kind: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    p, r = rng.dirichlet(np.full(size, 0.7), 2)
    if kind == "identical":
        r = p.copy()
    elif kind == "far":
        p, r = (np.exp(8.0 * x) for x in (np.arange(size), -np.arange(size)))
    elif kind == "ties":
        p, r = (np.repeat(0.5 ** np.arange(size), 2)[:size] for _ in range(2))
        r = np.roll(r, 1)
    elif kind == "impossible tokens":
        p[rng.random(size) < 0.3] = 0.0
        r[rng.random(size) < 0.3] = 0.0
        p[0], r[-1] = 0.5, 0.5
    return p / p.sum(), r / r.sum()


@pytest.mark.parametrize("support", ["union", "tail"])
@pytest.mark.parametrize("kind", ["random", "identical", "far", "ties", "impossible tokens"])
@pytest.mark.parametrize(
    "method", [{}, {"alpha_method": "fixed", "fixed_alpha": 0.3}, {"alpha_method": "fixed", "fixed_alpha": 1.0}]
)
def test_kept_and_redrawn_tokens_have_the_distribution_q_star(kind, support, method):
    rng = np.random.default_rng(0)
    for size in (2, 3, 5, 8):
        for k in range(1, size + 1):
            p, r = distributions(kind, size, rng)
            at = positions(p, r, k, support, **method)
            distribution = output_distribution(p, at, block._accept, block._residual)
            np.testing.assert_allclose(distribution, np.exp(at.q.log_q[0]), atol=1e-12)


def test_a_token_that_only_the_target_listed_is_redrawn():
    """Its probability under π_θ is a floor, which must not decide what is kept."""
    at = positions(np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.3, 0.6]), 1, "tail")
    kept, _ = acceptance(block._accept, at, 3)
    assert kept[0] > 0 and kept[1] == kept[2] == 0
    assert at.candidates.token_ids[0].tolist() == [0, 2, NO_TOKEN] and NO_TOKEN == TAIL_TOKEN


def test_a_token_outside_both_lists_is_kept_where_the_policys_mass_there_is_known():
    """Where π_t's list has nothing that π_θ's lacks; else floors of S stand in the way."""
    p = np.array([0.5, 0.3, 0.1, 0.1])
    at = positions(p, np.array([0.3, 0.5, 0.1, 0.1]), 2, "tail")
    kept, columns = acceptance(block._accept, at, 4)
    np.testing.assert_allclose(kept[2:], min(1.0, np.exp(at.q.log_q[0, -1]) / 0.2))
    assert columns[2:].tolist() == [at.candidates.token_ids.shape[1] - 1] * 2
    floored = positions(p, np.array([0.1, 0.3, 0.5, 0.1]), 2, "tail")
    assert acceptance(block._accept, floored, 4)[0][2:].tolist() == [0.0, 0.0]
    assert acceptance(block._accept, positions(p, p, 2, "union"), 4)[0][2:].tolist() == [0.0, 0.0]


# ---- whether the tests would notice a wrong rule --------------------------------------------------------------------


def keep_all_listed(drafted: np.ndarray, at: Positions, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, columns = block._accept(drafted, at, uniforms)
    exact = at.candidates.exact_theta[np.arange(len(drafted)), columns]
    return (at.candidates.token_ids == drafted[:, None]).any(axis=1) & np.isfinite(exact), columns


def keep_by_the_policy_on_s(drafted: np.ndarray, at: Positions, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By q*/π_θ with π_θ renormalised on S, which is not what the draft was drawn from."""
    rows = np.arange(len(drafted))
    _, columns = block._accept(drafted, at, uniforms)
    inside = (at.candidates.token_ids == drafted[:, None]).any(axis=1)
    log_p = np.where(inside, at.candidates.logp_theta[rows, columns], np.inf)
    return np.log(uniforms) < at.q.log_q[rows, columns] - log_p, columns


def redraw_from_q(at: Positions, rows: np.ndarray) -> np.ndarray:
    return np.exp(at.q.log_q[rows])


def redraw_less_floors(at: Positions, rows: np.ndarray) -> np.ndarray:
    """Subtracts from tokens that π_θ did not list too, though none of them was kept."""
    residual = np.maximum(np.exp(at.q.log_q[rows]) - np.exp(at.candidates.logp_theta[rows]), 0.0)
    return np.where(residual.sum(axis=1, keepdims=True) > 0, residual, redraw_from_q(at, rows))


MUTANTS = {
    "keeps too much": (keep_all_listed, block._residual),
    "keeps by the wrong proposal": (keep_by_the_policy_on_s, block._residual),
    "redraws from q*": (block._accept, redraw_from_q),
    "redraws less floors": (block._accept, redraw_less_floors),
}


def rejections(case: Case, accept: Accept, residual: Residual, trials: int = 200) -> float:
    """How often the distribution test of `case` fails when these rules decode: the share of `trials` of its size."""

    def rows(rules: tuple[Accept, Residual]) -> Callable[[int], np.ndarray]:
        known: dict[int, np.ndarray] = {}

        def distribution(last: int) -> np.ndarray:
            if last not in known:
                known[last] = on_vocabulary(case, last, *rules)
            return known[last]

        return distribution

    exact, wrong = (
        np.array(list(sequence_probabilities(rows(rules), case.tokens).values()))
        for rules in ((block._accept, block._residual), (accept, residual))
    )
    counts = np.random.default_rng(5).multinomial(case.sequences, wrong / wrong.sum(), trials)
    return float(np.mean([chi_square_p_value(each, case.sequences * exact) < FALSE_ALARM for each in counts]))


def on_vocabulary(case: Case, last: int, accept: Accept, residual: Residual) -> np.ndarray:
    p, options = THETA[last], case.options
    at = positions(p, T[last], options["top_k"], options.get("support", "union"))
    distribution, ids = output_distribution(p, at, accept, residual), at.candidates.token_ids[0]
    q = np.zeros(V)
    q[ids[ids != NO_TOKEN]] = distribution[ids != NO_TOKEN]
    if at.candidates.has_tail:
        outside = np.setdiff1d(np.arange(V), ids)
        q[outside] = distribution[-1] * p[outside] / p[outside].sum()
    return q


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_distribution_tests_would_notice(mutant):
    """With the sample size of that test, at its false-alarm rate of 1e-4."""
    case = next(case for case in CASES if case.name == "block-union-3")
    assert rejections(case, *MUTANTS[mutant]) >= 0.99
    assert rejections(case, block._accept, block._residual) == 0
