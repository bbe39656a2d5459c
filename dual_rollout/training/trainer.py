"""`DualGRPOTrainer`: GRPO whose rollouts come from q*, with what TRL leaves to a plugin."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from dual_rollout.config import CoordinatorConfig
from dual_rollout.prompts import without_nulls
from dual_rollout.record import FLOAT_COLUMNS
from dual_rollout.training.contexts import CONTEXT_COLUMNS, Contexts, column_names
from dual_rollout.training.correction import (
    IMPORTANCE_SAMPLING_MODES,
    ImportanceSamplingMode,
    corrected_weights,
)
from dual_rollout.training.model_card import add_to_card, rollout_section
from dual_rollout.training.policy_check import evaluating, has_dropout
from dual_rollout.training.report import RunReport
from dual_rollout.training.rollout import DualRollout
from dual_rollout.training.rollout_batch import pad_rows
from dual_rollout.training.rollout_metrics import log_over_processes
from dual_rollout.training.schedules import AlphaSchedule
from dual_rollout.training.trl_settings import check_training_args
from dual_rollout.training.weight_sync import WeightSync, WeightSyncMethod, choose_weight_sync, weight_folder
from dual_rollout.types import Prompt

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
"""TRL's losses that are linear in the advantages (or, VESPO, take the weights by themselves)."""

_Trainer: Any = object  # a mixin over any TRL trainer, whose attributes it uses


class DualTrainerMixin(_Trainer):
    """Rollouts from q* for TRL's `GRPOTrainer`, or a subclass of it. Put it before the trainer's class.

    Before each rollout the policy's server gets the new weights; after it, α, the log-probabilities and the
    importance weights stand in the batch as `(B, T)` tensors, and the weights multiply the advantages. With
    `use_vllm=True` TRL does both itself (its ratio exp(log π_θ − logprobs) is exactly π_θ/q*), with its own keys
    `vllm_importance_sampling_*`, and no weight is applied here; one is, again, where that correction is switched off.

    The weight is π_θ/q* with the trainer's own π_θ where it is computed before the update (by TRL for
    `num_iterations > 1` or steps that share a rollout; here where `policy_logprobs` is False), and else with the
    server's, which has the same weights. `sampling/policy_drift` logs how far the two are apart: the numerics of two
    implementations, or weights that did not arrive. It is without dropout: where the model has some, it is measured on
    two rows of each rollout in evaluation mode. Without the server's it is not logged. Before and after each rollout,
    log π_θ of fixed texts is compared as well (`sampling/policy_check`), and beyond what rounding explains the run
    stops.

    Evaluation is of the policy: its completions are drawn from π_θ alone, see `DualRollout`. The figures of each logged
    step and evaluation are also written to `metrics.jsonl` in the output folder (`report`).

    A resumed run goes on in the order of the data that it began with, in any epoch (TRL's sampler by itself would give
    the first epoch's order again). A checkpoint between two uses of one rollout does not hold that rollout: it is drawn
    anew, from the checkpoint's weights.

    A dataset column `t_prompt` (a string or chat messages) is what π_t sees instead of `prompt`, and a column
    `t_target` names a π_t of `CoordinatorConfig.targets`; see `dual_rollout.training.contexts`.

    Args:
        dual_config: the servers and how q* is defined.
        importance_sampling_mode, importance_sampling_clip_min, importance_sampling_clip_max: how the weights enter
            the loss, see `corrected_weights`.
        alpha_schedule: how α or its bounds move over the training steps.
        weight_sync: "disk" (all weights), "lora" (the adapter alone), or "auto"; see `choose_weight_sync`.
        weight_sync_dir: a folder that π_θ's server sees under the same path; inside `output_dir` when None.
        policy_check_bound: as for `DualRollout`.

    Raises:
        ValueError: settings of TRL that are wrong for samples from q*, or a dataset whose columns would be overwritten.
    """

    _train_sampler: Any = None
    _scoring_seconds = 0.0  # since the optimisation step began

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
        policy_check_bound: float | None = None,
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
        self.contexts = Contexts()
        self.policy_check_bound = policy_check_bound
        self.rollout = self._make_rollout(dual_config, alpha_schedule)
        if kwargs.get("args") is not None:
            self._check_args(kwargs["args"])  # before the model is loaded
        super().__init__(*args, **self._rollout_arguments(), **kwargs)
        self._check_args(self.args)
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
        for dataset in (self.train_dataset, *held_out):
            check_columns(dataset)
        self.report = RunReport(Path(self.args.output_dir))
        self.add_callback(self.report)
        self.add_callback(_UpdateTimer(self))
        self._has_dropout = has_dropout(self.model)
        self._weight_folder = weight_folder(self.args.output_dir, weight_sync_dir)
        self._weight_sync = self._make_weight_sync(weight_sync)

    def _make_rollout(self, config: CoordinatorConfig, schedule: AlphaSchedule | None) -> Any:
        """What draws the rollouts; to be overridden by a trainer that samples in its own process."""
        return DualRollout(config, schedule=schedule, policy_check_bound=self.policy_check_bound)

    def _make_weight_sync(self, method: WeightSyncMethod) -> WeightSync:
        """What brings new weights to the policy that is sampled from."""
        return choose_weight_sync(self, self.rollout, method, self._weight_folder)

    def _rollout_arguments(self) -> dict[str, Any]:
        return {"rollout_func": self.rollout}

    def _check_args(self, args: Any) -> None:
        check_training_args(args)
        ours = (self._mode, self._clip["clip_min"], self._clip["clip_max"])
        if args.use_vllm and args.vllm_importance_sampling_correction and ours != _DEFAULT_CORRECTION:
            raise ValueError(
                "with use_vllm TRL applies the weights, and importance_sampling_mode and its bounds do nothing: set "
                "vllm_importance_sampling_mode, vllm_importance_sampling_clip_min and _clip_max instead"
            )
        if args.off_policy_mask_threshold is not None:
            raise ValueError(
                "off_policy_mask_threshold compares the policy with log q*, from which it is far by design: unset it"
            )
        if args.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type={args.loss_type!r} is not known to be linear in the advantages, which carry the weights: "
                f"set it to one of {', '.join(LOSS_TYPES)}"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._synced_step = None  # steps may count from 0 again
        self.remove_sent_weights()  # of a run that was killed
        return super().train(*args, **kwargs)

    def unlogged_metrics(self) -> dict[str, float]:
        """Means of what was measured in training since the last log entry, by the metrics' names."""
        return {name: sum(values) / len(values) for name, values in self._metrics["train"].items() if values}

    def remove_sent_weights(self) -> None:
        """Remove what was written for π_θ's server and is still there: of a killed run, or a run's last adapter."""
        if self.is_world_process_zero():
            shutil.rmtree(self._weight_folder, ignore_errors=True)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Every process writes its own, then the main one the trainer's state, which says that a checkpoint is whole.
        self.accelerator.wait_for_everyone()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Whole epochs trained, and batches of the next one; both 0 but for a resumed run."""
        epochs, batches = super()._init_training_state(*args, **kwargs)
        for _ in range(epochs if self._train_sampler is not None else 0):
            next(iter(self._train_sampler), None)  # each beginning draws an epoch's order
        self._step, self._buffered_inputs = batches, None  # where TRL is in the uses of a rollout
        return epochs, batches

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._synced_step = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        device = self.args.device
        if device.type == "cpu":
            # With several processes accelerate numbers it, and torch.load does not know a "cpu:0".
            self.args._setup_devices = torch.device("cpu")
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.args._setup_devices = device

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # what `remove_unused_columns` leaves of a dataset
        columns: list[str] = self._signature_columns
        columns += [name for name in CONTEXT_COLUMNS if name not in columns]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card, with a section on the rollouts."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(Path(self.args.output_dir) / "README.md", rollout_section(self, self._mode, self._clip))

    def _generate(self, prompts: list[Prompt]) -> Any:
        if self.state.global_step != self._synced_step:
            started = time.perf_counter()
            self._weight_sync.sync(self, self.rollout)
            self._synced_step = self.state.global_step
            if not self.use_vllm:
                metrics = self._metrics["train" if self.model.training else "eval"]
                metrics["perf/weight_sync_s"].append(time.perf_counter() - started)
        return super()._generate(prompts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        for row in inputs:
            if "prompt" in row:  # as the servers get it, so that reward functions and models see the same
                row["prompt"] = without_nulls(row["prompt"])
        self.contexts = Contexts.from_rows(inputs)
        output = super()._generate_and_score_completions(inputs)
        # What the rollout returned per row has been merged into `inputs`.
        device, width = output["completion_ids"].device, output["completion_ids"].shape[1]
        for name in FLOAT_COLUMNS:
            output[_BATCH_NAMES.get(name, name)] = pad_rows([row[name] for row in inputs], 0.0, width=width).to(device)
        old_logps = self._old_per_token_logps(output)
        if old_logps is None and not self.rollout.config.policy_logprobs:
            old_logps = output["old_per_token_logps"] = self._policy_logps(output)
        if "importance_sampling_ratio" not in output:  # TRL's own, which its loss applies
            policy = output["logprobs_theta"] if old_logps is None else old_logps
            weights = self._weights(policy - output["sampling_per_token_logps"], output["completion_mask"])
            output["importance_sampling_ratio"] = weights
            self._apply_weights(output, weights)
        if self._drops_now():
            self._log_drift_without_dropout(output)
        elif old_logps is not None:
            self._log_drift(old_logps, output)
        self._scoring_seconds += time.perf_counter() - started
        return output

    def _old_per_token_logps(self, output: dict[str, Any]) -> torch.Tensor | None:
        """The trainer's log π_θ from before the update, `(B, T)` nats, where TRL computes it."""
        return output.get("old_per_token_logps")

    def _policy_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """log π_θ of the completions as the loss will have it, `(B, T)` nats, without a gradient."""
        mode = "train" if self.model.training else "eval"
        text = [torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], dim=1) for part in ("ids", "mask")]
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, *_ = self._get_per_token_logps_and_entropies(
                self.model,
                *text,
                batch["completion_ids"].shape[1],
                batch_size=getattr(self.args, f"per_device_{mode}_batch_size"),
            )
        return logps

    def _weights(self, log_weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = corrected_weights(log_weights, mask, self._mode, **self._clip)
        used = weights[mask.bool()] if weights.shape == mask.shape else weights[mask.any(dim=1)]
        log_over_processes(self, "sampling/importance_sampling_ratio", used)
        return weights

    def _apply_weights(self, output: dict[str, Any], weights: torch.Tensor) -> None:
        # VESPO takes the ratio into its own gamma weights; every other loss is linear in the advantage.
        if self.loss_type != "vespo":
            output["advantages"] = output["advantages"].unsqueeze(1) * weights

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_logps = result[0].detach()
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        # Without log-probabilities from before the update, the policy is still the one that the rollout was for.
        if self._old_per_token_logps(inputs) is None and not self._drops_now():
            self._log_drift(self._last_logps, inputs)
        return loss

    def _drops_now(self) -> bool:
        return self._has_dropout and self.model.training

    def _log_drift_without_dropout(self, output: dict[str, Any]) -> None:
        """Of a few rows of this process's rollout, for it takes a forward pass of its own."""
        if self.rollout.config.policy_logprobs:
            rows = {name: output[name][:_DRIFT_ROWS] for name in _DRIFT_TENSORS}
            with evaluating(self.model):
                logps = self._policy_logps(rows)
            self._log_drift(logps, rows)

    def _log_drift(self, policy_logps: torch.Tensor, batch: dict[str, Any]) -> None:
        """|log π_θ of the trainer − log π_θ of the server|, nats."""
        drift = (policy_logps - batch["logprobs_theta"]).abs()[batch["completion_mask"].bool()]
        log_over_processes(self, "sampling/policy_drift", drift, ("mean", "max"))


class _UpdateTimer(TrainerCallback):
    """Seconds of an optimisation step, all its batches and the optimizer's step, without rollouts and their scoring."""

    def __init__(self, trainer: DualTrainerMixin):
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._scoring_seconds, self._started = 0.0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._started - self._trainer._scoring_seconds
        self._trainer._metrics["train"]["perf/update_s"].append(seconds)


def check_columns(dataset: Any) -> None:
    """Refuse a dataset, or a stream, with columns that the rollout would overwrite.

    Raises:
        ValueError: names them.
    """
    taken = sorted({*([] if dataset is None else column_names(dataset))} & {*FLOAT_COLUMNS, "weight_version"})
    if taken:
        raise ValueError(f"the dataset's columns {', '.join(taken)} would be overwritten by the rollout's: rename them")


_DRIFT_ROWS = 2
_DRIFT_TENSORS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "logprobs_theta")

_DEFAULT_CORRECTION = ("token_truncate", 0.0, 3.0)

_BATCH_NAMES = {"logprobs_q": "sampling_per_token_logps"}
"""The record's columns stand in the batch as `(B, T)` tensors, but for TRL's own name of the one that it uses."""


class DualGRPOTrainer(DualTrainerMixin, GRPOTrainer):
    """`GRPOTrainer` with rollouts from q*; arguments as there, and those of `DualTrainerMixin`."""

    _tag_names = [*GRPOTrainer._tag_names, "dual_rollout"]
