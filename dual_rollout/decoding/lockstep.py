"""Lockstep: one position per round from both servers, all sequences of a round in one request per server.

This is the reference that defines the law; every other decoding mode must give the same one.
"""

from __future__ import annotations

import numpy as np

from dual_rollout.decoding.record import Positions, Recorder, both
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.engines.base import Engine
from dual_rollout.functional.sampling import sample_rows
from dual_rollout.types import NO_TOKEN, TopK


class Lockstep:
    """One token for every sequence of a round."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._config = recorder.config

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """Give every sequence its next token."""
        positions = await self._positions(sequences)
        uniforms = np.array([sequence.rewind().random() for sequence in sequences])
        columns = sample_rows(np.exp(positions.law.log_q), uniforms)
        await self._recorder.record(sequences, np.arange(len(sequences)), columns, positions)

    async def _positions(self, sequences: list[DecodingSequence]) -> Positions:
        k, temperature = self._config.top_k, self._config.temperature
        theta, t = self._recorder.theta, self._recorder.t
        contexts_theta = [sequence.context_theta for sequence in sequences]
        contexts_t = [sequence.context_t for sequence in sequences]
        top_theta, top_t = await both(
            theta.next_top_k(contexts_theta, k, temperature), t.next_top_k(contexts_t, k, temperature)
        )
        positions = self._recorder.positions(top_theta, top_t)
        if self._config.missing == "exact":
            candidates, rows = positions.candidates, range(len(sequences))
            top_theta, top_t = await both(
                self._completed(
                    theta, contexts_theta, top_theta, [candidates.missing(row, candidates.exact_theta) for row in rows]
                ),
                self._completed(t, contexts_t, top_t, [candidates.missing(row, candidates.exact_t) for row in rows]),
            )
            positions = self._recorder.positions(top_theta, top_t)
        return positions

    async def _completed(self, engine: Engine, contexts: list[list[int]], top: TopK, missing: list[list[int]]) -> TopK:
        """The lists with the named tokens added."""
        rows = [row for row, ids in enumerate(missing) if ids]
        if not rows:
            return top
        width = max(map(len, missing))
        if width == 0:
            return top
        extra_ids = np.full((len(contexts), width), NO_TOKEN, dtype=np.int64)
        extra = np.full((len(contexts), width), -np.inf)
        values = await engine.named_logprobs(
            [contexts[row] for row in rows], [missing[row] for row in rows], self._config.temperature
        )
        for row, logprobs in zip(rows, values, strict=True):
            extra_ids[row, : len(logprobs)] = missing[row]
            extra[row, : len(logprobs)] = logprobs
        return TopK(np.hstack([top.token_ids, extra_ids]), np.hstack([top.logprobs, extra]))
