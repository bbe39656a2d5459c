"""Sequences from one server that samples from q* itself: whole sequences per request, and a second one for log π_θ,
where that is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.call import CallSettings
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.exceptions import EngineProtocolError, PreflightError
from dual_rollout.samplers.base import Sampler, Served
from dual_rollout.samplers.concurrency import STREAMED_BLOCK, draw_concurrently
from dual_rollout.samplers.pairs import PairSampler
from dual_rollout.servers.native import NativeEngine, NativeSample
from dual_rollout.types import GenerationRequest

_ALPHA_TOLERANCE = 1e-5


class NativeSampler:
    """Samples from q* on one server that holds both models (`dual-rollout serve-native`).

    Which kind of server it is, one that shows both models one prompt or one of pairs, is seen when it is asked.

    Args:
        without_target: draw from π_θ alone, which only a server of pairs can.
    """

    def __init__(
        self, engine: NativeEngine, weights: PolicyWeights, stats: DecodingStats, *, without_target: bool = False
    ):
        self._engine = engine
        self._weights = weights
        self._stats = stats
        self._without_target = without_target

    def check_request(self, request: GenerationRequest) -> None:
        """See `Sampler`: what the server cannot draw, `ready` refuses."""

    async def served(self, config: CoordinatorConfig) -> Served:
        """See `Sampler`."""
        both = await self._engine.describe()
        return Served(both, None if self._without_target else both)

    async def ready(self, sequences: Sequence[DecodingSequence], config: CoordinatorConfig) -> Sampler:
        """See `Sampler`."""
        if (server := await self._engine.pair_server()) is not None:
            alone = self._without_target
            return PairSampler(self._engine, server, self._weights, self._stats, without_target=alone)
        faults = {
            "draws from π_θ alone": self._without_target,
            "shows π_t another prompt": any(map(_has_two_prompts, sequences)),
            f"knows alpha_method {config.alpha_method!r}": config.alpha_method not in ("kl_symmetry", "fixed"),
        }
        if found := [fault for fault, there in faults.items() if there]:
            raise PreflightError(
                f"{self._engine.url} holds two models, and none such {' or '.join(found)}: one of pairs does "
                "(dual-rollout serve-native with one model, see docs/native.md), or two servers (engine: dual)"
            )
        await self._engine.attach(config.temperature)
        return self

    async def sample(self, sequences: Iterable[DecodingSequence], settings: CallSettings) -> None:
        """See `Sampler`."""
        await draw_concurrently(sequences, settings, self._weights, settings.config.max_concurrency, self._extend)

    async def _extend(self, sequence: DecodingSequence, settings: CallSettings) -> None:
        config, prompt = settings.config, list(sequence.context_theta)
        if _has_two_prompts(sequence):  # one of those that came after the first, which `ready` has seen
            raise PreflightError(f"{self._engine.url} shows both models one prompt: this sequence has two")
        sample = await self._engine.generate(
            prompt,
            max_tokens=min(sequence.room, STREAMED_BLOCK) if settings.streams else sequence.room,
            temperature=config.temperature,
            stop_token_ids=sequence.stop_ids,
            ignore_eos=config.ignore_eos,
            seed=None if config.seed is None else int(sequence.rewind().integers(2**31)),
        )
        self._check_alpha(sample, config)
        logprobs_theta = np.full(len(sample.token_ids), np.nan)
        if config.policy_logprobs:
            text = [*prompt, *sample.token_ids]
            logprobs_theta = await self._engine.policy_logprobs(text, len(prompt), config.temperature)
        self._append(sequence, sample, logprobs_theta, settings)

    def _append(
        self, sequence: DecodingSequence, sample: NativeSample, logprobs_theta: np.ndarray, settings: CallSettings
    ) -> None:
        alpha, kl_theta, kl_t = sample.alpha, sample.kl_theta, sample.kl_t
        psi = -(1.0 - alpha) * kl_theta - alpha * kl_t
        # log q = (1 − α) log π_θ + α log π_t − ψ; at α = 0 it says nothing of π_t.
        with np.errstate(divide="ignore", invalid="ignore"):
            logprobs_t = (sample.log_q + psi - (1.0 - alpha) * logprobs_theta) / alpha
        logprobs_t[alpha == 0.0] = np.nan
        columns = {
            "token": np.array(sample.token_ids),
            "alpha": alpha,
            "logprobs_q": sample.log_q,
            "logprobs_theta": logprobs_theta,
            "logprobs_t": logprobs_t,
        }
        diagnostics = _diagnostics(kl_theta, kl_t) if settings.with_diagnostics else [{}] * len(alpha)
        table = zip(*(column.tolist() for column in columns.values()), strict=True)
        last = len(alpha) - 1
        for i, (numbers, extra) in enumerate(zip(table, diagnostics, strict=True)):
            sequence.append(**dict(zip(columns, numbers, strict=True)), diagnostics=extra)
            if i == last and sample.finish_reason == "stop":
                sequence.finish_reason = "stop"  # also at a stop token that only the server knows
            self._stats.positions += 1
            self._stats.tokens += 1
            self._stats.scored_tokens += settings.config.policy_logprobs
            if settings.on_token is not None:
                settings.on_token(sequence)

    def _check_alpha(self, sample: NativeSample, config: CoordinatorConfig) -> None:
        """The rule for α is the server's; refuse it where it breaks the client's."""
        low, high = config.alpha_min, config.alpha_max
        if config.fixed_alpha is not None:
            low = high = min(max(config.fixed_alpha, low), high)
        found = float(sample.alpha.min()), float(sample.alpha.max())
        if found[0] < low - _ALPHA_TOLERANCE or found[1] > high + _ALPHA_TOLERANCE:
            raise EngineProtocolError(
                f"sampled with α in [{found[0]:.4g}, {found[1]:.4g}], outside [{low:g}, {high:g}]: give dual-rollout "
                "serve-native the same --alpha-method, --fixed-alpha, --alpha-min and --alpha-max",
                url=self._engine.url,
            )


def _has_two_prompts(sequence: DecodingSequence) -> bool:
    return list(sequence.context_t) != list(sequence.context_theta)


def _diagnostics(kl_theta: np.ndarray, kl_t: np.ndarray) -> list[dict[str, float]]:
    """Of each position; the whole vocabulary is covered."""
    rows = np.transpose((kl_theta, kl_t, np.abs(kl_theta - kl_t))).tolist()
    return [
        {"kl_theta": theta, "kl_t": t, "kl_diff": difference, "coverage_theta": 1.0, "coverage_t": 1.0}
        for theta, t, difference in rows
    ]
