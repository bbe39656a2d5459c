"""Decoding where the server samples from q* itself: whole sequences per request, and a second one for log π_θ, where
that is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.record import DecodingStats, OnToken
from dual_rollout.decoding.scheduler import OnFinished
from dual_rollout.decoding.sequence import NOT_KNOWN_YET, DecodingSequence
from dual_rollout.decoding.weights import PolicyWeights
from dual_rollout.engines.native import NativeEngine, NativeSample
from dual_rollout.exceptions import DualRolloutError, EngineProtocolError, EngineUnavailableError

_ALPHA_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class NativeDecoder:
    """Draws sequences from a server that `NativeEngine.attach` has found to be good.

    Attributes:
        with_diagnostics: record both divergences of each position, and that the whole vocabulary was covered.
        max_block: tokens per request; whole sequences when None.
        on_token: called after each token is recorded.
        weights: whose version the tokens record.
    """

    engine: NativeEngine
    config: CoordinatorConfig
    stats: DecodingStats
    with_diagnostics: bool = False
    max_block: int | None = None
    on_token: OnToken | None = None
    weights: PolicyWeights = field(default_factory=PolicyWeights)

    async def decode(self, sequences: Iterable[DecodingSequence], on_finished: OnFinished | None = None) -> None:
        """Decode all sequences to their end, in place, at most `max_concurrency` in flight.

        `sequences` is consumed as places become free. A fault of one prompt ends that sequence only, with its
        `failure` set. Once the server is gone for longer than the retries allow, no more are begun: they end with the
        same error.
        """
        waiting = iter(sequences)
        gone: EngineUnavailableError | None = None

        async def run_place() -> None:
            nonlocal gone
            for sequence in waiting:
                if gone is not None and not sequence.done:
                    sequence.fail(gone)
                try:
                    while not sequence.done:
                        async with self.weights.in_use([sequence]):
                            await self._extend(sequence)
                    if not self.config.allow_mixed_versions:
                        self.weights.refuse_mixed(sequence)
                except DualRolloutError as error:
                    sequence.fail(error)
                    gone = error if isinstance(error, EngineUnavailableError) else gone
                if on_finished is not None:
                    await on_finished(sequence)

        await asyncio.gather(*(run_place() for _ in range(self.config.max_concurrency)))

    async def _extend(self, sequence: DecodingSequence) -> None:
        config, prompt = self.config, list(sequence.context_theta)
        sample = await self.engine.generate(
            prompt,
            max_tokens=min(sequence.room, self.max_block or sequence.room),
            temperature=config.temperature,
            stop_token_ids=sequence.stop_ids,
            ignore_eos=config.ignore_eos,
            seed=None if config.seed is None else int(sequence.rewind().integers(2**31)),
        )
        self._check_alpha(sample)
        logp_theta = np.full(len(sample.token_ids), np.nan)
        if config.policy_logprobs:
            text = [*prompt, *sample.token_ids]
            logp_theta = await self.engine.policy_logprobs(text, len(prompt), config.temperature)
        self._record(sequence, sample, logp_theta)

    def _record(self, sequence: DecodingSequence, sample: NativeSample, logp_theta: np.ndarray) -> None:
        alphas, kl_theta, kl_t = sample.alpha, sample.kl_theta, sample.kl_t
        psi = -(1.0 - alphas) * kl_theta - alphas * kl_t
        # log q = (1 − α) log π_θ + α log π_t − ψ; at α = 0 it says nothing of π_t.
        with np.errstate(divide="ignore", invalid="ignore"):
            logp_t = (sample.log_q + psi - (1.0 - alphas) * logp_theta) / alphas
        logp_t[alphas == 0.0] = np.nan
        diagnostics = np.transpose((kl_theta, kl_t, np.abs(kl_theta - kl_t))).tolist()
        columns = np.transpose((alphas, sample.log_q, logp_theta, logp_t)).tolist()
        for i, (alpha, log_q, theta, t) in enumerate(columns, start=1):
            sequence.append(
                sample.token_ids[i - 1],
                alpha=alpha,
                log_q=log_q,
                logp_theta=theta,
                logp_t=t,
                log_weight=theta - log_q,
                top_theta=NOT_KNOWN_YET,
                top_t=NOT_KNOWN_YET,
                diagnostics=_diagnostics(*diagnostics[i - 1]) if self.with_diagnostics else {},
            )
            if i == len(sample.token_ids) and sample.finish_reason == "stop":
                sequence.finish_reason = "stop"  # also at a stop token that only the server knows
            self.stats.positions += 1
            self.stats.tokens += 1
            self.stats.scored_tokens += self.config.policy_logprobs
            if self.on_token is not None:
                self.on_token(sequence)

    def _check_alpha(self, sample: NativeSample) -> None:
        """The rule for α is the server's; refuse it where it breaks the client's."""
        low, high = self.config.alpha_min, self.config.alpha_max
        if self.config.fixed_alpha is not None:
            low = high = min(max(self.config.fixed_alpha, low), high)
        found = float(sample.alpha.min()), float(sample.alpha.max())
        if found[0] < low - _ALPHA_TOLERANCE or found[1] > high + _ALPHA_TOLERANCE:
            raise EngineProtocolError(
                f"sampled with α in [{found[0]:.4g}, {found[1]:.4g}], outside [{low:g}, {high:g}]: give dual-rollout "
                "serve-native the same --alpha-method, --fixed-alpha, --alpha-min and --alpha-max",
                url=self.engine.url,
            )


def _diagnostics(kl_theta: float, kl_t: float, kl_diff: float) -> dict[str, float]:
    return {"kl_theta": kl_theta, "kl_t": kl_t, "kl_diff": kl_diff, "coverage_theta": 1.0, "coverage_t": 1.0}
