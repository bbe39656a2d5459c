"""q* over the full vocabulary in torch: batched, in float32, with a fixed number of steps and no host synchronisation.

The mathematics is that of `dual_rollout.functional.kl_symmetry`, which is the reference it is tested against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HALLEY_ROUNDS = 4
LOG_ZERO = -1e4  # stands for log 0: its weight underflows, and differences of it are finite
ROUNDING = 1e-5  # of α
SAME = 1e-6  # E|log π_t − log π_θ| below which two rows are equal up to float32 rounding, nats


class AlphaChoice(NamedTuple):
    """How α is chosen in each of n rows, and at what temperature; `(n, 1)` float32 each.

    Attributes:
        temperature: divides both models' logits.
        alpha: NaN where the two divergences are to be equal.
        alpha_min, alpha_max: bounds.
    """

    temperature: Tensor
    alpha: Tensor
    alpha_min: Tensor
    alpha_max: Tensor


class QStar(NamedTuple):
    """q* of n rows over the V tokens that both models have, float32, nats.

    Attributes:
        logprobs: `(n, V)` log q*.
        weights: `(n, V)` what q* is in proportion to; the largest of each row is 1.
        alpha: `(n, 1)`, the very α that `logprobs` was made with.
        logp_theta, logp_t: `(n, V)`, each of its model's whole vocabulary.
        kl_theta, kl_t: `(n, 1)` KL(q‖π_θ) and KL(q‖π_t). With ψ = log Σ π_θ^(1−α) π_t^α they are αψ′ − ψ and
            (α−1)ψ′ − ψ.
    """

    logprobs: Tensor
    weights: Tensor
    alpha: Tensor
    logp_theta: Tensor
    logp_t: Tensor
    kl_theta: Tensor
    kl_t: Tensor


def q_star(logits_theta: Tensor, logits_t: Tensor, choice: AlphaChoice) -> QStar:
    """q* of n pairs of rows.

    Args:
        logits_theta, logits_t: `(n, V_θ)` and `(n, V_t)`, any floating type. A token beyond the shorter vocabulary has
            probability zero there, and so under q*.

    A solved α of 0 or 1 stands for the limit from inside (0, 1): q is on the tokens that both can say. Where they have
    none in common, q is π_θ, with α = 0.
    """
    logp_theta, logp_t = common_logprobs(logits_theta, logits_t, choice.temperature)
    solved = balanced_alpha(*on_common(logp_theta, logp_t))
    alpha = torch.where(choice.alpha.isnan(), solved, choice.alpha).clamp(choice.alpha_min, choice.alpha_max)
    # α is 0 or 1 by the user's choice: then q is that model itself, whatever the other can say.
    at_an_end = (choice.alpha == 0.0) | (choice.alpha == 1.0) | (choice.alpha_max == 0.0) | (choice.alpha_min == 1.0)
    slope = logp_t - logp_theta
    common = torch.minimum(logp_theta, logp_t) > LOG_ZERO
    disjoint = ~(common.any(dim=1, keepdim=True) | at_an_end)
    alpha = alpha.masked_fill(disjoint, 0.0)
    path = (1.0 - alpha) * logp_theta + alpha * logp_t  # exact at both ends
    path = path.where(common | disjoint | at_an_end, LOG_ZERO)
    peak = path.amax(dim=1, keepdim=True)
    weights = (path - peak).exp()
    total = weights.sum(dim=1, keepdim=True)
    psi, rate = peak + total.log(), (weights * slope).sum(dim=1, keepdim=True) / total
    kl_theta, kl_t = alpha * rate - psi, (alpha - 1.0) * rate - psi
    return QStar(path - psi, weights, alpha, logp_theta, logp_t, kl_theta.clamp(min=0.0), kl_t.clamp(min=0.0))


def common_logprobs(logits_theta: Tensor, logits_t: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """log π_θ and log π_t of the tokens that both have, `(n, V)`; the mass of the others is not given to these."""
    return cut_to_common(log_softmax(logits_theta, temperature), log_softmax(logits_t, temperature))


def cut_to_common(logp_theta: Tensor, logp_t: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the tokens that only the longer vocabulary has."""
    vocab_size = min(logp_theta.shape[1], logp_t.shape[1])
    return logp_theta[:, :vocab_size], logp_t[:, :vocab_size]


def on_common(logp_theta: Tensor, logp_t: Tensor) -> tuple[Tensor, Tensor]:
    """log π_θ and log π_t − log π_θ where neither model excludes the token, log 0 and 0 elsewhere."""
    common = torch.minimum(logp_theta, logp_t) > LOG_ZERO
    return logp_theta.where(common, LOG_ZERO), (logp_t - logp_theta).where(common, 0.0)


def balanced_alpha(logp_theta: Tensor, slope: Tensor) -> Tensor:
    """The α in [0, 1] at which q_α is equally far from both; ½ for equal rows.

    Halley's method on log A − log B (see `kl_symmetry.solve_alpha`) from α = ½, inside a bracket. Its third moments
    cost little beside the exponentials, and save one or two rounds of Newton's.

    Args:
        logp_theta: `(B, V)` float32, finite.
        slope: `(B, V)` log π_t − log π_θ, finite.

    Returns:
        `(B, 1)`.
    """
    alpha = torch.full_like(slope[:, :1], 0.5)
    # So wide that the first bisection tries an end, where a row stays whose root is beyond.
    low, high = alpha - 1.0, alpha + 1.0
    for _ in range(HALLEY_ROUNDS):
        path = logp_theta + alpha * slope
        weight = (path - path.amax(dim=1, keepdim=True)).exp()
        a, a1, a2 = _side(weight, slope.clamp(min=0.0))
        b, b1, b2 = _side(weight, (-slope).clamp(min=0.0))
        low = torch.where(a < b, alpha, low)
        high = torch.where(a > b, alpha, high)
        gap, rate = a.log() - b.log(), a1 + b1
        curvature = a2 - a1 * a1 - b2 + b1 * b1
        step = alpha - 2.0 * gap * rate / (2.0 * rate * rate - gap * curvature)
        # An empty side makes the step NaN, which is not inside; a converged one may miss the bracket by its rounding.
        inside = (step >= low - ROUNDING) & (step <= high + ROUNDING)
        step = torch.where(inside, step, 0.5 * (low + high)).clamp(0.0, 1.0)
        same = a + b <= SAME * weight.sum(dim=1, keepdim=True)
        alpha = torch.where(same, alpha, step)
    return alpha


def log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """log-probabilities at `temperature`, a number or `(B, 1)`; float32, finite."""
    return (logits.float() / temperature).log_softmax(dim=1).clamp(min=LOG_ZERO)


def _side(weight: Tensor, distance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w d, and Σ w d² and Σ w d³ divided by it; each `(B, 1)`."""
    total = (weight * distance).sum(dim=1, keepdim=True)
    second = (weight * distance * distance).sum(dim=1, keepdim=True)
    third = (weight * distance * distance * distance).sum(dim=1, keepdim=True)
    return total, second / total, third / total
