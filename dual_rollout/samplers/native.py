"""Sequences from one server that samples from q* itself: a request per sequence."""

from __future__ import annotations

import logging
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

logger = logging.getLogger(__name__)


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
        self._told_of_waiting = False

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
            # One model with one prompt may still be two requests: the policy may be an adapter.
            if self._without_target or (server.target is not None and theta == t):
                async with places.taken(1):
                    await self._extend(sequence, settings)
                return
            lengths, most = [len(theta), len(t)], self._max_tokens(sequence, settings)
            if not cache.has_room(lengths, most):
                self._note_wait(cache.holds(lengths, most), server.max_requests // 2)
            async with cache.taken(lengths, most), places.taken(2):
                await self._extend(sequence, settings)
            if sequence.done:
                cache.note(len(sequence.tokens))

        await draw_concurrently(sequences, settings, self._weights, settings.config.concurrency, extend)

    def _note_wait(self, held: int, places: int) -> None:
        """A rollout waits while the KV cache holds `held` of its size, and there are `places` for such."""
        if held >= places:
            return
        self._stats.cache_waits += 1
        if not self._told_of_waiting:
            self._told_of_waiting = True
            logger.warning(
                "%s: its KV cache holds %d rollouts of two prompts of this length at once, and --max-num-seqs has "
                "places for %d; the others wait. More memory for it (--gpu-memory-utilization, "
                "--kv-cache-memory-bytes) or a lower max_tokens lets more of them run together",
                self._engine.url,
                held,
                places,
            )

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
            t_model=None if self._without_target else config.t_model,
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
