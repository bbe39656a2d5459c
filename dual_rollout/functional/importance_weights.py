"""Importance weights from q* to the policy, and what they are worth."""

from __future__ import annotations

import math

import numpy as np

_MIN_TAIL = 5


def importance_weights(logprobs_theta: np.ndarray, logprobs_q: np.ndarray) -> np.ndarray:
    """w = π_θ(y)/q*(y) of sampled tokens, so that E_q[w f] = E_π_θ[f] wherever q* has the policy's support.

    Args:
        logprobs_theta, logprobs_q: same shape, nats.
    """
    return np.exp(np.asarray(logprobs_theta, dtype=np.float64) - np.asarray(logprobs_q, dtype=np.float64))


def effective_sample_size(weights: np.ndarray) -> float:
    """Kish's (Σw)²/Σw² as a fraction of the number of weights, in (0, 1]; 1 when all are equal, 0 when all are 0."""
    weights = np.asarray(weights, dtype=np.float64)
    largest = weights.max(initial=0.0)
    if largest == 0:
        return 0.0
    scaled = weights / largest  # no square overflows
    return float(scaled.sum() ** 2 / (np.square(scaled).sum() * weights.size))


def pareto_k(weights: np.ndarray) -> float:
    """k̂, the shape of a generalised Pareto distribution fitted to the largest weights.

    The weights' moments exist up to order 1/k: below 0.5 their variance is finite; above 0.7 an estimate from them is
    not to be relied on, and above 1 not even its mean exists. The tail are the min(S/5, 3√S) largest of S weights, and
    k̂ is drawn a little towards 0.5, as ten more observations would (Vehtari et al. 2024, JMLR 25(72),
    arXiv:1507.02646).

    Args:
        weights: any shape, finite, >= 0.

    Returns:
        NaN where there is nothing to fit: fewer than 5 weights in the tail (S < 25), or weights that are all alike.
    """
    ordered = np.sort(np.asarray(weights, dtype=np.float64), axis=None)
    size = math.ceil(min(ordered.size / 5.0, 3.0 * math.sqrt(ordered.size)))
    if size < _MIN_TAIL:
        return math.nan
    threshold = ordered[-size - 1]
    excess = ordered[-size:] - threshold
    if excess[_quartile(size)] <= 1e-9 * threshold:
        return math.nan
    return (size * _pareto_shape(excess) + 10.0 * 0.5) / (size + 10.0)


def _quartile(size: int) -> int:
    """Index of the lower quartile among `size` sorted values."""
    return int(size / 4.0 + 0.5) - 1


def _pareto_shape(excess: np.ndarray) -> float:
    """ξ of F(x) = 1 − (1 + ξ x/σ)^(−1/ξ) from sorted positive values: Zhang and Stephens' posterior mean of θ = −ξ/σ.

    For a given θ the likelihood is largest at ξ(θ) = mean log(1 − θ x), where it is n(log(−θ/ξ) − ξ − 1); the mean is
    taken over a grid of the prior's quantiles (Zhang and Stephens 2009, doi:10.1198/tech.2009.08017).
    """
    n = excess.size
    points = 30 + int(math.sqrt(n))
    quantile = (np.arange(points) + 0.5) / points
    theta = 1.0 / excess[-1] + (1.0 - np.sqrt(1.0 / quantile)) / (3.0 * excess[_quartile(n)])
    shape = np.log1p(-theta[:, None] * excess).mean(axis=1)
    likelihood = n * (np.log(-theta / shape) - shape - 1.0)
    posterior = np.exp(likelihood - likelihood.max())
    return float(np.log1p(-(theta @ posterior / posterior.sum()) * excess).mean())
