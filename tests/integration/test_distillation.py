"""TRL's `DistillationTrainer` on rollouts between student and teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DistillationConfig
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from dual_rollout import CoordinatorConfig, DualDistillationTrainer, DualRollout
from dual_rollout.training.console import WITHOUT_REWARDS, heading_line
from dual_rollout.training.schedules import AlphaSchedule
from dual_rollout.training.weight_sync import DiskWeightSync
from tests.integration.conftest import TinyPair
from tests.integration.test_trainers import rows
from tests.integration.test_training import dual_config


def distillation_config(folder: Path, **options: Any) -> DistillationConfig:
    plain = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    plain |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "per_device_train_batch_size": 4}
    plain |= {"max_steps": 3, "max_completion_length": 8, "learning_rate": 1e-2, "beta": 0.0}
    return DistillationConfig(output_dir=str(folder), **{**plain, **options})


class Observed(DualDistillationTrainer):
    """Keeps each batch with the student's and the teacher's log-probabilities of the vocabulary, `(N, V)`, at every
    token that counts, by plain forwards at that moment."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.seen.append((dict(batch), *(log_probs(model, batch) for model in (self.model, self.teacher_model))))
        return batch


def log_probs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    length = batch["completion_ids"].shape[1]
    return logits[:, -length - 1 : -1][batch["completion_mask"].bool()].double().log_softmax(-1)


def test_a_student_learns_on_texts_between_it_and_its_teacher(
    tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRB: the budget comes down with every step. Each step's server has that step's student, and the loss is
    TRL's own, KL(teacher‖student) here, at the tokens that were drawn."""
    trainer = Observed(
        model=str(tiny_pair.theta_model),
        teacher_model=AutoModelForCausalLM.from_pretrained(tiny_pair.t_model),
        args=distillation_config(tmp_path),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows()]),
        dual_config=dual_config(tiny_pair, alpha_method="kl_budget", kl_budget=0.3),
        alpha_schedule=AlphaSchedule(shape="linear", kl_budget_end=0.0),
    )
    with trainer.rollout:
        trainer.train()
    assert capsys.readouterr().out.count(heading_line(WITHOUT_REWARDS)) == 1
    trainer.create_model_card(model_name="student")
    assert "no importance weight enters the loss" in (tmp_path / "README.md").read_text()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["sampling/kl_budget"] for log in logs] == pytest.approx([0.3, 0.15, 0.0])
    alphas = [log["sampling/alpha/mean"] for log in logs]
    assert len(trainer.seen) == 3 and alphas[0] > alphas[1] > alphas[2] == 0
    for log, (batch, student, teacher) in zip(logs, trainer.seen, strict=True):
        real = batch["completion_mask"].bool()
        tokens = batch["completion_ids"][real][:, None]
        for name, expected in (("logprobs_theta", student), ("logprobs_t", teacher)):
            drawn = expected.gather(1, tokens).squeeze(1).float()
            torch.testing.assert_close(batch[name][real], drawn, atol=2e-3, rtol=0)
        divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
        assert log["loss"] == pytest.approx(float(divergence), rel=1e-3)
        assert log["sampling/policy_check"] < 1e-3
        assert batch["sampling_per_token_logps"][real].isfinite().all()
    first, last = trainer.seen[0][1], trainer.seen[2][1]
    assert not np.allclose(first[0], last[0], atol=1e-3), "the student was trained"


def test_what_distillation_may_not_ask_is_refused(tmp_path: Path, tiny_pair: TinyPair) -> None:
    for options, named in (({"use_vllm": True}, "use_vllm=false"), ({"top_p": 0.5}, "top_p")):
        with pytest.raises(ValueError, match=named):
            DualDistillationTrainer(
                model=str(tmp_path / "none"),
                args=distillation_config(tmp_path, **options),
                train_dataset=Dataset.from_list(rows()),
                dual_config=dual_config(tiny_pair),
            )


class BetweenSelves(SDFTTrainer):
    """SDFT whose texts are drawn between the policy and itself with the privileged context: `docs/distillation.md`."""

    def __init__(self, *args: Any, rollout: DualRollout, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rollout = rollout
        self.errors: list[float] = []
        self._sync = DiskWeightSync(Path(self.args.output_dir) / "weights")

    def sample_rollouts(self, inputs: list[dict[str, Any]]) -> Any:
        prompts, contexts = ([row[name] for row in inputs] for name in ("prompt", "privileged_context"))
        seen = self.teacher_context_builder.select_generation_prompts(prompts, contexts)
        self._t_prompt_ids = self._tokenize_prompts(seen)
        self._sync.sync(self, self.rollout)
        return super().sample_rollouts(inputs)

    def _generate(self, prompt_ids: list[list[int]]) -> Any:
        options = {"max_tokens": self.max_completion_length, "temperature": self.temperature}
        self.drawn = self.rollout.generate(prompt_ids, t_prompts=self._t_prompt_ids, **options)
        both = zip(self.drawn.completion_ids, self.drawn.completion_mask, strict=True)
        return prompt_ids, [ids[mask.bool()].tolist() for ids, mask in both]

    def _prepare_training_batch(self, inputs: list[dict[str, Any]]) -> Any:
        """Keeps how far the record is from plain forwards of this moment's model on either text."""
        batch, real = super()._prepare_training_batch(inputs), self.drawn.completion_mask.bool()
        tokens = batch["completion_ids"][real][:, None]
        length = self.drawn.completion_ids.shape[1]
        teacher = {
            f"{part}_{name}": batch[f"teacher_{key}"][:, columns]
            for part, columns in (("prompt", slice(None, -length)), ("completion", slice(-length, None)))
            for name, key in (("ids", "input_ids"), ("mask", "attention_mask"))
        }
        for name, text in (("logprobs_theta", batch), ("logprobs_t", teacher)):
            expected = log_probs(self.model, text).gather(1, tokens).squeeze(1)
            self.errors.append((self.drawn.columns[name][real] - expected).abs().max().item())
        return batch


def test_self_distillation_between_self_and_privileged_self(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """One server has both roles, and the policy's current weights in both."""
    dataset = [{"prompt": row["prompt"], "privileged_context": f"it is {row['number']}"} for row in rows()]
    plain = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    plain |= {"save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 4, "num_generations": 1}
    args = SDFTConfig(output_dir=str(tmp_path), max_steps=2, max_completion_length=8, learning_rate=1e-2, **plain)
    config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.theta_url, top_k=50, seed=3)
    with DualRollout(config) as rollout:
        trainer = BetweenSelves(
            model=str(tiny_pair.theta_model), args=args, train_dataset=Dataset.from_list(dataset), rollout=rollout
        )
        trainer.train()
    assert len(trainer.errors) == 4 and max(trainer.errors) < 2e-3
    alpha = trainer.drawn.alpha[trainer.drawn.completion_mask.bool()]
    assert (alpha > 0).all() and alpha.std() > 0, "the privileged context makes a difference"
