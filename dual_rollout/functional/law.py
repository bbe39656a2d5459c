"""The law a position is sampled from: α and q* on the candidates of both lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dual_rollout.functional.candidates import Candidates
from dual_rollout.functional.kl_symmetry import disjoint_rows, log_q_star, solve_alpha

AlphaMethod = Literal["kl_symmetry", "fixed"]


@dataclass(frozen=True, slots=True)
class Law:
    """q* of B positions.

    Attributes:
        alpha: `(B,)`.
        log_q: `(B, S)` nats; `-inf` where q* has no mass.
        disjoint: `(B,)` bool; the lists shared no possible token there, so q* does not exist and the position is
            sampled from the policy (α = 0). Counted in the statistics, never silent.
    """

    alpha: np.ndarray
    log_q: np.ndarray
    disjoint: np.ndarray


def position_law(
    candidates: Candidates,
    *,
    method: AlphaMethod = "kl_symmetry",
    fixed_alpha: float | None = None,
    alpha_min: float = 0.0,
    alpha_max: float = 1.0,
) -> Law:
    """α by `method`, clipped to [alpha_min, alpha_max], and q_α ∝ π_θ^(1−α) π_t^α on the candidates."""
    disjoint = disjoint_rows(candidates.logp_theta, candidates.logp_t)
    alpha = np.zeros(len(disjoint))
    if method == "kl_symmetry":
        if disjoint.any():
            rows = ~disjoint
            alpha[rows] = solve_alpha(candidates.logp_theta[rows], candidates.logp_t[rows])
        else:
            alpha = solve_alpha(candidates.logp_theta, candidates.logp_t)
    else:
        alpha[:] = fixed_alpha
    alpha = np.where(disjoint, 0.0, np.clip(alpha, alpha_min, alpha_max))
    return Law(alpha, log_q_star(candidates.logp_theta, candidates.logp_t, alpha)[0], disjoint)
