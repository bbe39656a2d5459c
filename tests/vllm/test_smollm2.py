"""With a real language model: rollouts from q* between two vLLM servers, and the native engine's α on real text."""

from __future__ import annotations

import asyncio
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from dual_rollout import CoordinatorConfig, DualRollout, generate_with_optimal_sampling
from dual_rollout.training.policy_check import PolicyCheck
from dual_rollout.training.weight_sync import DiskWeightSync
from tests.unit.test_native_q_star import BALANCED, q_star
from tests.vllm.servers import REPOSITORY, VllmServer, running

MODEL = REPOSITORY / "outputs/models/SmolLM2-135M-Instruct"
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="make test-vllm puts the model there")
QUESTIONS = ["How much is 3 + 4?", "What is the capital of France?"]
HINTS = ["(It is 7.)", "(It is Paris.)"]


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorConfig]:
    """Two servers of the model."""
    logs = tmp_path_factory.mktemp("logs")
    theta = VllmServer(MODEL, log=logs / "theta.log")
    t = VllmServer(MODEL, log=logs / "t.log")
    with running(theta, t):
        yield CoordinatorConfig(theta_url=theta.url, t_url=t.url, top_k=50, support="tail", seed=0)


def test_the_record_is_that_of_the_models(config: CoordinatorConfig) -> None:
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


def test_a_tied_head_is_served_with_its_embeddings(config: CoordinatorConfig, tmp_path: Path) -> None:
    """vLLM's CPU build keeps the head of its start (0.08 nats a token here) unless it is written beside them.

    After the test above, since π_θ's server has other weights then.
    """
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    runpy.run_path(str(REPOSITORY / "recipes/bench/tiny_pair.py"))["add_noise"](model, 0.03, seed=1)
    accelerator, state = Accelerator(cpu=True), SimpleNamespace(global_step=1)
    trainer = SimpleNamespace(model=model, model_wrapped=model, accelerator=accelerator, state=state)
    with DualRollout(config) as rollout:
        DiskWeightSync(tmp_path).sync(trainer, rollout)
        check = PolicyCheck(trainer, AutoTokenizer.from_pretrained(MODEL), owner=None, bound=1e-3)
        check.run(rollout.ask_policy_servers, "after the sync")
    assert check.difference < 1e-3


@pytest.fixture(scope="module")
def real_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the model and of its copy with 12% noise (recipes/bench) after each token of two passages, prose and
    code; `(200, V)` each."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    passages = [(REPOSITORY / name).read_text() for name in ("README.md", "dual_rollout/functional/kl_symmetry.py")]
    texts = [torch.tensor([tokenizer(passage).input_ids[:100]]) for passage in passages]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    logits = []
    with torch.no_grad():
        logits.append(torch.cat([model(text).logits[0] for text in texts]))
        runpy.run_path(str(REPOSITORY / "recipes/bench/tiny_pair.py"))["add_noise"](model, 0.12, seed=1)
        logits.append(torch.cat([model(text).logits[0] for text in texts]))
    return logits[0], logits[1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_alpha_balances_the_divergences_of_real_text(
    real_text: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> None:
    """Both divergences of the served q*, of the α reported, from its definition in float64."""
    q = q_star(*real_text, BALANCED, temperature)
    logp_theta, logp_t = ((logits.double() / temperature).log_softmax(1) for logits in real_text)
    log_q = ((1 - q.alpha.double()) * logp_theta + q.alpha.double() * logp_t).log_softmax(1)
    kl_theta, kl_t = ((log_q.exp() * (log_q - logp)).sum(1) for logp in (logp_theta, logp_t))
    assert kl_theta.max() > 0.3 and len(kl_theta) == 200
    assert (kl_theta - kl_t).abs().max() < 1e-4
    assert (q.logprobs - log_q).abs().max() < 5e-5
    for found, expected in ((q.kl_theta, kl_theta), (q.kl_t, kl_t)):
        assert (found[:, 0] - expected).abs().max() < 1e-4
