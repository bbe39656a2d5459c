"""Vocabularies padded to different sizes, on real servers; the integration tests have the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from tests.integration.test_padded_vocabularies import WAYS
from tests.tiny_model import make_tiny_model
from tests.vllm.servers import VllmServer, running

SHORT, LONG = 300, 500


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    folder = tmp_path_factory.mktemp("padded")
    models = [
        make_tiny_model(folder / str(size), hidden_size=128, vocab_size=size, logit_scale=2.0) for size in (SHORT, LONG)
    ]
    short, long = (VllmServer(model, log=folder / f"{model.name}.log") for model in models)
    with running(short, long):
        yield [short.url, long.url]


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

    outputs = asyncio.run(asyncio.wait_for(run(), 300))
    assert [output.error for output in outputs] == [None] * 8
    for output in outputs:
        assert len(output.generated_tokens) == 12 and max(output.generated_tokens) < SHORT
        assert np.isfinite([output.logprobs_q, output.logprobs_theta, output.logprobs_t]).all()
