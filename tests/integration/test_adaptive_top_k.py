"""`top_k: auto`: S is a matter of the context alone, q* is exact, and what is asked for follows what was needed.

Each χ² test fails for a correct program with probability 1e-4; seeds are fixed.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.top_k_source import TopKSource
from dual_rollout.functional.top_k import NO_TOKEN, TopK, most_likely, tokens_to_mass
from dual_rollout.servers import HttpTransport, VLLMEngine
from dual_rollout.stats import CoordinatorStats
from tests.chi_square import chi_square_p_value
from tests.exact_distribution import FEWEST_LISTED, listed, position_distribution
from tests.hang import HANG
from tests.markov_server import MarkovServer

V = 60
START = 3
AUTO = {"top_k": "auto", "support": "tail", "top_k_mass": 0.9}


def chain(seed: int) -> np.ndarray:
    """Rows from nearly certain to nearly flat."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(V, V)) * np.linspace(0.2, 4.0, V)[:, None]
    matrix = np.exp(logits - logits.max(axis=1, keepdims=True))
    return matrix / matrix.sum(axis=1, keepdims=True)


THETA, T = chain(1), 0.7 * chain(1) + 0.3 * chain(2)


def generate(
    prompts: list[list[int]],
    *,
    max_tokens: int,
    chains: tuple[np.ndarray, np.ndarray] = (THETA, T),
    **options: Any,
) -> tuple[list[GenerationOutput], CoordinatorStats]:
    async def run() -> tuple[list[GenerationOutput], CoordinatorStats]:
        servers = [MarkovServer(matrix) for matrix in chains]
        async with servers[0].running() as theta, servers[1].running() as t:
            config = CoordinatorConfig(theta_url=theta.url, t_url=t.url, seed=5, **{**AUTO, **options})
            async with DualVLLMCoordinator(config) as coordinator:
                return await coordinator.generate_batch(prompts, max_tokens=max_tokens), coordinator.stats

    return asyncio.run(asyncio.wait_for(run(), HANG))


def test_the_matrices_need_lists_of_many_lengths():
    lengths = [len(listed(row, AUTO)) for row in (*THETA, *T)]
    assert min(lengths) == FEWEST_LISTED and max(lengths) > 40 and len(set(lengths)) > 10


@pytest.mark.parametrize("options", [{"decoding": "lockstep"}, {"decoding": "block", "num_draft_tokens": 3}], ids=str)
def test_the_distribution_and_its_record_are_exact(options):
    sequences = 1200
    outputs, stats = generate([[START]] * sequences, max_tokens=2, max_concurrency=400, **options)
    distributions = [position_distribution(p, r, AUTO) for p, r in zip(THETA, T, strict=True)]
    distribution = {
        (a, b): distributions[START][1][a] * distributions[a][1][b] for a, b in itertools.product(range(V), repeat=2)
    }
    drawn = [tuple(output.generated_tokens) for output in outputs]
    observed = np.array([drawn.count(pair) for pair in distribution])
    assert observed.sum() == sequences
    assert chi_square_p_value(observed, sequences * np.array(list(distribution.values()))) > 1e-4
    for output in outputs:
        for i, (last, token) in enumerate(itertools.pairwise([START, *output.generated_tokens])):
            alpha, q = distributions[last]
            assert output.alpha_history[i] == pytest.approx(alpha, abs=1e-7)
            assert output.logprobs_q[i] == pytest.approx(math.log(q[token]), abs=1e-6)
            assert output.logprobs_theta[i] == pytest.approx(math.log(THETA[last, token]), abs=1e-6)
            assert output.importance_weights[i] == pytest.approx(THETA[last, token] / q[token], rel=1e-6)
    assert stats.decoding.tail_tokens > 50
    assert stats.decoding.top_k_mass_mean > 0.9


@pytest.mark.parametrize("decoding", ["lockstep", "block"])
def test_the_tokens_do_not_depend_on_what_else_is_in_flight(decoding):
    """The others change what is asked for, not what a position is made of. Tail tokens are π_θ's server's own draws."""
    prompts = [[i] for i in range(24)]
    together, _ = generate(prompts, max_tokens=6, decoding=decoding, num_draft_tokens=2)
    alone, _ = generate(prompts, max_tokens=6, decoding=decoding, num_draft_tokens=2, max_concurrency=1)
    assert [output.generated_tokens for output in together] == [output.generated_tokens for output in alone]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.logprobs_q, b.logprobs_q, atol=1e-12)


@pytest.mark.parametrize("decoding", ["lockstep", "block"])
def test_a_list_that_comes_short_is_asked_for_again(decoding):
    """All rows are nearly certain, but for two that the last sequences start from."""
    matrix = np.full((V, V), 0.1 / V) + 0.9 * np.roll(np.eye(V), 1, axis=1)
    matrix[:2] = 1 / V
    prompts = [[i] for i in range(10, 50)] + [[0], [1]]
    outputs, stats = generate(prompts, chains=(matrix, matrix), max_tokens=4, decoding=decoding, max_concurrency=8)
    assert all(output.error is None for output in outputs)
    assert stats.decoding.repeated_lists > 0
    assert stats.decoding.received_tokens > stats.decoding.listed_tokens
    assert FEWEST_LISTED <= stats.decoding.top_k_mean < FEWEST_LISTED + 5


class NoServer:
    """An engine that is asked for lists of `length` equally likely tokens."""

    def __init__(self, max_logprobs: int | None = None):
        self.asked: list[tuple[int, int]] = []
        self._max_logprobs = max_logprobs
        self.length = 10

    async def probe(self, prompt: Any) -> Any:
        return self

    @property
    def max_logprobs(self) -> int | None:
        return self._max_logprobs

    async def next_top_k(self, contexts: Any, k: int, temperature: float = 1.0) -> TopK:
        self.asked.append((len(contexts), k))
        count = min(k, self.length)
        shape = (len(contexts), count)
        return TopK(np.broadcast_to(np.arange(count), shape), np.full(shape, -math.log(self.length)))


def ask(engine: NoServer, lists: TopKSource, contexts: int = 8) -> TopK:
    engine.asked.clear()
    return asyncio.run(lists.next_top_k([[1]] * contexts))


def adaptive(engine: Any) -> TopKSource:
    return TopKSource(engine, CoordinatorConfig(**AUTO), DecodingStats())


def test_what_is_asked_for_follows_what_was_needed():
    engine = NoServer()
    lists = adaptive(engine)
    ask(engine, lists)
    assert engine.asked == [(8, 128)]
    ask(engine, lists)
    assert engine.asked == [(8, 16)]
    engine.length = 700
    top = ask(engine, lists)
    assert [k for _, k in engine.asked] == [16, 32, 64, 128, 256, 512, 1000]  # nothing was known beyond 16
    assert top.token_ids.shape == (8, 630)
    for _ in range(20):
        ask(engine, lists)
    assert engine.asked == [(8, 1000)]  # a step that lists mostly need more than is not worth its request


def test_the_servers_own_limit_bounds_the_lists():
    engine = NoServer(max_logprobs=20)
    lists = adaptive(engine)
    engine.length = 100
    for _ in range(3):
        top = ask(engine, lists)
        assert engine.asked == [(8, 20)]
        assert top.token_ids.shape == (8, 20)


def test_a_list_of_all_there_is_is_not_asked_for_again():
    engine = NoServer()
    lists = adaptive(engine)
    ask(engine, lists)
    engine.length = 3  # of a vocabulary of three
    top = ask(engine, lists)
    assert len(engine.asked) == 1 and (top.token_ids != NO_TOKEN).sum(axis=1).tolist() == [3] * 8


def test_no_more_tokens_are_excluded_than_vllm_takes():
    async def run() -> tuple[int, dict[str, Any]]:
        async with MarkovServer(np.full((1100, 1100), 1 / 1100)).running() as server:
            transport = HttpTransport(server.url)
            (token,) = await VLLMEngine(transport).draw_excluding([[1]], [list(range(1100))], 1.0, [0])
            await transport.aclose()
            return token, server.requests[-1]["logit_bias"]

    token, bias = asyncio.run(run())
    assert list(bias) == [str(i) for i in range(1024)]  # the first come first
    assert 1024 <= token < 1100


def test_lists_are_cut_to_the_fewest_tokens_with_the_mass():
    top = TopK(
        np.array([[4, 2, 9, 7], [5, 1, NO_TOKEN, NO_TOKEN]]),
        np.log(np.array([[0.1, 0.5, 0.1, 0.2], [0.2, 0.7, 0, 0]]) + 1e-300),
    )
    top.logprobs[top.token_ids == NO_TOKEN] = -np.inf
    assert tokens_to_mass(top, 0.7 - 1e-9).tolist() == [2, 1]
    assert tokens_to_mass(top, 0.95).tolist() == [5, 5]
    cut = most_likely(top, np.array([3, 1]))
    assert cut.token_ids.tolist() == [[2, 7, 4], [1, NO_TOKEN, NO_TOKEN]]  # of equals the lower id
    np.testing.assert_allclose(np.exp(cut.logprobs), [[0.5, 0.2, 0.1], [0.7, 0, 0]])
