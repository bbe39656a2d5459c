"""One sequence on its way from prompt to output."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from dual_rollout.types import FinishReason

NOT_KNOWN_YET = math.nan
"""A log-probability that no list held; fetched from the server when the sequence ends, never floored."""


class DecodingSequence:
    """Tokens so far and their record. Each sequence has its own random stream, so its tokens do not depend on
    what else is in flight.

    Attributes:
        context_theta, context_t: token ids each model sees: its own prompt, then the shared completion.
        tokens: the completion.
        alpha, log_q, logp_theta, logp_t, log_weight: one float per token, nats (α plain).
        top_theta, top_t: log-probability of the most likely token at each position, nats.
        diagnostics: per-token lists by name.
        failure: what ended this sequence early, if anything did.
    """

    def __init__(
        self,
        prompt_theta: Sequence[int],
        prompt_t: Sequence[int],
        *,
        max_tokens: int,
        stop_ids: Collection[int],
        rng: np.random.Generator,
    ):
        self.context_theta = list(prompt_theta)
        self.context_t = list(prompt_t)
        self.rng = rng
        self.tokens: list[int] = []
        self.alpha: list[float] = []
        self.log_q: list[float] = []
        self.logp_theta: list[float] = []
        self.logp_t: list[float] = []
        self.log_weight: list[float] = []
        self.top_theta: list[float] = []
        self.top_t: list[float] = []
        self.diagnostics: dict[str, list[float]] = {}
        self.finish_reason: FinishReason | None = None
        self.failure: Exception | None = None
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    def append(
        self,
        token: int,
        *,
        alpha: float,
        log_q: float,
        logp_theta: float,
        logp_t: float,
        log_weight: float,
        top_theta: float,
        top_t: float,
        diagnostics: Mapping[str, float],
    ) -> None:
        """Add a sampled token; of `log_q`, `logp_theta`, `log_weight` two determine the third, see `settle`."""
        for context in (self.context_theta, self.context_t, self.tokens):
            context.append(token)
        self.alpha.append(alpha)
        self.log_q.append(log_q)
        self.logp_theta.append(logp_theta)
        self.logp_t.append(logp_t)
        self.log_weight.append(log_weight)
        self.top_theta.append(top_theta)
        self.top_t.append(top_t)
        for name, value in diagnostics.items():
            self.diagnostics.setdefault(name, []).append(value)
        if token in self._stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._max_tokens:
            self.finish_reason = "length"

    def fail(self, error: Exception) -> None:
        self.failure = error
