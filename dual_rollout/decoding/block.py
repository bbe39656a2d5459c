"""Block decoding: π_θ drafts several tokens in one request, π_t scores them in one, rejection keeps q* exact.

At each drafted position the proposal is π_θ itself. A token y that π_θ's list holds, or whose π_θ(y) was asked for by
name (missing="exact"), is kept with probability min(1, q*(y)/π_θ(y)); so is one outside S, with the probabilities of
the tail, where π_θ's mass there is known exactly. Any other is dropped. The first dropped position is drawn from the
residual, q* minus what was kept there: for each such y q*(y) − min(q*(y), π_θ(y)), for all others q*(y). Whatever the
acceptance rule, kept plus residual is q*, so each token has exactly the distribution that lockstep gives it (Leviathan
et al. 2023, arXiv:2211.17192, with a target between the two models).

There is no bonus position after a block that is kept whole, and nothing is lost by it. A bonus token would need π_θ's
list there, for q* lies between both, and with the forward pass that gives this list π_θ draws a token too: n passes of
π_θ give n lists and n tokens, and n positions of π_t scored, whether the last is called a bonus and drawn from q* or,
as here, drafted and kept or redrawn. Either way it is drawn from q* and costs no request, and the tokens of a round
are 1 + (those of the first n − 1 that are kept). What π_t's server computes beyond that is the last token's own forward
pass, in the methods that score a whole text; its list, for the position after the block, is not asked for.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate

import numpy as np

from dual_rollout.decoding.call import DecodingCall, both
from dual_rollout.decoding.positions import Draws, Positions, append_draws, build_positions
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.engine import Drafts, GrowingText, ScoringMethod, prefixes
from dual_rollout.functional.candidates import Candidates
from dual_rollout.functional.sampling import sample_rows
from dual_rollout.functional.top_k import NO_TOKEN


class Block:
    """One token for every sequence of a round, and up to `limit`.

    With `adaptive`, the length of each sequence's drafts follows its measured acceptance.
    """

    def __init__(self, call: DecodingCall, limit: int, scoring: ScoringMethod, *, adaptive: bool):
        self._call = call
        self._limit = limit
        self._scoring = scoring
        self._adaptive = adaptive

    def _length(self, sequence: DecodingSequence) -> int:
        """A draft one longer than what was accepted of late: longer ones are mostly thrown away."""
        wanted = self._limit
        if self._adaptive and sequence.run_length is not None:
            wanted = min(wanted, 1 + math.ceil(sequence.run_length))
        return min(wanted, sequence.room)

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """Draft, score, accept from left to right, and draw one token from the residual where a draft ends early.

        At temperature != 1, π_θ's server must report log-probabilities that follow it.
        """
        call, temperature = self._call, self._call.config.temperature
        contexts_theta = [sequence.context_theta for sequence in sequences]
        k = await call.theta.length(contexts_theta[0])
        drafts = await call.theta.engine.draft(
            contexts_theta,
            [self._length(sequence) for sequence in sequences],
            k,
            temperature,
            [int(sequence.rewind().integers(2**31)) for sequence in sequences],
            sequences[0].stop_ids,
        )
        contexts_t = [sequence.context_t for sequence in sequences]
        vocab_size_t = (await call.t.engine.probe(contexts_t[0])).vocab_size
        if vocab_size_t is not None:
            drafts = _until_unknown(drafts, vocab_size_t)
        positions = await self._positions(contexts_theta, contexts_t, drafts, k, vocab_size_t)
        lengths = [len(tokens) for tokens in drafts.token_ids]
        uniforms = np.concatenate(
            [sequence.rng.random((length, 2)) for sequence, length in zip(sequences, lengths, strict=True)]
        )
        drafted = np.concatenate(drafts.token_ids)
        kept, columns = _accept(drafted, positions, uniforms[:, 0])
        call.stats.draft_tokens += len(drafted)

        owners: list[DecodingSequence] = []
        rows: list[int] = []
        for sequence, length, end in zip(sequences, lengths, accumulate(lengths), strict=True):
            run = int(np.argmin(np.append(kept[end - length : end], False)))
            taken = min(run + 1, length)  # with the redrawn one, unless the whole block was kept
            owners += [sequence] * taken
            rows += range(end - length, end - length + taken)
            call.stats.accepted_tokens += run
            sequence.note_draft(length, run)
        index = np.array(rows)
        redrawn = index[~kept[index]]
        columns[redrawn] = sample_rows(_residual(positions, redrawn), uniforms[redrawn, 1])
        drafted[redrawn] = NO_TOKEN
        await append_draws(call, Draws(owners, index, columns[index], drafted[index]), positions)

    async def _positions(
        self,
        contexts_theta: list[GrowingText],
        contexts_t: list[GrowingText],
        drafts: Drafts,
        k: int,
        vocab_size_t: int | None,
    ) -> Positions:
        """The distributions at all drafted positions; `k` tokens were asked for in the drafts' own lists.

        What stands at a draft's end does not change the distribution there, so that π_t gets another token in the place
        of one that it does not have.
        """
        call, tokens, temperature = self._call, drafts.token_ids, self._call.config.temperature
        tokens_t = tokens if vocab_size_t is None else [np.minimum(draft, vocab_size_t - 1) for draft in tokens]
        k_t = await call.t.length(contexts_t[0])
        scored = await call.t.engine.score_drafts(contexts_t, tokens_t, k_t, temperature, self._scoring)
        top_theta, top_t = await both(
            call.theta.complete(drafts.lists, k, lambda: prefixes(contexts_theta, tokens)),
            call.t.complete(scored, k_t, lambda: prefixes(contexts_t, tokens)),
        )
        return await build_positions(
            call,
            top_theta,
            top_t,
            lambda names: call.theta.engine.score_named(contexts_theta, tokens, names, temperature),
            lambda names: call.t.engine.score_named(contexts_t, tokens_t, names, temperature),
        )


def _until_unknown(drafts: Drafts, vocab_size: int) -> Drafts:
    """The drafts, each up to its first token that a model of that vocabulary does not have.

    This one q* never keeps; what was drafted behind it the model could not even read.
    """
    lengths = [int(np.argmax(np.append(tokens, vocab_size) >= vocab_size)) + 1 for tokens in drafts.token_ids]
    if all(length > len(tokens) for length, tokens in zip(lengths, drafts.token_ids, strict=True)):
        return drafts
    rows = np.concatenate(
        [np.arange(len(tokens)) < length for length, tokens in zip(lengths, drafts.token_ids, strict=True)]
    )
    lists = drafts.lists
    return Drafts(
        [tokens[:length] for length, tokens in zip(lengths, drafts.token_ids, strict=True)],
        replace(
            lists,
            token_ids=lists.token_ids[rows],
            logprobs=lists.logprobs[rows],
            complete=np.broadcast_to(lists.complete, rows.shape)[rows],
        ),
    )


def _accept(drafted: np.ndarray, positions: Positions, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which drafted tokens `(R,)` are kept, and their columns (any where they are not)."""
    candidates, rows = positions.candidates, np.arange(len(drafted))
    matches = candidates.token_ids == drafted[:, None]
    inside = matches.any(axis=1)
    columns = np.where(inside, matches.argmax(axis=1), matches.shape[1] - 1)
    log_p, log_q = _proposal(candidates)[rows, columns], positions.q.log_q[rows, columns]
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.log(uniforms) < log_q - log_p  # False for NaN
    return kept & (inside | candidates.has_tail), columns


def _residual(positions: Positions, rows: np.ndarray) -> np.ndarray:
    """q* minus the kept mass, `(len(rows), S)`, not normalised."""
    q = np.exp(positions.q.log_q[rows])
    residual = np.maximum(q - np.exp(np.nan_to_num(_proposal(positions.candidates)[rows], nan=-np.inf)), 0.0)
    # Rounding can leave nothing where q* and π_θ are alike to the last digit; then q* itself is as right.
    return np.where(residual.sum(axis=1, keepdims=True) > 0, residual, q)


def _proposal(candidates: Candidates) -> np.ndarray:
    """log π_θ of what a draft may be kept as, `(R, S)`; NaN where it is not known exactly."""
    if not candidates.has_tail:
        return candidates.exact_theta
    return np.hstack([candidates.exact_theta[:, :-1], candidates.exact_tail[:, None]])
