"""The mathematics: numpy only, stateless, batched, float64, natural logarithms throughout."""

from dual_rollout.functional.alpha_methods import entropy_alpha, ess_balance_alpha, kl_budget_alpha
from dual_rollout.functional.candidates import TAIL_TOKEN, Candidates, merge_lists, merge_top_k_candidates
from dual_rollout.functional.diagnostics import compute_diagnostics
from dual_rollout.functional.distribution import NextTokenDistribution, next_token_distribution
from dual_rollout.functional.importance_weights import effective_sample_size, importance_weights, pareto_k
from dual_rollout.functional.kl_symmetry import compute_q_star, log_partition, solve_kl_symmetry
from dual_rollout.functional.sampling import sample_from_distribution, sample_rows

__all__ = [
    "TAIL_TOKEN",
    "Candidates",
    "NextTokenDistribution",
    "compute_diagnostics",
    "compute_q_star",
    "effective_sample_size",
    "entropy_alpha",
    "ess_balance_alpha",
    "importance_weights",
    "kl_budget_alpha",
    "log_partition",
    "merge_lists",
    "merge_top_k_candidates",
    "next_token_distribution",
    "pareto_k",
    "sample_from_distribution",
    "sample_rows",
    "solve_kl_symmetry",
]
