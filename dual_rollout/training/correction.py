"""Importance weights as they enter a loss."""

from __future__ import annotations

from typing import Literal, get_args

import torch

ImportanceSamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"]
IMPORTANCE_SAMPLING_MODES: tuple[str, ...] = get_args(ImportanceSamplingMode)


def corrected_weights(
    log_weights: torch.Tensor,
    mask: torch.Tensor,
    mode: ImportanceSamplingMode,
    *,
    clip_min: float = 0.0,
    clip_max: float = 3.0,
) -> torch.Tensor:
    """Weights π_θ/q* bounded in one of TRL's ways.

    "token_truncate" clamps each token's weight to [clip_min, clip_max]; "token_mask" zeroes the tokens outside.
    The "sequence" modes do the same with the product over the sequence, which behaves like exp(−T·KL(q‖π_θ)) and
    soon vanishes. "none" ignores the weights.

    Args:
        log_weights: `(B, T)` nats.
        mask: `(B, T)` 1 at real tokens.

    Returns:
        `(B, T)`; 1 everywhere for "none".
    """
    if mode == "none":
        return torch.ones_like(log_weights)
    if mode.startswith("sequence"):
        log_weights = (log_weights * mask).sum(dim=1, keepdim=True).expand_as(log_weights)
    weights = log_weights.exp()
    if mode.endswith("truncate"):
        return weights.clamp(min=clip_min, max=clip_max)
    return weights.masked_fill((weights < clip_min) | (weights > clip_max), 0.0)
