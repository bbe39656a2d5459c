"""Block decoding: π_θ drafts several tokens in one request, π_t scores them in one, rejection keeps the law exact.

At each drafted position the proposal is π_θ itself. A token y that π_θ's list holds is kept with probability
min(1, q*(y)/π_θ(y)); any other is dropped, since its π_θ(y) may not be known. The first dropped position is drawn from
the residual, q* minus what was kept there: for each y of the list q*(y) − min(q*(y), π_θ(y)), for all others q*(y).
Whatever the acceptance rule, kept plus residual is q*, so each token has exactly the law that lockstep gives it
(Leviathan et al. 2023, arXiv:2211.17192, with a target between the two models).
"""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np

from dual_rollout.decoding.record import Positions, Recorder
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.functional.candidates import Candidates
from dual_rollout.functional.sampling import sample_rows


class Block:
    """One token for every sequence of a round, and up to `limit`.

    With `adaptive`, the length of each sequence's drafts follows its measured acceptance.
    """

    def __init__(self, recorder: Recorder, limit: int, *, adaptive: bool):
        self._recorder = recorder
        self._config = recorder.config
        self._limit = limit
        self._adaptive = adaptive

    def _length(self, sequence: DecodingSequence) -> int:
        """A draft one longer than what was accepted of late: longer ones are mostly thrown away."""
        wanted = self._limit
        if self._adaptive and sequence.run_length is not None:
            wanted = min(wanted, 1 + math.ceil(sequence.run_length))
        return min(wanted, sequence.room)

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """Draft, score, accept from left to right, and draw one token from the residual where a draft ends early."""
        k, temperature = self._config.top_k, self._config.temperature
        drafts = await self._recorder.theta.draft(
            [sequence.context_theta for sequence in sequences],
            [self._length(sequence) for sequence in sequences],
            k,
            temperature,
            [int(sequence.rewind().integers(2**31)) for sequence in sequences],
        )
        lists_t = await self._recorder.t.score_drafts(
            [sequence.context_t for sequence in sequences], drafts.token_ids, k, temperature
        )
        positions = self._recorder.positions(drafts.lists, lists_t)
        lengths = [len(tokens) for tokens in drafts.token_ids]
        uniforms = np.concatenate(
            [sequence.rng.random((length, 2)) for sequence, length in zip(sequences, lengths, strict=True)]
        )
        drafted = np.concatenate(drafts.token_ids)
        kept, columns = _accept(drafted, positions, uniforms[:, 0])
        self._recorder.stats.draft_tokens += len(drafted)

        owners: list[DecodingSequence] = []
        rows: list[int] = []
        for sequence, length, end in zip(sequences, lengths, accumulate(lengths), strict=True):
            run = int(np.argmin(np.append(kept[end - length : end], False)))
            taken = min(run + 1, length)  # with the redrawn one, unless the whole block was kept
            owners += [sequence] * taken
            rows += range(end - length, end - length + taken)
            self._recorder.stats.accepted_tokens += run
            sequence.note_draft(run)
        index = np.array(rows)
        redrawn = index[~kept[index]]
        columns[redrawn] = sample_rows(_residual(positions, redrawn), uniforms[redrawn, 1])
        await self._recorder.record(owners, index, columns[index], positions)


def _accept(drafted: np.ndarray, positions: Positions, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which drafted tokens `(R,)` are kept, and their columns (0 where they are not)."""
    candidates, rows = positions.candidates, np.arange(len(drafted))
    matches = candidates.token_ids == drafted[:, None]
    columns = matches.argmax(axis=1)
    log_p = np.where(matches.any(axis=1), candidates.exact_theta[rows, columns], np.nan)
    log_q = positions.law.log_q[rows, columns]
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.log(uniforms) < log_q - log_p  # False for NaN: not in π_θ's list
    return kept, columns


def _residual(positions: Positions, rows: np.ndarray) -> np.ndarray:
    """q* minus the kept mass, `(len(rows), S)`, not normalised."""
    candidates: Candidates = positions.candidates
    q = np.exp(positions.law.log_q[rows])
    listed = np.exp(np.nan_to_num(candidates.exact_theta[rows], nan=-np.inf))
    residual = np.maximum(q - listed, 0.0)
    # Rounding can leave nothing where q* and π_θ are alike to the last digit; then q* itself is as right.
    return np.where(residual.sum(axis=1, keepdims=True) > 0, residual, q)
