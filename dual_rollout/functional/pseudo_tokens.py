"""Tokens behind the vocabulary whose log-probabilities carry numbers from the model to the client.

A server that has them serves V + 5 tokens. Before vLLM divides by the temperature, their logits are

| token | logit               |
|-------|---------------------|
| V     | −100                |
| V + 1 | −100 − 256 α        |
| V + 2 | −100 − 16 KL(q‖π_θ) |
| V + 3 | −100 − 16 KL(q‖π_t) |
| V + 4 | −100 − 16 τ         |

where τ is the temperature that α is solved at, and those of the vocabulary are τ log q*. What vLLM does afterwards to a
whole row, dividing by the temperature and normalising, cancels in the differences to token V. α is on a grid of 2^-20,
whose half is more than float32 loses on the way (three roundings by 2^-24 of 1.4, its largest logit over the factor),
so that the client gets the very number that was used. At temperatures up to 2 these tokens have a probability below
e^-50 = 2e-22 each: they are never sampled. vLLM's API writes what is below −9999 as that: at temperatures of at least
0.05 never α, but divergences above (9999 T − 100)/16 nats.

A prompt's rows (`prompt_logprobs`) hold log π_θ instead, and −200 at all five; but where π_θ has tokens that π_t lacks,
the last holds log of their probability together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NUM_PSEUDO_TOKENS = 5
FLOOR = -100.0
SCALES = (0.0, 256.0, 16.0, 16.0, 16.0)
POLICY_ROW = -200.0
ALPHA_STEP = 2.0**-20

_NEVER = -9999.0  # vLLM's API writes anything below as this


def decode(logprobs: Sequence[float], temperature: float) -> list[float]:
    """α, KL(q‖π_θ), KL(q‖π_t) and τ: as many as `logprobs` has entries after the first; NaN where vLLM cut one off.

    Args:
        logprobs: of tokens V, V + 1, ... in this order, nats.
        temperature: the request's.
    """
    differences = [logprobs[0] - value if value > _NEVER else math.nan for value in logprobs[1:]]
    values = [temperature / scale * gap for scale, gap in zip(SCALES[1:], differences, strict=False)]
    values[0] = round(values[0] / ALPHA_STEP) * ALPHA_STEP
    return values
