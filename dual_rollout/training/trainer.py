"""`DualGRPOTrainer`: GRPO whose rollouts come from q*, with what TRL leaves to a plugin."""

from __future__ import annotations

from typing import Any

import torch
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from dual_rollout.training.correction import (
    IMPORTANCE_SAMPLING_MODES,
    ImportanceSamplingMode,
    corrected_weights,
)
from dual_rollout.training.policy_check import evaluating, has_dropout
from dual_rollout.training.rollout_metrics import log_over_processes, mode_of
from dual_rollout.training.rollout_mixin import RolloutTrainerMixin, drawn_mask
from dual_rollout.training.rollout_mixin import check_columns as check_columns  # for those who look for it here
from dual_rollout.training.turns import ROLLOUT_COLUMNS

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
"""TRL's losses that are linear in the advantages (or, VESPO, take the weights by themselves)."""


class DualTrainerMixin(RolloutTrainerMixin):
    """Rollouts from q* for TRL's `GRPOTrainer`, or a subclass of it. Put it before the trainer's class.

    To what `RolloutTrainerMixin` does it adds the weights, which multiply the advantages. With `use_vllm=True` TRL
    does that itself, by its own keys `vllm_importance_sampling_*`: its ratio exp(log π_θ − logprobs) is exactly π_θ/q*.
    It also sends the policy's weights. Then no weight is applied here, unless that correction is switched off.

    The weight is π_θ/q* with the trainer's own π_θ where it is computed before the update, as TRL does for
    `num_iterations > 1` or steps that share a rollout. Else it is the server's, which has the same weights.
    `sampling/policy_drift` logs how far the two are apart: the numerics of two implementations, or weights that did not
    arrive. It is without dropout: where the model has some, it is measured on two rows of each rollout in evaluation
    mode.

    A `rollout_func` of your own may call `trainer.rollout(prompts, trainer)` as often as it likes. It returns what
    it has drawn with the columns that come with it, and with TRL's `env_mask`, 0 at tokens that were not drawn.

    Args:
        importance_sampling_mode, importance_sampling_clip_min, importance_sampling_clip_max: how the weights enter
            the loss, see `corrected_weights`.
        kwargs: those of `RolloutTrainerMixin` and of the trainer.

    Raises:
        ValueError: as there.
    """

    def __init__(
        self,
        *args: Any,
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
        if kwargs.get("rollout_func") is not None and (kwargs.get("tools") or kwargs.get("environment_factory")):
            raise ValueError(
                "with tools or an environment_factory TRL's tool loop asks for the turns, and they are drawn from q*: "
                "leave rollout_func out"
            )
        self._mode = importance_sampling_mode
        self._clip = {"clip_min": importance_sampling_clip_min, "clip_max": importance_sampling_clip_max}
        super().__init__(*args, **kwargs)
        self._has_dropout = has_dropout(self.model)

    def _check_args(self, args: Any) -> None:
        super()._check_args(args)
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

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, *args: Any, **kwargs: Any) -> Any:
        """Tokens and log q* of a turn, of all rows or of those whose tools have given a result."""
        records = self._draw_turn(prompt_ids, images)
        return [list(record.token_ids) for record in records], [list(record.logprobs_q) for record in records]

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> torch.Tensor:
        """Give the reward functions what the rollout knows of each row."""
        for name in ROLLOUT_COLUMNS:
            for row, value in zip(inputs, self._rollout_columns.get(name, ()), strict=False):
                row[name] = value
        self._rewards = super()._calculate_rewards(inputs, *args)
        return self._rewards

    def _correct(self, output: dict[str, Any]) -> None:
        old_logps = self._old_per_token_logps(output)
        if "importance_sampling_ratio" not in output:  # TRL's own, which its loss applies
            policy = output["logprobs_theta"] if old_logps is None else old_logps
            weights = self._weights(policy - output["sampling_per_token_logps"], drawn_mask(output))
            output["importance_sampling_ratio"] = weights
            self._apply_weights(output, weights)
        if self._drops_now():
            self._log_drift_without_dropout(output)
        elif old_logps is not None:
            self._log_drift(old_logps, output)

    def _old_per_token_logps(self, output: dict[str, Any]) -> torch.Tensor | None:
        """The trainer's log π_θ from before the update, `(B, T)` nats, where TRL computes it."""
        return output.get("old_per_token_logps")

    def _policy_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """log π_θ of the completions as the loss will have it, `(B, T)` nats, without a gradient."""
        text = [torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], dim=1) for part in ("ids", "mask")]
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, *_ = self._get_per_token_logps_and_entropies(
                self.model,
                *text,
                batch["completion_ids"].shape[1],
                batch_size=getattr(self.args, f"per_device_{mode_of(self)}_batch_size"),
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
        rows = {name: output[name][:_DRIFT_ROWS] for name in _DRIFT_TENSORS if name in output}
        with evaluating(self.model):
            logps = self._policy_logps(rows)
        self._log_drift(logps, rows)

    def _log_drift(self, policy_logps: torch.Tensor, batch: dict[str, Any]) -> None:
        """|log π_θ of the trainer − log π_θ of the server|, nats."""
        drift = (policy_logps - batch["logprobs_theta"]).abs()[drawn_mask(batch).bool()]
        log_over_processes(self, "sampling/policy_drift", drift, ("mean", "max"))


_DRIFT_ROWS = 2
_DRIFT_TENSORS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "logprobs_theta")

_DEFAULT_CORRECTION = ("token_truncate", 0.0, 3.0)


class DualGRPOTrainer(DualTrainerMixin, GRPOTrainer):
    """`GRPOTrainer` with rollouts from q*; arguments as there, and those of `DualTrainerMixin`."""

    _tag_names = [*GRPOTrainer._tag_names, "dual_rollout"]
