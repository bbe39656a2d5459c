"""What a coordinator counts and measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.tuner import Tuner
from dual_rollout.prompt_encoder import PromptStats
from dual_rollout.servers.http import HttpStats


@dataclass(slots=True)
class CoordinatorStats:
    """Totals over a coordinator's life.

    Attributes:
        theta, t: requests to each server; `targets` those of further targets by name.
        prompts: what was done to prompts.
        seconds: time spent inside generate calls.
        tuners: what measures the ways to decode, by the name of the target; `"t_url"` for the one there.
    """

    decoding: DecodingStats = field(default_factory=DecodingStats)
    theta: HttpStats = field(default_factory=HttpStats)
    t: HttpStats = field(default_factory=HttpStats)
    targets: dict[str, HttpStats] = field(default_factory=dict)
    prompts: PromptStats = field(default_factory=PromptStats)
    seconds: float = 0.0
    tuners: dict[str, Tuner] = field(default_factory=dict)

    @classmethod
    def of(cls, decoding: DecodingStats, traffic: Mapping[str, HttpStats]) -> CoordinatorStats:
        """Of what the samplers count, and of the requests to "theta", "t" and further targets."""
        targets = dict(traffic)
        return cls(decoding, targets.pop("theta"), targets.pop("t"), targets)

    @property
    def chosen(self) -> dict[str, str]:
        """How each target's sequences are decoded: what was found fastest at the latest load; `tuning` says why."""
        return {name: str(tuner.chosen) for name, tuner in self.tuners.items() if tuner.chosen is not None}

    @property
    def tuning(self) -> dict[str, dict[str, dict[str, float]]]:
        """Tokens per second measured for each way to decode, by target and load."""
        return {name: tuner.report() for name, tuner in self.tuners.items() if tuner.chosen is not None}

    @property
    def truncated_prompts(self) -> int:
        """Prompts that lost tokens at their beginning (`long_prompts`)."""
        return self.prompts.truncated_prompts

    @property
    def special_names(self) -> int:
        """Prompts whose text named a special token that was read as plain characters (`parse_special_tokens`)."""
        return self.prompts.special_names

    @property
    def tokens_per_second(self) -> float:
        return self.decoding.tokens / self.seconds if self.seconds else 0.0

    @property
    def retries(self) -> int:
        return sum(stats.retries for stats in (self.theta, self.t, *self.targets.values()))
