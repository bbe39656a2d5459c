"""A run stops, before the first token or right after the last, when π_θ's server does not serve its policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dual_rollout import DualGRPOTrainer, DualRLOOTrainer, DualRollout
from dual_rollout.exceptions import WeightSyncError
from dual_rollout.training.policy_check import bound_for, evaluating, fixed_texts, has_dropout, trainer_logprobs
from dual_rollout.types import Prompt
from tests.integration.conftest import TinyPair
from tests.integration.test_training import chat_dataset, dual_config, grpo_config
from tests.synced_training import lora_config
from tests.tiny_model import perturbed_copy
from tests.warm_servers import WarmServer

FLAGS = ["--max-logprobs", "-1", "--max-model-len", "256", "--threads", "1", "--enable-lora"]


@pytest.fixture
def pair(tiny_models: tuple[Path, Path], tiny_pair: TinyPair) -> Iterator[TinyPair]:
    """A policy's server that loads adapters and has its first weights; the target's of all tests."""
    with WarmServer(tiny_models[0], FLAGS) as theta:
        yield TinyPair(*tiny_models, theta.url, tiny_pair.t_url)


class Rewards:
    """A reward function that counts its calls: none means that no token was used."""

    __name__ = "rewards"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        self.calls += 1
        return [float(len(completion[0]["content"]) % 5) for completion in completions]


def make(pair: TinyPair, folder: Path, rewards: Any, *, kind: Any = DualGRPOTrainer, **options: Any) -> Any:
    grpo = {"max_steps": 2, "learning_rate": 3e-2, **options.pop("grpo", {})}
    return kind(
        model=options.pop("model", str(pair.theta_model)),
        reward_funcs=rewards,
        args=grpo_config(folder, **grpo),
        train_dataset=chat_dataset(),
        dual_config=dual_config(pair),
        **options,
    )


def run(trainer: Any) -> list[dict[str, float]]:
    with trainer.rollout:
        trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_an_adapter_on_other_full_weights_is_not_sampled_from(pair: TinyPair, tmp_path: Path) -> None:
    logs = run(make(pair, tmp_path / "full", Rewards()))
    assert all(log["sampling/policy_check"] < 1e-4 and log["perf/policy_check_s"] > 0 for log in logs)
    rewards = Rewards()
    with pytest.raises(WeightSyncError, match=r"before the rollout.*other full weights under the adapter"):
        run(make(pair, tmp_path / "lora", rewards, peft_config=lora_config()))
    assert rewards.calls == 0
    logs = run(make(pair, tmp_path / "merged", rewards, peft_config=lora_config(), weight_sync="disk"))
    assert max(log["sampling/policy_check"] for log in logs) < 1e-4, "all weights put it right"


def test_an_adapter_on_a_server_of_another_model_is_not_sampled_from(
    pair: TinyPair, tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    other = perturbed_copy(tiny_models[0], tmp_path / "other", noise=0.05, seed=5)
    rewards = Rewards()
    with WarmServer(other, FLAGS) as server, pytest.raises(WeightSyncError, match=r"started from another model"):
        run(make(replace(pair, theta_url=server.url), tmp_path / "run", rewards, peft_config=lora_config()))
    assert rewards.calls == 0


def test_every_replica_is_asked(pair: TinyPair, tiny_models: tuple[Path, Path], tmp_path: Path) -> None:
    """They agree on their likeliest token, which is all that replicas are compared by."""
    other = perturbed_copy(tiny_models[0], tmp_path / "other", noise=0.02, seed=5)
    with WarmServer(other, FLAGS) as server:
        trainer = make(
            replace(pair, theta_url=[pair.theta_url, server.url]),
            tmp_path / "run",
            Rewards(),
            peft_config=lora_config(),
        )
        with pytest.raises(WeightSyncError, match=f"^{server.url} does not serve the trainer's policy"):
            run(trainer)


class Disturbed(DualRollout):
    """Lets another run give the server its weights, while this one draws."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.disturb: Any = lambda: None

    def _generate(self, prompts: Sequence[Prompt], **options: Any) -> Any:
        self.disturb()
        return super()._generate(prompts, **options)


class DisturbedGRPO(DualGRPOTrainer):
    def _make_rollout(self, config: Any, schedule: Any) -> Any:
        return Disturbed(config, schedule=schedule)


class DisturbedRLOO(DualRLOOTrainer):
    def _make_rollout(self, config: Any, schedule: Any) -> Any:
        return Disturbed(config, schedule=schedule)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("kind", [DisturbedGRPO, DisturbedRLOO])
def test_the_first_of_two_trainers_on_a_server_notices_the_second(
    pair: TinyPair, tmp_path: Path, kind: Any, peft: bool
) -> None:
    """Also where both have the same weights, as at the start: the server tells whose they are."""
    options = {"peft_config": lora_config()} if peft else {}
    rewards = Rewards()
    if kind is DisturbedRLOO:
        from trl import RLOOConfig

        shape = grpo_config(tmp_path / "first")
        args = RLOOConfig(
            output_dir=shape.output_dir,
            per_device_train_batch_size=shape.per_device_train_batch_size,
            num_generations=shape.num_generations,
            max_completion_length=shape.max_completion_length,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        first = DisturbedRLOO(
            model=str(pair.theta_model),
            reward_funcs=rewards,
            args=args,
            train_dataset=chat_dataset(),
            dual_config=dual_config(pair),
            **options,
        )
    else:
        first = make(pair, tmp_path / "first", rewards, kind=kind, **options)
    second = make(pair, tmp_path / "second", Rewards(), **options)
    first.rollout.disturb = lambda: second._weight_sync.sync(second, second.rollout)
    with second.rollout, pytest.raises(WeightSyncError, match=r"after the rollout.*another run uses the server"):
        run(first)
    assert rewards.calls == 0


def test_weights_from_one_that_gives_no_name_are_noticed(pair: TinyPair, tmp_path: Path) -> None:
    rewards = Rewards()
    first = make(pair, tmp_path, rewards, kind=DisturbedGRPO)

    def disturb() -> None:
        first.rollout.reload_policy_weights(str(pair.t_model))
        first.rollout._run(first.rollout._open().theta.set_weight_version(first.rollout._given_version))

    first.rollout.disturb = disturb
    with pytest.raises(WeightSyncError, match=r"after the rollout.*another trainer gives it weights"):
        run(first)
    assert rewards.calls == 0


def test_the_bound_is_that_of_the_coarser_format_or_chosen(pair: TinyPair, tmp_path: Path) -> None:
    assert bound_for("float32", "float32") < bound_for("float16", "float32") < bound_for("float32", "bfloat16")
    assert bound_for("float32", None) == bound_for("bfloat16", "float32") < bound_for("bfloat16", "fp8")
    with pytest.raises(WeightSyncError, match="rounding explains 1e-12"):
        run(make(pair, tmp_path, Rewards(), policy_check_bound=1e-12))
    with pytest.raises(ValueError, match="policy_check_bound"):
        DualRollout(dual_config(pair), policy_check_bound=0.0)


def test_drift_is_without_dropout(pair: TinyPair, tmp_path: Path) -> None:
    logs = run(make(pair, tmp_path, Rewards(), peft_config=lora_config(lora_dropout=0.5)))
    assert len(logs) == 2
    assert all(0 <= log["sampling/policy_drift/max"] < 1e-3 for log in logs)


def test_what_the_trainer_computes_is_its_model_in_evaluation_mode(tiny_models: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models[0], attention_dropout=0.5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_models[0])
    texts = fixed_texts(tokenizer, model)
    assert len(texts) == 2 and all(1 < len(text) <= 24 for text in texts)
    model.train()
    model.model.norm.eval()
    assert has_dropout(model) and not has_dropout(AutoModelForCausalLM.from_pretrained(tiny_models[0]))
    found = trainer_logprobs(model, texts)
    assert model.training and not model.model.norm.training, "each module is in the mode that it was in"
    with torch.no_grad(), evaluating(model):
        for text, logprobs in zip(texts, found, strict=True):
            logps = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
            expected = [logps[i, token].item() for i, token in enumerate(text[1:])]
            np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_trained_tokens_are_among_the_texts(tiny_models: tuple[Path, Path]) -> None:
    from peft import get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_models[0]), lora_config(trainable_token_indices=[250, 260])
    )
    (text,) = fixed_texts(AutoTokenizer.from_pretrained(tiny_models[0]), model)[2:]
    assert text[::2] == [250, 260]
