"""What an evaluation of the policy says: its mean reward, of how many rows, and an interval for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_Z = 1.96  # of a normal distribution, for 95%


def rewards_of_rows(rewards: Sequence[float], completions: int) -> list[float]:
    """The mean reward of each row's completions; rows of which none was rewarded are left out.

    Args:
        rewards: of all completions, those of a row one after the other; NaN where no function gave one.
        completions: drawn for each row. They are not independent of each other, as rows are.
    """
    rows = [rewards[start : start + completions] for start in range(0, len(rewards), completions)]
    rewarded = [[reward for reward in row if not math.isnan(reward)] for row in rows]
    return [math.fsum(row) / len(row) for row in rewarded if row]


def interval(rewards: Sequence[float]) -> tuple[float, float]:
    """A 95% interval for the mean reward of all such rows.

    Of rewards that are 0 or 1 it is Wilson's (1927), which keeps its level for few rows and for shares near 0 and 1; of
    others, the mean ± 1.96 standard errors.

    Args:
        rewards: of rows that were drawn independently, at least one.
    """
    count, mean = len(rewards), math.fsum(rewards) / len(rewards)
    if set(rewards) <= {0.0, 1.0}:
        middle = (mean + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
        half = _Z / (1 + _Z**2 / count) * math.sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
        return max(0.0, middle - half), min(1.0, middle + half)
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / max(count - 1, 1)
    half = _Z * math.sqrt(variance / count)
    return mean - half, mean + half


def before_and_after(entries: Sequence[Mapping[str, Any]]) -> str:
    """The policy's own reward before and after a run, in words; nothing where it was not evaluated twice.

    Args:
        entries: of metrics.jsonl, with `eval_reward` and its `_rows`, `_low` and `_high`.
    """
    found = [entry for entry in entries if entry.get("eval_reward_rows") is not None]
    if len(found) < 2 or found[0]["step"] == found[-1]["step"]:
        return ""
    first, last = found[0], found[-1]
    lines = [
        f"The policy alone, on {first['eval_reward_rows']:.0f} held-out rows (95% intervals):",
        *(
            f"  after {entry['step']:>4} steps  reward {entry['eval_reward']:.3f}  "
            f"({entry['eval_reward_low']:.3f} to {entry['eval_reward_high']:.3f})"
            for entry in (first, last)
        ),
    ]
    if last["eval_reward_low"] > first["eval_reward_high"]:
        lines.append("It got better by more than chance explains.")
    elif last["eval_reward_high"] < first["eval_reward_low"]:
        lines.append("It got worse by more than chance explains.")
    else:
        lines.append("The intervals overlap: so few steps and rows show no difference.")
    return "\n".join([*lines, ""])
