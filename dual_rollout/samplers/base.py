"""What the coordinator asks of a way to get sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.call import CallSettings
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.engine import EngineInfo
from dual_rollout.types import GenerationRequest


@dataclass(frozen=True, slots=True)
class Served:
    """The models that a sampler's servers serve; π_t is None where there is none, or its server is gone and
    `on_target_failure` says to go on without."""

    theta: EngineInfo
    t: EngineInfo | None


class Sampler(Protocol):
    """A way to get sequences. All methods raise the errors of `dual_rollout.exceptions`."""

    def check_request(self, request: GenerationRequest) -> None:
        """Refuse what it cannot draw.

        Raises:
            ValueError: says what of the request, and what can.
        """
        ...

    async def served(self, config: CoordinatorConfig) -> Served:
        """What its servers serve; asked once, then remembered."""
        ...

    async def ready(self, sequences: Sequence[DecodingSequence], config: CoordinatorConfig) -> Sampler:
        """Check the servers before the first token, with the prompts of some sequences.

        Returns:
            What to sample with: itself, or another where `on_target_failure` says how to go on without the target.

        Raises:
            PreflightError: the servers cannot serve what `config` asks; says which flag to set.
        """
        ...

    async def sample(self, sequences: Iterable[DecodingSequence], settings: CallSettings) -> None:
        """Draw all sequences to their end, in place, at most `max_concurrency` in flight.

        `sequences` is consumed as places become free. A fault of one prompt ends that sequence only, with its `failure`
        set. Once a server is gone for longer than the retries allow, no more are begun: they end with the same error.
        """
        ...
