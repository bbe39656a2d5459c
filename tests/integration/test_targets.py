"""Several targets, no target, and a target that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.exceptions import EngineUnavailableError, PreflightError
from dual_rollout.samplers.dispatch import shares
from tests.chi_square import chi_square_p_value
from tests.hang import HANG
from tests.markov_server import MarkovServer, random_chain

V = 10
THETA, T, OTHER = (random_chain(np.random.default_rng(seed), V) for seed in (1, 2, 3))
NOWHERE = "http://127.0.0.1:9"


@contextlib.asynccontextmanager
async def servers(**options: Any) -> AsyncIterator[tuple[DualVLLMCoordinator, list[MarkovServer]]]:
    """π_θ, the target at t_url and one named "other"."""
    stubs = [MarkovServer(chain, processed=options.pop("processed", False)) for chain in (THETA, T, OTHER)]
    async with stubs[0].running(), stubs[1].running(), stubs[2].running():
        values = {"top_k": V, "seed": 5, "decoding": "lockstep", "max_retries": 0, "t_url": stubs[1].url, **options}
        targets = {"other": stubs[2].url, **values.pop("more", {})}
        config = CoordinatorConfig(theta_url=stubs[0].url, targets=targets, **values)
        async with DualVLLMCoordinator(config) as coordinator:
            yield coordinator, stubs


def generate(prompts: list[Any], targets: Any, *, max_tokens: int = 6, **options: Any) -> list[GenerationOutput]:
    async def run() -> list[GenerationOutput]:
        async with servers(**options) as (coordinator, _):
            return await coordinator.generate_batch(prompts, max_tokens=max_tokens, targets=targets)

    return asyncio.run(asyncio.wait_for(run(), HANG))


def tokens(outputs: list[GenerationOutput]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


@pytest.mark.parametrize("decoding", ["lockstep", "block"])
@pytest.mark.parametrize("max_concurrency", [2, 64])
def test_each_prompt_gets_its_own_target(decoding, max_concurrency):
    """What a prompt gets does not depend on where the others go."""
    prompts, names = [[i % V] for i in range(12)], [None, "other", "none"] * 4
    options = {"decoding": decoding, "max_concurrency": max_concurrency}
    mixed = tokens(generate(prompts, names, **options))
    for name in (None, "other", "none"):
        alone = tokens(generate(prompts, [name] * 12, **options))
        assert [row for row, other in zip(mixed, names, strict=True) if other == name] == [
            row for row, other in zip(alone, names, strict=True) if other == name
        ]
    assert tokens(generate(prompts, None, **options)) == tokens(generate(prompts, [None] * 12, **options))


def test_a_named_target_is_as_good_as_t_url():
    async def run() -> list[GenerationOutput]:
        async with MarkovServer(THETA).running() as theta, MarkovServer(OTHER).running() as t:
            config = CoordinatorConfig(theta_url=theta.url, t_url=t.url, top_k=V, seed=5, decoding="lockstep")
            async with DualVLLMCoordinator(config) as coordinator:
                return await coordinator.generate_batch([[i] for i in range(V)], max_tokens=6)

    named = generate([[i] for i in range(V)], ["other"] * V)
    direct = asyncio.run(asyncio.wait_for(run(), HANG))
    assert tokens(named) == tokens(direct)
    assert [output.logprobs_t for output in named] == [output.logprobs_t for output in direct]


@pytest.mark.parametrize(
    ("temperature", "processed", "top_k"), [(1.0, False, 3), (1.0, False, V), (0.7, True, 3), (0.7, False, V)]
)
def test_no_target_is_plain_generation(temperature, processed, top_k):
    """A χ² test of the pairs of tokens drawn, by a false-alarm rate of 1e-4 a case; the record is exact."""
    count, options = 4000, {"temperature": temperature, "processed": processed, "top_k": top_k}
    distribution = THETA ** (1 / temperature)
    distribution /= distribution.sum(axis=1, keepdims=True)
    outputs = generate([[1]] * count, ["none"] * count, max_tokens=2, t_url=NOWHERE, **options)
    pairs = tokens(outputs)
    observed = np.zeros((V, V))
    for first, second in pairs:
        observed[first, second] += 1
    assert chi_square_p_value(observed.ravel(), (count * distribution[1][:, None] * distribution).ravel()) > 1e-4
    for output in outputs[:200]:
        exact = [math.log(distribution[a, b]) for a, b in itertools.pairwise([1, *output.generated_tokens])]
        np.testing.assert_allclose(output.logprobs_theta, exact, atol=1e-9)
        assert output.logprobs_q == output.logprobs_theta
        assert output.importance_weights == [1.0, 1.0] and output.alpha_history == [0.0, 0.0]
        assert output.without_target == [True, True] and all(math.isnan(value) for value in output.logprobs_t)


def test_a_target_that_no_prompt_needs_may_be_down():
    outputs = generate([[1], [2]], ["other", "none"], t_url=NOWHERE, more={"unused": NOWHERE})
    assert [len(sequence) for sequence in tokens(outputs)] == [6, 6]
    assert outputs[0].without_target == [False] * 6


def test_every_target_in_use_is_checked_before_the_first_token():
    async def run() -> None:
        async with servers(top_k=5) as (coordinator, stubs):
            stubs[2].transitions = random_chain(np.random.default_rng(3), 3)  # prompts are outside its vocabulary
            with pytest.raises(PreflightError, match=r"targets\['other'\]"):
                await coordinator.generate_batch([[7], [8]], max_tokens=2, targets=[None, "other"])
            assert coordinator.stats.decoding.tokens == 0

    asyncio.run(asyncio.wait_for(run(), HANG))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["othr", None], r"unknown target 'othr'.*other, none.*did you mean 'other'"),
        ([1, None], "unknown target 1"),
        ([None], "one entry per prompt"),
        ("other", "one entry per prompt"),
    ],
)
def test_wrong_targets_are_refused(targets, words):
    with pytest.raises(ValueError, match=words):
        generate([[1], [2]], targets)


def test_a_stream_has_a_target_too():
    async def run() -> None:
        async with servers() as (coordinator, _):
            (output,) = await coordinator.generate_batch([[1]], max_tokens=6, targets=["other"])
            chunks = [chunk async for chunk in coordinator.generate_stream([1], max_tokens=6, target="other")]
            assert [chunk.token_id for chunk in chunks] == output.generated_tokens
            plain = [chunk async for chunk in coordinator.generate_stream([1], max_tokens=6, target="none")]
            assert [chunk.alpha for chunk in plain] == [0.0] * 6
            assert [chunk.importance_weight for chunk in plain] == [1.0] * 6

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_diagnostics_of_a_token_without_a_target_say_what_is_known():
    async def run() -> None:
        async with servers() as (coordinator, _):
            outputs = await coordinator.generate_batch(
                [[1], [2]], max_tokens=3, targets=["none", None], return_diagnostics=True
            )
            assert outputs[0].diagnostics.keys() == outputs[1].diagnostics.keys()
            assert outputs[0].diagnostics["kl_theta"] == [0.0] * 3 and outputs[0].diagnostics["ess_theta"] == [1.0] * 3
            assert all(math.isnan(value) for value in outputs[0].diagnostics["kl_diff"])
            assert math.isnan(outputs[0].diagnostics["kl_diff_mean"])
            stats = coordinator.stats.decoding
            assert (stats.tokens, stats.policy_tokens, stats.lost_target_tokens) == (6, 3, 0)

    asyncio.run(asyncio.wait_for(run(), HANG))


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [([5], 64, [64]), ([10, 10], 5, [3, 2]), ([1000, 1], 64, [63, 1]), ([1, 1, 1], 2, [1, 1, 1]), ([3, 3, 2], 8, None)],
)
def test_the_places_are_shared_out(counts, limit, expected):
    found = shares(counts, limit)
    assert min(found) >= 1 and sum(found) <= max(limit, len(counts))
    assert expected is None or sorted(found) == sorted(expected)


# ---- a target that is gone from the start; test_faults.py has those that go and come back ---------------------------


def test_by_default_a_lost_target_is_an_error():
    with pytest.raises(EngineUnavailableError, match=NOWHERE):
        generate([[1]], None, t_url=NOWHERE)


def test_a_lost_target_can_be_done_without():
    async def run() -> None:
        async with servers(t_url=NOWHERE, on_target_failure="policy") as (coordinator, _):
            outputs = await coordinator.generate_batch([[1], [2], [3]], max_tokens=4, targets=[None, "other", None])
            assert [output.without_target for output in outputs] == [[True] * 4, [False] * 4, [True] * 4]
            assert outputs[0].importance_weights == [1.0] * 4 and outputs[0].alpha_history == [0.0] * 4
            assert coordinator.stats.decoding.lost_target_tokens == 8

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_waiting_is_bounded_by_the_caller():
    async def run() -> None:
        async with servers(t_url=NOWHERE, on_target_failure="wait") as (coordinator, _):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(coordinator.generate_batch([[1]], max_tokens=4), 1.5)

    asyncio.run(asyncio.wait_for(run(), HANG))


# ---- in a recipe ----------------------------------------------------------------------------------------------------


def test_a_recipe_names_replicas_and_targets(tmp_path):
    from dual_rollout.training.arguments import parse_recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: x\nuse_cpu: true\nbf16: false\n"
        "dual_theta_url: http://a:1\ndual_t_url: [http://b:1, http://c:2/v1]\n"
        "dual_targets: {teacher: http://d:1, other: [http://e, http://f]}\ndual_on_target_failure: wait\n"
    )

    def config(*flags: str) -> CoordinatorConfig:
        dual = parse_recipe(["--config", str(recipe), *flags]).dual
        return dual.coordinator_config(dual.dual_theta_url, dual.dual_t_url)

    found = config()
    assert (found.theta_url, found.t_url, found.on_target_failure) == (
        "http://a:1",
        ["http://b:1", "http://c:2"],
        "wait",
    )
    assert found.targets == {"teacher": "http://d:1", "other": ["http://e", "http://f"]}
    found = config("--dual_theta_url", "http://x:1", "http://y:1", "--dual_targets", '{"one": "http://z"}')
    assert (found.theta_url, found.targets) == (["http://x:1", "http://y:1"], {"one": "http://z"})
    with pytest.raises(ValueError, match="dual_targets must be a mapping"):
        config("--dual_targets", "http://z")
