"""`solve_kl_symmetry` and `compute_q_star` against definitions written down again here, in a few lines
of numpy and with a bisection."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_rollout import compute_diagnostics, compute_q_star, solve_kl_symmetry
from dual_rollout.functional.kl_symmetry import NEAREST_0, NEAREST_1

ITERATIONS = 12
TOLERANCE = 1e-9  # nats, on the difference of the divergences


def random_row(rng: np.random.Generator, k: int, kind: str) -> np.ndarray:
    """A distribution on k tokens. "peaked" puts 1 − 1e-3 … 1 − 1e-12 on one; "sparse" has zeros."""
    p = np.exp(rng.normal(size=k) * rng.uniform(0.1, 5.0))
    if kind == "peaked":
        rest = 10.0 ** -rng.uniform(3, 12)
        peak = rng.integers(k)
        p[peak] = 0.0
        total = p.sum()
        p = p * (rest / total) if total else p
        p[peak] = 1.0 - rest
    elif kind == "sparse":
        zero = rng.random(k) < 0.3
        zero[rng.integers(k)] = False
        p[zero] = 0.0
    return p / p.sum()


@st.composite
def row_pairs(draw: st.DrawFn, kinds: tuple[str, ...] = ("lognormal", "peaked", "sparse"), min_k: int = 1):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k = draw(st.integers(min_k, 200))
    theta, t = (random_row(rng, k, draw(st.sampled_from(kinds))) for _ in range(2))
    if not np.any((theta > 0) & (t > 0)):
        theta[0] = t[0] = 0.5
        theta, t = theta / theta.sum(), t / t.sum()
    return theta, t


def psi(theta: np.ndarray, t: np.ndarray, alpha: float) -> float:
    both = (theta > 0) & (t > 0)
    path = (1 - alpha) * np.log(theta[both]) + alpha * np.log(t[both])
    return float(path.max() + np.log(np.exp(path - path.max()).sum()))


def psi_slope(theta: np.ndarray, t: np.ndarray, alpha: float) -> float:
    """ψ′(α) = E_q[log π_t − log π_θ], which is KL(q‖π_θ) − KL(q‖π_t)."""
    both = (theta > 0) & (t > 0)
    log_theta, log_t = np.log(theta[both]), np.log(t[both])
    path = (1 - alpha) * log_theta + alpha * log_t
    q = np.exp(path - path.max())
    return float((q * (log_t - log_theta)).sum() / q.sum())


def bisect(theta: np.ndarray, t: np.ndarray) -> float:
    """The root of the increasing ψ′ in [0, 1], or the end nearest to it."""
    low, high = 0.0, 1.0
    if psi_slope(theta, t, low) >= 0:
        return low
    if psi_slope(theta, t, high) <= 0:
        return high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if psi_slope(theta, t, middle) < 0 else (low, middle)
    return (low + high) / 2


def kl(q: np.ndarray, p: np.ndarray) -> float:
    return float((q[q > 0] * (np.log(q[q > 0]) - np.log(p[q > 0]))).sum())


def is_solution(theta: np.ndarray, t: np.ndarray, alpha: float) -> bool:
    """ψ′(α) = 0, or α is the limit towards the end that ψ falls to."""
    slope = psi_slope(theta, t, alpha)
    return abs(slope) < TOLERANCE or (alpha == NEAREST_0 and slope > 0) or (alpha == NEAREST_1 and slope < 0)


def is_inside(alpha: float) -> bool:
    return NEAREST_0 < alpha < NEAREST_1


@given(row_pairs())
def test_divergences_are_equal_within_twelve_iterations(rows):
    theta, t = rows
    alpha = solve_kl_symmetry(theta, t, max_iter=ITERATIONS)
    assert isinstance(alpha, float) and 0 < alpha < 1
    assert is_solution(theta, t, alpha)
    q = compute_q_star(theta, t, alpha)
    assert q.sum() == pytest.approx(1, abs=1e-12)
    if is_inside(alpha):
        assert abs(kl(q, theta) - kl(q, t)) < TOLERANCE


@given(row_pairs(), st.sampled_from([1e-3, 1e-6, 1e-12, 1e-15]))
def test_nearly_identical_rows(rows, noise):
    theta, _ = rows
    t = theta * (1 + noise * np.sin(np.arange(len(theta))))
    assert is_solution(theta, t / t.sum(), solve_kl_symmetry(theta, t, max_iter=ITERATIONS))


@given(row_pairs())
def test_agrees_with_bisection(rows):
    theta, t = rows
    alpha, reference = solve_kl_symmetry(theta, t), bisect(theta, t)
    if abs(psi_slope(theta, t, 0.0)) < TOLERANCE and abs(psi_slope(theta, t, 1.0)) < TOLERANCE:
        return  # every α solves it
    if reference in (0.0, 1.0):
        assert alpha == pytest.approx(reference, abs=1e-15) or is_solution(theta, t, alpha)
        return
    # Where ψ′ is nearly flat, a tolerance on ψ′ leaves its root open by tolerance / slope.
    low, high = max(reference - 1e-4, 0.0), min(reference + 1e-4, 1.0)
    curvature = (psi_slope(theta, t, high) - psi_slope(theta, t, low)) / (high - low)
    assert abs(alpha - reference) <= 1e-8 + TOLERANCE / max(curvature, 1e-300)


@given(row_pairs())
def test_minimum_of_psi_is_the_divergence(rows):
    theta, t = rows
    alpha = solve_kl_symmetry(theta, t)
    lowest = psi(theta, t, alpha)
    assert all(lowest <= psi(theta, t, other) + 1e-12 for other in np.linspace(0, 1, 41))
    if is_inside(alpha):
        q = compute_q_star(theta, t, alpha)
        assert kl(q, theta) == pytest.approx(-lowest, abs=TOLERANCE)
        assert kl(q, t) == pytest.approx(-lowest, abs=TOLERANCE)


@given(row_pairs(kinds=("lognormal",), min_k=2))
def test_swapping_the_models_mirrors_alpha(rows):
    theta, t = rows
    assert solve_kl_symmetry(t, theta) == pytest.approx(1 - solve_kl_symmetry(theta, t), abs=1e-7)


@given(row_pairs())
def test_the_path_is_the_same_from_both_ends(rows):
    theta, t = rows
    for alpha in (0.0, 0.25, 0.5, 1.0):
        np.testing.assert_allclose(
            compute_q_star(theta, t, alpha), compute_q_star(t, theta, 1 - alpha), rtol=1e-12, atol=1e-300
        )


@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.sampled_from(["lognormal", "peaked", "sparse"]))
def test_identical_rows_give_one_half(seed, k, kind):
    p = random_row(np.random.default_rng(seed), k, kind)
    assert solve_kl_symmetry(p, p) == 0.5
    np.testing.assert_allclose(compute_q_star(p, p, 0.5), p, rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 130))
def test_batch_equals_singles_bit_for_bit(seed, batch, k):
    rng = np.random.default_rng(seed)
    kinds = ("lognormal", "peaked", "lognormal", "sparse")
    theta = np.stack([random_row(rng, k, kinds[rng.integers(4)]) for _ in range(batch)])
    t = np.stack([random_row(rng, k, kinds[rng.integers(3)]) for _ in range(batch)])
    alpha = solve_kl_symmetry(theta, t)
    assert alpha.shape == (batch,) and alpha.dtype == np.float64
    assert alpha.tolist() == [solve_kl_symmetry(a, b) for a, b in zip(theta, t, strict=True)]
    q = compute_q_star(theta, t, alpha)
    for row in range(batch):
        np.testing.assert_array_equal(q[row], compute_q_star(theta[row], t[row], alpha[row]))


@given(row_pairs(), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_rows_are_normalised_first(rows, scale_theta, scale_t):
    theta, t = rows
    alpha = solve_kl_symmetry(theta * scale_theta, t * scale_t)
    assert is_solution(theta, t, alpha)


@given(row_pairs())
def test_never_nan(rows):
    theta, t = rows
    alpha = solve_kl_symmetry(theta, t)
    assert np.isfinite(alpha)
    assert np.isfinite(compute_q_star(theta, t, alpha)).all()
    diagnostics = compute_diagnostics(theta, t, compute_q_star(theta, t, alpha), alpha)
    assert not np.isnan(list(diagnostics.values())).any()


@given(row_pairs(kinds=("lognormal", "peaked"), min_k=2), st.floats(0, 1))
def test_effective_sample_sizes_have_closed_forms(rows, alpha):
    theta, t = rows
    ess = compute_diagnostics(theta, t, compute_q_star(theta, t, alpha), alpha)
    ess_theta = np.exp(-psi(theta, t, alpha) - psi(theta, t, -alpha))
    ess_t = np.exp(-psi(theta, t, alpha) - psi(theta, t, 2 - alpha))
    assert ess["ess_theta"] == pytest.approx(ess_theta, rel=1e-8)
    assert ess["ess_t"] == pytest.approx(ess_t, rel=1e-8)
    assert ess["ess_ratio"] == pytest.approx(ess_theta / ess_t, rel=1e-8)


@given(row_pairs(kinds=("lognormal", "peaked"), min_k=2), st.floats(0, 1))
def test_the_weights_second_moment_is_at_most_that_power_of_a_teachers(rows, alpha):
    theta, t = rows
    q = compute_q_star(theta, t, alpha)
    log_moment, log_teachers = (np.log((theta * (theta / p)).sum()) for p in (q, t))
    assert log_moment <= alpha * log_teachers + 1e-9


@given(row_pairs())
def test_ends_of_the_path_are_the_models(rows):
    theta, t = rows
    np.testing.assert_allclose(compute_q_star(theta, t, 0), theta, rtol=1e-12, atol=0)
    np.testing.assert_allclose(compute_q_star(theta, t, 1), t, rtol=1e-12, atol=0)


@given(row_pairs(), st.floats(0.01, 0.99))
def test_inside_the_path_is_the_geometric_mean(rows, alpha):
    theta, t = rows
    expected = np.zeros_like(theta)
    both = (theta > 0) & (t > 0)
    expected[both] = np.exp((1 - alpha) * np.log(theta[both]) + alpha * np.log(t[both]) - psi(theta, t, alpha))
    np.testing.assert_allclose(compute_q_star(theta, t, alpha), expected, rtol=1e-10, atol=0)


def test_one_point_support():
    assert solve_kl_symmetry([1.0], [1.0]) == 0.5
    assert compute_q_star([1.0], [1.0], 0.3).tolist() == [1.0]


@pytest.mark.parametrize("epsilon", [0.4, 1e-3, 1e-9, 1e-12])
def test_two_points_mirrored_give_one_half(epsilon):
    theta, t = np.array([1 - epsilon, epsilon]), np.array([epsilon, 1 - epsilon])
    alpha = solve_kl_symmetry(theta, t, max_iter=ITERATIONS)
    # ½ up to the rounding of 1 − ε in double precision.
    assert alpha == pytest.approx(0.5, abs=1e-5)
    np.testing.assert_allclose(compute_q_star(theta, t, alpha), [0.5, 0.5], atol=1e-9)


@given(st.floats(1e-12, 0.5), st.floats(1e-12, 0.5))
def test_two_points_have_a_closed_form(a, b):
    """With π_θ = (1−a, a) and π_t = (b, 1−b), q is where the two divergences meet: q₂ solves a linear equation."""
    theta, t = np.array([1 - a, a]), np.array([b, 1 - b])
    up, down = np.log(t[1] / theta[1]), np.log(theta[0] / t[0])
    if up < 1e-6 or down < 1e-6:
        return
    q = compute_q_star(theta, t, solve_kl_symmetry(theta, t, max_iter=ITERATIONS))
    np.testing.assert_allclose(q, [up / (up + down), down / (up + down)], atol=1e-7)


@pytest.mark.parametrize("k", [2, 3, 100])
@pytest.mark.parametrize("same_peak", [True, False])
def test_peaks_of_one_minus_1e_12(k, same_peak):
    rng = np.random.default_rng(k)
    rows = []
    for peak in (0, 0 if same_peak else 1):
        p = np.exp(rng.normal(size=k))
        p[peak] = 0
        p *= 1e-12 / p.sum()
        p[peak] = 1 - 1e-12
        rows.append(p)
    theta, t = rows
    alpha = solve_kl_symmetry(theta, t, max_iter=ITERATIONS)
    q = compute_q_star(theta, t, alpha)
    assert abs(kl(q, theta) - kl(q, t)) < TOLERANCE


@given(row_pairs())
def test_a_solved_q_lives_on_the_common_support(rows):
    """So that neither divergence is infinite, whichever model has tokens that the other lacks."""
    theta, t = rows
    alpha = solve_kl_symmetry(theta, t)
    q = compute_q_star(theta, t, alpha)
    assert np.all(q[(theta == 0) | (t == 0)] == 0)
    np.testing.assert_allclose(q, compute_q_star(t, theta, 1 - alpha), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize(
    ("theta", "t", "limit", "q"),
    [
        # Where both have mass π_θ has more of it, so ψ falls all the way to α = 1.
        ([0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.0, 0.8], NEAREST_1, [0.5, 0.5, 0.0, 0.0]),
        ([0.1, 0.0, 0.9], [0.6, 0.4, 0.0], NEAREST_0, [1.0, 0.0, 0.0]),
        ([0.9, 0.1, 0.0, 0.0], [0.05, 0.05, 0.5, 0.4], NEAREST_1, [0.5, 0.5, 0.0, 0.0]),
        ([1.0, 0.0], [0.3, 0.7], NEAREST_1, [1.0, 0.0]),
        ([0.5, 0.3, 0.2, 0.0], [0.0, 0.3, 0.3, 0.4], NEAREST_0, [0.0, 0.6, 0.4, 0.0]),
        ([0.5, 0.5, 0.0, 0.0], [0.0, 0.3, 0.7, 0.0], NEAREST_1, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_where_no_alpha_balances_q_is_the_limit_from_inside(theta, t, limit, q):
    theta, t = np.array(theta), np.array(t)
    assert bisect(theta, t) == pytest.approx(limit, abs=1e-15)
    assert solve_kl_symmetry(theta, t) == limit
    assert solve_kl_symmetry(t, theta) == 1 - limit
    np.testing.assert_allclose(compute_q_star(theta, t, limit), q, rtol=1e-12)
    np.testing.assert_allclose(compute_q_star(t, theta, 1 - limit), q, rtol=1e-12)


def test_disjoint_rows_are_refused_and_named():
    theta = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.8, 0.0]])
    t = np.array([[0.4, 0.6, 0.0], [0.0, 0.5, 0.5], [0.1, 0.9, 0.0]])
    with pytest.raises(ValueError, match=r"row 1\b.*top_k"):
        solve_kl_symmetry(theta, t)
    with pytest.raises(ValueError, match="share no token"):
        compute_q_star(theta[1], t[1], 0.5)
    assert compute_q_star(theta[1], t[1], 0.0).tolist() == theta[1].tolist()
    assert compute_q_star(theta[1], t[1], 1.0).tolist() == t[1].tolist()


@pytest.mark.parametrize(
    ("theta", "t", "message"),
    [
        ([0.5, 0.5], [1.0], "one common shape"),
        ([], [], "one common shape"),
        (0.5, 0.5, "one common shape"),
        ([[[1.0]]], [[[1.0]]], "one common shape"),
        ([0.5, np.nan], [0.5, 0.5], "probs_theta must hold finite"),
        ([0.5, 0.5], [0.5, np.inf], "probs_t must hold finite"),
        ([-0.7, -0.7], [0.5, 0.5], "log-probabilities"),
        ([0.5, 0.5], [0.0, 0.0], "probs_t has a row without any mass"),
    ],
)
def test_invalid_entries_are_refused(theta, t, message):
    with pytest.raises(ValueError, match=message):
        solve_kl_symmetry(np.array(theta), np.array(t))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, np.nan])
def test_alpha_outside_the_path_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must lie in"):
        compute_q_star(np.array([0.5, 0.5]), np.array([0.4, 0.6]), alpha)


def test_inputs_are_left_alone():
    theta, t = np.array([[2.0, 1.0]]), np.array([[1.0, 3.0]])
    solve_kl_symmetry(theta, t)
    compute_q_star(theta, t, 0.5)
    assert theta.tolist() == [[2.0, 1.0]] and t.tolist() == [[1.0, 3.0]]
