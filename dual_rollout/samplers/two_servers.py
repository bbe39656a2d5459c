"""Sequences from q* between two servers, asked for their top-k log-probabilities."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.block import Block
from dual_rollout.decoding.call import CallSettings, DecodingCall
from dual_rollout.decoding.failover import TargetFailover
from dual_rollout.decoding.lockstep import Lockstep
from dual_rollout.decoding.outage import Outage, ask_target, until_back
from dual_rollout.decoding.scheduler import Mode, Scheduler
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.tuner import Choice, Tuner
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.engine import Engine
from dual_rollout.exceptions import EngineUnavailableError, PreflightError
from dual_rollout.preflight import TemperatureCheck, check_servers
from dual_rollout.samplers.base import Sampler, Served
from dual_rollout.samplers.policy_alone import PolicyAloneSampler
from dual_rollout.types import GenerationRequest

logger = logging.getLogger(__name__)

_STEADY = 0.75  # of the sequences in flight must still be, or others in their place: a batch that runs out is slow


class TwoServerSampler:
    """Samples between the policy's server and one target's, in the configured mode.

    Args:
        theta, t: the servers' clients.
        flag: where the config names the target.

    Attributes:
        tuner: measures the ways to decode with this target.
    """

    def __init__(self, theta: Engine, t: Engine, flag: str, weights: PolicyWeights, stats: DecodingStats):
        self.tuner = Tuner()
        self._theta, self._t = theta, t
        self._flag = flag
        self._weights = weights
        self._stats = stats
        self._outage = Outage()
        self._checked = False
        self._temperatures = TemperatureCheck()

    def check_request(self, request: GenerationRequest) -> None:
        """See `Sampler`: it draws any."""

    async def served(self, config: CoordinatorConfig) -> Served:
        """See `Sampler`."""
        theta, t = await asyncio.gather(
            self._theta.describe(), ask_target(self._t.describe, self._t.url, config.on_target_failure)
        )
        return Served(theta, t)

    async def ready(self, sequences: Sequence[DecodingSequence], config: CoordinatorConfig) -> Sampler:
        """See `Sampler`."""
        if not self._checked and not await self._check(sequences, config):
            return PolicyAloneSampler(self._theta, self._weights, self._stats, lost=True)
        if config.decoding == "block" and config.temperature != 1.0 and not self.tuner.processed:
            raise PreflightError(
                f'decoding="block" at temperature {config.temperature:g} needs the distribution that drafts are drawn '
                f"from, but the server at theta_url ({self._theta.url}) reports raw log-probabilities. Start it with "
                '--logprobs-mode processed_logprobs, or set decoding to "lockstep".'
            )
        draws = config.support == "tail" or config.decoding == "block" or config.on_target_failure == "policy"
        contexts = [sequence.context_theta for sequence in sequences]
        await self._temperatures.check(self._theta, config.temperature, contexts, "theta_url", draws=draws)
        if config.on_target_failure == "fail":  # otherwise its server may be gone at the moment
            contexts = [sequence.context_t for sequence in sequences]
            await self._temperatures.check(self._t, config.temperature, contexts, self._flag, draws=False)
        return self

    async def sample(self, sequences: Iterable[DecodingSequence], settings: CallSettings) -> None:
        """See `Sampler`."""
        call = DecodingCall(self._theta, self._t, settings, self._stats)
        scheduler = Scheduler(sequences, call, self._weights)
        config, tuner = settings.config, self.tuner
        try:
            # The first round reads the prompts, whatever the mode: no measure of any.
            await scheduler.run(self._mode(tuner.first(config), call), groups=1, rounds=1)
            while not scheduler.done:
                plan = tuner.choose(config, scheduler.load)
                tokens, active, started = scheduler.tokens, scheduler.active, time.perf_counter()
                mode = self._mode(plan.choice, call)
                await scheduler.run(mode, groups=plan.choice.groups, rounds=plan.rounds)
                if scheduler.active >= _STEADY * active:
                    plan.note(scheduler.tokens - tokens, time.perf_counter() - started)
            await scheduler.finish()
        finally:
            scheduler.abandon()

    def _mode(self, choice: Choice, call: DecodingCall) -> Mode:
        if choice.mode == "lockstep":
            mode: Mode = Lockstep(call)
        else:
            adaptive = call.config.num_draft_tokens is None
            mode = Block(call, choice.num_draft_tokens, choice.scoring, adaptive=adaptive)
        return TargetFailover(mode, call, self._outage)

    async def _check(self, sequences: Sequence[DecodingSequence], config: CoordinatorConfig) -> bool:
        """Whether the target's server is there, and then that it and the policy's can give what is asked."""
        contexts_theta = [sequence.context_theta for sequence in sequences]
        contexts_t = [sequence.context_t for sequence in sequences]

        async def check() -> None:
            theta, t = await check_servers(self._theta, self._t, config, contexts_theta, contexts_t, flag=self._flag)
            self.tuner.scoring, self.tuner.processed = t.scoring, theta.logprobs_mode == "processed"
            self.tuner.sessions = theta.sessions and t.sessions
            if self.tuner.sessions and config.decoding == "auto":
                logger.info("decoding by lockstep: both servers keep texts (sessions), so that auto tries no block")

        try:
            await (until_back(check, self._t.url) if config.on_target_failure == "wait" else check())
        except EngineUnavailableError as error:
            if config.on_target_failure != "policy" or error.url != self._t.url:
                raise
            logger.warning("going on without the target (on_target_failure is policy): %s", error)
            return False
        self._checked = True
        return True
