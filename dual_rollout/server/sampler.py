"""Logits to tokens and log-probabilities, for a batch of sequences at once."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from dual_rollout.server.protocol import SamplingParams


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (nats) at one position, in vLLM's order: the sampled or prompt token, the others.

    ``rank`` is that of the first token, 1 for the most likely; None where nobody asked. Arrays (int32 and float32) keep
    what waits for an answer small.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    rank: int | None = None


@dataclass
class SampleRequest:
    """What the sampler needs to know of one sequence. ``banned`` tokens cannot be drawn in this step."""

    params: SamplingParams
    rng: random.Random
    banned: frozenset[int] = frozenset()


def sample(
    logits_BV: torch.Tensor, requests: list[SampleRequest], *, processed: bool
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Draw one token per row, and list its log-probabilities where the request wants them.

    Raw log-probabilities are those of the model itself; ``processed`` ones are those of the law sampled from
    (after bias and temperature; for greedy requests at temperature 1).
    """
    laws_BV = _processed_logits(logits_BV, requests)
    token_ids = _draw(laws_BV, requests)
    reported_BV = laws_BV if processed else logits_BV
    logprobs: list[TokenLogprobs | None] = [None] * len(requests)
    wanting = [i for i, request in enumerate(requests) if request.params.wants_logprobs]
    if wanting:
        rows = reported_BV if len(wanting) == len(requests) else reported_BV[wanting]
        counts = [_count(requests[i].params, logits_BV.shape[1]) for i in wanting]
        listed = top_logprobs(rows, [token_ids[i] for i in wanting], counts)
        normalisers = None
        for row, i in enumerate(wanting):
            named = requests[i].params.logprob_token_ids
            if named is None:
                logprobs[i] = listed[row]
                continue
            if normalisers is None:
                normalisers = rows.logsumexp(-1)
            ids = np.array([token_ids[i], *named], dtype=np.int32)
            logprobs[i] = TokenLogprobs(ids, (rows[row, ids.tolist()] - normalisers[row]).numpy())
    return token_ids, logprobs


def top_logprobs(
    logits_RV: torch.Tensor, first_ids: list[int], counts: list[int], *, with_ranks: bool = False
) -> list[TokenLogprobs]:
    """Per row the given token, then the ``counts[row]`` most likely ones."""
    first_R1 = torch.tensor(first_ids).unsqueeze(1)
    normaliser_R1 = logits_RV.logsumexp(-1, keepdim=True)
    first_logits_R1 = logits_RV.gather(1, first_R1)
    top = logits_RV.topk(max(counts), dim=-1)
    ids = torch.cat((first_R1, top.indices), dim=1).numpy().astype(np.int32)
    logprobs = (torch.cat((first_logits_R1, top.values), dim=1) - normaliser_R1).numpy()
    ranks = [None] * len(counts)
    if with_ranks:
        ranks = ((logits_RV > first_logits_R1).sum(-1) + 1).tolist()
    return [
        TokenLogprobs(ids[row][: count + 1], logprobs[row][: count + 1], ranks[row]) for row, count in enumerate(counts)
    ]


def _count(params: SamplingParams, vocab_size: int) -> int:
    if params.logprobs is None:
        return 0
    return vocab_size if params.logprobs == -1 else params.logprobs


def _processed_logits(logits_BV: torch.Tensor, requests: list[SampleRequest]) -> torch.Tensor:
    temperatures = [1.0 if request.params.greedy else request.params.temperature for request in requests]
    changed = any(request.params.logit_bias or request.banned for request in requests)
    if not changed and all(temperature == 1.0 for temperature in temperatures):
        return logits_BV
    processed_BV = logits_BV.clone()
    for row, request in enumerate(requests):
        if request.params.logit_bias:
            ids, biases = zip(*request.params.logit_bias, strict=True)
            processed_BV[row, list(ids)] += torch.tensor(biases)
        if request.banned:
            processed_BV[row, list(request.banned)] = -torch.inf
    return processed_BV.div_(torch.tensor(temperatures).unsqueeze(1))


def _draw(laws_BV: torch.Tensor, requests: list[SampleRequest]) -> list[int]:
    """Greedy rows take the mode; the others invert their cumulative distribution at one uniform number."""
    token_ids = laws_BV.argmax(-1).tolist()
    for row, request in enumerate(requests):
        if request.params.greedy:
            continue
        weights = laws_BV[row].softmax(-1).double().cumsum(-1).numpy()
        token_id = int(np.searchsorted(weights, request.rng.random() * weights[-1], side="right"))
        token_ids[row] = min(token_id, len(weights) - 1)
    return token_ids
