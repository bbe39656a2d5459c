"""Sequences from π_θ alone: for prompts without a target, for evaluation, and while the target's server is gone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.call import CallSettings, DecodingCall
from dual_rollout.decoding.policy_alone import PolicyAlone
from dual_rollout.decoding.scheduler import Scheduler
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.engine import Engine
from dual_rollout.preflight import TemperatureCheck, check_policy
from dual_rollout.samplers.base import Sampler, Served
from dual_rollout.types import GenerationRequest


class PolicyAloneSampler:
    """Plain generation from π_θ's server, each sequence on its own.

    Args:
        theta: the policy's server.
        lost: the sequences do have a target, whose server is gone.
    """

    def __init__(self, theta: Engine, weights: PolicyWeights, stats: DecodingStats, *, lost: bool = False):
        self._theta = theta
        self._weights = weights
        self._stats = stats
        self._lost = lost
        self._temperatures = TemperatureCheck()

    def check_request(self, request: GenerationRequest) -> None:
        """See `Sampler`: it draws any."""

    async def served(self, config: CoordinatorConfig) -> Served:
        """See `Sampler`."""
        return Served(await self._theta.describe(), None)

    async def ready(self, sequences: Sequence[DecodingSequence], config: CoordinatorConfig) -> Sampler:
        """See `Sampler`."""
        contexts = [sequence.context_theta for sequence in sequences]
        await check_policy(self._theta, config, contexts)
        await self._temperatures.check(self._theta, config.temperature, contexts, "theta_url", draws=True)
        return self

    async def sample(self, sequences: Iterable[DecodingSequence], settings: CallSettings) -> None:
        """See `Sampler`."""
        call = DecodingCall(self._theta, self._theta, settings, self._stats)
        scheduler = Scheduler(sequences, call, self._weights)
        try:
            await scheduler.run(PolicyAlone(call, lost=self._lost), groups=settings.config.concurrency)
            await scheduler.finish()
        finally:
            scheduler.abandon()
