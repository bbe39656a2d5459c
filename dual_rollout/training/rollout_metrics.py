"""What a rollout logs through its trainer, over all tokens of all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.functional.importance_weights import pareto_k
from dual_rollout.types import GenerationOutput


def log_rollout(trainer: Any, outputs: Sequence[GenerationOutput], retries: int, seconds: float) -> None:
    """Add this rollout's figures to the trainer's metrics, over all tokens of all processes.

    Tokens without a target count with α = 0 and the weight 1, and not at all where π_t is needed.
    """
    weights = np.concatenate([output.importance_weights for output in outputs])
    mass = [np.minimum(output.diagnostics["coverage_theta"], output.diagnostics["coverage_t"]) for output in outputs]
    residual = [output.diagnostics["kl_diff"] for output in outputs]
    kl = [output.diagnostics["kl_theta"] for output in outputs]
    alpha = np.concatenate([output.alpha_history for output in outputs])
    log_over_processes(trainer, "sampling/rollout_weight", weights)
    log_over_processes(trainer, "sampling/alpha", alpha)
    log_over_processes(trainer, "sampling/kl", np.concatenate(kl), ("mean", "max"))
    log_over_processes(trainer, "sampling/kl_residual", np.concatenate(residual), ("max",))
    log_over_processes(trainer, "sampling/top_k_mass", np.concatenate(mass), ("min", "mean"))
    tokens, first, second, tail, called, timed = (
        over_processes(trainer.accelerator, values)
        for values in (alpha, weights, weights**2, [pareto_k(weights)], [retries], [seconds])
    )
    metrics = trainer._metrics[mode_of(trainer)]
    if first:
        metrics["sampling/effective_sample_size_ratio"].append(first["mean"] ** 2 / max(second["mean"], _TINY))
    if tail:  # of the process with the heaviest
        metrics["sampling/pareto_k"].append(tail["max"])
    metrics["rollout/tokens_per_second"].append(tokens["count"] / timed["max"])
    metrics["rollout/seconds"].append(timed["max"])
    metrics["rollout/retry_total"].append(called["mean"] * called["count"])


_TINY = 1e-37  # in place of a sum of squares that float32 has rounded to 0


def log_over_processes(
    trainer: Any, name: str, values: Any, reductions: Sequence[str] = ("min", "mean", "max")
) -> None:
    """Add `<name>/<reduction>` of all processes' values to the trainer's metrics, where any process has some.

    All processes must call it.
    """
    found = over_processes(trainer.accelerator, values)
    for reduce in reductions if found else ():
        trainer._metrics[mode_of(trainer)][f"{name}/{reduce}"].append(found[reduce])


def over_processes(accelerator: Any, values: Any) -> dict[str, float]:
    """`count`, `min`, `mean` and `max` of all processes' values, each of which counts once, but for NaN; {} for none.

    All processes must call it.

    Args:
        values: 1-D, a tensor or what makes one; as many as this process has.
    """
    values = torch.as_tensor(values, dtype=torch.float32).to(accelerator.device)
    values = values[~values.isnan()]
    edges = (values.min(), values.max()) if len(values) else (values.new_tensor(math.inf), values.new_tensor(-math.inf))
    own = torch.stack([values.new_tensor(float(len(values))), values.sum(), *edges])
    count, total, low, high = accelerator.gather(own).view(-1, 4).T
    if count.sum() == 0:
        return {}
    return {
        "count": count.sum().item(),
        "min": low.min().item(),
        "mean": (total.sum() / count.sum()).item(),
        "max": high.max().item(),
    }


_COUNTS = ("draft_tokens", "accepted_tokens", "policy_tokens", "lost_target_tokens", "restarts", "cache_waits")


def token_counts(stats: DecodingStats) -> np.ndarray:
    """Tokens so far, for `log_token_counts`."""
    return np.array([getattr(stats, name) for name in _COUNTS])


def log_token_counts(trainer: Any, local: np.ndarray) -> None:
    """Of this rollout, over all processes: the share of draft tokens that q* accepted, where any were drafted; tokens
    drawn from π_θ alone, and those of them for which π_t's server was gone; pairs that a native server began again, and
    those that waited for room in its KV cache, where there are any."""
    counts = torch.tensor(local, dtype=torch.float32, device=trainer.accelerator.device)
    total = trainer.accelerator.gather(counts).view(-1, len(_COUNTS)).sum(dim=0).tolist()
    drafted, accepted, policy_only, lost, restarts, cache_waits = total
    metrics = trainer._metrics[mode_of(trainer)]
    metrics["rollout/policy_only_tokens"].append(policy_only)
    metrics["rollout/lost_target_tokens"].append(lost)
    if drafted:
        metrics["spec_decode/acceptance_rate"].append(accepted / drafted)
    for name, count in (("rollout/pair_restarts", restarts), ("rollout/cache_waits", cache_waits)):
        if count:
            metrics[name].append(count)


def log_completion_columns(trainer: Any, rows: Sequence[Sequence[GenerationOutput]]) -> None:
    """Two columns of the table that `log_completions` shows: each completion's mean α and mean weight per token.

    Args:
        rows: what was drawn for each completion, turn by turn.
    """
    if not hasattr(trainer, "_log_completion_extra"):
        return
    for name, column in (("alpha", "alpha"), ("importance_weight", "importance_weights")):
        drawn = [np.concatenate([getattr(output, column) for output in turns]) for turns in rows]
        trainer._log_completion_extra(name, [round(float(np.mean(values)), 4) for values in drawn])


def mode_of(trainer: Any) -> str:
    """TRL's names of its metrics: "train" or "eval"."""
    return "train" if trainer.model.training else "eval"
