"""What the probes of all kinds of servers share."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from dual_rollout.functional.top_k import TopK

logger = logging.getLogger(__name__)

SAME_LOGPROB = 0.1
"""Nats; kernels differ by less in bfloat16, wrong rows by far more."""


def follow_temperature(at_one: TopK, at_two: TopK) -> bool:
    """Whether log-probabilities follow the temperature: lists after one text, asked for at temperature 1 and at 2.

    Doubling it halves the distances between tokens, which no rounding can look like. Where the tokens are too alike to
    tell, or only one may be listed, its own log-probability must move by more than kernels round. False is the safe
    answer: lists are then asked for at temperature 1.
    """
    one, two = (np.sort(top.logprobs[0])[::-1] for top in (at_one, at_two))
    last = min(int(np.isfinite(one).sum()), int(np.isfinite(two).sum())) - 1
    distance, at_two_distance = one[0] - one[last], two[0] - two[last]
    if distance > SAME_LOGPROB:
        return bool(at_two_distance < 0.75 * distance)
    return bool(abs(one[0] - two[0]) > SAME_LOGPROB)


def warn_of_refusals(url: str, refused: Sequence[str]) -> None:
    """Log what a server refused to the probe, `Capabilities.refused`."""
    for refusal in refused:
        logger.warning("%s refused what it should offer; slower ways do as well. %s", url, refusal)
