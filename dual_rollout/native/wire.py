"""What client, API server and engine tell each other. Needs neither torch nor vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from dual_rollout.config import NATIVE_TEMPERATURES, AlphaRule

PATH = "/v1/dual_rollout"
BOUNDS = {
    "token": (0.0, math.inf),
    "alpha": (0.0, 1.0),
    "logprobs_q": (-math.inf, 0.0),
    "logprobs_theta": (-math.inf, 0.0),
    "logprobs_t": (-math.inf, 0.0),
    "kl_theta": (0.0, math.inf),
    "kl_t": (0.0, math.inf),
}
"""What is recorded of each drawn token, as float32 and in this order, and between which ends it is: nats, all but the
first two. To add one, compute it in `draw.py` and `kernel.py` and give it a field in `client.NativeSample`."""
NUMBERS = tuple(BOUNDS)
EXTRA_ARGS = "dual_rollout"
"""The key of `SamplingParams.extra_args` under which a request of a rollout has its `Member`."""

Side = Literal["theta", "t", "both", "alone"]
"""What a request's row of logits is: one side of a pair; both, where the engine has two models, or the sides are the
same; or π_θ without a target."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """What one vLLM request is told of the rollout that it belongs to.

    Attributes:
        rollout: a name that no other has.
        side: what its row is.
        seed: with the position, what the draw depends on; in [0, 2^63).
        start: tokens of the rollout that are already in the prompt.
        mark: the token that a row without its partner is made to draw; a stop token of the request.
        rule: how α is chosen.
        temperature: divides both models' logits.
    """

    rollout: str
    side: Side
    seed: int
    start: int
    mark: int
    rule: AlphaRule
    temperature: float

    def __post_init__(self) -> None:
        if not isinstance(self.rollout, str) or not self.rollout or self.side not in get_args(Side):
            raise ValueError(
                f"a request of a rollout needs its name and a side, got {self.rollout!r:.80}, {self.side!r:.80}"
            )
        limits = {"seed": 2**63, "start": 2**31, "mark": 2**31}
        for name, limit in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
                raise ValueError(f"{name} must be a whole number in [0, {limit}), got {value!r:.80}")
        check_temperature(self.temperature)

    def to_extra_args(self) -> dict[str, Any]:
        return {EXTRA_ARGS: asdict(self)}

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> Self | None:
        """None for an ordinary request.

        Raises:
            ValueError: it says something else than `to_extra_args` does.
        """
        if not extra_args or EXTRA_ARGS not in extra_args:
            return None
        values = extra_args[EXTRA_ARGS]
        if not isinstance(values, Mapping) or set(values) != {spec.name for spec in fields(cls)}:
            raise ValueError(f"{EXTRA_ARGS} is for requests that POST {PATH}/generate makes")
        return cls(**{**values, "rule": AlphaRule(**values["rule"])})


def check_temperature(value: Any) -> None:
    """Raise `ValueError` for one that a native server does not take."""
    low, high = NATIVE_TEMPERATURES
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"temperature must be in [{low:g}, {high:g}], got {value!r:.80}")
