"""Rollouts from q* ∝ π_θ^(1−α)·π_t^α: sample between a policy and a target model, with exact importance weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dual_rollout.config import CoordinatorConfig
    from dual_rollout.coordinator import DualVLLMCoordinator, generate_with_optimal_sampling
    from dual_rollout.functional import (
        compute_diagnostics,
        compute_q_star,
        merge_top_k_candidates,
        sample_from_distribution,
        solve_kl_symmetry,
    )
    from dual_rollout.training.async_trainer import DualAsyncGRPOTrainer
    from dual_rollout.training.distillation import DualDistillationTrainer
    from dual_rollout.training.rloo import DualRLOOTrainer
    from dual_rollout.training.rollout import DualRollout
    from dual_rollout.training.rollout_batch import RolloutBatch
    from dual_rollout.training.trainer import DualGRPOTrainer
    from dual_rollout.types import GenerationOutput

__version__ = "0.1.0"

# Loaded on first use: a process that only coordinates never imports torch, and the numerics need numpy alone.
_HOME = {
    "CoordinatorConfig": "dual_rollout.config",
    "DualAsyncGRPOTrainer": "dual_rollout.training.async_trainer",
    "DualDistillationTrainer": "dual_rollout.training.distillation",
    "DualGRPOTrainer": "dual_rollout.training.trainer",
    "DualRLOOTrainer": "dual_rollout.training.rloo",
    "DualRollout": "dual_rollout.training.rollout",
    "DualVLLMCoordinator": "dual_rollout.coordinator",
    "GenerationOutput": "dual_rollout.types",
    "RolloutBatch": "dual_rollout.training.rollout_batch",
    "compute_diagnostics": "dual_rollout.functional",
    "compute_q_star": "dual_rollout.functional",
    "generate_with_optimal_sampling": "dual_rollout.coordinator",
    "merge_top_k_candidates": "dual_rollout.functional",
    "sample_from_distribution": "dual_rollout.functional",
    "solve_kl_symmetry": "dual_rollout.functional",
}

__all__ = [
    "CoordinatorConfig",
    "DualAsyncGRPOTrainer",
    "DualDistillationTrainer",
    "DualGRPOTrainer",
    "DualRLOOTrainer",
    "DualRollout",
    "DualVLLMCoordinator",
    "GenerationOutput",
    "RolloutBatch",
    "compute_diagnostics",
    "compute_q_star",
    "generate_with_optimal_sampling",
    "merge_top_k_candidates",
    "sample_from_distribution",
    "solve_kl_symmetry",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
