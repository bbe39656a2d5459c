"""How far q* may go from the policy, as training goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from dual_rollout.config import CoordinatorConfig

ScheduleShape = Literal["constant", "linear", "cosine"]
_SCHEDULED = ("kl_budget", "fixed_alpha", "alpha_min", "alpha_max")
"""The fields of `CoordinatorConfig` that may move."""


@dataclass(frozen=True, kw_only=True)
class AlphaSchedule:
    """What chooses or bounds α, moving from what `CoordinatorConfig` says to what is said here.

    Over training progress p in [0, 1], a value v becomes v + (end − v)·s. For "linear" s = p, for "cosine"
    s = (1 − cos πp)/2; "constant" leaves all as it is. `kl_budget_end=0` ends on-policy.

    Args:
        shape: "constant", "linear" or "cosine".
        kl_budget_end: the last `kl_budget`, nats; needs `alpha_method="kl_budget"`.
        fixed_alpha_end: the last `fixed_alpha`; needs `alpha_method="fixed"`.
        alpha_min_end, alpha_max_end: the last bounds on α; at no step may the lower exceed the upper one.

    Raises:
        ValueError: an unknown shape, or ends without a schedule, or a schedule without an end.
    """

    shape: ScheduleShape = "constant"
    kl_budget_end: float | None = None
    fixed_alpha_end: float | None = None
    alpha_min_end: float | None = None
    alpha_max_end: float | None = None

    def __post_init__(self) -> None:
        if self.shape not in get_args(ScheduleShape):
            raise ValueError(f"alpha_schedule must be one of {', '.join(get_args(ScheduleShape))}; got {self.shape!r}")
        if (self.shape == "constant") != (not self.ends):
            raise ValueError(
                f"alpha_schedule is {self.shape!r}: a schedule needs one of {'_end, '.join(_SCHEDULED)}_end, and these "
                'need "linear" or "cosine"'
            )

    @property
    def ends(self) -> dict[str, float]:
        """The last value of every scheduled field of `CoordinatorConfig`."""
        ends = {name: getattr(self, f"{name}_end") for name in _SCHEDULED}
        return {name: end for name, end in ends.items() if end is not None}

    def at(self, config: CoordinatorConfig, progress: float) -> CoordinatorConfig:
        """`config` with the values that hold at `progress` in [0, 1].

        Raises:
            ValueError: an end that does not fit `config`.
        """
        for name, method in (("kl_budget", "kl_budget"), ("fixed_alpha", "fixed")):
            if name in self.ends and config.alpha_method != method:
                raise ValueError(f'{name}_end needs alpha_method "{method}"')
        share = progress if self.shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
        values = {name: (1.0 - share) * getattr(config, name) + share * end for name, end in self.ends.items()}
        return replace(config, **values)


def training_progress(step: int, max_steps: int) -> float:
    """Progress at the rollout for optimisation step `step` (from 0) of `max_steps`: 1 at the last one, and after it."""
    return min(max(step / max(max_steps - 1, 1), 0.0), 1.0)
