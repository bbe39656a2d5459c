"""Ways to choose α besides KL symmetry, each for a whole batch at once.

All take log-probabilities that are normalised per row, `-inf` outside the support, rows that share at least one token
(see `disjoint_rows`), and give `(B,)` float64 in [0, 1]. Where the end of [0, 1] would leave the common support, the
limit from inside takes its place (see `kl_symmetry`), but for the policy itself under `kl_budget_alpha`. Notation as
in `kl_symmetry`: ℓ = log π_t − log π_θ and ψ(α) = log Σ π_θ^(1−α) π_t^α over the common support.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dual_rollout.functional.kl_symmetry import NEAREST_0, NEAREST_1, limit_from_inside

Array = np.ndarray

_TOLERANCE = 1e-10  # width of the last bracket around α
_MAX_ROUNDS = 120  # bisection in every third round alone closes the bracket sooner


def ess_balance_alpha(logp_theta: Array, logp_t: Array) -> Array:
    """The α at which samples of q_α are worth equally much for π_θ and for π_t: ESS_θ = ESS_t.

    With importance weights over the common support, ESS_θ = exp(2ψ(0) − ψ(α) − ψ(−α)) and
    ESS_t = exp(2ψ(1) − ψ(α) − ψ(2−α)), so α solves f(α) = ψ(2−α) − 2ψ(1) − ψ(−α) + 2ψ(0) = 0. By convexity of ψ,
    f(0) ≥ 0 ≥ f(1) and f′(α) = ψ′(−α) − ψ′(2−α) ≤ 0, strictly unless ℓ is constant: the root is unique and lies in
    [0, 1]. A constant ℓ gives ½.
    """
    base, slope = _common(logp_theta, logp_t)
    zero = np.zeros(len(base))
    offset = 2.0 * (_cumulants(base, slope, zero + 1.0)[0] - _cumulants(base, slope, zero)[0])

    def imbalance(rows: Array, alpha: Array) -> tuple[Array, Array]:
        left, left_mean, _ = _cumulants(base[rows], slope[rows], -alpha)
        right, right_mean, _ = _cumulants(base[rows], slope[rows], 2.0 - alpha)
        return left - right + offset[rows], right_mean - left_mean

    alpha = zero + 0.5
    rows = np.flatnonzero(~_constant(base, slope))
    low, high = _bracket(imbalance, rows, len(base))
    alpha[rows] = 0.5 * (low + high)[rows]
    return alpha


def entropy_alpha(logp_theta: Array, logp_t: Array) -> Array:
    """α = H(π_θ) / (H(π_θ) + H(π_t)): the less certain model has the smaller say; ½ where both are certain.

    Dividing both entropies by log K, to bring them to [0, 1], would change nothing. A model without entropy decides
    alone: q is π_θ at H(π_θ) = 0 and π_t at H(π_t) = 0.
    """
    theta, t = _entropy(logp_theta), _entropy(logp_t)
    total = theta + t
    alpha = np.where(total > 0, theta / np.where(total > 0, total, 1.0), 0.5)
    return limit_from_inside(alpha, logp_theta, logp_t)


def kl_budget_alpha(logp_theta: Array, logp_t: Array, budget: float) -> Array:
    """The largest α with KL(q_α‖π_θ) ≤ `budget` nats.

    KL(q_α‖π_θ) = α ψ′(α) − ψ(α) has the derivative α ψ″(α) ≥ 0, so the α that keep to the budget are an interval that
    begins at 0. Newton's method is applied to the square root of the divergence, which is nearly linear in α. Identical
    rows give 1. Where π_t can say what π_θ cannot, q_1 = π_t would be infinitely far from π_θ and the limit α → 1 takes
    its place. Where π_θ can say what π_t cannot, every α > 0 costs −log of π_θ's mass on the common support at once: if
    that exceeds the budget, the policy itself is left, α = 0, and else the limit α → 0 at least.
    """
    base, slope = _common(logp_theta, logp_t)
    ones = np.ones(len(base))

    def excess(rows: Array, alpha: Array) -> tuple[Array, Array]:
        psi, mean, variance = _cumulants(base[rows], slope[rows], alpha)
        root = np.sqrt(np.maximum(alpha * mean - psi, 0.0))
        return root - np.sqrt(budget), alpha * variance / np.where(root > 0, 2.0 * root, np.inf)

    every = np.arange(len(base))
    identical = _constant(base, slope) & np.all(np.isfinite(logp_theta) == np.isfinite(logp_t), axis=1)
    unbounded = identical | (excess(every, ones)[0] <= 0)
    open_end = np.any(np.isfinite(logp_t) & ~np.isfinite(logp_theta), axis=1)
    alpha = np.where(unbounded, np.where(open_end, NEAREST_1, 1.0), 0.0)
    rows = np.flatnonzero(~unbounded & (excess(every, 0.0 * ones)[0] < 0))
    alpha[rows] = np.maximum(_bracket(excess, rows, len(base))[0][rows], NEAREST_0)
    return alpha


def _common(logp_theta: Array, logp_t: Array) -> tuple[Array, Array]:
    """log π_θ and ℓ on the common support, `-inf` and 0 elsewhere; `(B, K)` each."""
    common = np.isfinite(logp_theta) & np.isfinite(logp_t)
    base = np.where(common, logp_theta, -np.inf)
    return base, np.where(common, logp_t, 0.0) - np.where(common, logp_theta, 0.0)


def _constant(base: Array, slope: Array) -> Array:
    """`(B,)` bool: whether ℓ is the same at every common token, and q_α thus the same for every α inside (0, 1)."""
    common = np.isfinite(base)
    return np.where(common, slope, -np.inf).max(axis=1) == np.where(common, slope, np.inf).min(axis=1)


def _cumulants(base: Array, slope: Array, alpha: Array) -> tuple[Array, Array, Array]:
    """ψ, ψ′ and ψ″ at any real α, `(B,)` each: the log-partition, and mean and variance of ℓ under q_α."""
    path = base + alpha[:, None] * slope
    peak = path.max(axis=1, keepdims=True)
    q = np.exp(path - peak)
    total = q.sum(axis=1, keepdims=True)
    q /= total
    mean = np.einsum("bk,bk->b", q, slope)
    variance = np.einsum("bk,bk->b", q, np.square(slope - mean[:, None]))
    return (peak + np.log(total))[:, 0], mean, variance


def _entropy(logp: Array) -> Array:
    possible = np.isfinite(logp)
    return np.maximum(-(np.exp(logp) * np.where(possible, logp, 0.0)).sum(axis=1), 0.0)


def _bracket(evaluate: Callable[[Array, Array], tuple[Array, Array]], rows: Array, batch: int) -> tuple[Array, Array]:
    """Where increasing functions on [0, 1] change sign, between `low` and `high` at most 1e-10 apart; `(batch,)` each.

    Newton's method, aimed a little beyond its own estimate so that the bracket closes from both sides; after six
    rounds every third one bisects, so that the end is certain whatever the function. `evaluate(rows, alpha)` gives
    value and slope.
    """
    low, high = np.zeros(batch), np.ones(batch)
    alpha = np.full(batch, 0.5)
    for count in range(_MAX_ROUNDS):
        if not len(rows):
            break
        value, rate = evaluate(rows, alpha[rows])
        low[rows] = np.where(value < 0, alpha[rows], low[rows])
        high[rows] = np.where(value < 0, high[rows], alpha[rows])
        wide = high[rows] - low[rows] > _TOLERANCE
        rows, value, rate = rows[wide], value[wide], rate[wide]
        middle = 0.5 * (low[rows] + high[rows])
        step = -value / np.where(rate > 0, rate, np.nan)
        newton = alpha[rows] + step + np.copysign(0.4 * _TOLERANCE, step)
        inside = (newton > low[rows]) & (newton < high[rows]) & (count < 6 or count % 3 > 0)
        alpha[rows] = np.where(inside, newton, middle)
    return low, high
