"""Drawing from a finite distribution by inverting its cumulative sum."""

from __future__ import annotations

import numpy as np


def sample_from_distribution(probs: np.ndarray, candidates: np.ndarray, rng: np.random.Generator | None = None) -> int:
    """One token id from `candidates`, drawn with `probs`.

    Args:
        probs: `(K,)` non-negative; normalised here.
        candidates: `(K,)` token ids.
        rng: source of one uniform number; a fresh, unseeded generator when None.

    Raises:
        ValueError: shapes differ, or no entry has mass.
    """
    probs, candidates = np.asarray(probs, dtype=np.float64), np.asarray(candidates)
    if probs.ndim != 1 or probs.shape != candidates.shape:
        raise ValueError(f"probs and candidates must be (K,), got {probs.shape} and {candidates.shape}")
    if not (np.all(probs >= 0) and 0 < probs.sum() < np.inf):
        raise ValueError("probs must be non-negative, finite, and not all zero")
    uniform = (rng or np.random.default_rng()).random()
    return int(candidates[sample_rows(probs[None], np.array([uniform]))[0]])


def sample_rows(probs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """One column per row, by inverse CDF.

    Args:
        probs: `(B, K)` non-negative, each row with mass; need not be normalised.
        uniforms: `(B,)` in [0, 1).

    Returns:
        `(B,)` column indices. A column without mass is never returned.
    """
    cdf = np.cumsum(probs, axis=1)
    total = cdf[:, -1]
    # u · total may round up to total itself, which would point behind the last column.
    target = np.minimum(uniforms * total, np.nextafter(total, 0.0))
    return (cdf <= target[:, None]).sum(axis=1)
