"""What the coordinator asks of a way to get sequences, and what is asked of the servers behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.call import CallSettings
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.engine import Engine, EngineInfo
from dual_rollout.samplers.examination import Examination
from dual_rollout.types import GenerationRequest, Role, TargetModel


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


class Servers(Protocol):
    """The servers that a config's samplers draw from, for whoever trains with them, describes or examines them.

    Attributes:
        theta: the client of the policy's server, which takes new weights.
        t: the client of the server of the target at `t_url`, or of `theta`'s where that holds the target too.
        policy_name: the name of `theta`'s server in a report.
        list_settings: the fields of the config that say which top-k lists are asked for, and how they are used.
    """

    theta: Engine
    t: Engine
    policy_name: str
    list_settings: tuple[str, ...]

    def in_words(self, describe: Callable[[Role], EngineInfo | None]) -> str:
        """What serves the models, without names and addresses.

        Args:
            describe: what a model's server says of itself; None where it does not answer.
        """
        ...

    async def target(self) -> TargetModel:
        """What the target is; asks its server."""
        ...

    async def examine(self) -> Examination:
        """All that can be found out without harm within the config's `total_timeout`, for people to read."""
        ...
