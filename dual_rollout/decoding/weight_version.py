"""π_θ's weights while sequences are drawn from them: each token knows its version, and no sequence mixes two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.exceptions import RolloutError


@dataclass(slots=True)
class PolicyWeights:
    """The weights that π_θ's server has now.

    Attributes:
        version: None before any are counted.
    """

    version: int | None = None

    def mark(self, sequences: Iterable[DecodingSequence]) -> None:
        """Say of the tokens of `sequences` that come next that these weights drew them."""
        for sequence in sequences:
            sequence.weight_version = self.version

    def refuse_mixed(self, sequence: DecodingSequence) -> None:
        """End a sequence with an error unless all of it, and the record that was just completed, is of `version`."""
        other = next((version for version in sequence.record.weight_versions if version != self.version), self.version)
        if other != self.version and sequence.failure is None:
            changed = f"from version {other} to {self.version}"
            sequence.fail(RolloutError(f"π_θ's weights changed {changed} meanwhile: change them between rollouts"))
