"""`DualGRPOTrainer`: GRPO whose rollouts come from q*, with what TRL leaves to a plugin."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import torch
from trl import GRPOTrainer

from dual_rollout.config import CoordinatorConfig
from dual_rollout.training.correction import (
    IMPORTANCE_SAMPLING_MODES,
    ImportanceSamplingMode,
    corrected_weights,
)
from dual_rollout.training.rollout import DualRollout, check_training_args, pad_rows
from dual_rollout.training.schedules import AlphaSchedule
from dual_rollout.training.weight_sync import WeightSyncMethod, choose_weight_sync
from dual_rollout.types import Prompt

T_PROMPT_COLUMN = "t_prompt"


_Trainer: Any = object  # a mixin over any TRL trainer, whose attributes it uses


class DualTrainerMixin(_Trainer):
    """Rollouts from q* for a TRL trainer with a `rollout_func`. Put it before the trainer's class.

    Before each rollout the policy's server gets the new weights; after it, α, the log-probabilities and the
    importance weights stand in the batch as `(B, T)` tensors, and the weights multiply the advantages. With
    `use_vllm=True` TRL does both itself (its ratio exp(log π_θ − logprobs) is exactly π_θ/q*), with its own keys
    `vllm_importance_sampling_*`, and no weight is applied here; one is, again, where that correction is switched off.

    The weight is π_θ/q* with the trainer's own π_θ where TRL computes it before the update (`num_iterations > 1`, or
    steps that share a rollout), and else with the server's, which has the same weights. `sampling/policy_drift` logs
    how far the two are apart: the numerics of two implementations, or weights that did not arrive.

    A dataset column `t_prompt` (a string or chat messages) is what π_t sees instead of `prompt`.

    Args:
        dual_config: the servers and the law of the rollouts.
        importance_sampling_mode, importance_sampling_clip_min, importance_sampling_clip_max: how the weights enter
            the loss, see `corrected_weights`.
        alpha_schedule: how the bounds on α move over the training steps.
        weight_sync: "disk" (all weights), "lora" (the adapter alone), or "auto"; see `choose_weight_sync`.
        weight_sync_dir: a folder that π_θ's server sees under the same path; inside `output_dir` when None.

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
        alpha_schedule: AlphaSchedule | None = None,
        weight_sync: WeightSyncMethod = "auto",
        weight_sync_dir: str | Path | None = None,
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
        self.rollout = DualRollout(dual_config, schedule=alpha_schedule)
        if "args" in kwargs:
            check_training_args(kwargs["args"])  # before the model is loaded
        super().__init__(*args, rollout_func=self.rollout, **kwargs)
        if self.args.off_policy_mask_threshold is not None:
            raise ValueError(
                "off_policy_mask_threshold compares the policy with log q*, from which it is far by design: unset it"
            )
        folder = Path(weight_sync_dir or Path(self.args.output_dir) / "theta_weights")
        self._weight_sync = choose_weight_sync(self, self.rollout, weight_sync, folder)

    def _generate(self, prompts: list[Prompt]) -> Any:
        if self.state.global_step != self._synced_step:
            started = time.perf_counter()
            self._weight_sync.sync(self, self.rollout)
            self._synced_step = self.state.global_step
            if not self.use_vllm:
                metrics = self._metrics["train" if self.model.training else "eval"]
                metrics["perf/weight_sync_s"].append(time.perf_counter() - started)
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
        if "importance_sampling_ratio" not in output:  # TRL's own, which its loss applies
            self._apply_weights(output)
        if "old_per_token_logps" in output:
            self._log_drift(output["old_per_token_logps"], output)
        self._scoring_seconds = time.perf_counter() - started
        return output

    def _apply_weights(self, output: dict[str, Any]) -> None:
        mask = output["completion_mask"]
        policy = output.get("old_per_token_logps", output["logprobs_theta"])
        weights = corrected_weights(policy - output["sampling_per_token_logps"], mask, self._mode, **self._clip)
        output["importance_sampling_ratio"] = weights
        # VESPO takes the ratio into its own gamma weights; every other loss is linear in the advantage.
        if self.loss_type != "vespo":
            output["advantages"] = output["advantages"].unsqueeze(1) * weights
        used = weights[mask.bool()] if weights.shape == mask.shape else weights.flatten()
        for reduce in ("min", "mean", "max"):
            self._log_reduced("sampling/importance_sampling_ratio", reduce, used)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_logps = result[0].detach()
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        # Without log-probabilities from before the update, the policy is still the one that the rollout was for.
        if "old_per_token_logps" not in inputs:
            self._log_drift(self._last_logps, inputs)
        return loss

    def _log_drift(self, policy_logps: torch.Tensor, batch: dict[str, Any]) -> None:
        """|log π_θ of the trainer − log π_θ of the server|, nats."""
        drift = (policy_logps - batch["logprobs_theta"]).abs()[batch["completion_mask"].bool()]
        for reduce in ("mean", "max"):
            self._log_reduced("sampling/policy_drift", reduce, drift)

    def _log_reduced(self, name: str, reduce: Literal["min", "mean", "max"], values: torch.Tensor) -> None:
        """Log a reduction over all processes' values; a process may have none (all its completions masked)."""
        function = getattr(torch, reduce)
        local = function(values) if values.numel() else torch.tensor(float("nan"), device=values.device)
        gathered = self.accelerator.gather(local)
        gathered = gathered[~gathered.isnan()]
        if gathered.numel():
            mode = "train" if self.model.training else "eval"
            self._metrics[mode][f"{name}/{reduce}"].append(function(gathered).item())


class DualGRPOTrainer(DualTrainerMixin, GRPOTrainer):
    """`GRPOTrainer` with rollouts from q*; arguments as there, and those of `DualTrainerMixin`."""

    _tag_names = [*GRPOTrainer._tag_names, "dual_rollout"]
