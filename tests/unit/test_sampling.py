from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_rollout import sample_from_distribution
from dual_rollout.functional import sample_rows
from tests.chi_square import chi_square_p_value, chi_square_survival

FALSE_ALARM = 1e-4
NEARLY_ONE = np.nextafter(1.0, 0.0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.sampled_from([1.0, 10.0, 200.0]))
def test_columns_without_mass_are_never_returned(seed, k, spread):
    rng = np.random.default_rng(seed)
    probs = np.exp(rng.normal(size=(6, k)) * spread)
    probs[rng.random((6, k)) < 0.5] = 0.0
    probs[probs.sum(axis=1) == 0, 0] = 1.0
    for uniforms in (np.zeros(6), np.full(6, NEARLY_ONE), rng.random(6)):
        columns = sample_rows(probs, uniforms)
        assert ((columns >= 0) & (columns < k)).all()
        assert (probs[np.arange(6), columns] > 0).all()


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999, NEARLY_ONE])
def test_zeros_at_both_ends(uniform):
    probs = np.array([[0.0, 0.0, 0.4, 0.0, 0.6, 0.0, 0.0]])
    assert sample_rows(probs, np.array([uniform]))[0] == (2 if uniform < 0.4 else 4)


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1.0, 1e300])
def test_any_scale(scale):
    columns = sample_rows(np.array([[0.0, scale, 0.0]] * 3), np.array([0.0, 0.5, NEARLY_ONE]))
    assert columns.tolist() == [1, 1, 1]


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_each_column_owns_an_interval_of_its_probability(seed, k):
    """On a grid of N uniforms a column is hit N·p times, give or take one for each of its two edges."""
    probs = np.random.default_rng(seed).dirichlet(np.ones(k))
    grid = (np.arange(2000) + 0.5) / 2000
    columns = sample_rows(np.tile(probs, (2000, 1)), grid)
    assert (np.diff(columns) >= 0).all()
    assert (np.abs(np.bincount(columns, minlength=k) - 2000 * probs) <= 1.001).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_frequencies(seed):
    """χ² over 20,000 draws; a correct sampler fails with probability 1e-4 for each seed (seeds are fixed)."""
    probs = np.array([0.0, 0.002, 0.3, 0.05, 0.0, 0.5, 0.108, 0.04, 0.0])
    candidates = np.array([3, 11, 12, 40, 41, 50, 700, 49151, 49152])
    rng = np.random.default_rng(seed)
    drawn = [sample_from_distribution(probs, candidates, rng) for _ in range(20_000)]
    observed = np.array([drawn.count(token) for token in candidates.tolist()])
    assert observed.sum() == 20_000
    assert chi_square_p_value(observed, 20_000 * probs) > FALSE_ALARM


def test_same_generator_same_tokens():
    probs, candidates = np.full(50, 0.02), np.arange(50)

    def draw(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return [sample_from_distribution(probs, candidates, rng) for _ in range(30)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_without_a_generator_draws_differ():
    probs, candidates = np.full(10_000, 1e-4), np.arange(10_000)
    assert len({sample_from_distribution(probs, candidates) for _ in range(8)}) > 1


def test_returns_a_plain_int_and_normalises():
    token = sample_from_distribution(np.array([0.0, 3.0]), np.array([5, 6]), np.random.default_rng(0))
    assert token == 6 and type(token) is int


@pytest.mark.parametrize(
    ("probs", "candidates", "message"),
    [
        ([0.5, 0.5], [1], "must be"),
        ([[1.0]], [[1]], "must be"),
        ([0.0, 0.0], [1, 2], "not all zero"),
        ([-0.1, 1.1], [1, 2], "non-negative"),
        ([np.nan, 1.0], [1, 2], "non-negative"),
        ([np.inf, 1.0], [1, 2], "finite"),
        ([], [], "not all zero"),
    ],
)
def test_what_cannot_be_sampled_is_refused(probs, candidates, message):
    with pytest.raises(ValueError, match=message):
        sample_from_distribution(np.array(probs), np.array(candidates))


@pytest.mark.parametrize(
    ("statistic", "dof", "p"),
    # From printed tables of the χ² distribution.
    [
        (3.841, 1, 0.05),
        (6.635, 1, 0.01),
        (11.070, 5, 0.05),
        (18.307, 10, 0.05),
        (29.588, 10, 0.001),
        (124.342, 100, 0.05),
    ],
)
def test_the_tests_own_p_values(statistic, dof, p):
    assert chi_square_survival(statistic, dof) == pytest.approx(p, rel=2e-3)
