"""The distribution of the next token: α and q* on the candidates of both lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dual_rollout.config import AlphaRule
from dual_rollout.functional.alpha_methods import entropy_alpha, ess_balance_alpha, kl_budget_alpha
from dual_rollout.functional.candidates import Candidates
from dual_rollout.functional.kl_symmetry import disjoint_rows, log_q_star, solve_alpha

ALPHA_METHODS: Mapping[str, Callable[[Any, np.ndarray, np.ndarray], Any]] = {
    "kl_symmetry": lambda rule, logp_theta, logp_t: solve_alpha(logp_theta, logp_t),
    "fixed": lambda rule, logp_theta, logp_t: rule.fixed_alpha,
    "ess_balance": lambda rule, logp_theta, logp_t: ess_balance_alpha(logp_theta, logp_t),
    "entropy": lambda rule, logp_theta, logp_t: entropy_alpha(logp_theta, logp_t),
    "kl_budget": lambda rule, logp_theta, logp_t: kl_budget_alpha(logp_theta, logp_t, rule.kl_budget),
}
"""What gives α, `(B,)` or one for all rows, before its bounds: by an `AlphaRule`, for each of `config.AlphaMethod`."""


@dataclass(frozen=True, slots=True)
class NextTokenDistribution:
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


def next_token_distribution(candidates: Candidates, rule: AlphaRule = AlphaRule()) -> NextTokenDistribution:  # noqa: B008
    """α by `rule`, clipped to its bounds, and q_α ∝ π_θ^(1−α) π_t^α on the candidates."""
    logp_theta, logp_t = candidates.logp_theta, candidates.logp_t
    disjoint = disjoint_rows(logp_theta, logp_t)
    alpha, solve = np.zeros(len(disjoint)), ALPHA_METHODS[rule.alpha_method]
    if disjoint.any():
        rows = ~disjoint
        alpha[rows] = solve(rule, logp_theta[rows], logp_t[rows])
    else:
        alpha[:] = solve(rule, logp_theta, logp_t)
    alpha = np.where(disjoint, np.isneginf(logp_theta).all(axis=1), np.clip(alpha, rule.alpha_min, rule.alpha_max))
    return NextTokenDistribution(alpha, log_q_star(logp_theta, logp_t, alpha)[0], disjoint)
