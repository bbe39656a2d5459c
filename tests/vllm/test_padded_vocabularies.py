"""Vocabularies padded to different sizes, on real servers; the integration tests have the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from tests.hang import HANG
from tests.integration.test_padded_vocabularies import WAYS
from tests.tiny_model import make_tiny_model
from tests.vllm.servers import NativeServer, VllmServer, running

SHORT, LONG = 300, 500


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmServer, VllmServer, NativeServer]]:
    """One of each size, and a native one whose policy has more tokens than its target."""
    folder = tmp_path_factory.mktemp("padded")
    models = [
        make_tiny_model(folder / str(size), hidden_size=128, vocab_size=size, logit_scale=2.0) for size in (SHORT, LONG)
    ]
    short, long = (VllmServer(model, log=folder / f"{model.name}.log") for model in models)
    native = NativeServer(models[1], models[0], log=folder / "native.log")
    with running(short, long, native):
        yield short, long, native


@pytest.fixture(scope="module")
def urls(servers: tuple[VllmServer, VllmServer, NativeServer]) -> list[str]:
    return [servers[0].url, servers[1].url]


@pytest.mark.parametrize("turned", [False, True], ids=["the target has more", "the policy has more"])
@pytest.mark.parametrize("way", WAYS)
def test_no_sequence_fails(urls: list[str], turned: bool, way: str) -> None:
    async def run():
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


def test_a_native_server_leaves_log_pi_theta_its_whole_vocabulary(
    servers: tuple[VllmServer, VllmServer, NativeServer],
) -> None:
    """What the policy gives to tokens that the target lacks, a third of its mass here, is not given to the others."""

    async def run():
        config = CoordinatorConfig(engine="native", theta_url=servers[2].url, seed=1, ignore_eos=True)
        async with DualVLLMCoordinator(config) as coordinator:
            return await coordinator.generate_batch([[7, 8, 9], [20, 21]], max_tokens=12, stop_token_ids=[LONG - 1])

    models = [AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32) for server in servers[1::-1]]
    for output in asyncio.run(asyncio.wait_for(run(), HANG)):
        assert output.error is None and max(output.generated_tokens) < SHORT
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
