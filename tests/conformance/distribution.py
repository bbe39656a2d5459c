"""Rollouts on real servers against the exact distribution of two tokens, enumerated from both models' forward passes.

Each χ² test fails for a correct program with probability 1e-4, each comparison of a mean (5 standard errors) with
6e-7. Seeds are fixed. With 400 sequences a total variation of 0.2 is found with a probability of about 0.9; the record
of each token is compared too, which finds far less.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.coordinator import CoordinatorStats
from dual_rollout.record import COUNTS
from tests.chi_square import chi_square_p_value, chi_square_survival, standard_errors_off
from tests.conformance.suite import logprobs_of, reference
from tests.exact_distribution import listed, position_distribution
from tests.hang import HANG

PROMPT = [10, 20, 30]
LONG_PROMPT = [10 + 7 * i % 80 for i in range(100)]
SEQUENCES = 400
FALSE_ALARM = 1e-4
STANDARD_ERRORS = 5.0
TAIL = {"top_k": 10, "support": "tail"}
CLOSE = 2e-3  # nats; of a sum over a few hundred values that agree to 1e-3 at worst


@dataclass(frozen=True)
class Pair:
    """Two servers and the folders of their models."""

    theta_url: str
    t_url: str
    theta_model: Path
    t_model: Path


class ExactDistribution:
    """q* of two tokens after `PROMPT`, for one configuration.

    Attributes:
        p, r: `(1 + V, V)` π_θ and π_t after the prompt, then after the prompt and each token.
        q: `(1 + V, V)` q* there; alpha: `(1 + V,)`.
    """

    def __init__(self, pair: Pair, options: dict[str, Any]):
        self.p, self.r = next_tokens(pair.theta_model), next_tokens(pair.t_model)
        positions = [position_distribution(p, r, options) for p, r in zip(self.p, self.r, strict=True)]
        self.alpha = np.array([alpha for alpha, _ in positions])
        self.q = np.array([q for _, q in positions])
        self.options = options

    def pairs(self, rows: np.ndarray) -> np.ndarray:
        """`(V, V)` probability of each pair of tokens, where `rows` is one of `p`, `q`."""
        return rows[0][:, None] * rows[1:]


class RolloutDistribution:
    """Subclasses give a fixture `pair`."""

    @pytest.mark.parametrize(
        "options",
        [
            {"top_k": 4},
            TAIL,
            {"top_k": 10, "support": "tail", "missing": "exact"},
            {"top_k": 10, "support": "tail", "alpha_method": "fixed", "fixed_alpha": 0.3},
            {"top_k": "auto", "top_k_mass": 0.8, "support": "tail"},
        ],
        ids=lambda options: "-".join(str(value) for value in options.values()),
    )
    def test_blocks_have_the_exact_distribution(self, pair: Pair, options: dict[str, Any]) -> None:
        exact = ExactDistribution(pair, options)
        outputs, stats = rollouts(pair, {"decoding": "block", "num_draft_tokens": 2, **options})
        assert 0 < stats.decoding.accepted_tokens < stats.decoding.draft_tokens
        for name in COUNTS:
            assert sum(getattr(output, name) for output in outputs) == getattr(stats.decoding, name)
        assert_distribution(exact, outputs)
        assert_record(exact, outputs)
        if options.get("support") == "tail":
            assert stats.decoding.tail_tokens > 20 and not stats.decoding.approximate_tail_weights
            assert_unbiased(exact, outputs)

    def test_lockstep_has_the_same_distribution_as_blocks(self, pair: Pair) -> None:
        outputs, _ = rollouts(pair, {"decoding": "lockstep", **TAIL}, seed=8)
        assert_distribution(ExactDistribution(pair, TAIL), outputs)
        assert_record(ExactDistribution(pair, TAIL), outputs)
        blocks, _ = rollouts(pair, {"decoding": "block", "num_draft_tokens": 2, **TAIL})
        a, b = (
            np.bincount([output.generated_tokens[1] for output in each], minlength=400) for each in (outputs, blocks)
        )
        rare = a + b < 10
        a, b = (np.append(counts[~rare], counts[rare].sum()) for counts in (a, b))
        assert chi_square_survival(float((np.square(a - b) / (a + b)).sum()), len(a) - 1) > FALSE_ALARM

    @pytest.mark.parametrize("max_tokens", [2, 20], ids=["asked for by name", "scored with the text"])
    def test_what_the_lists_lack_is_exact_after_a_long_prompt(self, pair: Pair, max_tokens: int) -> None:
        outputs, stats = _generate(pair, [LONG_PROMPT] * 8, max_tokens, {"top_k": 2, "support": "tail"}, seed=3)
        assert stats.decoding.scored_tokens > 4 * max_tokens
        for output in outputs:
            text = [*LONG_PROMPT, *output.generated_tokens]
            for model, found in ((pair.theta_model, output.logprobs_theta), (pair.t_model, output.logprobs_t)):
                rows = logprobs_of(reference(model), text)[len(LONG_PROMPT) - 1 : -1]
                expected = rows[np.arange(max_tokens), output.generated_tokens]
                assert found == pytest.approx(expected.tolist(), abs=CLOSE)


def assert_distribution(exact: ExactDistribution, outputs: list[GenerationOutput]) -> None:
    """The pairs of tokens come as often as they should, and the first tokens outside both lists too."""
    expected = SEQUENCES * exact.pairs(exact.q)
    observed = np.zeros_like(expected)
    for output in outputs:
        observed[tuple(output.generated_tokens)] += 1
    assert expected.sum() == pytest.approx(SEQUENCES)
    assert chi_square_p_value(observed.ravel(), expected.ravel()) > FALSE_ALARM
    assert chi_square_p_value(observed.sum(axis=1), expected.sum(axis=1)) > FALSE_ALARM
    if exact.options.get("support") == "tail":
        # The share of the tail, and in it of the likelier half of its tokens, at both positions.
        kinds = [_kinds(p, r, exact.options) for p, r in zip(exact.p, exact.r, strict=True)]
        cells = np.array(
            [[3 * kinds[0][y] + kinds[1 + y][z] for z in range(len(kinds[0]))] for y in range(len(kinds[0]))]
        )
        counts = [np.bincount(cells.ravel(), weights=values.ravel(), minlength=9) for values in (observed, expected)]
        assert chi_square_p_value(*counts) > FALSE_ALARM


def _kinds(p: np.ndarray, r: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """0 for a token of S, 1 for one of the likelier half of the tail, else 2."""
    kinds = np.zeros(len(p), dtype=int)
    outside = np.setdiff1d(np.arange(len(p)), [*listed(p, options), *listed(r, options)])
    order = outside[np.argsort(-p[outside])]
    likelier = np.cumsum(p[order]) < p[order].sum() / 2
    kinds[order] = np.where(likelier, 1, 2)
    return kinds


def assert_record(exact: ExactDistribution, outputs: list[GenerationOutput]) -> None:
    """α, log q* and exact log-probabilities of every token, of those that one list or both lack too."""
    for output in outputs:
        for i, row in enumerate((0, 1 + output.generated_tokens[0])):
            y = output.generated_tokens[i]
            assert output.alpha_history[i] == pytest.approx(exact.alpha[row], abs=CLOSE)
            assert output.logprobs_q[i] == pytest.approx(np.log(exact.q[row, y]), abs=CLOSE)
            assert output.logprobs_theta[i] == pytest.approx(np.log(exact.p[row, y]), abs=CLOSE)
            assert output.logprobs_t[i] == pytest.approx(np.log(exact.r[row, y]), abs=CLOSE)
            assert output.importance_weights[i] == pytest.approx(exact.p[row, y] / exact.q[row, y], rel=2 * CLOSE)


def assert_unbiased(exact: ExactDistribution, outputs: list[GenerationOutput]) -> None:
    """E_q[w f] = E_π_θ[f] over pairs of tokens."""
    tokens = np.array([output.generated_tokens for output in outputs])
    weights = np.array([np.prod(output.importance_weights) for output in outputs])
    policy = exact.pairs(exact.p)
    vocabulary = np.arange(len(policy))
    for f in (np.ones_like(policy), (vocabulary[:, None] + vocabulary) % 4 == 1, vocabulary[:, None] + 0.0 * policy):
        assert standard_errors_off(weights * f[tokens[:, 0], tokens[:, 1]], float((policy * f).sum())) < STANDARD_ERRORS


_known: dict[str, tuple[list[GenerationOutput], CoordinatorStats]] = {}


def rollouts(pair: Pair, options: dict[str, Any], seed: int = 7) -> tuple[list[GenerationOutput], CoordinatorStats]:
    """`SEQUENCES` rollouts of two tokens after `PROMPT`, drawn once for each configuration."""
    key = repr((pair, options, seed))
    if key not in _known:
        _known[key] = _generate(pair, [PROMPT] * SEQUENCES, 2, options, seed)
    return _known[key]


def _generate(
    pair: Pair, prompts: list[list[int]], max_tokens: int, options: dict[str, Any], seed: int
) -> tuple[list[GenerationOutput], CoordinatorStats]:
    async def run() -> tuple[list[GenerationOutput], CoordinatorStats]:
        config = CoordinatorConfig(theta_url=pair.theta_url, t_url=pair.t_url, seed=seed, ignore_eos=True, **options)
        async with DualVLLMCoordinator(config) as coordinator:
            outputs = await coordinator.generate_batch(prompts, max_tokens=max_tokens)
        assert [output.error for output in outputs] == [None] * len(prompts)
        return outputs, coordinator.stats

    return asyncio.run(asyncio.wait_for(run(), HANG))


@functools.cache
def next_tokens(folder: Path) -> np.ndarray:
    """`(1 + V, V)` probabilities of the token after `PROMPT`, and after it and each token."""
    model = reference(folder)
    vocabulary = torch.arange(model.config.vocab_size)[:, None]
    texts = torch.hstack([torch.tensor(PROMPT).expand(len(vocabulary), -1), vocabulary])
    with torch.no_grad():
        logits = model(texts).logits[:, -2:].double()
    return torch.vstack([logits[:1, 0], logits[:, 1]]).softmax(-1).numpy()
