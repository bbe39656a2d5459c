"""Every way to choose α against its definition, by brute force on a grid and bisection, and by its properties."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_rollout import compute_diagnostics, compute_q_star
from dual_rollout.config import AlphaRule
from dual_rollout.functional import merge_lists, next_token_distribution
from dual_rollout.functional.alpha_methods import entropy_alpha, ess_balance_alpha, kl_budget_alpha
from dual_rollout.functional.top_k import TopK

GRID = np.linspace(0.0, 1.0, 2001)[1:-1]
SEEDS = st.integers(0, 2**32 - 1)
BUDGETS = st.sampled_from([1e-6, 1e-4, 0.01, 0.1, 0.5, 2.0])


def distributions(seed: int, batch: int = 1, zeros: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`(batch, K)` pairs, from nearly uniform to peaked; with `zeros`, some tokens impossible under one of them."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 12))
    pair = []
    for _ in range(2):
        p = np.exp(rng.normal(size=(batch, k)) * rng.uniform(0.1, 4.0))
        if zeros and k > 2:
            p[:, rng.integers(1, k)] = 0.0  # token 0 stays common
        pair.append(p / p.sum(axis=1, keepdims=True))
    return pair[0], pair[1]


def logs(*probs: np.ndarray) -> list[np.ndarray]:
    with np.errstate(divide="ignore"):
        return [np.log(p) for p in probs]


def kl(q: np.ndarray, p: np.ndarray) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)


def kl_theta(theta: np.ndarray, t: np.ndarray, alpha: float) -> float:
    return kl(compute_q_star(theta, t, alpha), theta)


def ess_difference(theta: np.ndarray, t: np.ndarray, alpha: float) -> float:
    """log ESS_t − log ESS_θ from the weights themselves; grows with α."""
    q = compute_q_star(theta, t, alpha)
    sizes = []
    for p in (theta, t):
        w = [b / a for a, b in zip(q, p, strict=True) if a > 0]
        mass = [a for a in q if a > 0]
        first = math.fsum(a * x for a, x in zip(mass, w, strict=True))
        sizes.append(2 * math.log(first) - math.log(math.fsum(a * x * x for a, x in zip(mass, w, strict=True))))
    return sizes[1] - sizes[0]


def sign_changes(values: list[float]) -> int:
    return int(np.count_nonzero(np.diff(np.sign([value for value in values if abs(value) > 1e-12]))))


def bisect(increasing: Callable[[float], float]) -> float:
    low, high = 1e-12, 1.0 - 1e-12
    if increasing(low) >= 0:
        return 0.0
    if increasing(high) <= 0:
        return 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)
    return 0.5 * (low + high)


@given(SEEDS, st.booleans())
def test_ess_balance_by_brute_force(seed, zeros):
    (theta,), (t,) = distributions(seed, zeros=zeros)
    alpha = ess_balance_alpha(*logs(theta[None], t[None]))[0]
    assert 0 <= alpha <= 1
    differences = [ess_difference(theta, t, a) for a in GRID[::50]]
    assert sign_changes(differences) <= 1, "the root is unique"
    spread = max(differences) - min(differences)
    if spread > 1e-3:  # below, rounding decides where the root is
        assert alpha == pytest.approx(bisect(lambda a: ess_difference(theta, t, a)), abs=1e-9)


@given(SEEDS)
def test_ess_balance_makes_the_effective_sample_sizes_equal(seed):
    theta, t = distributions(seed, batch=5)
    alpha = ess_balance_alpha(*logs(theta, t))
    ratio = compute_diagnostics(theta, t, compute_q_star(theta, t, alpha), alpha)["ess_ratio"]
    np.testing.assert_allclose(ratio, 1.0, atol=1e-7)


@given(SEEDS)
def test_ess_balance_sees_only_the_common_support(seed):
    """Restricting both distributions to what they share, and renormalising, changes no ratio of weights."""
    theta, t = distributions(seed, batch=3, zeros=True)
    common = (theta > 0) & (t > 0)
    cut = [np.where(common, p, 0.0) / np.where(common, p, 0.0).sum(axis=1, keepdims=True) for p in (theta, t)]
    np.testing.assert_allclose(ess_balance_alpha(*logs(theta, t)), ess_balance_alpha(*logs(*cut)), atol=1e-7)


@pytest.mark.parametrize("method", [ess_balance_alpha, entropy_alpha])
@given(SEEDS, st.booleans())
def test_swapping_the_models_mirrors_alpha(method, seed, zeros):
    theta, t = logs(*distributions(seed, batch=4, zeros=zeros))
    np.testing.assert_allclose(method(theta, t), 1.0 - method(t, theta), atol=1e-7)


@pytest.mark.parametrize("method", [ess_balance_alpha, entropy_alpha, lambda a, b: kl_budget_alpha(a, b, 0.1)])
@given(SEEDS, st.booleans())
def test_a_batch_equals_its_rows(method, seed, zeros):
    theta, t = logs(*distributions(seed, batch=6, zeros=zeros))
    rows = [method(theta[i : i + 1], t[i : i + 1])[0] for i in range(6)]
    np.testing.assert_array_equal(method(theta, t), rows)


@given(SEEDS, st.booleans())
def test_entropy_by_its_definition(seed, zeros):
    (theta,), (t,) = distributions(seed, zeros=zeros)
    h_theta, h_t = (-math.fsum(x * math.log(x) for x in p if x > 0) for p in (theta, t))
    assert entropy_alpha(*logs(theta[None], t[None]))[0] == pytest.approx(h_theta / (h_theta + h_t), abs=1e-12)


def test_entropy_of_certain_models():
    certain, open_ = np.array([[1.0, 0.0]]), np.array([[0.6, 0.4]])
    assert entropy_alpha(*logs(certain, open_))[0] == 0.0
    assert entropy_alpha(*logs(open_, certain))[0] == 1.0
    assert entropy_alpha(*logs(certain, certain))[0] == 0.5


@given(SEEDS, BUDGETS, st.booleans())
def test_kl_budget_by_brute_force(seed, budget, zeros):
    (theta,), (t,) = distributions(seed, zeros=zeros)
    alpha = kl_budget_alpha(*logs(theta[None], t[None]), budget)[0]
    assert kl_theta(theta, t, alpha) <= budget + 1e-12
    rows = [np.broadcast_to(p, (len(GRID), len(p))) for p in (theta, t)]
    divergences = compute_diagnostics(*rows, compute_q_star(*rows, GRID), GRID)["kl_theta"]
    assert np.all(np.diff(divergences) >= -1e-12), "the divergence grows with α"
    assert alpha >= max(GRID[divergences <= budget], default=0.0) - 1e-9, "no larger α keeps to the budget"
    assert alpha == pytest.approx(bisect(lambda a: kl_theta(theta, t, a) - budget), abs=1e-9)


@given(SEEDS, st.booleans())
def test_kl_budget_grows_with_the_budget_from_policy_to_target(seed, zeros):
    theta, t = logs(*distributions(seed, batch=4, zeros=zeros))
    alphas = [kl_budget_alpha(theta, t, budget) for budget in (0.0, 1e-8, 1e-3, 0.03, 0.3, 3.0, 1e6)]
    assert np.all(np.diff(alphas, axis=0) >= 0)
    np.testing.assert_array_equal(alphas[0], 0.0)
    assert np.all(alphas[-1] >= np.nextafter(1.0, 0.0))


def test_kl_budget_vanishes_like_its_square_root():
    """KL(q_α‖π_θ) = α² Var_π_θ(ℓ)/2 + O(α³)."""
    theta, t = np.array([[0.5, 0.3, 0.2]]), np.array([[0.2, 0.2, 0.6]])
    ell = np.log(t / theta)
    variance = float((theta * ell**2).sum() - (theta * ell).sum() ** 2)
    for budget in (1e-6, 1e-8, 1e-10):
        expected = math.sqrt(2 * budget / variance)
        assert kl_budget_alpha(*logs(theta, t), budget)[0] == pytest.approx(expected, rel=3 * expected)


def test_kl_budget_never_lets_the_target_say_what_the_policy_cannot():
    theta, t = np.array([0.5, 0.5, 0.0]), np.array([0.3, 0.3, 0.4])
    alpha = kl_budget_alpha(*logs(theta[None], t[None]), 10.0)[0]
    assert alpha < 1.0
    np.testing.assert_allclose(compute_q_star(theta, t, alpha), [0.5, 0.5, 0.0])


def test_kl_budget_below_the_price_of_the_common_support():
    """Any α > 0 loses the token that π_t cannot say, which alone costs −log 0.9."""
    theta, t = np.array([[0.1, 0.9, 0.0]]), np.array([[0.0, 0.9, 0.1]])
    assert kl_budget_alpha(*logs(theta, t), 0.1)[0] == 0.0
    assert kl_budget_alpha(*logs(theta, t), 0.11)[0] == np.nextafter(1.0, 0.0)


def by_token(distribution) -> np.ndarray:
    """q of what `candidates` make, where both lists hold every token, so that half of the columns are holes."""
    return np.exp(distribution.log_q[:, : distribution.log_q.shape[1] // 2])


SOLVED = {"kl_symmetry": {}, "ess_balance": {}, "entropy": {}, "kl_budget": {"kl_budget": 0.1}}


@pytest.mark.parametrize("method", SOLVED)
@given(SEEDS, st.booleans())
def test_a_solved_alpha_never_leaves_the_common_support(method, seed, certain):
    """But for the policy itself, α = 0, which is what a budget leaves that no other α keeps to."""
    theta, t = distributions(seed, batch=4, zeros=True)
    if certain:  # a model of no entropy, and another of too little for float64
        theta[0], theta[1, 1:] = np.eye(theta.shape[1])[0], 1e-300
        theta[1] /= theta[1].sum()
    distribution = next_token_distribution(candidates(theta, t), AlphaRule(alpha_method=method, **SOLVED[method]))
    q, common = by_token(distribution), (theta > 0) & (t > 0)
    policy = (distribution.alpha == 0) & (method == "kl_budget")
    assert np.all(q[~policy][~common[~policy]] == 0)
    np.testing.assert_allclose(q[policy], theta[policy], rtol=1e-12)
    loss = -np.log(np.where(common, theta, 0.0).sum(axis=1))
    assert np.all(loss[policy] > 0.1), "only where no α > 0 keeps to the budget"


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_an_end_that_is_asked_for_is_the_model_itself(end):
    """As `fixed_alpha` or as a bound: 0 is the policy and 1 the target, also where their supports differ."""
    theta, t = np.array([[0.5, 0.3, 0.2, 0.0]]), np.array([[0.0, 0.3, 0.3, 0.4]])
    for options in (
        {"alpha_method": "fixed", "fixed_alpha": end},
        {"alpha_max": 0.0} if end == 0 else {"alpha_min": 1.0},
    ):
        distribution = next_token_distribution(candidates(theta, t), AlphaRule(**options))
        assert distribution.alpha[0] == end
        np.testing.assert_allclose(by_token(distribution), t if end else theta, rtol=1e-12)


def test_identical_models():
    (p,) = logs(np.array([[0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25]]))
    assert ess_balance_alpha(p, p).tolist() == [0.5, 0.5]
    assert entropy_alpha(p, p).tolist() == [0.5, 0.5]
    assert kl_budget_alpha(p, p, 0.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", [ess_balance_alpha, lambda a, b: kl_budget_alpha(a, b, 0.5)])
def test_distributions_as_peaked_as_those_of_language_models(method):
    """50,000 tokens, one of them with nearly all mass, not the same one: the hard case for Newton's method."""
    rng = np.random.default_rng(0)
    pair = []
    for top in (0, 1):
        logits = rng.normal(size=(3, 50_000))
        logits[:, top] += np.array([12.0, 25.0, 60.0])
        pair.append(logits - logits.max(axis=1, keepdims=True))
        pair[-1] -= np.log(np.exp(pair[-1]).sum(axis=1, keepdims=True))
    alpha = method(*pair)
    definition = ess_difference if method is ess_balance_alpha else lambda *args: kl_theta(*args) - 0.5
    for row in range(3):
        theta, t = np.exp(pair[0][row]), np.exp(pair[1][row])
        around = [definition(theta, t, float(np.clip(alpha[row] + step, 0, 1))) for step in (-1e-8, 1e-8)]
        assert around[0] <= 0 <= around[1]


def candidates(theta: np.ndarray, t: np.ndarray):
    ids = np.broadcast_to(np.arange(theta.shape[1]), theta.shape).copy()
    return merge_lists(TopK(ids, logs(theta)[0]), TopK(ids, logs(t)[0]))


def test_the_distribution_follows_the_method_and_then_the_bounds():
    theta, t = distributions(7, batch=8)
    numbers = {"fixed": {"fixed_alpha": 0.3}, "kl_budget": {"kl_budget": 0.05}}
    expected = {
        "ess_balance": ess_balance_alpha(*logs(theta, t)),
        "entropy": entropy_alpha(*logs(theta, t)),
        "kl_budget": kl_budget_alpha(*logs(theta, t), 0.05),
        "fixed": np.full(8, 0.3),
    }
    for method, alpha in expected.items():
        options = {"alpha_method": method, **numbers.get(method, {})}
        free = next_token_distribution(candidates(theta, t), AlphaRule(**options))
        np.testing.assert_allclose(free.alpha, alpha, atol=1e-9)
        low, high = np.quantile(alpha, [0.3, 0.6])
        bound = next_token_distribution(candidates(theta, t), AlphaRule(alpha_min=low, alpha_max=high, **options))
        np.testing.assert_allclose(bound.alpha, np.clip(alpha, low, high), atol=1e-9)
        np.testing.assert_allclose(np.exp(bound.log_q).sum(axis=1), 1.0)


@pytest.mark.parametrize("method", [*SOLVED, "fixed"])
def test_disjoint_rows_are_left_to_the_policy(method):
    theta, t = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.9, 0.1]])
    options = {"fixed_alpha": 0.4} if method == "fixed" else SOLVED[method]
    distribution = next_token_distribution(candidates(theta, t), AlphaRule(alpha_method=method, **options))
    assert distribution.disjoint.tolist() == [True, False]
    assert distribution.alpha[0] == 0 and 0 < distribution.alpha[1] < 1
    assert np.exp(distribution.log_q[0]).max() == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha_method": "half"}, "alpha_method must be one of"),
        ({"fixed_alpha": 0.5}, "fixed_alpha is set, but"),
        ({"kl_budget": 0.5}, "kl_budget is set, but"),
        ({"alpha_method": "fixed"}, "fixed_alpha must be set"),
        ({"alpha_method": "kl_budget"}, "kl_budget must be set"),
        ({"alpha_method": "fixed", "fixed_alpha": 1.5}, "fixed_alpha must be a number"),
        ({"alpha_method": "kl_budget", "kl_budget": -1.0}, "kl_budget must be a finite number"),
        ({"alpha_method": "kl_budget", "kl_budget": float("nan")}, "kl_budget must be a finite number"),
        ({"alpha_min": 0.6, "alpha_max": 0.5}, "must not exceed"),
        ({"alpha_max": "1"}, "alpha_max must be a number"),
    ],
)
def test_rules_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AlphaRule(**values)
