"""Importance weights from q* to the policy."""

from __future__ import annotations

import numpy as np


def importance_weights(logprobs_theta: np.ndarray, logprobs_q: np.ndarray) -> np.ndarray:
    """w = π_θ(y)/q*(y) of sampled tokens, so that E_q[w f] = E_π_θ[f] wherever q* has the policy's support.

    Args:
        logprobs_theta, logprobs_q: same shape, nats.
    """
    return np.exp(np.asarray(logprobs_theta, dtype=np.float64) - np.asarray(logprobs_q, dtype=np.float64))


def effective_sample_size(weights: np.ndarray) -> float:
    """Kish's (Σw)²/Σw² as a fraction of the number of weights, in (0, 1]; 1 when all are equal, 0 when all are 0."""
    weights = np.asarray(weights, dtype=np.float64)
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / (squares * weights.size) if squares > 0 else 0.0
