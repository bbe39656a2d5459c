"""Tokens from π_θ alone: for prompts that have no target, and for the time that π_t's server is gone."""

from __future__ import annotations

import logging
import math
import time

import numpy as np

from dual_rollout.decoding.outage import Outage, patiently, until_back
from dual_rollout.decoding.record import Recorder
from dual_rollout.decoding.scheduler import Mode
from dual_rollout.decoding.sequence import NOT_KNOWN_YET, DecodingSequence
from dual_rollout.exceptions import EngineProtocolError, EngineUnavailableError
from dual_rollout.types import NO_TOKEN

logger = logging.getLogger(__name__)

_TOKENS_PER_REQUEST = 256
_TOKENS_WHILE_GONE = 8  # few, so that π_t is soon asked again


class Policy:
    """Plain generation: each sequence gets up to `limit` tokens drawn by π_θ's server, with α = 0 and weight 1.

    Args:
        lost: the sequences do have a target, whose server is gone.
    """

    def __init__(self, recorder: Recorder, limit: int = _TOKENS_PER_REQUEST, *, lost: bool = False):
        self._recorder = recorder
        self._limit = limit
        self._lost = lost

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """Draw tokens for every sequence, in one request each; log π_θ of one that no list holds comes in the end."""
        recorder, config = self._recorder, self._recorder.config
        drafts = await recorder.theta.draft(
            [sequence.context_theta for sequence in sequences],
            [min(self._limit, sequence.room) for sequence in sequences],
            await recorder.lists_theta.length(sequences[0].context_theta),
            config.temperature,
            [int(sequence.rewind().integers(2**31)) for sequence in sequences],
            sequences[0].stop_ids,
        )
        owners = [s for s, tokens in zip(sequences, drafts.token_ids, strict=True) for _ in tokens]
        tokens = np.concatenate(drafts.token_ids)
        listed = (drafts.lists.token_ids == tokens[:, None]) & (drafts.lists.token_ids != NO_TOKEN)
        logprobs = np.where(listed, drafts.lists.logprobs, -np.inf).max(axis=1)
        logprobs[~listed.any(axis=1)] = NOT_KNOWN_YET
        tops = drafts.lists.logprobs.max(axis=1)
        columns = (tokens.tolist(), logprobs.tolist(), tops.tolist())
        for sequence, token, logprob, top in zip(owners, *columns, strict=True):
            if not sequence.done:
                self._append(sequence, token, logprob, top)

    def _append(self, sequence: DecodingSequence, token: int, logprob: float, top: float) -> None:
        sequence.append(
            token,
            alpha=0.0,
            log_q=logprob,
            logp_theta=logprob,
            logp_t=math.nan,
            log_weight=0.0,
            top_theta=top,
            top_t=math.nan,
            diagnostics=_DIAGNOSTICS if self._recorder.with_diagnostics else {},
            without_target=True,
        )
        stats = self._recorder.stats
        stats.tokens += 1
        stats.policy_tokens += 1
        stats.lost_target_tokens += self._lost
        if self._recorder.on_token is not None:
            self._recorder.on_token(sequence)


_DIAGNOSTICS = {
    "kl_theta": 0.0,
    "kl_t": math.nan,
    "kl_diff": math.nan,
    "ess_theta": 1.0,
    "ess_t": math.nan,
    "ess_ratio": math.nan,
    "entropy_q": math.nan,
    "coverage_theta": 1.0,
    "coverage_t": math.nan,
}
"""Of q* = π_θ, drawn from the whole vocabulary; what would need π_t, or all of π_θ, is not known."""


class Surviving:
    """A mode that goes on as `on_target_failure` says when π_t's server is gone."""

    def __init__(self, mode: Mode, recorder: Recorder, outage: Outage):
        self._mode = mode
        self._recorder = recorder
        self._outage = outage
        self._policy = Policy(recorder, _TOKENS_WHILE_GONE, lost=True)

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """A round of the mode, or tokens of π_θ alone."""
        on_failure = self._recorder.config.on_target_failure
        if on_failure == "wait":
            await until_back(lambda: self._mode.advance(sequences), self._recorder.t.url)
        elif on_failure == "policy":
            await self._advance_somehow(sequences)
        else:
            await self._mode.advance(sequences)

    async def _advance_somehow(self, sequences: list[DecodingSequence]) -> None:
        left = [sequence for sequence in sequences if sequence.unknown_to_t]
        if left:
            await self._policy.advance(left)
            sequences = [sequence for sequence in sequences if not sequence.unknown_to_t]
        if sequences:
            await self._advance_with_target(sequences)

    async def _advance_with_target(self, sequences: list[DecodingSequence]) -> None:
        if not self._outage.lasts:
            started = time.monotonic()
            retries = self._recorder.config.max_retries if len(sequences) == 1 else 0
            try:
                await patiently(lambda: self._mode.advance(sequences), retries)
                return
            except (EngineUnavailableError, EngineProtocolError) as error:
                if error.url != self._recorder.t.url:
                    raise
                if isinstance(error, EngineUnavailableError):
                    self._outage.begin(time.monotonic() - started)
                elif len(sequences) > 1:
                    raise  # one prompt may be to blame; the scheduler finds it
                logger.warning("going on without the target (on_target_failure is policy): %s", error)
        await self._policy.advance(sequences)
        vocab_size = (await self._recorder.t.probe(sequences[0].context_t)).vocab_size  # found before the first token
        for sequence in sequences:
            recent = sequence.tokens[-_TOKENS_WHILE_GONE:]
            sequence.unknown_to_t = vocab_size is not None and any(token >= vocab_size for token in recent)
