"""Lockstep: one position per round from both servers, all sequences of a round in one request per server.

This is the reference that defines the law; every other decoding mode must give the same one.
"""

from __future__ import annotations

import numpy as np

from dual_rollout.decoding.record import Positions, Recorder, both
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.functional.sampling import sample_rows


class Lockstep:
    """One token for every sequence of a round."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """Give every sequence its next token."""
        positions = await self._positions(sequences)
        uniforms = np.array([sequence.rewind().random() for sequence in sequences])
        columns = sample_rows(np.exp(positions.law.log_q), uniforms)
        await self._recorder.record(sequences, np.arange(len(sequences)), columns, positions)

    async def _positions(self, sequences: list[DecodingSequence]) -> Positions:
        recorder, temperature = self._recorder, self._recorder.config.temperature
        contexts_theta = [sequence.context_theta for sequence in sequences]
        contexts_t = [sequence.context_t for sequence in sequences]
        top_theta, top_t = await both(
            recorder.lists_theta.next_top_k(contexts_theta), recorder.lists_t.next_top_k(contexts_t)
        )
        return await recorder.positions(
            top_theta,
            top_t,
            lambda names: recorder.theta.named_logprobs(contexts_theta, names, temperature),
            lambda names: recorder.t.named_logprobs(contexts_t, names, temperature),
        )
