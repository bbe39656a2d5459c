"""Tokens outside both lists (`support="tail"`): drawn from π_θ, with its exact mass there."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np

from dual_rollout.decoding.call import DecodingCall, both
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.exceptions import DualRolloutError, EngineProtocolError
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


async def draw_tail_token(
    call: DecodingCall, sequence: DecodingSequence, candidates: Candidates, row: int
) -> TailToken | None:
    """A token outside S in `row`; None, and the sequence failed, where the server cannot give one."""
    try:
        return TailToken(
            *await both(_draw_outside(call, sequence, candidates, row), _tail_mass(call, sequence, candidates, row))
        )
    except DualRolloutError as error:
        sequence.fail(error)
        return None


async def _draw_outside(call: DecodingCall, sequence: DecodingSequence, candidates: Candidates, row: int) -> int:
    """y ~ π_θ given that y is outside S and π_t has it, by rejection; the server's exclusion only makes the first draw
    succeed."""
    engine, config = call.theta.engine, call.config
    likeliest_first = candidates.token_ids[row][np.argsort(-candidates.logp_theta[row])]
    excluded = [*likeliest_first[likeliest_first != NO_TOKEN].tolist(), *candidates.theta_alone]
    rejected = set(excluded)
    for _ in range(_MAX_DRAWS):
        call.stats.tail_draws += 1
        seed = int(sequence.rng.integers(2**31))
        token = await engine.draw_excluding(sequence.context_theta, excluded, config.temperature, seed)
        if token not in rejected:
            return token
    raise EngineProtocolError(
        f"{_MAX_DRAWS} draws gave no token outside the candidates; the server seems to ignore logit_bias. "
        'Use support="union" with it.',
        url=engine.url,
    )


async def _tail_mass(call: DecodingCall, sequence: DecodingSequence, candidates: Candidates, row: int) -> float:
    """log of π_θ's exact mass on what the tail stands for. q* was built with floors in S, and without knowing what π_θ
    has on tokens that π_t lacks; the weight must not be."""
    if not math.isnan(candidates.exact_tail[row]):
        return float(candidates.exact_tail[row])
    engine, temperature = call.theta.engine, call.config.temperature
    served = await engine.probe(sequence.context_theta)
    if not served.names_tokens_at(temperature):
        if not call.stats.approximate_tail_weights:
            logger.warning(
                "%s does not report named tokens%s: tail weights are approximate (floors for exact candidates)",
                engine.url,
                f" at temperature {temperature:g}" if served.named_logprobs else "",
            )
        call.stats.approximate_tail_weights += 1
        return float(candidates.logp_theta[row, -1])
    names = [*candidates.missing(row, candidates.exact_theta), *candidates.theta_alone]
    (logprobs,) = await engine.named_logprobs([sequence.context_theta], [names], temperature)
    mass = 1.0 - np.nansum(np.exp(candidates.exact_theta[row])) - np.exp(logprobs).sum()
    return math.log(max(mass, ROUNDING))
