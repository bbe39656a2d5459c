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
    with np.errstate(divide="ignore"):
        logp_theta, logp_t, log_q = (
            np.log(np.atleast_2d(np.asarray(p, dtype=np.float64))) for p in (probs_theta, probs_t, q)
        )
    rows = log_diagnostics(logp_theta, logp_t, log_q, alpha)
    for name, coverage in (("coverage_theta", coverage_theta), ("coverage_t", coverage_t)):
        if coverage is not None:
            rows[name] = np.broadcast_to(np.asarray(coverage, dtype=np.float64), rows["alpha"].shape)
    return {name: float(row[0]) if np.ndim(q) == 1 else row for name, row in rows.items()}


def log_diagnostics(
    logp_theta: np.ndarray, logp_t: np.ndarray, log_q: np.ndarray, alpha: float | np.ndarray
) -> dict[str, np.ndarray]:
    """`compute_diagnostics` of `(B, K)` log-probabilities, of which none is too small to be told from 0."""
    q = np.exp(log_q)
    possible = log_q > -np.inf
    finite_log_q = np.where(possible, log_q, 0.0)
    kl_theta, kl_t = (
        np.where(possible, q * (finite_log_q - np.where(q > 0, logp, 0.0)), 0.0).sum(axis=1)
        for logp in (logp_theta, logp_t)
    )
    ess_theta, ess_t = (_ess(np.where(possible, logp, -np.inf), finite_log_q) for logp in (logp_theta, logp_t))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "alpha": np.broadcast_to(np.asarray(alpha, dtype=np.float64), kl_theta.shape),
            "kl_theta": kl_theta,
            "kl_t": kl_t,
            "kl_diff": np.abs(kl_theta - kl_t),
            "ess_theta": ess_theta,
            "ess_t": ess_t,
            "ess_ratio": ess_theta / ess_t,
            "entropy_q": -(q * finite_log_q).sum(axis=1),
        }


def _ess(logp: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """(E_q w)²/E_q[w²] with w = p/q, 0 where p has no mass on the support of q; `(B,)`."""
    peak = logp.max(axis=1, keepdims=True)
    scaled = logp - np.where(peak > -np.inf, peak, 0.0)
    exponent = 2.0 * scaled - log_q
    peak = exponent.max(axis=1, keepdims=True)
    peak = np.where(peak > -np.inf, peak, 0.0)
    squares = np.exp(exponent - peak).sum(axis=1)
    return np.square(np.exp(scaled).sum(axis=1)) * np.exp(-peak[:, 0]) / np.where(squares > 0, squares, 1.0)
