"""A native server's α and q* in torch against the numpy reference."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from dual_rollout.config import AlphaMethod, AlphaRule
from dual_rollout.functional.alpha_methods import entropy_alpha, ess_balance_alpha, kl_budget_alpha
from dual_rollout.functional.distribution import ALPHA_METHODS
from dual_rollout.functional.kl_symmetry import log_q_star, solve_alpha
from dual_rollout.native import q_star as native
from dual_rollout.native.alpha_methods import SOLVERS, alpha_of_rule
from dual_rollout.native.ordinary_requests import q_star_logits
from dual_rollout.native.q_star import AlphaChoice, QStar

BALANCED = AlphaRule()


def choice(rows: int, rule: AlphaRule, temperature: float, device: str = "cpu") -> AlphaChoice:
    alpha = np.nan if rule.fixed_alpha is None else rule.fixed_alpha
    numbers = (temperature, alpha, rule.alpha_min, rule.alpha_max)
    return AlphaChoice(*(torch.full((rows, 1), number, device=device) for number in numbers))


def q_star(theta: torch.Tensor, t: torch.Tensor, rule: AlphaRule = BALANCED, temperature: float = 1.0) -> QStar:
    return native.q_star(theta, t, choice(len(theta), rule, temperature, str(theta.device)))


def pair(rows: int, vocab: int, scale: float, correlation: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    theta, noise = (torch.randn(rows, vocab, generator=generator) * scale for _ in range(2))
    return theta, correlation * theta + (1 - correlation**2) ** 0.5 * noise


def exact(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (logits.double() / temperature).log_softmax(1)


def kl_difference(theta: torch.Tensor, t: torch.Tensor, alpha: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    logp, slope = exact(theta, temperature), exact(t, temperature) - exact(theta, temperature)
    return ((logp + alpha * slope).softmax(1) * slope).sum(1).abs()


def alpha_error(theta: torch.Tensor, t: torch.Tensor, temperature: float, q: QStar) -> np.ndarray:
    """Against the reference. Where both models put nearly all mass on one token, float32 leaves nothing to tell them
    apart by, and any α is as good as another."""
    reference = solve_alpha(exact(theta, temperature).numpy(), exact(t, temperature).numpy())
    apart = q.kl_theta[:, 0].numpy() > 1e-2
    assert apart.any()
    return np.abs(q.alpha[:, 0].numpy() - reference)[apart]


@pytest.mark.parametrize(
    ("vocab", "scale", "correlation"), [(50, 3.0, 0.5), (300, 3.0, 0.98), (2000, 5.0, 0.9), (2000, 8.0, 0.97)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_alpha_balances_the_divergences(vocab: int, scale: float, correlation: float, temperature: float) -> None:
    theta, t = pair(200, vocab, scale, correlation)
    q = q_star(theta, t, BALANCED, temperature)
    assert alpha_error(theta, t, temperature, q).max() < 1e-4
    assert kl_difference(theta, t, q.alpha, temperature).max() < 1e-4
    logp_theta, logp_t = exact(theta, temperature), exact(t, temperature)
    log_q = ((1 - q.alpha.double()) * logp_theta + q.alpha.double() * logp_t).log_softmax(1)
    assert (q.logprobs - log_q).abs().max() < 5e-5
    for found, logp in ((q.kl_theta, logp_theta), (q.kl_t, logp_t)):
        assert (found - (log_q.exp() * (log_q - logp)).sum(1, keepdim=True)).abs().max() < 5e-5


def test_peaked_rows_like_those_of_a_language_model() -> None:
    """One token with almost all mass in both, or one in each, over a wide tail. In the latter rows both divergences are
    some ten nats."""
    theta, t = pair(400, 5000, 3.0, 0.95)
    theta[::2, 7] += 20.0
    t[::4, 7] += 20.0
    t[2::4, 9] += 20.0
    q = q_star(theta, t, BALANCED, 1.0)
    assert alpha_error(theta, t, 1.0, q).max() < 1e-4
    assert q.kl_theta.max() > 5
    assert kl_difference(theta, t, q.alpha).max() < 2e-4


def test_two_tokens() -> None:
    theta, t = torch.tensor([[5.0, 0.0], [9.0, 0.0]]), torch.tensor([[0.0, 5.0], [0.0, 3.0]])
    alpha = q_star(theta, t, BALANCED, 1.0).alpha
    assert kl_difference(theta, t, alpha).max() < 1e-4


def test_equal_models_meet_in_the_middle() -> None:
    theta, _ = pair(5, 100, 3.0, 0.0)
    q = q_star(theta, theta.clone(), BALANCED, 1.0)
    assert q.alpha.tolist() == [[0.5]] * 5
    assert (q.logprobs - exact(theta)).abs().max() < 1e-5
    assert q.kl_theta.max() < 1e-5 and q.kl_t.max() < 1e-5


def test_rule_bounds_and_fixed_alpha() -> None:
    theta, t = pair(50, 100, 3.0, 0.5)
    free = q_star(theta, t, BALANCED, 1.0).alpha
    bounded = q_star(theta, t, AlphaRule(alpha_min=0.45, alpha_max=0.5), 1.0).alpha
    assert torch.equal(bounded, free.clamp(0.45, 0.5)) and bounded.std() > 0
    for alpha, same in ((0.0, theta), (1.0, t)):
        q = q_star(theta, t, AlphaRule(alpha_method="fixed", fixed_alpha=alpha), 1.0)
        assert set(q.alpha[:, 0].tolist()) == {alpha}
        assert (q.logprobs - exact(same)).abs().max() < 1e-4
        assert (q.kl_theta if alpha == 0.0 else q.kl_t).max() < 1e-5


def test_impossible_tokens_stay_impossible() -> None:
    theta, t = pair(3, 20, 2.0, 0.5)
    theta[:, 3], t[:, 3] = -torch.inf, -torch.inf
    theta[:, 4] = -torch.inf
    q = q_star(theta, t, BALANCED, 1.0)
    assert torch.isfinite(q.alpha).all() and q.logprobs[:, 3:5].exp().max() == 0
    assert q.logprobs.exp().sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_without_a_root_q_is_the_limit_from_inside() -> None:
    """What both models allow, one of them likes better throughout, so no α balances."""
    theta, t = pair(3, 20, 2.0, 0.5)
    t[:, 5:] = -torch.inf
    theta, t = torch.cat((theta, t)), torch.cat((t, theta))
    q = q_star(theta, t, BALANCED, 1.0)
    logp_theta, logp_t = exact(theta).numpy(), exact(t).numpy()
    alpha = solve_alpha(logp_theta, logp_t)
    assert q.alpha[:, 0].tolist() == alpha.round(15).tolist() == [0.0] * 3 + [1.0] * 3
    assert np.abs(q.logprobs.exp().numpy() - np.exp(log_q_star(logp_theta, logp_t, alpha)[0])).max() < 1e-6
    assert q.logprobs[:, 5:].exp().max() == 0
    assert torch.isfinite(q.kl_theta).all() and torch.isfinite(q.kl_t).all()


def test_supports_that_overlap_in_part() -> None:
    """At every α inside (0, 1) only common tokens are possible."""
    theta, t = pair(200, 30, 2.0, 0.5)
    generator = torch.Generator().manual_seed(2)
    for logits, common in ((theta, 0), (t, 1)):
        missing = torch.rand(logits.shape, generator=generator) < 0.3
        missing[:, common] = False
        logits[missing] = -torch.inf
    q = q_star(theta, t, BALANCED, 1.0)
    both = torch.isfinite(theta) & torch.isfinite(t)
    assert both.any(dim=1).all()
    assert q.logprobs.exp()[~both].max() == 0
    log_q, _ = log_q_star(exact(theta).numpy(), exact(t).numpy(), solve_alpha(exact(theta).numpy(), exact(t).numpy()))
    assert np.abs(q.logprobs.exp().numpy() - np.exp(log_q)).max() < 1e-4
    for logits, bound in ((theta, 0.0), (t, 1.0)):  # an end that is asked for is the model itself
        end = q_star(theta, t, AlphaRule(alpha_min=bound, alpha_max=bound), 1.0)
        assert (end.logprobs.exp() - exact(logits).exp()).abs().max() < 1e-5


def supports(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    theta, t = pair(60, 30, 2.0, 0.8)
    generator = torch.Generator().manual_seed(3)
    missing = torch.rand(theta.shape, generator=generator) < 0.3
    missing[:, 0] = False
    if kind in ("theta alone", "both alone"):
        t[missing] = -torch.inf
    if kind in ("t alone", "both alone"):
        theta[missing.roll(1, dims=1) & (torch.arange(30) > 0)] = -torch.inf
    if kind == "equal":
        t = theta.clone()
    if kind == "one token":
        theta[:, 1] += 200.0
    return theta, t


@pytest.mark.parametrize("kind", ["the same support", "theta alone", "t alone", "both alone", "equal", "one token"])
@pytest.mark.parametrize(
    "rule",
    [
        AlphaRule(alpha_method="ess_balance"),
        AlphaRule(alpha_method="entropy"),
        *(AlphaRule(alpha_method="kl_budget", kl_budget=budget) for budget in (0.0, 0.05, 0.5, 50.0)),
    ],
    ids=lambda rule: f"{rule.alpha_method} {rule.kl_budget}",
)
def test_the_other_methods_give_the_q_star_of_the_reference(rule: AlphaRule, kind: str) -> None:
    """At the ends of (0, 1) too, which are a model itself or the limit from inside: there the support tells."""
    theta, t = supports(kind)
    rows = torch.full((len(theta), 1), 1.0)
    alpha = alpha_of_rule(rule, 1.0, theta, t)
    found = native.q_star(theta, t, AlphaChoice(rows, alpha, 0.0 * rows, rows))
    logp_theta, logp_t = exact(theta).numpy(), exact(t).numpy()
    methods = {"ess_balance": ess_balance_alpha, "entropy": entropy_alpha}
    reference = methods.get(rule.alpha_method, lambda a, b: kl_budget_alpha(a, b, rule.kl_budget))(logp_theta, logp_t)
    log_q, _ = log_q_star(logp_theta, logp_t, reference)
    assert np.array_equal(found.logprobs.exp().numpy() > 0, np.exp(log_q.astype(np.float32)) > 0)
    assert np.abs(found.logprobs.exp().numpy() - np.exp(log_q)).max() < 2e-3


def test_without_a_common_token_the_policy_decides() -> None:
    theta, t = pair(2, 10, 2.0, 0.5)
    theta[:, :5], t[:, 5:] = -torch.inf, -torch.inf
    q = q_star(theta, t, BALANCED, 1.0)
    assert q.alpha.tolist() == [[0.0], [0.0]]
    assert (q.logprobs.exp() - exact(theta).exp()).abs().max() < 1e-5


def test_a_longer_vocabulary_is_cut_to_the_common_tokens() -> None:
    theta, t = pair(4, 20, 2.0, 0.5)
    q = q_star(theta, t[:, :17], BALANCED, 1.0)
    path = (1 - q.alpha) * theta.log_softmax(1)[:, :17] + q.alpha * t[:, :17].log_softmax(1)
    assert q.logprobs.shape == (4, 17)
    psi = -(1 - q.alpha) * q.kl_theta - q.alpha * q.kl_t
    assert (psi - path.logsumexp(1, keepdim=True)).abs().max() < 1e-5
    assert (q.logprobs - path.log_softmax(1)).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
def test_what_vllm_samples_an_ordinary_request_from_is_q_star(temperature: float) -> None:
    """It divides what is served by the temperature. Tokens that π_t lacks are impossible."""
    theta, t = pair(300, 500, 4.0, 0.9)
    t = t[:, :450]
    served = q_star_logits(theta, t, choice(300, BALANCED, temperature))
    assert served.shape == (300, 500) and (served[:, 450:] == -torch.inf).all()
    q = q_star(theta, t, BALANCED, temperature)
    assert ((served / temperature).log_softmax(1)[:, :450].exp() - q.logprobs.exp()).abs().max() < 1e-5


def test_every_method_has_what_solves_it() -> None:
    assert set(ALPHA_METHODS) == set(get_args(AlphaMethod))
    assert set(SOLVERS) == set(get_args(AlphaMethod)) - {"kl_symmetry", "fixed"}, "the others are solved in the draw"
