"""The record of one sequence: its tokens and their numbers, written once, with one set of names.

A decoder appends to it, and everything behind it is a view: `GenerationOutput`, `RolloutBatch`, the shards of
`dual-rollout generate`, and the columns that reward functions get. To add a number per token, add a line to
`SequenceRecord` and give it a value where tokens are appended: `decoding/positions.py`, `decoding/policy_alone.py`,
`samplers/native.py`. `native.wire.BOUNDS` says what else a number needs that a native server computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

NOT_KNOWN_YET = math.nan
"""A log-probability that no list held; fetched from the server when the sequence ends, never floored."""


def _column(kind: type, output: str | None = None, *, stored: bool = True) -> Any:
    """A column.

    Args:
        kind: what its entries are, `int`, `float` or `bool`. Floats are also tensors, and columns of reward functions.
        output: its name in `GenerationOutput` and in shards, where that is another.
        stored: whether shards have it.

    Raises:
        TypeError: for another kind, which neither tensors nor shards could hold.
    """
    if kind not in (int, float, bool):
        raise TypeError(f"the entries of a column are int, float or bool, not {kind}")
    return field(default_factory=list, metadata={"kind": kind, "output": output, "stored": stored})


@dataclass(slots=True)
class SequenceRecord:
    """Tokens drawn from q*, with what the policy update needs. Columns are lists with one entry per token.

    Attributes:
        token_ids: sampled ids, the stop token included when there was one.
        alpha: α, in [0, 1].
        logprobs_q: log q*(y), nats: of the distribution that y was really drawn from.
        logprobs_theta: log π_θ(y), nats, exact (never floored), at the requested temperature.
        logprobs_t: log π_t(y), nats, likewise; NaN at tokens without a target.
        without_target: whether the token was drawn from π_θ alone, because its prompt has no target, or because π_t's
            server was gone and `on_target_failure` is "policy". Then α = 0, log q* = log π_θ, the weight is exactly 1,
            and log π_t is NaN, as are the diagnostics that need it.
        weight_versions: the version of π_θ's weights that each token was sampled under, as the weight sync counts them:
            the trainer's global step; None before the first sync.
        diagnostics: further columns by name, where they were asked for.
        draft_tokens, accepted_tokens: tokens that were drafted for it from π_θ, and those of them that q* accepted; 0
            and 0 where block decoding was not used.
    """

    token_ids: list[int] = _column(int, "generated_tokens")
    alpha: list[float] = _column(float, "alpha_history")
    logprobs_q: list[float] = _column(float)
    logprobs_theta: list[float] = _column(float)
    logprobs_t: list[float] = _column(float)
    without_target: list[bool] = _column(bool)
    weight_versions: list[int | None] = _column(int, stored=False)
    diagnostics: dict[str, list[float]] = field(default_factory=dict)
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def importance_weights(self) -> list[float]:
        """π_θ(y) / q*(y); NaN where one of them is not known."""
        return [_exp(theta - q) for theta, q in zip(self.logprobs_theta, self.logprobs_q, strict=True)]

    @property
    def weight_version(self) -> int | None:
        """The version of the whole: the oldest of its tokens'; None where one is not known, or there are none."""
        return oldest_version(self.weight_versions)

    def append(self, *, diagnostics: Mapping[str, float], **columns: Any) -> None:
        """Add a token.

        Args:
            diagnostics: one number for each of the further columns, the same ones for every token.
            columns: a value for each other column, by its name.
        """
        for name in COLUMNS:
            getattr(self, name).append(columns.pop(name))
        if columns:
            raise TypeError(f"a record has no column {', '.join(columns)}")
        for name, value in diagnostics.items():
            self.diagnostics.setdefault(name, []).append(value)

    def stored_columns(self) -> dict[str, Any]:
        """What a shard keeps, under the names of `GenerationOutput`; see `STORED_COLUMNS` and `COUNTS`."""
        return {output_name(name): getattr(self, name) for name in (*STORED_COLUMNS, *COUNTS)}


COLUMNS: tuple[str, ...] = tuple(spec.name for spec in fields(SequenceRecord) if "kind" in spec.metadata)
"""The columns that every token has."""

FLOAT_COLUMNS: tuple[str, ...] = (
    *(spec.name for spec in fields(SequenceRecord) if spec.metadata.get("kind") is float),
    "importance_weights",
)
"""One float per token: tensors of `RolloutBatch`, and columns for reward functions."""

STORED_COLUMNS: dict[str, type] = {
    spec.name: spec.metadata["kind"] for spec in fields(SequenceRecord) if spec.metadata.get("stored")
} | {"importance_weights": float}
"""The columns of shards, and what their entries are."""

COUNTS = ("draft_tokens", "accepted_tokens")
"""What is counted of the whole sequence, by its names in outputs, in shards and in the rollouts that a run keeps."""

KEPT_DIAGNOSTICS = ("kl_theta", "coverage_theta", "coverage_t")
"""Of the diagnostics, those that files keep where any are wanted: `dual-rollout report` shows them."""

_OUTPUT_NAMES = {
    spec.name: spec.metadata["output"] for spec in fields(SequenceRecord) if spec.metadata.get("output") is not None
}


def oldest_version(versions: Sequence[int | None]) -> int | None:
    """The oldest of some versions of the weights; None where one is not known, or there are none."""
    known = [version for version in versions if version is not None]
    return min(known) if known and len(known) == len(versions) else None


def output_name(column: str) -> str:
    """The name of a column in `GenerationOutput` and in shards."""
    return _OUTPUT_NAMES.get(column, column)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
