"""What in a step's figures says that something is wrong, in words and with the likely reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_DRIFT = 0.1
"""Nats, mean over tokens. bfloat16 against float32 gives some hundredths."""
LEAST_ESS = 0.1


def alarms(logs: Mapping[str, Any]) -> dict[str, str]:
    """The alarms of a step, each under a name by which it is known again.

    Args:
        logs: the step's metrics, by the names under which they are logged.
    """
    found = {}
    drift = logs.get("sampling/policy_drift/mean", 0.0)
    if drift > MOST_DRIFT:
        found["drift"] = (
            f"The trainer's log π_θ is {drift:.2g} nats from the server's on average. Likely: bfloat16 on one side, "
            "dropout in the trainer's model, another base model or other adapters on the server."
        )
    ess = logs.get("sampling/effective_sample_size_ratio", 1.0)
    if ess < LEAST_ESS:
        found["ess"] = (
            f"The weights leave {100 * ess:.1f}% of the samples' worth (ESS): π_t is far from π_θ. A smaller "
            "dual_alpha_max or dual_alpha_method: kl_budget keeps q* nearer to the policy."
        )
    if logs.get("frac_reward_zero_std", 0.0) == 1.0:
        found["no signal"] = (
            "Within each group all rewards are equal, so this step trains nothing. Likely: the task is too hard or too "
            "easy, or num_generations too small."
        )
    return found
