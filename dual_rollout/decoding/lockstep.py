"""Lockstep: one position per round from both servers, all sequences of a round in one request per server.

This is the reference that defines the distribution; every other decoding mode must give the same one.
"""

from __future__ import annotations

import numpy as np

from dual_rollout.decoding.call import DecodingCall, both
from dual_rollout.decoding.positions import Draws, Positions, append_draws, build_positions
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.functional.sampling import sample_rows
from dual_rollout.functional.top_k import NO_TOKEN


class Lockstep:
    """One token for every sequence of a round."""

    def __init__(self, call: DecodingCall):
        self._call = call

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """Give every sequence its next token."""
        positions = await self._positions(sequences)
        uniforms = np.array([sequence.rewind().random() for sequence in sequences])
        columns = sample_rows(np.exp(positions.q.log_q), uniforms)
        rows, nothing = np.arange(len(sequences)), np.full(len(sequences), NO_TOKEN)
        await append_draws(self._call, Draws(sequences, rows, columns, drafted=nothing), positions)

    async def _positions(self, sequences: list[DecodingSequence]) -> Positions:
        call, temperature = self._call, self._call.config.temperature
        contexts_theta = [sequence.context_theta for sequence in sequences]
        contexts_t = [sequence.context_t for sequence in sequences]
        top_theta, top_t = await both(call.theta.next_top_k(contexts_theta), call.t.next_top_k(contexts_t))
        return await build_positions(
            call,
            top_theta,
            top_t,
            lambda names: call.theta.engine.named_logprobs(contexts_theta, names, temperature),
            lambda names: call.t.engine.named_logprobs(contexts_t, names, temperature),
        )
