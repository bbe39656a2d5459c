"""How far q* is from both models at a position, and what its weights are worth."""

from __future__ import annotations

import numpy as np


def compute_diagnostics(
    probs_theta: np.ndarray,
    probs_t: np.ndarray,
    q: np.ndarray,
    alpha: float | np.ndarray,
    *,
    coverage_theta: float | np.ndarray | None = None,
    coverage_t: float | np.ndarray | None = None,
) -> dict[str, float | np.ndarray]:
    """Divergences (nats), effective sample sizes (fractions) and entropy (nats) of one position or a batch.

    For q = q_α of two normalised distributions the effective sample sizes have the closed forms
    ESS_θ = exp(−ψ(α) − ψ(−α)) and ESS_t = exp(−ψ(α) − ψ(2−α)).

    Args:
        probs_theta, probs_t, q: `(K,)` or `(B, K)`, each row normalised.
        alpha: the α of q, passed through to the result.
        coverage_theta, coverage_t: mass of each model's list, where known.

    Returns:
        Floats for 1-D inputs, else `(B,)` arrays: `alpha`, `kl_theta`, `kl_t`, `kl_diff` (absolute), `ess_theta`,
        `ess_t`, `ess_ratio` (ESS_θ/ESS_t), `entropy_q`, and the coverages that were given.
    """
    theta, t, q_ = (np.atleast_2d(np.asarray(p, dtype=np.float64)) for p in (probs_theta, probs_t, q))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.where(q_ > 0, np.log(q_), 0.0)
        kl_theta = np.where(q_ > 0, q_ * (log_q - np.log(theta)), 0.0).sum(axis=1)
        kl_t = np.where(q_ > 0, q_ * (log_q - np.log(t)), 0.0).sum(axis=1)
        ess_theta, ess_t = _ess(theta, q_), _ess(t, q_)
        rows = {
            "alpha": np.broadcast_to(np.asarray(alpha, dtype=np.float64), kl_theta.shape),
            "kl_theta": kl_theta,
            "kl_t": kl_t,
            "kl_diff": np.abs(kl_theta - kl_t),
            "ess_theta": ess_theta,
            "ess_t": ess_t,
            "ess_ratio": ess_theta / ess_t,
            "entropy_q": -(q_ * log_q).sum(axis=1),
        }
    for name, coverage in (("coverage_theta", coverage_theta), ("coverage_t", coverage_t)):
        if coverage is not None:
            rows[name] = np.broadcast_to(np.asarray(coverage, dtype=np.float64), kl_theta.shape)
    return {name: float(row[0]) for name, row in rows.items()} if np.ndim(q) == 1 else rows


def _ess(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(E_q w)²/E_q[w²] with w = p/q on the support of q, 0 where p has no mass there; `(B,)`."""
    weights = np.divide(p, q, out=np.zeros_like(p), where=q > 0)
    squares = (q * np.square(weights)).sum(axis=1)
    return np.square((q * weights).sum(axis=1)) / np.where(squares > 0, squares, 1.0)
