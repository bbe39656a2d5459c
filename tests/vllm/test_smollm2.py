"""Once with a real language model: rollouts from q* between two vLLM servers, the target seeing the answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dual_rollout import CoordinatorConfig, generate_with_optimal_sampling
from tests.vllm.servers import VllmServer, running

MODEL = Path(__file__).parents[2] / "outputs/models/SmolLM2-135M-Instruct"
QUESTIONS = ["How much is 3 + 4?", "What is the capital of France?"]
HINTS = ["(It is 7.)", "(It is Paris.)"]


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.skipif(not MODEL.exists(), reason="make test-vllm puts the model there")
def test_the_record_is_that_of_the_models(tmp_path: Path) -> None:
    theta = VllmServer(MODEL, core=0, log=tmp_path / "theta.log")
    t = VllmServer(MODEL, core=1, log=tmp_path / "t.log")
    with running(theta, t):
        config = CoordinatorConfig(theta_url=theta.url, t_url=t.url, top_k=50, support="tail", seed=0)
        outputs = asyncio.run(
            generate_with_optimal_sampling(
                [chat(question) for question in QUESTIONS],
                config,
                max_tokens=12,
                t_prompts=[chat(f"{q} {hint}") for q, hint in zip(QUESTIONS, HINTS, strict=True)],
            )
        )
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for output in outputs:
        assert output.error is None
        assert output.generated_text
        ids = torch.tensor([output.prompt_token_ids + output.generated_tokens])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        start = len(output.prompt_token_ids)
        expected = [logprobs[start + i - 1, y].item() for i, y in enumerate(output.generated_tokens)]
        assert output.logprobs_theta == pytest.approx(expected, abs=2e-3)
        assert all(0 < alpha < 1 for alpha in output.alpha_history)
