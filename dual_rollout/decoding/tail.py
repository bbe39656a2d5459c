"""Tokens outside both lists (`support="tail"`): drawn from π_θ, with its exact mass there."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dual_rollout.decoding.call import DecodingCall, both
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.engine import sent_once
from dual_rollout.exceptions import DualRolloutError, EngineProtocolError, EngineRejectedError
from dual_rollout.functional.candidates import ROUNDING, Candidates
from dual_rollout.functional.top_k import NO_TOKEN

logger = logging.getLogger(__name__)

_MAX_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class TailToken:
    """A token outside S.

    Attributes:
        log_mass: log of π_θ's mass outside S, nats; the weight of any token there is that mass over q*'s.
    """

    token_id: int
    log_mass: float


async def draw_tail_tokens(
    call: DecodingCall, sequences: Sequence[DecodingSequence], candidates: Candidates, rows: Sequence[int]
) -> list[TailToken | None]:
    """For each sequence a token outside S in its row; None, and it failed, where the server cannot give one.

    All are asked for at once. Where the server refuses that, each is asked for alone, since one prompt may be to blame.
    """
    draws = [_Draw.of(sequence, candidates, row) for sequence, row in zip(sequences, rows, strict=True)]

    async def drawn(some: list[_Draw]) -> list[TailToken]:
        tokens, masses = await both(_draw_outside(call, some), _tail_masses(call, candidates, some))
        return [TailToken(*pair) for pair in zip(tokens, masses, strict=True)]

    async def alone(draw: _Draw) -> TailToken | None:
        try:
            return (await drawn([draw]))[0]
        except DualRolloutError as error:
            draw.sequence.fail(error)
            return None

    try:
        return list(await drawn(draws)) if draws else []
    except (EngineRejectedError, EngineProtocolError):
        with sent_once():
            return await asyncio.gather(*map(alone, draws))
    except DualRolloutError as error:
        for sequence in sequences:
            sequence.fail(error)
        return [None] * len(draws)


@dataclass(frozen=True, slots=True)
class _Draw:
    """A token that is wanted outside S.

    Attributes:
        row: of the candidates.
        excluded: what it may not be, the likeliest first.
        seed: of the first try; the n-th after it has `seed + n`, so that asking again gives the same.
    """

    sequence: DecodingSequence
    row: int
    excluded: list[int]
    seed: int

    @classmethod
    def of(cls, sequence: DecodingSequence, candidates: Candidates, row: int) -> _Draw:
        likeliest_first = candidates.token_ids[row][np.argsort(-candidates.logp_theta[row])]
        excluded = [*likeliest_first[likeliest_first != NO_TOKEN].tolist(), *candidates.theta_alone]
        return cls(sequence, row, excluded, int(sequence.rng.integers(2**31 - _MAX_DRAWS)))


async def _draw_outside(call: DecodingCall, draws: list[_Draw]) -> list[int]:
    """y ~ π_θ given that y is outside S and π_t has it, by rejection; the server's exclusion only makes the first try
    succeed."""
    engine, temperature = call.theta.engine, call.config.temperature
    tokens, left = [NO_TOKEN] * len(draws), list(range(len(draws)))
    for attempt in range(_MAX_DRAWS):
        call.stats.tail_draws += len(left)
        drawn = await engine.draw_excluding(
            [draws[i].sequence.context_theta for i in left],
            [draws[i].excluded for i in left],
            temperature,
            [draws[i].seed + attempt for i in left],
        )
        for i, token in zip(left, drawn, strict=True):
            tokens[i] = token
        left = [i for i in left if tokens[i] in draws[i].excluded]
        if not left:
            return tokens
    raise EngineProtocolError(
        f"{_MAX_DRAWS} draws gave no token outside the candidates; the server seems to ignore logit_bias. "
        'Use support="union" with it.',
        url=engine.url,
    )


async def _tail_masses(call: DecodingCall, candidates: Candidates, draws: list[_Draw]) -> list[float]:
    """log of π_θ's exact mass on what the tail of each stands for. q* was built with floors in S, and without knowing
    what π_θ has on tokens that π_t lacks; the weight must not be."""
    masses = {draw.row: float(candidates.exact_tail[draw.row]) for draw in draws}
    unknown = [draw for draw in draws if math.isnan(masses[draw.row])]
    if not unknown:
        return list(masses.values())
    engine, temperature = call.theta.engine, call.config.temperature
    served = await engine.probe(unknown[0].sequence.context_theta)
    if not served.names_tokens_at(temperature):
        if not call.stats.approximate_tail_weights:
            logger.warning(
                "%s does not report named tokens%s: tail weights are approximate (floors for exact candidates)",
                engine.url,
                f" at temperature {temperature:g}" if served.named_logprobs else "",
            )
        call.stats.approximate_tail_weights += len(unknown)
        masses |= {draw.row: float(candidates.logp_theta[draw.row, -1]) for draw in unknown}
        return list(masses.values())
    exact = candidates.exact_theta
    named = await engine.named_logprobs(
        [draw.sequence.context_theta for draw in unknown],
        [[*candidates.missing(draw.row, exact), *candidates.theta_alone] for draw in unknown],
        temperature,
    )
    for draw, logprobs in zip(unknown, named, strict=True):
        mass = 1.0 - np.nansum(np.exp(exact[draw.row])) - np.exp(logprobs).sum()
        masses[draw.row] = math.log(max(mass, ROUNDING))
    return list(masses.values())
