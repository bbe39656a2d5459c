"""Sequences from one server that samples from q* itself: a request per sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.call import CallSettings
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.native.capacity import CacheRoom, Places
from dual_rollout.native.client import NativeEngine, NativeSample
from dual_rollout.samplers.base import Sampler, Served
from dual_rollout.samplers.concurrency import STREAMED_BLOCK, draw_concurrently
from dual_rollout.types import GenerationRequest


class NativeSampler:
    """Samples from q* on a native server (`dual-rollout serve-native`).

    Args:
        without_target: draw from π_θ alone.
    """

    def __init__(
        self, engine: NativeEngine, weights: PolicyWeights, stats: DecodingStats, *, without_target: bool = False
    ):
        self._engine = engine
        self._weights = weights
        self._stats = stats
        self._without_target = without_target

    def check_request(self, request: GenerationRequest) -> None:
        """See `Sampler`: it draws any."""

    async def served(self, config: CoordinatorConfig) -> Served:
        """See `Sampler`."""
        model = await self._engine.describe()
        return Served(model, None if self._without_target else model)

    async def ready(self, sequences: Sequence[DecodingSequence], config: CoordinatorConfig) -> Sampler:
        """See `Sampler`."""
        await self._engine.native_server()
        return self

    async def sample(self, sequences: Iterable[DecodingSequence], settings: CallSettings) -> None:
        """See `Sampler`. No more are asked for at once than the server has places for, since they would wait there, nor
        more of two prompts than its KV cache holds, since they would fall out of step."""
        server = await self._engine.native_server()
        places, cache = Places(server.max_requests), CacheRoom(server.cache_blocks, server.block_size)

        async def extend(sequence: DecodingSequence, settings: CallSettings) -> None:
            theta, t = sequence.context_theta, sequence.context_t
            if self._without_target or theta == t:
                async with places.taken(1):
                    await self._extend(sequence, settings)
                return
            async with cache.taken([len(theta), len(t)], self._max_tokens(sequence, settings)), places.taken(2):
                await self._extend(sequence, settings)
            if sequence.done:
                cache.note(len(sequence.tokens))

        await draw_concurrently(sequences, settings, self._weights, settings.config.max_concurrency, extend)

    @staticmethod
    def _max_tokens(sequence: DecodingSequence, settings: CallSettings) -> int:
        return min(sequence.room, STREAMED_BLOCK) if settings.streams else sequence.room

    async def _extend(self, sequence: DecodingSequence, settings: CallSettings) -> None:
        config = settings.config
        sample = await self._engine.draw(
            sequence.context_theta,
            None if self._without_target else sequence.context_t,
            max_tokens=self._max_tokens(sequence, settings),
            temperature=config.temperature,
            rule=config.alpha_rule,
            seed=int(sequence.rewind(0).integers(2**63 - 1)),
            start=len(sequence.tokens),
            stop_token_ids=sequence.stop_ids,
        )
        self._append(sequence, sample, settings)

    def _append(self, sequence: DecodingSequence, sample: NativeSample, settings: CallSettings) -> None:
        alone = self._without_target
        columns = {name: getattr(sample, name) for name in ("alpha", "logprobs_q", "logprobs_theta", "logprobs_t")}
        if alone:
            columns |= {"logprobs_q": sample.logprobs_theta, "logprobs_t": np.full_like(sample.logprobs_t, np.nan)}
        diagnostics = {
            "kl_theta": sample.kl_theta,
            "kl_t": sample.kl_t,
            "kl_diff": np.abs(sample.kl_theta - sample.kl_t),
            "coverage_theta": np.ones_like(sample.kl_theta),
            "coverage_t": np.ones_like(sample.kl_t),
        }
        tokens = zip(sample.token_ids, _rows(columns), _rows(diagnostics), strict=True)
        for token, numbers, further in tokens:
            sequence.append(
                token, **numbers, without_target=alone, diagnostics=further if settings.with_diagnostics else None
            )
            self._stats.positions += 1
            self._stats.tokens += 1
            self._stats.policy_tokens += alone
            if settings.on_token is not None:
                settings.on_token(sequence)
        self._stats.restarts += sample.restarts


def _rows(columns: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A table of columns, row by row."""
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]
