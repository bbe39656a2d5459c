"""How far q* may go from the policy, as training goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from dual_rollout.config import CoordinatorConfig

ScheduleShape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class AlphaSchedule:
    """Bounds on α that move from what `CoordinatorConfig` says to what is said here.

    Over training progress p in [0, 1], a value v becomes v + (end − v)·s with s = p for "linear" and
    s = (1 − cos πp)/2 for "cosine"; "constant" leaves all as it is. `kl_budget_end=0` ends on-policy.

    Args:
        shape: "constant", "linear" or "cosine".
        kl_budget_end: the last `kl_budget`, nats; needs `alpha_method="kl_budget"`.
        alpha_max_end: the last `alpha_max`; not below `alpha_min`.

    Raises:
        ValueError: an unknown shape, or ends without a schedule, or a schedule without an end.
    """

    shape: ScheduleShape = "constant"
    kl_budget_end: float | None = None
    alpha_max_end: float | None = None

    def __post_init__(self) -> None:
        if self.shape not in get_args(ScheduleShape):
            raise ValueError(f"alpha_schedule must be one of {', '.join(get_args(ScheduleShape))}; got {self.shape!r}")
        if (self.shape == "constant") != (not self.ends):
            raise ValueError(
                f"alpha_schedule is {self.shape!r}: a schedule needs kl_budget_end or alpha_max_end, and these need "
                '"linear" or "cosine"'
            )

    @property
    def ends(self) -> dict[str, float]:
        """The last value of every scheduled field of `CoordinatorConfig`."""
        ends = {"kl_budget": self.kl_budget_end, "alpha_max": self.alpha_max_end}
        return {name: end for name, end in ends.items() if end is not None}

    def at(self, config: CoordinatorConfig, progress: float) -> CoordinatorConfig:
        """`config` with the values that hold at `progress` in [0, 1].

        Raises:
            ValueError: an end that does not fit `config`.
        """
        if self.kl_budget_end is not None and config.alpha_method != "kl_budget":
            raise ValueError('kl_budget_end needs alpha_method "kl_budget"')
        if self.ends and config.engine == "native":
            raise ValueError('alpha_schedule needs engine "dual": a native server has its own, fixed rule for α')
        share = progress if self.shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
        values = {name: (1.0 - share) * getattr(config, name) + share * end for name, end in self.ends.items()}
        return replace(config, **values)


def training_progress(step: int, max_steps: int) -> float:
    """Progress at the rollout for optimisation step `step` (from 0) of `max_steps`: 1 at the last one, and after it."""
    return min(max(step / max(max_steps - 1, 1), 0.0), 1.0)
