from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_rollout import compute_diagnostics, compute_q_star, solve_kl_symmetry
from dual_rollout.functional import effective_sample_size, importance_weights
from dual_rollout.functional.diagnostics import log_diagnostics

NAMES = {"alpha", "kl_theta", "kl_t", "kl_diff", "ess_theta", "ess_t", "ess_ratio", "entropy_q"}


def random_rows(seed: int, batch: int = 1, k: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(k), batch), rng.dirichlet(np.ones(k), batch)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_diagnostics_by_their_definitions(seed, alpha):
    (theta,), (t,) = random_rows(seed)
    q = compute_q_star(theta, t, alpha)
    got = compute_diagnostics(theta, t, q, alpha, coverage_theta=0.9, coverage_t=0.8)
    kl_theta = sum(a * math.log(a / b) for a, b in zip(q, theta, strict=True))
    kl_t = sum(a * math.log(a / b) for a, b in zip(q, t, strict=True))
    ess_theta = 1 / sum(b * b / a for a, b in zip(q, theta, strict=True))
    ess_t = 1 / sum(b * b / a for a, b in zip(q, t, strict=True))
    expected = {
        "alpha": alpha,
        "kl_theta": kl_theta,
        "kl_t": kl_t,
        "kl_diff": abs(kl_theta - kl_t),
        "ess_theta": ess_theta,
        "ess_t": ess_t,
        "ess_ratio": ess_theta / ess_t,
        "entropy_q": -sum(a * math.log(a) for a in q),
        "coverage_theta": 0.9,
        "coverage_t": 0.8,
    }
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert all(type(value) is float for value in got.values())


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_batch_equals_singles(seed, batch):
    theta, t = random_rows(seed, batch)
    alpha = solve_kl_symmetry(theta, t)
    q = compute_q_star(theta, t, alpha)
    rows = compute_diagnostics(theta, t, q, alpha)
    assert set(rows) == NAMES
    for i in range(batch):
        assert {name: column[i] for name, column in rows.items()} == compute_diagnostics(theta[i], t[i], q[i], alpha[i])


def test_identical_models():
    p = np.array([0.7, 0.2, 0.1])
    got = compute_diagnostics(p, p, p, 0.5)
    assert got["kl_theta"] == got["kl_t"] == got["kl_diff"] == 0
    assert got["ess_theta"] == pytest.approx(1) and got["ess_t"] == pytest.approx(1)


def test_weights_without_mass_are_worth_nothing():
    """A position sampled from π_θ because the lists share no token: infinitely far from π_t, but no NaN."""
    theta, t = np.array([0.6, 0.4, 0.0]), np.array([0.0, 0.0, 1.0])
    got = compute_diagnostics(theta, t, theta, 0.0)
    assert got["kl_theta"] == 0 and got["kl_t"] == got["kl_diff"] == math.inf
    assert got["ess_theta"] == pytest.approx(1) and got["ess_t"] == 0 and got["ess_ratio"] == math.inf


def test_entropy_of_a_certain_token_is_zero():
    one = np.array([0.0, 1.0])
    assert compute_diagnostics(one, one, one, 0.5)["entropy_q"] == 0


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_weights_turn_expectations_under_q_into_those_under_the_policy(seed, alpha):
    (theta,), (t,) = random_rows(seed)
    q = compute_q_star(theta, t, alpha)
    weights = importance_weights(np.log(theta), np.log(q))
    f = np.arange(len(q)) ** 2
    assert (q * weights * f).sum() == pytest.approx((theta * f).sum())


def test_weight_of_a_token_the_policy_never_says_is_zero():
    assert importance_weights(np.array([-np.inf, -1.0]), np.array([-2.0, -1.0])).tolist() == [0.0, 1.0]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=50))
def test_effective_sample_size_lies_between_one_sample_and_all(weights):
    ess = effective_sample_size(np.array(weights))
    assert 1 / len(weights) - 1e-12 <= ess <= 1 + 1e-12
    assert ess == pytest.approx(effective_sample_size(7 * np.array(weights)))


def test_effective_sample_size_at_its_ends():
    assert effective_sample_size(np.full(9, 0.3)) == pytest.approx(1)
    assert effective_sample_size(np.array([5.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert effective_sample_size(np.zeros(4)) == 0


@pytest.mark.parametrize("scale", [1e-300, 1e200, 1e308])
def test_effective_sample_size_of_weights_of_any_size(scale):
    assert effective_sample_size(scale * np.array([1.0, 1.0, 0.0])) == pytest.approx(2 / 3)


def test_a_probability_too_small_for_a_float_is_not_an_impossible_one():
    """q gives e^-400 to a token to which π_θ gives e^-800: next to nothing, not an infinite divergence."""
    logp_theta, logp_t = np.array([[0.0, -800.0]]), np.array([[0.0, -1e-5]])
    log_q = np.array([[0.0, -400.0]])
    got = log_diagnostics(logp_theta, logp_t, log_q, 0.5)
    assert got["kl_theta"] == pytest.approx(0, abs=1e-100) and got["ess_theta"] == pytest.approx(1)
    assert got["kl_t"] == pytest.approx(0, abs=1e-100)
    assert got["ess_t"] == pytest.approx(4 * math.exp(-400))  # one weight of e^400


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_logarithms_give_the_same_diagnostics(seed, batch):
    theta, t = random_rows(seed, batch)
    alpha = solve_kl_symmetry(theta, t)
    q = compute_q_star(theta, t, alpha)
    by_logs = log_diagnostics(np.log(theta), np.log(t), np.log(q), alpha)
    for name, column in compute_diagnostics(theta, t, q, alpha).items():
        np.testing.assert_array_equal(by_logs[name], column, err_msg=name)
