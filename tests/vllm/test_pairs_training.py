"""Trainers on real vLLM whose target is the policy's own model, shown another prompt: two requests a rollout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import qwen3_template

from dual_rollout import (
    CoordinatorConfig,
    DualDistillationTrainer,
    DualGRPOTrainer,
    DualRLOOTrainer,
    DualRollout,
)
from dual_rollout.cli import main
from dual_rollout.training.connections import ADAPTER_NAME
from dual_rollout.training.policy_check import evaluating
from dual_rollout.training.schedules import AlphaSchedule
from tests.async_loop import LoopInThread, make_loop
from tests.documents import subcommands
from tests.integration.conftest import TinyPair
from tests.integration.test_async_trainer import LENGTH, Kept, check_samples
from tests.integration.test_async_trainer import make as make_async_trainer  # noqa: F401 (a fixture)
from tests.integration.test_distillation import distillation_config
from tests.integration.test_trainers import EVERY_THIRD, rloo_config, rows
from tests.integration.test_training import chat_dataset, count_of_the, grpo_config
from tests.synced_training import distance, lora_config, served, served_models
from tests.tiny_model import make_tokenizer, perturbed_copy
from tests.vllm.pairs import Pairs, adapter_route, distributions_of, largest_errors, logprobs_of, prompts_of
from tests.vllm.servers import LORA_FLAGS, REPOSITORY
from tests.vllm.trl_transfer import send_by_files

NEEDS_LORA = pytest.mark.skipif(not LORA_FLAGS, reason="vLLM's LoRA kernels for GPUs take no float32")
TOLERANCE = 1e-3  # nats; of weights that have been trained at a high rate


@pytest.fixture
def trained(ample: Pairs) -> Iterator[Pairs]:
    """The roomy server, which gets its own weights back."""
    yield ample
    with DualRollout(CoordinatorConfig(engine="native", theta_url=ample.server.url)) as rollout:
        rollout.reload_policy_weights(str(ample.server.model))
    if ADAPTER_NAME in served_models(ample.server.url):
        adapter_route(ample.server, "unload", lora_name=ADAPTER_NAME)


class Observed:
    """Compares every rollout with plain forwards of this moment's policy and of the target, on either prompt.

    Attributes:
        at_start: the model that the server was started with.
        target_follows: whether the target is the policy of this moment, and not `at_start`.
        errors: the largest of each rollout, of log π_θ, log π_t and log q of the drawn tokens, nats.
        apart: how far the one that the target is not is from log π_t, nats.
        alphas: of all tokens.
        imbalance: the largest |KL(q‖π_θ) − KL(q‖π_t)|, nats.
    """

    at_start: Any
    target_follows: bool

    def __init__(self, *args: Any, **kwargs: Any):
        self.errors: list[float] = []
        self.apart: list[float] = []
        self.alphas: list[float] = []
        self.imbalance = 0.0
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        with evaluating(self.model):
            found = [self._compare(row, batch, i) for i, row in enumerate(inputs)]
        for values, of_rows in zip((self.errors, self.apart), zip(*found, strict=True), strict=True):
            values.append(max(of_rows))
        return batch

    def _compare(self, row: dict[str, Any], batch: dict[str, Any], i: int) -> tuple[float, float]:
        real = batch["completion_mask"][i].bool()
        tokens, prompt = batch["completion_ids"][i][real].tolist(), batch["prompt_ids"][i]
        options = {"add_generation_prompt": True, "return_dict": False}
        shown = self.processing_class.apply_chat_template(row["t_prompt"], **options)
        alpha = batch["alpha"][i][real].double().numpy()
        rollout = {
            "token_ids": tokens,
            "alpha": alpha,
            "prompts": (prompt[batch["prompt_mask"][i].bool()].tolist(), shown),
        }
        target, other = (self.model, self.at_start) if self.target_follows else (self.at_start, self.model)
        distributions, chosen = distributions_of(rollout, self.model, target), (np.arange(len(tokens)), tokens)
        logp_theta, logp_t, log_q = distributions
        self.alphas += alpha.tolist()
        self.imbalance = max(self.imbalance, np.abs((np.exp(log_q) * (logp_t - logp_theta)).sum(1)).max())
        names = ("logprobs_theta", "logprobs_t", "sampling_per_token_logps")
        errors = [
            np.abs(batch[name][i][real].numpy() - expected[chosen]).max()
            for name, expected in zip(names, distributions, strict=True)
        ]
        return max(errors), np.abs(logp_t - logprobs_of(other, shown, tokens))[chosen].max()


class ObservedGRPO(Observed, DualGRPOTrainer):
    pass


class ObservedRLOO(Observed, DualRLOOTrainer):
    pass


class ObservedDistillation(Observed, DualDistillationTrainer):
    pass


def trainer_of(kind: str, pairs: Pairs, folder: Path, **options: Any) -> Any:
    """A trainer for three steps at a high rate."""
    plain = {
        "model": AutoModelForCausalLM.from_pretrained(pairs.server.model, dtype=torch.float32),
        "train_dataset": Dataset.from_list(rows()),
        "processing_class": make_tokenizer(),
        "dual_config": CoordinatorConfig(
            engine="native", theta_url=pairs.server.url, t_model=options.pop("t_model", None)
        ),
    }
    if kind == "distillation":
        teacher = perturbed_copy(pairs.server.model, folder / "teacher", noise=0.2, seed=1)
        plain["teacher_model"] = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        return ObservedDistillation(args=distillation_config(folder), **plain, **options)
    plain["reward_funcs"] = count_of_the
    if kind == "RLOO":
        return ObservedRLOO(args=rloo_config(folder, max_steps=3), **plain, **options)
    by_trl = {"use_vllm": True, "vllm_server_base_url": pairs.server.url, "vllm_mode": "server"}
    by_trl["vllm_importance_sampling_mode"] = "token_truncate"
    rate = 3e-2 if "peft_config" in options else 1e-2
    args = grpo_config(folder, max_steps=3, learning_rate=rate, **(by_trl if kind == "GRPO by TRL's transfer" else {}))
    return ObservedGRPO(args=args, **plain, **options)


@pytest.mark.parametrize(
    ("kind", "options", "target_follows"),
    [
        pytest.param("RLOO", {}, True, id="RLOO"),
        pytest.param("distillation", {}, True, id="distillation"),
        pytest.param("GRPO", {"peft": True}, False, id="an adapter", marks=NEEDS_LORA),
        pytest.param(
            "GRPO", {"peft": True, "t_model": ADAPTER_NAME}, True, id="an adapter in both roles", marks=NEEDS_LORA
        ),
        pytest.param("GRPO by TRL's transfer", {}, True, id="TRL's transfer"),
        pytest.param("GRPO by TRL's transfer", {"peft": True}, True, id="TRL's transfer of a merged adapter"),
    ],
)
def test_both_sides_have_the_weights_that_they_should(
    trained: Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    options: dict[str, Any],
    target_follows: bool,
) -> None:
    """In every rollout, also after steps that changed the policy much: every number against transformers. The target is
    the policy of that moment where full weights are sent, or where it names the policy's adapter; without that it stays
    the model that the server was started with."""
    sent = send_by_files(monkeypatch, tmp_path)
    adapter = {"peft_config": lora_config()} if options.get("peft") else {}
    trainer = trainer_of(kind, trained, tmp_path, t_model=options.get("t_model"), **adapter)
    trainer.at_start, trainer.target_follows = trained.model, target_follows
    with trainer.rollout:
        trainer.train()
    trainer.create_model_card(model_name="a-model")
    assert ("with the policy's weights of each moment" in (tmp_path / "README.md").read_text()) == target_follows
    assert len(sent) == (3 if "TRL" in kind else 0)
    assert len(trainer.errors) == 3 and max(trainer.errors) < TOLERANCE
    assert trainer.apart[-1] > 0.05 > TOLERANCE > trainer.apart[0], "the policy has left where it began"
    alphas = np.array(trainer.alphas)
    assert trainer.imbalance < 1e-4 and 0 <= alphas.min() < alphas.max() <= 1
    assert ((alphas > 0) & (alphas < 1)).mean() > 0.9, "only where both are all but sure may float32 have 0 or 1"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3 and np.isfinite([log["loss"] for log in logs]).all()
    assert max(log["sampling/policy_check"] for log in logs) < TOLERANCE
    if kind != "distillation":  # in whose loss no weight is
        assert max(log["sampling/policy_drift/max"] for log in logs) < TOLERANCE
        assert max(log["sampling/importance_sampling_ratio/max"] for log in logs) > 1.05


@pytest.fixture
def tiny_pair(trained: Pairs) -> TinyPair:
    """One server in both roles, for `make_async_trainer`."""
    return TinyPair(*[trained.server.model] * 2, *[trained.server.url] * 2)


@pytest.fixture
def config(trained: Pairs) -> CoordinatorConfig:
    return CoordinatorConfig(engine="native", theta_url=trained.server.url, seed=5)


def test_the_asynchronous_trainer(
    make_async_trainer: Callable[..., Any],  # noqa: F811
    trained: Pairs,
    config: CoordinatorConfig,
    tmp_path: Path,
) -> None:
    """The first transfer brings a policy that the server did not have, in both roles; the later ones what it has
    learned. Samples of the first step are of the first transfer, whatever comes after."""
    policy = perturbed_copy(trained.server.model, tmp_path / "policy", noise=0.2, seed=7)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.response_template = qwen3_template
    loop = make_loop(
        dual_config=config,
        dataset=Dataset.from_list(rows()),
        reward_funcs=[count_of_the],
        processing_class=tokenizer,
        eos_token_ids=[tokenizer.eos_token_id, *EVERY_THIRD],
        num_generations=2,
        max_tokens=LENGTH,
    )
    options = {"token_budget": 0, "per_device_train_batch_size": 8}
    trainer = make_async_trainer(model=policy, trainer_options={"rollout_worker": LoopInThread(loop)}, **options)
    trainer.rollout_queue = kept = Kept(trainer.rollout_queue)
    before = served(trained.server.url)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and trainer.weight_transfer.number == 3 and np.isfinite([log["loss"] for log in logs]).all()
    weights = check_samples(kept.taken[:8], rows(), policy, policy)
    assert logs[0]["ratio"] == pytest.approx(weights.mean(), rel=1e-2) and np.abs(weights - 1).max() > 0.01
    assert 0 < logs[0]["sampling/alpha/mean"] < 1
    assert max(log["sampling/policy_check"] for log in logs) < 1e-4
    assert distance(served(trained.server.url), before) > 0.05
    trainer.model.set_attn_implementation("sdpa")
    learned = trained.rollouts(prompts_of(4, seed=15), [{"max_tokens": 10}] * 4)
    assert max(largest_errors(learned, trainer.model).values()) < TOLERANCE
    first = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    assert max(largest_errors(learned, first).values()) > 0.05


def test_a_trainer_distils_the_policy_from_itself(trained: Pairs, tmp_path: Path) -> None:
    """The target is the same model, shown another prompt, with the same new weights. Evaluation is of the policy."""
    config = CoordinatorConfig(engine="native", theta_url=trained.server.url, alpha_method="kl_budget", kl_budget=0.05)
    schedule = AlphaSchedule(shape="linear", kl_budget_end=0.01)
    trainer = DualGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(trained.server.model, dtype=torch.float32),
        reward_funcs=count_of_the,
        args=grpo_config(tmp_path, max_steps=2),
        train_dataset=chat_dataset(with_t_prompts=True),
        eval_dataset=chat_dataset(),
        processing_class=make_tokenizer(),
        dual_config=config,
        alpha_schedule=schedule,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "sampling/policy_drift/max" in entry]
    assert len(logged) == 2 and max(entry["sampling/policy_drift/max"] for entry in logged) < 1e-3
    assert all(entry["sampling/kl/max"] <= entry["sampling/kl_budget"] + 1e-4 for entry in logged)
    assert logged[0]["sampling/alpha/mean"] > 0.0
    evaluated = trainer.evaluate()
    assert evaluated["eval_sampling/alpha/mean"] == 0.0


@pytest.mark.parametrize(
    ("recipe", "further"),
    [
        ("self_distillation_cpu", []),
        pytest.param("self_distillation_lora_cpu", [], marks=NEEDS_LORA),
        pytest.param("self_distillation_lora_cpu", ["--dual_t_model", ADAPTER_NAME], marks=NEEDS_LORA),
    ],
    ids=["full weights", "adapter", "adapter in both roles"],
)
def test_the_recipes_train(
    trained: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, further: list[str]
) -> None:
    """By the commands of recipes/native/README.md, one of which started this server: two steps with a small model in
    place of the recipe's. Full weights, which the target follows, and an adapter, whose target is the model that the
    server was started with, or follows too."""
    monkeypatch.chdir(REPOSITORY)
    doctor, train = (subcommands("recipes/native/README.md", name)[-1] for name in ("doctor", "train"))
    assert main([trained.server.url if word == "http://127.0.0.1:8000" else word for word in doctor]) == 0
    changes: dict[str, Any] = {
        "model_name_or_path": trained.server.model,
        "dual_theta_url": trained.server.url,
        "output_dir": tmp_path,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
    }
    flags = [*further, *(str(word) for key, value in changes.items() for word in (f"--{key}", value))]
    adapter = "lora" in recipe
    before = served(trained.server.url, trained.server.name)
    assert main([word.replace("self_distillation_cpu", recipe) for word in train] + flags) == 0
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert max(entry["sampling/policy_drift/max"] for entry in steps) < 1e-3
    assert [entry["sampling/kl_budget"] for entry in steps] == pytest.approx([0.05, 0.0])
    assert (ADAPTER_NAME in served_models(trained.server.url)) == adapter
    if adapter:
        assert distance(served(trained.server.url, trained.server.name), before) < 1e-4, "the base stays"
