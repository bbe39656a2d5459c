"""The geometric path between two distributions, and the point of it that is equally far from both.

For α in [0, 1] let q_α ∝ π_θ^(1−α) π_t^α and ψ(α) = log Σ π_θ^(1−α) π_t^α over the common support. Then
KL(q_α‖π_θ) − KL(q_α‖π_t) = ψ′(α) = E_q[ℓ] with ℓ = log π_t − log π_θ, and ψ″ = Var_q[ℓ] ≥ 0: the α of equal
divergence is the unique minimum of a convex function, the Chernoff point (Chernoff 1952; Nielsen 2013,
doi:10.1109/LSP.2013.2243726), where both divergences equal the Chernoff information −ψ(α).

Where the supports differ, the path is not continuous at its ends: q_0 is π_θ, while q_α for every α inside (0, 1), and
so the limit α → 0, lives on the common support. The limits are told from the ends by their α: `NEAREST_0` and
`NEAREST_1` are so near that q_α is the limit to the last digit.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

NEAREST_0 = 2.0**-53
NEAREST_1 = 1.0 - NEAREST_0
"""Stand for the limits α → 0 and α → 1 from inside (0, 1). Each is exactly 1 minus the other."""


def solve_kl_symmetry(probs_theta: Array, probs_t: Array, *, tol: float = 1e-10, max_iter: int = 12) -> float | Array:
    """The α at which q_α is equally far, in KL, from both distributions.

    Rows are normalised to sum to one first. Zero entries mean "not in the support". Identical rows give ½. The
    supports may differ so much that no α in (0, 1) balances the divergences. Then they are nearest to balance in the
    limit α → 0 or α → 1, and `NEAREST_0` or `NEAREST_1` is returned, with which `compute_q_star` gives q* on the common
    support.

    Args:
        probs_theta, probs_t: `(K,)` or `(B, K)` non-negative, finite.
        tol: bound on |KL(q‖π_θ) − KL(q‖π_t)|, nats.
        max_iter: evaluations at most.

    Returns:
        A float for 1-D inputs, else `(B,)` float64 inside (0, 1).

    Raises:
        ValueError: invalid entries, or a row whose supports are disjoint (q* does not exist there).
    """
    logp_theta, logp_t = _checked_logs(probs_theta, probs_t)
    alpha = solve_alpha(_normalised(logp_theta), _normalised(logp_t), tol=tol, max_iter=max_iter)
    return float(alpha[0]) if np.ndim(probs_theta) == 1 else alpha


def compute_q_star(probs_theta: Array, probs_t: Array, alpha: float | Array) -> Array:
    """q_α ∝ π_θ^(1−α) π_t^α, normalised, computed in log space.

    α = 0 and α = 1 return π_θ and π_t themselves, whatever the other's support; any α between them, however near to
    an end, a distribution on the common support.

    Args:
        probs_theta, probs_t: `(K,)` or `(B, K)` non-negative, finite.
        alpha: a float, or `(B,)`, in [0, 1].

    Returns:
        Probabilities of the inputs' shape; each row sums to one.

    Raises:
        ValueError: invalid entries or α, or disjoint supports at an α inside (0, 1).
    """
    logp_theta, logp_t = _checked_logs(probs_theta, probs_t)
    alpha = np.broadcast_to(np.asarray(alpha, dtype=np.float64), logp_theta.shape[:1])
    if not np.all((alpha >= 0) & (alpha <= 1)):
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    inside = (alpha > 0) & (alpha < 1)
    _refuse_disjoint(logp_theta[inside], logp_t[inside])
    q = np.exp(log_q_star(logp_theta, logp_t, alpha)[0])
    return q[0] if np.ndim(probs_theta) == 1 else q


def log_q_star(logp_theta: Array, logp_t: Array, alpha: Array) -> tuple[Array, Array]:
    """log q_α and ψ(α) from log-probabilities.

    Args:
        logp_theta, logp_t: `(B, K)` nats, `-inf` outside the support.
        alpha: `(B,)` in [0, 1]. Rows with disjoint supports need α = 0 or 1.

    Returns:
        `(B, K)` log q, and `(B,)` ψ(α) = log Σ π_θ^(1−α) π_t^α.
    """
    path = geometric_path(logp_theta, logp_t, alpha)
    peak = path.max(axis=1, keepdims=True)
    psi = peak + np.log(np.exp(path - peak).sum(axis=1, keepdims=True))
    return path - psi, psi[:, 0]


def log_partition(logp_theta: Array, logp_t: Array, alpha: Array) -> Array:
    """ψ(α) = log Σ π_θ^(1−α) π_t^α over the common support, for any real α (outside [0, 1] too); `(B,)` nats."""
    common = np.isfinite(logp_theta) & np.isfinite(logp_t)
    theta, t = np.where(common, logp_theta, -np.inf), np.where(common, logp_t, 0.0)
    return log_q_star(theta, t, alpha)[1]


def geometric_path(logp_theta: Array, logp_t: Array, alpha: Array) -> Array:
    """(1−α) log π_θ + α log π_t, with the convention 0 · (−inf) = 0; `(B, K)`."""
    alpha = alpha[:, None]
    with np.errstate(invalid="ignore"):
        path = (1.0 - alpha) * logp_theta + alpha * logp_t
    if np.any((alpha == 0) | (alpha == 1)):
        path = np.where(alpha == 0, logp_theta, np.where(alpha == 1, logp_t, path))
    return path


def solve_alpha(logp_theta: Array, logp_t: Array, *, tol: float = 1e-10, max_iter: int = 12) -> Array:
    """`solve_kl_symmetry` on normalised log-probabilities.

    Newton's method is applied not to ψ′ = A − B, where A = Σ_{ℓ>0} ℓ w and B = Σ_{ℓ<0} |ℓ| w with
    w = π_θ^(1−α) π_t^α, but to log A − log B: the same root, and a difference of log-sum-exps whose slope is
    bounded by the smallest and largest |ℓ|. It is exactly linear when two tokens matter, which is the hard case
    for ψ′ (a peaked row, where ψ″ underflows away from the root). A bracket guards the rest.

    Args:
        logp_theta, logp_t: `(B, K)` nats, `-inf` outside the support; every row has a common support.

    Returns:
        `(B,)` float64 inside (0, 1).

    Raises:
        ValueError: a row whose supports are disjoint.
    """
    _refuse_disjoint(logp_theta, logp_t)
    common = np.isfinite(logp_theta) & np.isfinite(logp_t)
    base = np.where(common, logp_theta, -np.inf)
    with np.errstate(invalid="ignore"):
        slope = np.where(common, logp_t - logp_theta, 0.0)

    found = np.full(len(base), 0.5)
    rows = np.flatnonzero(np.any(slope != 0.0, axis=1))
    base, slope, alpha = base[rows], slope[rows], found[rows]
    low, high = np.full_like(alpha, -1e-300), np.full_like(alpha, 1.0 + 1e-15)
    powers = _powers(slope)
    for _ in range(max_iter):
        imbalance, log_ratio, newton = _balance(base, slope, powers, alpha)
        low, high = np.where(log_ratio < 0, alpha, low), np.where(log_ratio > 0, alpha, high)
        # No root inside: ψ is monotone on the whole interval and its minimum is at the end just evaluated.
        at_end = (high <= 0.0) | (low >= 1.0)
        todo = (np.abs(imbalance) > tol) & ~at_end
        if not todo.any():
            break
        step = np.minimum(np.maximum(alpha + newton, 0.0), 1.0)
        middle = 0.5 * (np.maximum(low, 0.0) + np.minimum(high, 1.0))
        better = np.where((step > low) & (step < high), step, middle)
        alpha = np.where(todo, better, alpha)
        if 2 * np.count_nonzero(todo) <= len(rows):  # copying the others is less work than to go on with all
            found[rows] = alpha
            rows, base, slope, powers, alpha, low, high = (
                array[todo] for array in (rows, base, slope, powers, alpha, low, high)
            )
    found[rows] = alpha
    return np.clip(found, NEAREST_0, NEAREST_1)


def limit_from_inside(alpha: Array, logp_theta: Array, logp_t: Array) -> Array:
    """α `(B,)`, with 0 and 1 made the limits from inside (0, 1) where the end itself leaves the common support."""
    possible_theta, possible_t = np.isfinite(logp_theta), np.isfinite(logp_t)
    low = np.where(np.any(possible_theta & ~possible_t, axis=1), NEAREST_0, 0.0)
    high = np.where(np.any(possible_t & ~possible_theta, axis=1), NEAREST_1, 1.0)
    return np.clip(alpha, low, high)


def _powers(slope: Array) -> Array:
    """`(B, 5, K)`: of each ℓ the positive part, the negative part, the squares of both, and 1."""
    up = np.maximum(slope, 0.0)
    down = up - slope
    return np.stack([up, down, up * up, down * down, np.ones_like(slope)], axis=1)


def _balance(base: Array, slope: Array, powers: Array, alpha: Array) -> tuple[Array, Array, Array]:
    """ψ′(α), log A − log B and the Newton step for it, each `(B,)`; an empty side makes both infinite."""
    path = base + alpha[:, None] * slope
    weight = np.exp(path - path.max(axis=1, keepdims=True))
    a, b, a_rate, b_rate, total = (powers @ weight[:, :, None])[:, :, 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.log(a) - np.log(b)
        # Without one of the sides ψ is monotone, unless it underflowed: the step goes to the end, which tells.
        step = -log_ratio / np.where((a > 0) & (b > 0), a_rate / a + b_rate / b, 1.0)
    return (a - b) / total, log_ratio, step


def _checked_logs(probs_theta: Array, probs_t: Array) -> tuple[Array, Array]:
    theta, t = np.asarray(probs_theta, dtype=np.float64), np.asarray(probs_t, dtype=np.float64)
    if theta.shape != t.shape or theta.ndim not in (1, 2) or theta.shape[-1] == 0:
        raise ValueError(
            f"probs_theta and probs_t must have one common shape (K,) or (B, K), got {theta.shape} and {t.shape}"
        )
    for name, probs in (("probs_theta", theta), ("probs_t", t)):
        if not np.all(np.isfinite(probs) & (probs >= 0)):
            raise ValueError(f"{name} must hold finite probabilities >= 0 (did you pass log-probabilities?)")
        if not np.all(probs.reshape(-1, probs.shape[-1]).sum(axis=1) > 0):
            raise ValueError(f"{name} has a row without any mass")
    with np.errstate(divide="ignore"):
        return np.log(np.atleast_2d(theta)), np.log(np.atleast_2d(t))


def _normalised(logp: Array) -> Array:
    peak = logp.max(axis=1, keepdims=True)
    return logp - (peak + np.log(np.exp(logp - peak).sum(axis=1, keepdims=True)))


def _refuse_disjoint(logp_theta: Array, logp_t: Array) -> None:
    disjoint = disjoint_rows(logp_theta, logp_t)
    if disjoint.any():
        rows = ", ".join(map(str, np.flatnonzero(disjoint)[:5]))
        raise ValueError(
            f"the two distributions share no token with positive probability (row {rows}): no q between them "
            "exists. Raise top_k, or use alpha = 0 or 1 for such rows."
        )


def disjoint_rows(logp_theta: Array, logp_t: Array) -> Array:
    """`(B,)` bool: True where no token has positive probability under both."""
    return ~np.any(np.isfinite(logp_theta) & np.isfinite(logp_t), axis=1)
