"""Tokens from π_θ alone: for prompts that have no target, and for the time that π_t's server is gone."""

from __future__ import annotations

import math

import numpy as np

from dual_rollout.decoding.call import DecodingCall
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.functional.top_k import NO_TOKEN
from dual_rollout.record import NOT_KNOWN_YET

_TOKENS_PER_REQUEST = 256


class PolicyAlone:
    """Plain generation: each sequence gets up to `limit` tokens drawn by π_θ's server, with α = 0 and weight 1.

    Args:
        lost: the sequences do have a target, whose server is gone.
    """

    def __init__(self, call: DecodingCall, limit: int = _TOKENS_PER_REQUEST, *, lost: bool = False):
        self._call = call
        self._limit = limit
        self._lost = lost

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """Draw tokens for every sequence, in one request each; log π_θ of one that no list holds comes in the end."""
        call = self._call
        drafts = await call.theta.engine.draft(
            [sequence.context_theta for sequence in sequences],
            [min(self._limit, sequence.room) for sequence in sequences],
            await call.theta.length(sequences[0].context_theta),
            call.config.temperature,
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
            logprobs_q=logprob,
            logprobs_theta=logprob,
            logprobs_t=math.nan,
            log_weight=0.0,
            tops=(top, math.nan),
            diagnostics=_DIAGNOSTICS if self._call.settings.with_diagnostics else {},
            without_target=True,
        )
        self._call.stats.policy_tokens += 1
        self._call.stats.lost_target_tokens += self._lost
        self._call.count_token(sequence)


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
