"""Ordinary requests drawn from q*, for frameworks that ask vLLM for tokens in their own way: vLLM samples, and returns
log q* as the log-probability of what it has sampled. Only where two models see one prompt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic

from dual_rollout.config import AlphaRule
from dual_rollout.native.alpha_methods import SOLVERS, alpha_of_rule
from dual_rollout.native.draw import at_least_two
from dual_rollout.native.q_star import AlphaChoice, q_star


def q_star_logits(logits_theta: Tensor, logits_t: Tensor, choice: AlphaChoice) -> Tensor:
    """`(n, V_θ)` τ log q* at the temperature τ of `choice`, by which vLLM divides; −∞ at tokens that π_t lacks."""
    q = q_star(logits_theta, logits_t, choice)
    beyond = logits_theta.shape[1] - q.logprobs.shape[1]
    return torch.nn.functional.pad(choice.temperature * q.logprobs, (0, beyond), value=-torch.inf)


class OrdinaryRows:
    """Turns π_θ's logits of ordinary requests into those of q*.

    Args:
        rule: how α is chosen for all of them.
    """

    def __init__(self, rule: AlphaRule, device: torch.device, backend: str):
        self._rule = rule
        self._device = device
        self._compiled = torch.compile(q_star_logits, backend=backend)

    def apply(self, logits: Tensor, logits_t: Tensor, temperatures: Mapping[int, float]) -> None:
        """Write the rows, in place.

        Args:
            logits, logits_t: `(B, V_θ)` and `(B, V_t)`.
            temperatures: of each row's request; α is solved at that, and at 1 where it is greedy.
        """
        if not temperatures:
            return
        rule, rows = self._rule, torch.tensor(list(temperatures), device=self._device)
        theta, t = logits[rows], logits_t[rows]
        taus = [temperature or 1.0 for temperature in temperatures.values()]
        temperature = torch.tensor(taus, device=self._device)[:, None]
        if rule.alpha_method in SOLVERS:
            alpha = alpha_of_rule(rule, temperature, theta, t)
        else:
            alpha = torch.full_like(temperature, torch.nan if rule.fixed_alpha is None else rule.fixed_alpha)
        bounds = (torch.full_like(temperature, bound) for bound in (rule.alpha_min, rule.alpha_max))
        theta, t = at_least_two(theta), at_least_two(t)
        choice = AlphaChoice(*map(at_least_two, (temperature, alpha, *bounds)))
        for tensor in (theta, t, *choice):
            maybe_mark_dynamic(tensor, 0)
        logits[rows] = self._compiled(theta, t, choice)[: len(rows)]

    def warm_up(self, vocab_size: int, vocab_size_t: int) -> None:
        """Compile now, and not during the first requests."""
        sizes = (vocab_size, vocab_size_t)
        with torch.inference_mode():
            theta, t = (torch.zeros(2, size, device=self._device) for size in sizes)
            self.apply(theta, t, {0: 1.0})
