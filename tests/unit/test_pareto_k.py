"""k̂ on samples whose tail is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dual_rollout.functional.importance_weights import _pareto_shape, pareto_k


def generalised_pareto(shape: float, size: int, seed: int = 0) -> np.ndarray:
    """By inversion of F(x) = 1 − (1 + k x)^(−1/k)."""
    u = np.random.default_rng(seed).random(size)
    return -np.log(u) if shape == 0 else (u**-shape - 1.0) / shape


@pytest.mark.parametrize("shape", [-0.4, 0.0, 0.2, 0.5, 0.7, 1.0, 1.5])
def test_the_fit_finds_the_shape(shape):
    """The estimator's asymptotic deviation is about (1 + k)/√n, 0.025 at most here: five of them."""
    excess = np.sort(generalised_pareto(shape, 10_000))
    assert _pareto_shape(excess) == pytest.approx(shape, abs=0.12)


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.2])
def test_the_tail_of_weights_with_power_distribution(shape):
    """u^(−k) has the tail index k everywhere; its 949 largest of 100,000 are fitted, the deviation is 0.04 to 0.07."""
    weights = np.random.default_rng(1).random(100_000) ** -shape
    assert pareto_k(weights) == pytest.approx(shape, abs=0.25)


def test_bounded_weights_have_no_heavy_tail():
    assert pareto_k(np.random.default_rng(2).random(5000)) < 0


def test_a_target_too_far_away_shows():
    """Weights of a normal under a narrower one: exp(a x²), whose tail index for x ~ N(0, s²) is 2 a s² = 1 − s²."""
    x = np.random.default_rng(3).normal(size=200_000)
    for s, trusted in ((0.9, True), (0.4, False)):
        weights = s * np.exp(-0.5 * (s * x) ** 2 + 0.5 * x**2)
        assert (pareto_k(weights) < 0.7) == trusted


def test_scale_and_order_do_not_matter():
    weights = generalised_pareto(0.4, 400)
    assert pareto_k(weights) == pytest.approx(pareto_k(1e-3 * weights[::-1].reshape(20, 20)))


@pytest.mark.parametrize("weights", [np.ones(24), np.ones(500), np.arange(20.0), np.zeros(100), np.array([])])
def test_nothing_to_fit(weights):
    assert math.isnan(pareto_k(weights))


def test_a_small_tail_is_drawn_towards_a_half():
    """With few weights the prior, worth ten observations at 0.5, holds back an extreme fit."""
    weights = np.random.default_rng(4).random(30) ** -3.0
    fit = _pareto_shape(np.sort(weights)[-6:] - np.sort(weights)[-7])
    assert pareto_k(weights) == pytest.approx((6 * fit + 5) / 16)
