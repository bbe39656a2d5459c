"""`DualGRPOTrainer`: GRPO whose rollouts come from q*, with what TRL leaves to a plugin."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOTrainer

from dual_rollout.config import CoordinatorConfig
from dual_rollout.training.correction import (
    IMPORTANCE_SAMPLING_MODES,
    ImportanceSamplingMode,
    corrected_weights,
)
from dual_rollout.training.rollout import DualRollout, pad_rows
from dual_rollout.training.weight_sync import DiskWeightSync
from dual_rollout.types import Prompt

T_PROMPT_COLUMN = "t_prompt"


if TYPE_CHECKING:
    _Trainer = GRPOTrainer
else:
    _Trainer = object


class DualTrainerMixin(_Trainer):
    """Rollouts from q* for a TRL trainer with a `rollout_func`. Put it before the trainer's class.

    Before each rollout the policy's server gets the new weights; after it, α, the log-probabilities and the
    importance weights stand in the batch as `(B, T)` tensors, and the weights multiply the advantages. With
    `use_vllm=True` TRL does both itself (its ratio exp(log π_θ − logprobs) is exactly π_θ/q*), and this adds nothing.

    A dataset column `t_prompt` (a string or chat messages) is what π_t sees instead of `prompt`.

    Args:
        dual_config: the servers and the law of the rollouts.
        importance_sampling_mode, importance_sampling_clip_min, importance_sampling_clip_max: how the weights enter
            the loss, see `corrected_weights`.

    Raises:
        ValueError: settings of TRL that are wrong for samples from q*.
    """

    def __init__(
        self,
        *args: Any,
        dual_config: CoordinatorConfig,
        importance_sampling_mode: ImportanceSamplingMode = "token_truncate",
        importance_sampling_clip_min: float = 0.0,
        importance_sampling_clip_max: float = 3.0,
        **kwargs: Any,
    ):
        if importance_sampling_mode not in IMPORTANCE_SAMPLING_MODES:
            raise ValueError(
                f"importance_sampling_mode must be one of {', '.join(IMPORTANCE_SAMPLING_MODES)}; "
                f"got {importance_sampling_mode!r}"
            )
        if not 0 <= importance_sampling_clip_min < importance_sampling_clip_max:
            raise ValueError("importance_sampling_clip_min must be >= 0 and below importance_sampling_clip_max")
        self._mode = importance_sampling_mode
        self._clip = {"clip_min": importance_sampling_clip_min, "clip_max": importance_sampling_clip_max}
        self._synced_step: int | None = None
        self.t_prompts: list[Prompt] | None = None
        self.rollout = DualRollout(dual_config)
        super().__init__(*args, rollout_func=self.rollout, **kwargs)
        if self.args.off_policy_mask_threshold is not None:
            raise ValueError(
                "off_policy_mask_threshold compares the policy with log q*, from which it is far by design: unset it"
            )
        if getattr(self.args, "use_liger_kernel", False):
            raise ValueError("use_liger_kernel bypasses the per-token weights: set it to false")
        if self.args.vllm_mode != "server" and self.use_vllm:
            raise ValueError('rollouts from q* need vllm_mode: "server" (or use_vllm: false)')
        self._weight_sync = DiskWeightSync(Path(self.args.output_dir) / "theta_weights")

    def _generate(self, prompts: list[Prompt]) -> Any:
        if not self.use_vllm and self.state.global_step != self._synced_step:
            seconds = self._weight_sync.sync(self, self.rollout)
            self._synced_step = self.state.global_step
            self._metrics["train" if self.model.training else "eval"]["perf/weight_sync_s"].append(seconds)
        return super()._generate(prompts)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._scoring_seconds, started = 0.0, time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._metrics["train"]["perf/update_s"].append(time.perf_counter() - started - self._scoring_seconds)
        return loss

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        self.t_prompts = None
        if T_PROMPT_COLUMN in inputs[0]:
            self.t_prompts = [row[T_PROMPT_COLUMN] for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        # TRL has merged what the rollout returned per row into `inputs`.
        device, width = output["completion_ids"].device, output["completion_ids"].shape[1]
        for name in ("alpha", "importance_weights", "logprobs_theta", "logprobs_t"):
            output[name] = pad_rows([row[name] for row in inputs], 0.0, width=width).to(device)
        if not self.use_vllm:
            self._apply_weights(output)
        self._scoring_seconds = time.perf_counter() - started
        return output

    def _apply_weights(self, output: dict[str, Any]) -> None:
        mask = output["completion_mask"]
        log_weights = (output["logprobs_theta"] - output["sampling_per_token_logps"]) * mask
        weights = corrected_weights(log_weights, mask, self._mode, **self._clip)
        output["importance_sampling_ratio"] = weights
        # VESPO takes the ratio into its own gamma weights; every other loss is linear in the advantage.
        if self.loss_type != "vespo":
            output["advantages"] = output["advantages"].unsqueeze(1) * weights
        metrics = self._metrics["train" if self.model.training else "eval"]
        used = self.accelerator.gather(weights[mask.bool()].mean()).mean().item()
        metrics["sampling/importance_sampling_ratio/mean"].append(used)
        for name, reduce in (("min", torch.min), ("max", torch.max)):
            extreme = self.accelerator.gather(reduce(weights[mask.bool()]))
            metrics[f"sampling/importance_sampling_ratio/{name}"].append(reduce(extreme).item())


class DualGRPOTrainer(DualTrainerMixin, GRPOTrainer):
    """`GRPOTrainer` with rollouts from q*; arguments as there, and those of `DualTrainerMixin`."""

    _tag_names = [*GRPOTrainer._tag_names, "dual_rollout"]
