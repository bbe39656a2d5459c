"""How a rollout says what its α is to be, and a request of a pair what it is. Needs neither torch nor vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

ALPHA_METHODS = ("kl_symmetry", "fixed", "ess_balance", "entropy", "kl_budget")
Side = Literal["theta", "t", "both"]
NUMBERS = ("token", "alpha", "log_q", "log_theta", "log_t", "kl_theta", "kl_t")
"""What is recorded of each drawn token, as float32."""
EXTRA_ARGS = "dual_rollout"
"""The key of `SamplingParams.extra_args` under which a request of a pair has its `PairMember`."""


@dataclass(frozen=True, kw_only=True)
class PairRule:
    """How α is chosen per token; the names are those of `CoordinatorConfig`.

    Raises:
        ValueError: a value out of range, naming it.
    """

    alpha_method: str = "kl_symmetry"
    fixed_alpha: float | None = None
    kl_budget: float | None = None
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha_method not in ALPHA_METHODS:
            raise ValueError(f"alpha_method must be one of {', '.join(ALPHA_METHODS)}, got {self.alpha_method!r:.80}")
        for name, method in (("fixed_alpha", "fixed"), ("kl_budget", "kl_budget")):
            value = getattr(self, name)
            if (value is not None) != (self.alpha_method == method):
                raise ValueError(f"{name} belongs to alpha_method {method!r}: give both or neither")
            if value is not None and not (_is_real(value) and 0 <= value <= (1 if name == "fixed_alpha" else math.inf)):
                raise ValueError(f"{name} is out of range: {value!r:.80}")
        if not (_is_real(self.alpha_min) and _is_real(self.alpha_max) and 0 <= self.alpha_min <= self.alpha_max <= 1):
            raise ValueError(f"need 0 <= alpha_min <= alpha_max <= 1, got {self.alpha_min!r} and {self.alpha_max!r}")
        if not (_is_real(self.temperature) and 0.01 <= self.temperature <= 100):
            raise ValueError(f"temperature must be in [0.01, 100], got {self.temperature!r:.80}")


@dataclass(frozen=True, kw_only=True)
class PairMember:
    """What one vLLM request is told of the pair that it belongs to.

    Attributes:
        pair: a name that no other pair has.
        side: "theta" or "t"; "both" for a rollout of π_θ alone, which is one request.
        seed: with the position, what the draw depends on; in [0, 2^63).
        start: tokens of the rollout that are already in the prompt.
        mark: the token that a row without its partner is made to draw; a stop token of the request.
        method: how α is chosen.
    """

    pair: str
    side: Side
    seed: int
    start: int
    mark: int
    method: PairRule

    def __post_init__(self) -> None:
        if not isinstance(self.pair, str) or not self.pair or self.side not in get_args(Side):
            raise ValueError(f"a request of a pair needs its name and a side, got {self.pair!r:.80}, {self.side!r:.80}")
        limits = {"seed": 2**63, "start": 2**31, "mark": 2**31}
        for name, limit in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
                raise ValueError(f"{name} must be a whole number in [0, {limit}), got {value!r:.80}")

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
            raise ValueError(f"{EXTRA_ARGS} is for requests that POST /v1/dual_rollout/generate makes")
        return cls(**{**values, "method": PairRule(**values["method"])})


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
