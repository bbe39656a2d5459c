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
    """Weights π_θ/q* bounded in one of TRL's ways, in TRL's shapes.

    "token_truncate" clamps each token's weight to [clip_min, clip_max]; "token_mask" zeroes the tokens outside.
    The "sequence" modes do the same with the product over the sequence, which behaves like exp(−T·KL(q‖π_θ)) and
    soon vanishes. "none" ignores the weights.

    Args:
        log_weights: `(B, T)` nats; what stands at padding does not matter.
        mask: `(B, T)` 1 at real tokens.

    Returns:
        `(B, T)`, 1 at padding; `(B, 1)` for the "sequence" modes; 1 everywhere for "none".
    """
    real = mask.bool()
    log_weights = log_weights.masked_fill(~real, 0.0)
    if mode == "none":
        return torch.ones_like(log_weights)
    if mode.startswith("sequence"):
        log_weights, real = log_weights.sum(dim=1, keepdim=True), real.any(dim=1, keepdim=True)
    weights = log_weights.exp()
    if mode.endswith("truncate"):
        weights = weights.clamp(min=clip_min, max=clip_max)
    else:
        weights = weights.masked_fill((weights < clip_min) | (weights > clip_max), 0.0)
    return weights.masked_fill(~real, 1.0)
