"""The law a position is sampled from: α and q* on the candidates of both lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dual_rollout.functional.alpha import entropy_alpha, ess_balance_alpha, kl_budget_alpha
from dual_rollout.functional.candidates import Candidates
from dual_rollout.functional.kl_symmetry import disjoint_rows, log_q_star, solve_alpha

AlphaMethod = Literal["kl_symmetry", "fixed", "ess_balance", "entropy", "kl_budget"]


@dataclass(frozen=True, slots=True)
class Law:
    """q* of B positions.

    Attributes:
        alpha: `(B,)`.
        log_q: `(B, S)` nats; `-inf` where q* has no mass.
        disjoint: `(B,)` bool; the lists shared no possible token there, so q* does not exist and the position is
            sampled from the policy (α = 0), or from the target (α = 1, weight 0) where all that the policy can say are
            tokens that the target does not have. Counted in the statistics, never silent.
    """

    alpha: np.ndarray
    log_q: np.ndarray
    disjoint: np.ndarray


def position_law(
    candidates: Candidates,
    *,
    method: AlphaMethod = "kl_symmetry",
    fixed_alpha: float | None = None,
    kl_budget: float | None = None,
    alpha_min: float = 0.0,
    alpha_max: float = 1.0,
) -> Law:
    """α by `method`, clipped to [alpha_min, alpha_max], and q_α ∝ π_θ^(1−α) π_t^α on the candidates.

    Args:
        fixed_alpha: the α of "fixed".
        kl_budget: the bound of "kl_budget" on KL(q_α‖π_θ), nats.

    Raises:
        ValueError: the method's own number is missing.
    """
    logp_theta, logp_t = candidates.logp_theta, candidates.logp_t
    disjoint = disjoint_rows(logp_theta, logp_t)
    alpha = np.zeros(len(disjoint))
    if disjoint.any():
        rows = ~disjoint
        alpha[rows] = _alpha(method, logp_theta[rows], logp_t[rows], fixed_alpha, kl_budget)
    else:
        alpha[:] = _alpha(method, logp_theta, logp_t, fixed_alpha, kl_budget)
    alpha = np.where(disjoint, np.isneginf(logp_theta).all(axis=1), np.clip(alpha, alpha_min, alpha_max))
    return Law(alpha, log_q_star(logp_theta, logp_t, alpha)[0], disjoint)


def _alpha(
    method: AlphaMethod,
    logp_theta: np.ndarray,
    logp_t: np.ndarray,
    fixed_alpha: float | None,
    kl_budget: float | None,
) -> np.ndarray | float:
    if method == "kl_symmetry":
        return solve_alpha(logp_theta, logp_t)
    if method == "ess_balance":
        return ess_balance_alpha(logp_theta, logp_t)
    if method == "entropy":
        return entropy_alpha(logp_theta, logp_t)
    if method == "fixed" and fixed_alpha is not None:
        return fixed_alpha
    if method == "kl_budget" and kl_budget is not None:
        return kl_budget_alpha(logp_theta, logp_t, kl_budget)
    needs = {"fixed": "fixed_alpha", "kl_budget": "kl_budget"}.get(method)
    raise ValueError(f"alpha_method {method!r} needs {needs}" if needs else f"unknown alpha_method {method!r}")
