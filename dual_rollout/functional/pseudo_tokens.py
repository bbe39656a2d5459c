"""Tokens behind the vocabulary whose log-probabilities carry numbers from the model to the client.

A server that has them serves V + 4 tokens. Before vLLM divides by the temperature, their logits are

| token | logit            |
|-------|------------------|
| V     | −100             |
| V + 1 | −100 − 16 α      |
| V + 2 | −100 + 16 ψ(α)   |
| V + 3 | −100 − 16 τ      |

where τ is the temperature that α is solved at, and those of the vocabulary are τ log q*. What vLLM does afterwards to a
whole row, dividing by the temperature and normalising, cancels in the differences to token V. The factor of 16 keeps α
and ψ to 1e-6 in float32; α is on a grid of 2^-18, so that the client gets the very number that was used. At
temperatures up to 2 these tokens have a probability below e^-50 = 2e-22 each: they are never sampled.

A prompt's rows (`prompt_logprobs`) hold log π_θ instead, and −200 at all four.
"""

from __future__ import annotations

from collections.abc import Sequence

NUM_PSEUDO_TOKENS = 4
FLOOR = -100.0
SCALE = 16.0
POLICY_ROW = -200.0
ALPHA_STEP = 2.0**-18


def decode(logprobs: Sequence[float], temperature: float) -> list[float]:
    """α, ψ and τ, as many as `logprobs` has entries after the first, from log-probabilities of tokens V, V + 1, ...

    Args:
        logprobs: of tokens V, V + 1, ... in this order, nats.
        temperature: the request's.
    """
    signs = (1.0, -1.0, 1.0)
    base = logprobs[0]
    values = [sign * (base - value) * temperature / SCALE for sign, value in zip(signs, logprobs[1:], strict=False)]
    values[0] = round(values[0] / ALPHA_STEP) * ALPHA_STEP
    return values
