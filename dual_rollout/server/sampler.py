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

    Arrays (int32 and float32) keep what waits for an answer small.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray


def sample(
    logits_BV: torch.Tensor, params_B: list[SamplingParams], rngs_B: list[random.Random], *, processed: bool
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Draw one token per row, and list its log-probabilities where the request wants them.

    Raw log-probabilities are those of the model itself; ``processed`` ones are those of the distribution sampled from
    (after bias and temperature; for greedy requests at temperature 1).
    """
    sampled_BV = _processed_logits(logits_BV, params_B)
    token_ids = _draw(sampled_BV, params_B, rngs_B)
    reported_BV = sampled_BV if processed else logits_BV
    logprobs: list[TokenLogprobs | None] = [None] * len(params_B)
    wanting = [i for i, params in enumerate(params_B) if params.wants_logprobs]
    if wanting:
        rows = reported_BV if len(wanting) == len(params_B) else reported_BV[wanting]
        counts = [_count(params_B[i], logits_BV.shape[1]) for i in wanting]
        listed = top_logprobs(rows, [token_ids[i] for i in wanting], counts)
        normalisers = None
        for row, i in enumerate(wanting):
            named = params_B[i].logprob_token_ids
            if named is None:
                logprobs[i] = listed[row]
                continue
            if normalisers is None:
                normalisers = rows.logsumexp(-1)
            ids = np.array([token_ids[i], *named], dtype=np.int32)
            logprobs[i] = TokenLogprobs(ids, (rows[row, ids.tolist()] - normalisers[row]).numpy())
    return token_ids, logprobs


def top_logprobs(logits_RV: torch.Tensor, first_ids: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """Per row the given token, then the ``counts[row]`` most likely ones."""
    first_R1 = torch.tensor(first_ids).unsqueeze(1)
    normaliser_R1 = logits_RV.logsumexp(-1, keepdim=True)
    top = logits_RV.topk(max(counts), dim=-1)
    ids = torch.cat((first_R1, top.indices), dim=1).numpy().astype(np.int32)
    logprobs = (torch.cat((logits_RV.gather(1, first_R1), top.values), dim=1) - normaliser_R1).numpy()
    return [TokenLogprobs(ids[row][: count + 1], logprobs[row][: count + 1]) for row, count in enumerate(counts)]


def _count(params: SamplingParams, vocab_size: int) -> int:
    if params.logprobs is None:
        return 0
    return vocab_size if params.logprobs == -1 else params.logprobs


def _processed_logits(logits_BV: torch.Tensor, params_B: list[SamplingParams]) -> torch.Tensor:
    temperatures = [1.0 if params.greedy else params.temperature for params in params_B]
    if all(temperature == 1.0 for temperature in temperatures) and not any(params.logit_bias for params in params_B):
        return logits_BV
    processed_BV = logits_BV.clone()
    for row, params in enumerate(params_B):
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias, strict=True)
            processed_BV[row, list(ids)] += torch.tensor(biases)
    return processed_BV.div_(torch.tensor(temperatures).unsqueeze(1))


def _draw(logits_BV: torch.Tensor, params_B: list[SamplingParams], rngs_B: list[random.Random]) -> list[int]:
    """Greedy rows take the mode; the others invert their cumulative distribution at one uniform number."""
    token_ids = logits_BV.argmax(-1).tolist()
    for row, (params, rng) in enumerate(zip(params_B, rngs_B, strict=True)):
        if params.greedy:
            continue
        weights = logits_BV[row].softmax(-1).double().cumsum(-1).numpy()
        token_id = int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))
        token_ids[row] = min(token_id, len(weights) - 1)
    return token_ids
