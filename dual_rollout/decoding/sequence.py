"""One sequence on its way from prompt to output."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from dual_rollout.engines.base import Context
from dual_rollout.types import FinishReason

NOT_KNOWN_YET = math.nan
"""A log-probability that no list held; fetched from the server when the sequence ends, never floored."""


class DecodingSequence:
    """Tokens so far and their record. Each sequence has its own random stream, set by `key` (seed and number), so its
    tokens do not depend on what else is in flight.

    Attributes:
        context_theta, context_t: token ids each model sees: its own prompt, then the shared completion.
        tokens: the completion.
        alpha, log_q, logp_theta, logp_t, log_weight: one float per token, nats (α plain).
        weight_version: the version of π_θ's weights that the round under way asks.
        weight_versions: that of each token.
        without_target: whether the token was drawn from π_θ alone.
        top_theta, top_t: log-probability of the most likely token at each position, nats.
        diagnostics: per-token lists by name.
        run_length: running mean of the accepted tokens per draft; None before the first draft.
        unknown_to_t: whether it holds a token that π_t does not have, drawn from π_θ alone while π_t's server was gone:
            π_t is asked no more.
        failure: what ended this sequence early, if anything did.
    """

    def __init__(
        self,
        prompt_theta: Sequence[int],
        prompt_t: Sequence[int],
        *,
        max_tokens: int,
        stop_ids: Collection[int],
        key: tuple[int, int],
    ):
        self.context_theta = Context(prompt_theta)
        self.context_t = Context(prompt_t)
        self._bits = np.random.Philox(key=np.array(key, dtype=np.uint64))
        self.rng = np.random.Generator(self._bits)
        self.tokens: list[int] = []
        self.alpha: list[float] = []
        self.log_q: list[float] = []
        self.logp_theta: list[float] = []
        self.logp_t: list[float] = []
        self.log_weight: list[float] = []
        self.weight_version: int | None = None
        self.weight_versions: list[int | None] = []
        self.without_target: list[bool] = []
        self.top_theta: list[float] = []
        self.top_t: list[float] = []
        self.diagnostics: dict[str, list[float]] = {}
        self.run_length: float | None = None
        self.finish_reason: FinishReason | None = None
        self.unknown_to_t = False
        self.failure: Exception | None = None
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    @property
    def stop_ids(self) -> Collection[int]:
        """Tokens that end it."""
        return self._stop_ids

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self._max_tokens - len(self.tokens)

    def rewind(self) -> np.random.Generator:
        """`rng`, set to the stream of the next position: the same numbers whenever it is asked before that token.

        So a round that has to be repeated, because a server failed or a neighbour's prompt was refused, ends in the
        same tokens, and what happens at one position does not shift the numbers of the next.
        """
        state = self._bits.state
        state["state"]["counter"] = np.array([0, 0, 0, len(self.tokens)], dtype=np.uint64)
        state["buffer_pos"], state["has_uint32"] = 4, 0  # nothing left over from another position
        self._bits.state = state
        return self.rng

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
        without_target: bool = False,
    ) -> None:
        """Add a sampled token; of `log_q`, `logp_theta`, `log_weight` two determine the third, see `settle`."""
        for context in (self.context_theta, self.context_t, self.tokens):
            context.append(token)
        self.alpha.append(alpha)
        self.log_q.append(log_q)
        self.logp_theta.append(logp_theta)
        self.logp_t.append(logp_t)
        self.log_weight.append(log_weight)
        self.weight_versions.append(self.weight_version)
        self.without_target.append(without_target)
        self.top_theta.append(top_theta)
        self.top_t.append(top_t)
        for name, value in diagnostics.items():
            self.diagnostics.setdefault(name, []).append(value)
        if token in self._stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._max_tokens:
            self.finish_reason = "length"

    def note_draft(self, accepted: int) -> None:
        """Remember how many tokens of a draft were accepted, the recent ones most."""
        self.run_length = accepted if self.run_length is None else 0.7 * self.run_length + 0.3 * accepted

    def fail(self, error: Exception) -> None:
        self.failure = error
