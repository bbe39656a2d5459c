"""The ways to choose α that `draw` does not know itself, in torch; `functional.alpha_methods` has the mathematics.

They take up to 24 passes over the vocabulary and are not compiled: a rollout that asks for them pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dual_rollout.config import AlphaRule
from dual_rollout.native.q_star import LOG_ZERO, cut_to_common, log_softmax, on_common

_ROUNDS = 12
_NEAREST_0, _NEAREST_1 = 2.0**-53, 1.0 - 2.0**-24  # in float32


def alpha_of_rule(rule: AlphaRule, temperature: float | Tensor, logits_theta: Tensor, logits_t: Tensor) -> Tensor:
    """`(n, 1)` α of one of `SOLVERS` for `(n, V_θ)` and `(n, V_t)` logits, before the bounds.

    0 or 1 is that model itself; `_NEAREST_0` or `_NEAREST_1` the limit from inside (0, 1), see `kl_symmetry`.
    """
    return SOLVERS[rule.alpha_method](rule, log_softmax(logits_theta, temperature), log_softmax(logits_t, temperature))


def _entropy(logp_theta: Tensor, logp_t: Tensor) -> Tensor:
    theta, t = (-(logp.exp() * logp).sum(dim=1, keepdim=True) for logp in (logp_theta, logp_t))
    return _limit_from_inside(torch.where(theta + t > 0, theta / (theta + t), 0.5), logp_theta, logp_t)


def _ess_balance(logp_theta: Tensor, logp_t: Tensor) -> Tensor:
    base, slope = on_common(*cut_to_common(logp_theta, logp_t))
    zero = torch.zeros_like(base[:, :1])
    offset = 2.0 * (_cumulants(base, slope, zero + 1.0)[0] - _cumulants(base, slope, zero)[0])

    def imbalance(alpha: Tensor) -> tuple[Tensor, Tensor]:
        left, left_mean, _ = _cumulants(base, slope, -alpha)
        right, right_mean, _ = _cumulants(base, slope, 2.0 - alpha)
        return left - right + offset, right_mean - left_mean

    return _limit_from_inside(_root(imbalance, zero + 0.5), logp_theta, logp_t)


def _kl_budget(logp_theta: Tensor, logp_t: Tensor, budget: float) -> Tensor:
    base, slope = on_common(*cut_to_common(logp_theta, logp_t))
    half = torch.full_like(base[:, :1], 0.5)

    def excess(alpha: Tensor) -> tuple[Tensor, Tensor]:
        psi, mean, variance = _cumulants(base, slope, alpha)
        root = (alpha * mean - psi).clamp(min=0.0).sqrt()
        # Where rounding leaves no divergence, no step can be taken from its slope: the bracket is halved.
        return root - budget**0.5, alpha * variance / torch.where(root > 0, 2.0 * root, torch.nan)

    within = excess(2.0 * half)[0] <= 0
    alpha = _limit_from_inside(torch.where(within, 1.0, _root(excess, half)), logp_theta, logp_t)
    at_once = -base.logsumexp(dim=1, keepdim=True)  # −log of π_θ's mass on the common support is the price of any α > 0
    return alpha.masked_fill(~within & (at_once >= budget), 0.0)


def _limit_from_inside(alpha: Tensor, logp_theta: Tensor, logp_t: Tensor) -> Tensor:
    """α with 0 and 1 made the limits where the end itself leaves the common support, as that of `kl_symmetry`."""
    theta, t = cut_to_common(logp_theta, logp_t)
    theta_alone, t_alone = (
        ((own > LOG_ZERO) & (other <= LOG_ZERO)).any(dim=1, keepdim=True) for own, other in ((theta, t), (t, theta))
    )
    alpha = torch.where(theta_alone, alpha.clamp(min=_NEAREST_0), alpha)
    return torch.where(t_alone, alpha.clamp(max=_NEAREST_1), alpha)


def _root(evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], alpha: Tensor) -> Tensor:
    """Where an increasing function on [0, 1] is zero, by Newton's method inside a bracket; ½ where it is zero there."""
    low, high = torch.zeros_like(alpha), torch.ones_like(alpha)
    for _ in range(_ROUNDS):
        value, rate = evaluate(alpha)
        low = torch.where(value <= 0, alpha, low)
        high = torch.where(value >= 0, alpha, high)
        newton = alpha - value / rate
        inside = (newton >= low) & (newton <= high)  # NaN is not
        alpha = torch.where(inside, newton, 0.5 * (low + high))
    return alpha


def _cumulants(base: Tensor, slope: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ψ, ψ′ and ψ″ at α, `(n, 1)` each: the log-partition, and mean and variance of the slope under q_α."""
    path = base + alpha * slope
    psi = path.logsumexp(dim=1, keepdim=True)
    q = (path - psi).exp()
    mean = (q * slope).sum(dim=1, keepdim=True)
    return psi, mean, (q * (slope - mean).square()).sum(dim=1, keepdim=True)


SOLVERS: Mapping[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "ess_balance": lambda rule, logp_theta, logp_t: _ess_balance(logp_theta, logp_t),
    "entropy": lambda rule, logp_theta, logp_t: _entropy(logp_theta, logp_t),
    "kl_budget": lambda rule, logp_theta, logp_t: _kl_budget(logp_theta, logp_t, rule.kl_budget),
}
"""What gives α for each of `config.AlphaMethod` that `draw` does not know itself: by a rule, and log-probabilities of
both whole vocabularies, `(n, V_θ)` and `(n, V_t)`."""
