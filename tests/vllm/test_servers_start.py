"""The harness itself: both servers answer, each with its own model's log-probabilities."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.vllm.conftest import ServerPair
from tests.vllm.servers import VllmServer

PROMPTS = [[10, 20, 30], [200, 7], list(range(40, 90))]
TOP_K = 50


def served_logprobs(server: VllmServer) -> list[dict[int, float]]:
    """The ``TOP_K`` log-probabilities after each of ``PROMPTS``, by token id."""
    answer = server.post(
        "/v1/completions",
        {
            "model": server.name,
            "prompt": PROMPTS,
            "max_tokens": 1,
            "logprobs": TOP_K,
            "temperature": 0.0,
            "return_tokens_as_token_ids": True,
        },
    )
    rows = [choice["logprobs"]["top_logprobs"][0] for choice in answer["choices"]]
    return [{int(token.removeprefix("token_id:")): value for token, value in row.items()} for row in rows]


@pytest.mark.parametrize("side", ["theta", "t"])
def test_logprobs_are_those_of_the_model(vllm_pair: ServerPair, side: str) -> None:
    server: VllmServer = getattr(vllm_pair, side)
    model = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32).eval()
    for prompt, row in zip(PROMPTS, served_logprobs(server), strict=True):
        with torch.no_grad():
            expected_V = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert set(row) == set(expected_V.topk(TOP_K).indices.tolist())
        assert row == pytest.approx({token: expected_V[token].item() for token in row}, abs=1e-3)


def test_the_two_servers_serve_different_models(vllm_pair: ServerPair) -> None:
    assert served_logprobs(vllm_pair.theta) != served_logprobs(vllm_pair.t)
