"""One sequence on its way from prompt to output."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dual_rollout.engine import GrowingText
from dual_rollout.record import SequenceRecord
from dual_rollout.types import FinishReason


class DecodingSequence:
    """A record that grows, and what is needed to let it grow. Each sequence has its own random stream, set by `key`
    (seed and number), so its tokens do not depend on what else is in flight.

    Attributes:
        context_theta, context_t: token ids each model sees: its own prompt, then the shared completion.
        record: the completion and its numbers.
        top_theta, top_t: log-probability of the most likely token at each position, nats; NaN where not known.
        log_weights: log w = log π_θ − log q* by position, where it is known before both terms are: outside both lists.
        weight_version: the version of π_θ's weights that the round under way asks.
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
        self.context_theta = GrowingText(prompt_theta)
        self.context_t = GrowingText(prompt_t)
        self._bits = np.random.Philox(key=np.array(key, dtype=np.uint64))
        self._stream = self._bits.state
        self.rng = np.random.Generator(self._bits)
        self.record = SequenceRecord()
        self.top_theta: list[float] = []
        self.top_t: list[float] = []
        self.log_weights: dict[int, float] = {}
        self.weight_version: int | None = None
        self.run_length: float | None = None
        self.finish_reason: FinishReason | None = None
        self.unknown_to_t = False
        self.failure: Exception | None = None
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids

    @property
    def tokens(self) -> list[int]:
        """The completion."""
        return self.record.token_ids

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

    @property
    def last_log_weight(self) -> float:
        """log w of the last token, NaN where it is not known yet."""
        position = len(self.tokens) - 1
        return self.log_weights.get(position, self.record.logprobs_theta[-1] - self.record.logprobs_q[-1])

    def rewind(self, position: int | None = None) -> np.random.Generator:
        """`rng`, set to the stream of a position, by default the next: the same numbers whenever it is asked.

        So a round that has to be repeated, because a server failed or a neighbour's prompt was refused, ends in the
        same tokens, and what happens at one position does not shift the numbers of the next.
        """
        # Nothing is left over in this state from another position: it is that of a new stream, but for the counter.
        self._stream["state"]["counter"][-1] = len(self.tokens) if position is None else position
        self._bits.state = self._stream
        return self.rng

    def append(
        self,
        token: int,
        *,
        tops: tuple[float, float] = (math.nan, math.nan),
        log_weight: float | None = None,
        diagnostics: Mapping[str, float] | None = None,
        without_target: bool = False,
        **columns: Any,
    ) -> None:
        """Add a sampled token, whose record `complete` may have to finish.

        Args:
            tops: log-probability of the most likely token for π_θ and for π_t, nats.
            log_weight: where log q* follows from it and log π_θ, instead of the other way round.
            columns: of the record.
        """
        if log_weight is not None:
            self.log_weights[len(self.tokens)] = log_weight
        self.context_theta.append(token)
        self.context_t.append(token)
        self.top_theta.append(tops[0])
        self.top_t.append(tops[1])
        self.record.append(
            token_ids=token,
            without_target=without_target,
            weight_versions=self.weight_version,
            diagnostics=diagnostics or {},
            **columns,
        )
        if token in self._stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._max_tokens:
            self.finish_reason = "length"

    def note_draft(self, length: int, accepted: int) -> None:
        """Count a draft's tokens, and remember how many were accepted, of the recent drafts most."""
        self.record.draft_tokens += length
        self.record.accepted_tokens += accepted
        self.run_length = accepted if self.run_length is None else 0.7 * self.run_length + 0.3 * accepted

    def fail(self, error: Exception) -> None:
        self.failure = error
