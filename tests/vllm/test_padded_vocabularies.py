"""Vocabularies padded to different sizes, on real servers; the integration tests have the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from tests.hang import HANG
from tests.integration.test_padded_vocabularies import WAYS
from tests.qwen_pair import SHORT, check_rollouts, make_qwen_pair
from tests.tiny_model import make_tiny_model
from tests.vllm.servers import NativeServer, VllmServer, running

FEW, MANY = 300, 500


@dataclass(frozen=True)
class Servers:
    """Of the math recipe's pair: its policy, its target, and both in a native one. The policy of `turned`, a native one
    of two small models, has more tokens than its target."""

    policy: VllmServer
    target: VllmServer
    native: NativeServer
    turned: NativeServer


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("padded")
    policy, target = make_qwen_pair(folder)
    few, many = (
        make_tiny_model(folder / str(size), hidden_size=128, vocab_size=size, logit_scale=2.0) for size in (FEW, MANY)
    )
    found = Servers(
        policy=VllmServer(policy, log=folder / "policy.log"),
        target=VllmServer(target, log=folder / "target.log"),
        native=NativeServer(policy, target, log=folder / "native.log"),
        turned=NativeServer(many, few, log=folder / "turned.log"),
    )
    with running(found.policy, found.target, found.native, found.turned):
        yield found


@pytest.mark.parametrize("options", [{"top_k": 100}, {"top_k": 100, "support": "tail", "missing": "exact"}], ids=str)
def test_rollouts_of_the_math_recipes_pair_are_exact(servers: Servers, options: dict[str, Any]) -> None:
    policy, target = servers.policy, servers.target
    check_rollouts(policy.model, target.model, policy.url, target.url, **options)


def test_native_rollouts_of_the_math_recipes_pair_are_exact(servers: Servers) -> None:
    check_rollouts(servers.policy.model, servers.target.model, servers.native.url)


@pytest.mark.parametrize("turned", [False, True], ids=["the target has more", "the policy has more"])
@pytest.mark.parametrize("way", WAYS)
def test_no_sequence_fails(servers: Servers, turned: bool, way: str) -> None:
    async def run():
        urls = [servers.policy.url, servers.target.url]
        theta_url, t_url = urls[::-1] if turned else urls
        config = CoordinatorConfig(
            theta_url=theta_url, t_url=t_url, **{"top_k": 20, "seed": 1, "ignore_eos": True, **WAYS[way]}
        )
        async with DualVLLMCoordinator(config) as coordinator:
            return await coordinator.generate_batch(["what is the", [7, 8, SHORT - 1]] * 4, max_tokens=12)

    outputs = asyncio.run(asyncio.wait_for(run(), HANG))
    assert [output.error for output in outputs] == [None] * 8
    for output in outputs:
        assert len(output.generated_tokens) == 12 and max(output.generated_tokens) < SHORT
        assert np.isfinite([output.logprobs_q, output.logprobs_theta, output.logprobs_t]).all()


def test_a_native_server_leaves_log_pi_theta_its_whole_vocabulary(servers: Servers) -> None:
    """What the policy gives to tokens that the target lacks, a third of its mass here, is not given to the others."""

    async def run():
        config = CoordinatorConfig(engine="native", theta_url=servers.turned.url, seed=1, ignore_eos=True)
        async with DualVLLMCoordinator(config) as coordinator:
            prompts = [[7, 8, 9], [20, 21], [20, FEW]]
            outputs = await coordinator.generate_batch(prompts, max_tokens=12, stop_token_ids=[MANY - 1])
            alone = await coordinator.generate_batch(prompts[2:] * 8, targets=["none"] * 8, max_tokens=12)
            return outputs, alone

    outputs, alone = asyncio.run(asyncio.wait_for(run(), HANG))
    assert f"token id outside [0, {FEW})" in str(outputs.pop().error)
    assert [output.error for output in alone] == [None] * 8
    assert max(max(output.generated_tokens) for output in alone) >= FEW, "without a target the policy has all its own"
    folders = servers.turned.model, servers.turned.target
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    for output in outputs:
        assert output.error is None and max(output.generated_tokens) < FEW
        text = torch.tensor([[*output.prompt_token_ids, *output.generated_tokens]])
        start = len(output.prompt_token_ids)
        for model, found in zip(models, (output.logprobs_theta, output.logprobs_t), strict=True):
            with torch.no_grad():
                logprobs = model(text).logits[0, start - 1 : -1].double().log_softmax(-1)
            expected = logprobs[torch.arange(len(found)), text[0, start:]]
            np.testing.assert_allclose(found, expected, atol=1e-3)
        np.testing.assert_allclose(
            output.importance_weights, np.exp(np.subtract(output.logprobs_theta, output.logprobs_q)), rtol=1e-9
        )
