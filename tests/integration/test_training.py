"""The plugin under real TRL trainers, with tiny models behind embedded servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from dual_rollout import CoordinatorConfig, DualGRPOTrainer, DualRollout
from dual_rollout.exceptions import RolloutError
from dual_rollout.training.correction import corrected_weights
from tests.integration.conftest import TinyPair

QUESTIONS = ["what is that", "the user of what", "and to the", "system in user"]


def grpo_config(folder: Path, **options: Any) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            **options,
        },
    )


def chat_dataset(with_t_prompts: bool = False) -> Dataset:
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    if with_t_prompts:
        for row, question in zip(rows, QUESTIONS, strict=True):
            row["t_prompt"] = [{"role": "user", "content": f"{question} is the assistant"}]
    return Dataset.from_list(rows)


def dual_config(pair: TinyPair, **options: Any) -> CoordinatorConfig:
    return CoordinatorConfig(theta_url=pair.theta_url, t_url=pair.t_url, top_k=20, seed=3, **options)


def count_of_the(completions: list[Any], **_: Any) -> list[float]:
    return [float(sum(map(ord, c[0]["content"])) % 7) for c in completions]


class Recording(DualGRPOTrainer):
    """Keeps each generation batch, and the rows it came from."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []
        self.rows: list[list[dict[str, Any]]] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.rows.append(inputs)
        self.batches.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in output.items()})
        return output


def record(pair: TinyPair, folder: Path, *, dataset: Dataset | None = None, **options: Any) -> Recording:
    mixin = {k: options.pop(k) for k in list(options) if k.startswith("importance_sampling")}
    config = dual_config(pair)
    trainer = Recording(
        model=str(pair.theta_model),
        reward_funcs=count_of_the,
        args=grpo_config(folder, **options),
        train_dataset=chat_dataset() if dataset is None else dataset,
        dual_config=config,
        **mixin,
    )
    with trainer.rollout:
        trainer.train()
    return trainer


def policy_logprobs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """log π(y) of the completion tokens by a plain forward, `(B, T)`."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logprobs = logits[:, -length - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def test_alpha_and_weights_reach_the_loss_as_tensors(tiny_pair: TinyPair, tmp_path: Path) -> None:
    trainer = record(tiny_pair, tmp_path, importance_sampling_clip_max=1.2)
    batch = trainer.batches[0]
    mask = batch["completion_mask"].bool()
    for name in ("alpha", "importance_weights", "logprobs_theta", "logprobs_t", "sampling_per_token_logps"):
        assert batch[name].shape == mask.shape
    assert ((batch["alpha"][mask] > 0) & (batch["alpha"][mask] < 1)).all()
    # Before the first update the policy is the model on disk: the server's log π_θ is the trainer's.
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.theta_model)
    expected = policy_logprobs(model, batch)
    torch.testing.assert_close(batch["logprobs_theta"][mask], expected[mask], atol=1e-3, rtol=0)
    weights = (expected - batch["sampling_per_token_logps"]).exp()
    torch.testing.assert_close(batch["importance_weights"][mask], weights[mask], atol=1e-2, rtol=1e-2)
    assert batch["importance_weights"][mask].max() > 1.2, "the test needs a weight that the bound cuts"
    ratio = batch["importance_sampling_ratio"]
    torch.testing.assert_close(ratio[mask], batch["importance_weights"][mask].clamp(max=1.2), atol=1e-4, rtol=1e-4)
    # One advantage per sequence times one weight per token, which TRL's loss is linear in.
    per_sequence = batch["advantages"] / ratio
    spread = (per_sequence.max(dim=1).values - per_sequence.min(dim=1).values).abs()
    assert spread.max() < 1e-4


def test_the_trainer_logs_the_rollout(tiny_pair: TinyPair, tmp_path: Path) -> None:
    logs = record(tiny_pair, tmp_path).state.log_history[0]
    assert 0 < logs["sampling/alpha/min"] <= logs["sampling/alpha/mean"] <= logs["sampling/alpha/max"] < 1
    ratio = "sampling/importance_sampling_ratio/"
    assert logs[ratio + "min"] <= logs[ratio + "mean"] <= logs[ratio + "max"] <= 3
    assert logs["sampling/kl_residual/max"] < 1e-9
    assert 0 < logs["sampling/top_k_mass/min"] <= logs["sampling/top_k_mass/mean"] <= 1
    assert 0 < logs["sampling/effective_sample_size_ratio"] <= 1
    assert logs["rollout/tokens_per_second"] > 0
    assert logs["perf/weight_sync_s"] > 0


def test_the_target_sees_its_own_prompt(tiny_pair: TinyPair, tmp_path: Path) -> None:
    trainer = record(tiny_pair, tmp_path, dataset=chat_dataset(with_t_prompts=True), max_steps=1)
    batch, rows = trainer.batches[0], trainer.rows[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.t_model)
    tokenizer = trainer.processing_class
    for i, row in enumerate(rows):
        prompt = tokenizer.apply_chat_template(row["t_prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        length = int(batch["completion_mask"][i].sum())
        completion = batch["completion_ids"][i, :length]
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor(prompt), completion])[None]).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(-1, completion.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(batch["logprobs_t"][i, :length], expected, atol=1e-3, rtol=0)


def test_a_plain_grpo_trainer_takes_the_rollout_function(tiny_pair: TinyPair, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        seen.append(columns)
        return count_of_the(completions)

    with DualRollout(dual_config(tiny_pair), allow_uncorrected=True) as rollout:
        trainer = GRPOTrainer(
            model=str(tiny_pair.theta_model),
            reward_funcs=reward,
            args=grpo_config(tmp_path, max_steps=1),
            train_dataset=chat_dataset(),
            rollout_func=rollout,
        )
        trainer.train()
    columns = seen[0]
    lengths = [len(row) for row in columns["alpha"]]
    assert all(1 <= length <= 6 for length in lengths)
    for name in ("importance_weights", "logprobs_theta", "logprobs_t"):
        assert [len(row) for row in columns[name]] == lengths


def test_a_rollout_batch_holds_what_any_loop_needs(tiny_pair: TinyPair) -> None:
    with DualRollout(dual_config(tiny_pair)) as rollout:
        batch = rollout.generate(["the user", "what is that of"], num_generations=3, max_tokens=5)
        again = rollout.generate(["the user", "what is that of"], num_generations=3, max_tokens=5)
    assert batch.prompt_ids.shape[0] == batch.completion_ids.shape[0] == 6
    assert torch.equal(batch.prompt_ids[0], batch.prompt_ids[2])
    assert (batch.prompt_mask[:, -1] == 1).all(), "prompts are padded on the left"
    assert (batch.completion_mask[:, 0] == 1).all(), "completions are padded on the right"
    mask = batch.completion_mask.bool()
    weights = (batch.logprobs_theta - batch.logprobs_q).exp()
    torch.testing.assert_close(batch.importance_weights[mask], weights[mask], atol=1e-4, rtol=1e-4)
    assert not torch.equal(batch.completion_ids, again.completion_ids), "successive calls use successive streams"
    with DualRollout(dual_config(tiny_pair)) as same_seed:
        repeat = same_seed.generate(["the user", "what is that of"], num_generations=3, max_tokens=5)
    assert torch.equal(batch.completion_ids, repeat.completion_ids)


def test_a_failed_sequence_stops_the_training_batch(tiny_pair: TinyPair) -> None:
    with DualRollout(dual_config(tiny_pair)) as rollout, pytest.raises(RolloutError, match="1 of 2 sequences"):
        rollout.generate([[5, 6], [10**6]], max_tokens=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 10}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"importance_sampling_mode": "token"}, "importance_sampling_mode"),
        ({"importance_sampling_clip_max": 0.0}, "importance_sampling_clip_max"),
    ],
)
def test_settings_that_would_bias_the_gradient_are_refused(
    tiny_models: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    nobody = TinyPair(*tiny_models, "http://127.0.0.1:1", "http://127.0.0.1:2")
    with pytest.raises(ValueError, match=named):
        record(nobody, tmp_path, **options)


def test_correction_modes() -> None:
    log_weights = torch.log(torch.tensor([[0.5, 4.0, 1.0], [2.0, 0.25, 9.0]]))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    token = {"clip_min": 0.4, "clip_max": 2.0}
    cut = corrected_weights(log_weights, mask, "token_truncate", **token)
    torch.testing.assert_close(cut[mask.bool()], torch.tensor([0.5, 2.0, 1.0, 2.0, 0.4]))
    masked = corrected_weights(log_weights, mask, "token_mask", **token)
    torch.testing.assert_close(masked[mask.bool()], torch.tensor([0.5, 0.0, 1.0, 2.0, 0.0]))
    # Products over real tokens: 0.5 · 4 · 1 = 2 and 2 · 0.25 = 0.5; the padded 9 does not count.
    product = corrected_weights(log_weights, mask, "sequence_truncate", clip_max=1.5)
    torch.testing.assert_close(product[:, 0], torch.tensor([1.5, 0.5]))
    dropped = corrected_weights(log_weights, mask, "sequence_mask", clip_max=1.5)
    torch.testing.assert_close(dropped[:, 0], torch.tensor([0.0, 0.5]))
    assert (corrected_weights(log_weights, mask, "none") == 1).all()
