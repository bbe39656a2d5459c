"""How the importance weights get into TRL's losses: once, whoever applies them; and what is logged of them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from trl import GRPOTrainer

from dual_rollout import CoordinatorConfig, DualGRPOTrainer, DualRollout
from dual_rollout.functional.importance_weights import effective_sample_size, pareto_k
from dual_rollout.training.arguments import parse_recipe
from dual_rollout.training.correction import corrected_weights
from dual_rollout.training.schedules import AlphaSchedule
from dual_rollout.training.trainer import DualTrainerMixin
from dual_rollout.training.weight_sync import TrlWeightSync
from tests.integration.conftest import TinyPair
from tests.integration.test_training import chat_dataset, count_of_the, dual_config, grpo_config

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
ANY_WEIGHT = 1e9


class Plain(GRPOTrainer):
    """Keeps what TRL itself makes of each rollout, before the mixin changes it."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.advantages = output["advantages"].clone()
        return output


class Counted(DualTrainerMixin, Plain):
    """Keeps the batch and the gradient of its only step; the learning rate is 0, so that both can be had again."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.gradient = self.model.lm_head.weight.grad.clone()
        return loss

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.batch = dict(output)
        return output

    def gradient_with(self, weights: torch.Tensor) -> torch.Tensor:
        """TRL's gradient of the same batch when `weights`, `(B, T)` or `(B, 1)`, multiply the advantages once."""
        batch = {name: value for name, value in self.batch.items() if name != "importance_sampling_ratio"}
        if self.loss_type == "vespo":  # its weights are gamma weights of the ratio
            batch |= {"advantages": self.advantages, "importance_sampling_ratio": weights}
        else:
            batch |= {"advantages": self.advantages[:, None] * weights}
        self.model.zero_grad()
        use_vllm, self.use_vllm = self.use_vllm, False  # TRL is not to apply anything by itself
        GRPOTrainer._compute_loss(self, self.model, batch).backward()
        self.use_vllm = use_vllm
        return self.model.lm_head.weight.grad.clone()


def counted_run(
    pair: TinyPair, folder: Path, *, trl_corrects: bool | None = None, mode: str = "token_truncate", **options: Any
) -> Counted:
    """One step. `trl_corrects` is None with `use_vllm=False`; else `use_vllm` is set, with or without its correction.

    `use_vllm=True` needs CUDA and vLLM when a trainer is made. It is therefore set on a finished one, and what sends
    weights over NCCL is replaced; all that happens to the rollout and in the loss is TRL's own code.
    """
    trainer = Counted(
        model=str(pair.theta_model),
        reward_funcs=count_of_the,
        args=grpo_config(folder, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **options),
        train_dataset=chat_dataset(),
        dual_config=dual_config(pair),
        importance_sampling_mode=mode,
        importance_sampling_clip_max=ANY_WEIGHT,
    )
    if trl_corrects is not None:
        trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, trl_corrects
        trainer.vllm_importance_sampling_mode = mode
        trainer.vllm_importance_sampling_clip_max = ANY_WEIGHT
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        trainer._last_loaded_step = -1
    with trainer.rollout:
        trainer.train()
    return trainer


def times_applied(trainer: Counted, per_sequence: bool = False) -> list[int]:
    """The n in 0, 1, 2 for which the gradient is that of wⁿ, with w = π_θ/q* from the rollout itself."""
    mask = trainer.batch["completion_mask"]
    log_w = (trainer.batch["logprobs_theta"] - trainer.batch["sampling_per_token_logps"]) * mask
    if per_sequence:
        log_w = log_w.sum(dim=1, keepdim=True)
    assert log_w.abs().max() > 0.5, "the test needs weights that are not 1"
    scale = trainer.gradient.abs().max()
    assert scale > 0
    distance = [(trainer.gradient_with((n * log_w).exp()) - trainer.gradient).abs().max() / scale for n in (0, 1, 2)]
    return [n for n, value in enumerate(distance) if value < 1e-3]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_enter_every_loss_once(tiny_pair: TinyPair, tmp_path: Path, loss_type: str) -> None:
    assert times_applied(counted_run(tiny_pair, tmp_path, loss_type=loss_type)) == [1]


@pytest.mark.parametrize("loss_type", ["grpo", "luspo", "sapo"])
def test_weights_enter_once_with_ratios_per_sequence(tiny_pair: TinyPair, tmp_path: Path, loss_type: str) -> None:
    options = {"loss_type": loss_type, "importance_sampling_level": "sequence"}
    assert times_applied(counted_run(tiny_pair, tmp_path, **options)) == [1]


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_weights_of_whole_sequences_enter_once(tiny_pair: TinyPair, tmp_path: Path, loss_type: str) -> None:
    trainer = counted_run(tiny_pair, tmp_path, mode="sequence_truncate", loss_type=loss_type)
    assert times_applied(trainer, per_sequence=True) == [1]


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_the_mode_none_applies_nothing(tiny_pair: TinyPair, tmp_path: Path, loss_type: str) -> None:
    assert times_applied(counted_run(tiny_pair, tmp_path, mode="none", loss_type=loss_type)) == [0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "vespo"])
@pytest.mark.parametrize("trl_corrects", [True, False])
def test_with_use_vllm_the_weights_enter_once_too(
    tiny_pair: TinyPair, tmp_path: Path, loss_type: str, trl_corrects: bool
) -> None:
    """TRL applies its ratio, which is π_θ/q*, or the mixin does where that is switched off; never both.

    `use_vllm` is set after construction here, see `counted_run`: no CUDA and no NCCL take part.
    """
    assert times_applied(counted_run(tiny_pair, tmp_path, trl_corrects=trl_corrects, loss_type=loss_type)) == [1]


class Stale(DualGRPOTrainer):
    """The server keeps the weights of the first step; keeps the batches."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self._weight_sync = TrlWeightSync()  # sends nothing
        self.batches.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in output.items()})
        return output


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_drift_is_logged_and_corrected_where_trl_computes_it(
    tiny_pair: TinyPair, tmp_path: Path, num_iterations: int
) -> None:
    trainer = Stale(
        model=str(tiny_pair.theta_model),
        reward_funcs=count_of_the,
        args=grpo_config(tmp_path, max_steps=2 * num_iterations, num_iterations=num_iterations),
        train_dataset=chat_dataset(),
        dual_config=dual_config(tiny_pair),
        importance_sampling_clip_max=ANY_WEIGHT,
    )
    trainer.rollout.policy_check_bound = math.inf  # else the run stops before the second rollout
    with trainer.rollout:
        trainer.train()
    drift = [
        entry["sampling/policy_drift/max"]
        for entry in trainer.state.log_history
        if "sampling/policy_drift/max" in entry
    ]
    assert len(drift) == 2, "one measurement per rollout"
    assert drift[0] < 1e-3, "two implementations of the same weights"
    assert drift[1] > 0.01, "weights that did not arrive"
    assert ("old_per_token_logps" in trainer.batches[1]) == (num_iterations == 2)
    batch = trainer.batches[1]
    mask = batch["completion_mask"].bool()
    policy = batch["old_per_token_logps"] if num_iterations == 2 else batch["logprobs_theta"]
    expected = (policy - batch["sampling_per_token_logps"]).exp()
    torch.testing.assert_close(batch["importance_sampling_ratio"][mask], expected[mask])


def test_completions_that_are_all_masked_do_not_stop_a_run(tiny_pair: TinyPair, tmp_path: Path) -> None:
    trainer = counted_run(tiny_pair, tmp_path, mask_truncated_completions=True, max_completion_length=2)
    assert trainer.batch["completion_mask"].sum() == 0, "the test needs completions that were cut"
    assert (trainer.batch["importance_sampling_ratio"] == 1).all()
    assert "sampling/importance_sampling_ratio/max" not in trainer.state.log_history[0]


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DualGRPOTrainer])
def test_completions_are_logged_and_rewarded_with_what_the_rollout_knows(
    tiny_pair: TinyPair, tmp_path: Path, trainer_class: type
) -> None:
    seen: dict[str, Any] = {}

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        seen.update(columns)
        return count_of_the(completions)

    with DualRollout(dual_config(tiny_pair), allow_uncorrected=True) as rollout:
        ours = (
            {"dual_config": dual_config(tiny_pair)} if trainer_class is DualGRPOTrainer else {"rollout_func": rollout}
        )
        trainer = trainer_class(
            model=str(tiny_pair.theta_model),
            reward_funcs=reward,
            args=grpo_config(tmp_path, max_steps=1, log_completions=True, per_device_train_batch_size=8),
            train_dataset=chat_dataset(),
            **ours,
        )
        trainer.train()
        if trainer_class is DualGRPOTrainer:
            trainer.rollout.close()
    names = ("alpha", "importance_weights", "logprobs_theta", "logprobs_t", "logprobs_q")
    assert all(len(seen[name]) == 8 for name in names)
    record = (seen[name] for name in ("logprobs_theta", "logprobs_q", "importance_weights"))
    for theta, q, weights in zip(*record, strict=True):
        np.testing.assert_allclose(np.exp(np.array(theta) - q), weights)
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table["alpha"].tolist() == pytest.approx([sum(row) / len(row) for row in seen["alpha"]], abs=1e-4)
    assert table["importance_weight"].tolist() == pytest.approx(
        [sum(row) / len(row) for row in seen["importance_weights"]], abs=1e-4
    )
    logs = trainer.state.log_history[0]
    every = [weight for row in seen["importance_weights"] for weight in row]
    assert logs["sampling/rollout_weight/mean"] == pytest.approx(sum(every) / len(every), rel=1e-5)
    assert logs["sampling/rollout_weight/max"] == pytest.approx(max(every), rel=1e-5)
    assert len(every) >= 25, "the test needs enough weights for a fit"
    assert logs["sampling/pareto_k"] == pytest.approx(pareto_k(np.array(every)), rel=1e-5)
    assert logs["sampling/effective_sample_size_ratio"] == pytest.approx(
        effective_sample_size(np.array(every)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("distribution", "schedule", "logged", "values"),
    [
        ({}, AlphaSchedule(shape="linear", alpha_max_end=0.0), "sampling/alpha_max", [1.0, 2 / 3, 1 / 3, 0.0]),
        (
            {"alpha_method": "kl_budget", "kl_budget": 0.1},
            AlphaSchedule(shape="cosine", kl_budget_end=0.0),
            "sampling/kl_budget",
            [0.1, 0.075, 0.025, 0.0],
        ),
    ],
    ids=["alpha_max", "kl_budget"],
)
def test_a_schedule_ends_on_policy(
    tiny_pair: TinyPair,
    tmp_path: Path,
    distribution: dict[str, Any],
    schedule: AlphaSchedule,
    logged: str,
    values: list[float],
) -> None:
    trainer = DualGRPOTrainer(
        model=str(tiny_pair.theta_model),
        reward_funcs=count_of_the,
        args=grpo_config(tmp_path, max_steps=4),
        train_dataset=chat_dataset(),
        dual_config=dual_config(tiny_pair, **distribution),
        alpha_schedule=schedule,
    )
    with trainer.rollout:
        trainer.train()
    logs = trainer.state.log_history[:4]
    assert [entry[logged] for entry in logs] == pytest.approx(values)
    alphas = [entry["sampling/alpha/max"] for entry in logs]
    if logged == "sampling/alpha_max":
        assert all(alpha <= bound + 1e-6 for alpha, bound in zip(alphas, values, strict=True))
    assert alphas[0] > 0.1 and alphas[-1] == 0.0


def test_a_schedule_that_does_not_fit_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="kl_budget_end"):
        DualRollout(CoordinatorConfig(), schedule=AlphaSchedule(shape="linear", kl_budget_end=0.0))


def test_a_recipe_names_method_and_schedule() -> None:
    distribution = ["--dual_alpha_method", "kl_budget", "--dual_kl_budget", "0.2"]
    schedule = ["--dual_alpha_schedule", "cosine", "--dual_kl_budget_end", "0", "--dual_alpha_max_end", "0.5"]
    machine = ["--use_cpu", "true", "--bf16", "false"]
    dual = parse_recipe(["--model_name_or_path", "some/model", *machine, *distribution, *schedule]).dual
    last = dual.alpha_schedule().at(dual.coordinator_config("http://a:1", "http://b:2"), 1.0)
    assert (last.alpha_method, last.kl_budget, last.alpha_max) == ("kl_budget", 0.0, 0.5)


def test_padding_has_the_weight_one() -> None:
    """VESPO sums the logarithms of the weights over padding too."""
    log_weights, mask = torch.tensor([[0.7, 5.0], [9.0, 9.0]]), torch.tensor([[1, 0], [0, 0]])
    for mode in ("token_truncate", "token_mask", "none"):
        assert corrected_weights(log_weights, mask, mode, clip_max=0.9)[mask == 0].tolist() == [1.0, 1.0, 1.0]
    for mode in ("sequence_truncate", "sequence_mask"):
        weights = corrected_weights(log_weights, mask, mode, clip_max=3.0)
        assert weights.shape == (2, 1) and weights[1] == 1.0
