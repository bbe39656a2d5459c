"""What no list held is fetched when a sequence has come to its end, so that every record is exact."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import numpy as np

from dual_rollout.decoding.call import DecodingCall
from dual_rollout.decoding.outage import until_back
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.engine import GrowingText, ScoringEngine
from dual_rollout.exceptions import DualRolloutError

logger = logging.getLogger(__name__)

_NAMED_COST = 32  # tokens of a text that cost as much as a request, which computes part of a block of the cache again


async def fetch_unlisted(call: DecodingCall, sequence: DecodingSequence) -> None:
    """Fetch log π_θ and log π_t of the tokens that a list lacked; log q* outside both follows from log π_θ."""
    record = sequence.record
    if sequence.failure is None:  # else the same server would fail again
        await asyncio.gather(_complete_theta(call, sequence), _complete_t(call, sequence))
    for position, log_weight in sequence.log_weights.items():
        record.logprobs_q[position] = record.logprobs_theta[position] - log_weight


async def _complete_theta(call: DecodingCall, sequence: DecodingSequence) -> None:
    logprobs = sequence.record.logprobs_theta
    text = _Text(sequence.context_theta, logprobs, sequence.top_theta)
    try:
        await _score(call, call.theta.engine, text, np.isnan(logprobs))
    except DualRolloutError as error:
        sequence.fail(error)


async def _complete_t(call: DecodingCall, sequence: DecodingSequence) -> None:
    record, engine, on_failure = sequence.record, call.t.engine, call.config.on_target_failure
    unknown = np.isnan(record.logprobs_t) & ~np.array(record.without_target, dtype=bool)
    text = _Text(sequence.context_t, record.logprobs_t, sequence.top_t)
    try:
        if on_failure == "wait":
            await until_back(lambda: _score(call, engine, text, unknown), engine.url)
        else:
            await _score(call, engine, text, unknown)
    except DualRolloutError as error:
        if on_failure == "policy":
            logger.warning("some log π_t stay NaN (on_target_failure is policy): %s", error)
        else:
            sequence.fail(error)


@dataclass(frozen=True, slots=True)
class _Text:
    """What one model saw: prompt and completion, and of the completion its log-probabilities and those of the likeliest
    tokens."""

    context: GrowingText
    logprobs: list[float]
    tops: list[float]


async def _score(call: DecodingCall, engine: ScoringEngine, text: _Text, unknown: np.ndarray) -> None:
    """Replace the log-probabilities that are `unknown` by exact values.

    A few tokens are asked for by name, each after its prefix, which the server still has in its cache. For more, one
    request scores the whole text, which servers do at temperature 1. The most likely token of each position was listed
    at the temperature in use, which fixes the normaliser:
    log p_T(y) = (log p(y) − log p(top)) / T + log p_T(top).
    """
    indices = np.flatnonzero(unknown).tolist()
    if not indices:
        return
    context = text.context
    first = len(context) - len(text.logprobs)
    last = first + indices[-1] + 1
    temperature = call.config.temperature
    served = await engine.probe(context)
    few = len(indices) * _NAMED_COST <= last
    if few and served.prefix_caching and served.names_tokens_at(temperature):
        prefixes = [GrowingText.like(context, context[: first + i]) for i in indices]
        names = [[context[first + i]] for i in indices]
        values = await engine.named_logprobs(prefixes, names, temperature)
        exact = [float(value[0]) for value in values]
    else:
        seen = GrowingText.like(context, context[:last])
        own, top = await engine.score(seen, first)
        exact = [(own[i] - top[i]) / temperature + text.tops[i] for i in indices]
    for i, logprob in zip(indices, exact, strict=True):
        text.logprobs[i] = logprob
    call.stats.scored_tokens += len(indices)
