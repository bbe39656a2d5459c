"""Two models of one tokenizer whose vocabularies are padded to different sizes, as Qwen2.5's 1.5B and 7B are.

An id that only one of them has has probability 0 under the other, and so under q*: it is never drawn, and never sent to
the server that would refuse it. Here such ids have up to half of a model's mass, and none of them may fail a sequence.

Each χ² test fails for a correct program with probability 1e-4, each comparison of a mean (5 standard errors) with 6e-7;
seeds are fixed.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.coordinator import CoordinatorStats
from dual_rollout.decoding import outage
from dual_rollout.servers import vllm_probe
from tests.chi_square import chi_square_p_value, standard_errors_off
from tests.exact_distribution import position_distribution
from tests.fault_proxy import FaultProxy, reset
from tests.hang import HANG
from tests.markov_server import MarkovServer, random_chain
from tests.sglang_stub import SGLangStub, markov
from tests.tiny_model import make_tiny_model
from tests.warm_servers import WarmServer

COMMON, LONG = 7, 10
START, TOKENS, SEQUENCES = 3, 2, 150
FALSE_ALARM, STANDARD_ERRORS = 1e-4, 5.0
SHORT_CHAIN = random_chain(np.random.default_rng(1), COMMON, sharpness=1.2)
LONG_CHAIN = random_chain(np.random.default_rng(5), LONG, sharpness=1.2)
PAIRS = {"the target has more": (SHORT_CHAIN, LONG_CHAIN), "the policy has more": (LONG_CHAIN, SHORT_CHAIN)}
OPTIONS: dict[str, dict[str, Any]] = {
    "union-floor": {"top_k": 3},
    "union-exact": {"top_k": 3, "missing": "exact"},
    "union-all": {"top_k": LONG},
    "union-1": {"top_k": 1},
    "tail-floor": {"top_k": 2, "support": "tail"},
    "tail-exact": {"top_k": 2, "support": "tail", "missing": "exact"},
    "tail-all": {"top_k": COMMON, "support": "tail"},
    "the target itself": {"top_k": 3, "alpha_method": "fixed", "fixed_alpha": 1.0},
}
FULL_SUPPORT = [name for name, options in OPTIONS.items() if options.get("support") == "tail" or options["top_k"] > 3]
both_pairs = pytest.mark.parametrize("pair", PAIRS)
every_option = pytest.mark.parametrize("name", OPTIONS)
every_mode = pytest.mark.parametrize("decoding", ["lockstep", "block"])


@functools.cache
def rollouts(
    pair: str, name: str, decoding: str
) -> tuple[list[GenerationOutput], CoordinatorStats, list[list[dict[str, Any]]]]:
    """Outputs, statistics, and what was asked of either server."""

    async def run() -> Any:
        servers = [MarkovServer(chain) for chain in PAIRS[pair]]
        async with servers[0].running() as theta, servers[1].running() as t:
            config = CoordinatorConfig(
                theta_url=theta.url, t_url=t.url, decoding=decoding, seed=11, max_concurrency=1000, **OPTIONS[name]
            )
            async with DualVLLMCoordinator(config) as coordinator:
                outputs = await coordinator.generate_batch([[START]] * SEQUENCES, max_tokens=TOKENS)
                return outputs, coordinator.stats, [theta.requests, t.requests]

    return asyncio.run(asyncio.wait_for(run(), HANG))


@functools.cache
def exact_position(pair: str, name: str, last: int) -> tuple[float, np.ndarray]:
    theta, t = PAIRS[pair]
    return position_distribution(theta[last], t[last], OPTIONS[name])


def sequence_probabilities(rows: Any) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of common tokens; `rows(last)` is the next-token distribution."""
    return {
        sequence: math.prod(rows(last)[token] for last, token in itertools.pairwise((START, *sequence)))
        for sequence in itertools.product(range(COMMON), repeat=TOKENS)
    }


@both_pairs
@every_option
@every_mode
def test_no_sequence_fails_and_the_distribution_is_exact(pair, name, decoding):
    outputs, _, _ = rollouts(pair, name, decoding)
    assert [output.error for output in outputs] == [None] * SEQUENCES
    drawn = [tuple(output.generated_tokens) for output in outputs]
    distribution = sequence_probabilities(lambda last: exact_position(pair, name, last)[1])
    assert sum(distribution.values()) == pytest.approx(1)
    observed = np.array([drawn.count(sequence) for sequence in distribution])
    assert observed.sum() == SEQUENCES, "an id that one model lacks was drawn"
    assert chi_square_p_value(observed, SEQUENCES * np.array(list(distribution.values()))) > FALSE_ALARM


@both_pairs
@every_option
@every_mode
def test_the_record_is_exact(pair, name, decoding):
    theta, t = PAIRS[pair]
    for output in rollouts(pair, name, decoding)[0]:
        steps = itertools.pairwise([START, *output.generated_tokens])
        record = (output.alpha_history, output.logprobs_q, output.logprobs_theta, output.logprobs_t)
        for (last, token), alpha, log_q, log_theta, log_t, weight in zip(
            steps, *record, output.importance_weights, strict=True
        ):
            exact_alpha, q = exact_position(pair, name, last)
            assert alpha == pytest.approx(exact_alpha, abs=1e-7)
            assert log_q == pytest.approx(math.log(q[token]), abs=1e-6)
            assert log_theta == pytest.approx(math.log(theta[last, token]), abs=1e-6)
            assert log_t == pytest.approx(math.log(t[last, token]), abs=1e-6)
            assert weight == pytest.approx(theta[last, token] / q[token], rel=1e-5)


@both_pairs
@pytest.mark.parametrize("name", FULL_SUPPORT)
@every_mode
def test_weighted_means_are_the_policys_on_the_common_tokens(pair, name, decoding):
    """E_q[w f] = E_π_θ[f 1{no token that π_t lacks}]."""
    outputs, stats, _ = rollouts(pair, name, decoding)
    weights = np.array([math.prod(output.importance_weights) for output in outputs])
    first = np.array([output.generated_tokens[0] for output in outputs])
    policy = sequence_probabilities(lambda last: PAIRS[pair][0][last])
    assert standard_errors_off(weights, sum(policy.values())) < STANDARD_ERRORS
    expected = sum(probability for sequence, probability in policy.items() if sequence[0] % 2 == 0)
    assert standard_errors_off(weights * (first % 2 == 0), expected) < STANDARD_ERRORS
    assert stats.decoding.approximate_tail_weights == 0
    if OPTIONS[name]["top_k"] == 2:
        assert stats.decoding.tail_tokens > 0


@both_pairs
@every_option
@every_mode
def test_no_request_names_what_a_server_lacks(pair, name, decoding):
    for chain, requests in zip(PAIRS[pair], rollouts(pair, name, decoding)[2], strict=True):
        for request in requests[10:]:  # what comes before asks for the size of the vocabulary
            prompts = request["prompt"] if isinstance(request["prompt"][0], list) else [request["prompt"]]
            named = [*request.get("logprob_token_ids", ()), *map(int, request.get("logit_bias", ()))]
            assert max(itertools.chain(named, *prompts)) < len(chain)


@pytest.mark.parametrize("kinds", [("sglang", "vllm"), ("vllm", "sglang")], ids=" ".join)
@both_pairs
@every_mode
def test_sglang_tells_its_vocabulary_too(kinds, pair, decoding):
    async def run() -> list[GenerationOutput]:
        servers = [
            SGLangStub(markov(chain)) if kind == "sglang" else MarkovServer(chain)
            for kind, chain in zip(kinds, PAIRS[pair], strict=True)
        ]
        async with servers[0].running() as theta, servers[1].running() as t:
            config = CoordinatorConfig(
                theta_url=theta.url,
                t_url=t.url,
                theta_engine=kinds[0],
                t_engine=kinds[1],
                decoding=decoding,
                seed=11,
                top_k=2,
                support="tail",
            )
            async with DualVLLMCoordinator(config) as coordinator:
                return await coordinator.generate_batch([[START]] * 40, max_tokens=3)

    outputs = asyncio.run(asyncio.wait_for(run(), HANG))
    assert [output.error for output in outputs] == [None] * 40
    assert max(token for output in outputs for token in output.generated_tokens) < COMMON


def test_a_sequence_with_a_token_that_the_target_lacks_goes_on_without(monkeypatch):
    """Drawn from π_θ alone while the target's server was gone; the others return to it."""
    monkeypatch.setattr(outage, "_PAUSE_S", 0.0)
    theta_chain, t_chain = PAIRS["the policy has more"]

    async def run() -> list[GenerationOutput]:
        async with MarkovServer(theta_chain).running() as theta, MarkovServer(t_chain).running() as t:
            proxy = FaultProxy(t.url, reset, lambda number: number == 12)
            async with proxy.running():
                config = CoordinatorConfig(
                    theta_url=theta.url,
                    t_url=proxy.url,
                    decoding="lockstep",
                    on_target_failure="policy",
                    top_k=3,
                    seed=1,
                    max_retries=0,
                )
                async with DualVLLMCoordinator(config) as coordinator:
                    outputs = await coordinator.generate_batch([[START]] * 60, max_tokens=40)
                assert proxy.injected == 1
                return outputs

    outputs = asyncio.run(asyncio.wait_for(run(), HANG))
    assert [output.error for output in outputs] == [None] * 60
    left = [output for output in outputs if max(output.generated_tokens) >= COMMON]
    assert 0 < len(left) < 60
    for output in outputs:
        assert len(output.generated_tokens) == 40
        if output not in left:
            assert not output.without_target[-1]
            continue
        first = next(i for i, token in enumerate(output.generated_tokens) if token >= COMMON)
        assert all(output.without_target[first:])
        assert output.importance_weights[first:] == [1.0] * (40 - first)


# ---- end to end, on the embedded server -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    folder = tmp_path_factory.mktemp("padded")
    flags = ["--max-logprobs", "-1", "--max-model-len", "128", "--threads", "1"]
    models = [make_tiny_model(folder / str(size), vocab_size=size, logit_scale=2.0) for size in (300, 500)]
    with WarmServer(models[0], flags) as short, WarmServer(models[1], flags) as long:
        yield [short.url, long.url]


WAYS: dict[str, dict[str, Any]] = {
    "lockstep": {"decoding": "lockstep"},
    "lockstep, exact": {"decoding": "lockstep", "missing": "exact"},
    "lockstep, tail": {"decoding": "lockstep", "support": "tail"},
    "auto list": {"decoding": "lockstep", "top_k": "auto", "support": "tail"},
    "block": {"decoding": "block"},
    "block, exact": {"decoding": "block", "missing": "exact"},
    "block, tail": {"decoding": "block", "support": "tail", "missing": "exact"},
}


@pytest.mark.parametrize("turned", [False, True], ids=["the target has more", "the policy has more"])
@pytest.mark.parametrize(
    ("way", "scoring"),
    [(way, None) for way in WAYS] + [("block, exact", method) for method in ("prefixes", "prompt_logprobs")],
)
def test_no_sequence_fails_on_real_models(padded_servers, monkeypatch, turned, way, scoring):
    if scoring is not None:
        monkeypatch.setattr(vllm_probe, "_scoring", lambda *_: (scoring,))

    async def run() -> list[GenerationOutput]:
        theta_url, t_url = padded_servers[::-1] if turned else padded_servers
        values = {"top_k": 20, "seed": 1, "ignore_eos": True, **WAYS[way]}
        config = CoordinatorConfig(theta_url=theta_url, t_url=t_url, **values)
        async with DualVLLMCoordinator(config) as coordinator:
            return await coordinator.generate_batch(["what is the", [7, 8, 299]] * 4, max_tokens=12)

    outputs = asyncio.run(asyncio.wait_for(run(), HANG))
    assert [output.error for output in outputs] == [None] * 8
    for output in outputs:
        assert len(output.generated_tokens) == 12 and max(output.generated_tokens) < 300
        assert np.isfinite([output.logprobs_q, output.logprobs_theta, output.logprobs_t]).all()
        assert all(weight > 0 for weight in output.importance_weights)
