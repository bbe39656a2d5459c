"""`DualRLOOTrainer`: RLOO whose rollouts come from q*."""

from __future__ import annotations

from typing import Any

import torch
from trl import RLOOTrainer

from dual_rollout.training.trainer import DualTrainerMixin


class DualRLOOTrainer(DualTrainerMixin, RLOOTrainer):
    """`RLOOTrainer` with rollouts from q*; arguments as there, and those of `DualTrainerMixin`.

    RLOO has one ratio, one advantage and one clip per sequence; its gradient is A·ρ·∇log π_θ(y) with
    ∇log π_θ(y) = Σ_t ∇log π_θ(y_t). The "sequence" modes multiply A by the sequence's weight, which is exact where no
    bound acts, whatever the leave-one-out baseline, but vanishes for long completions. The "token" modes multiply each
    term of that sum by its token's weight and leave ρ and its clip alone, as in GRPO.

    The policy's log-probabilities, which RLOO always computes before the update, make the weights.

    Raises:
        ValueError: besides those of the mixin, `use_vllm`: TRL would not send the weights.
    """

    _tag_names = [*RLOOTrainer._tag_names, "dual_rollout"]
    _old_logps: torch.Tensor | None = None
    _token_weights: torch.Tensor | None = None

    def _check_args(self, args: Any) -> None:
        if args.use_vllm:
            raise ValueError("RLOO sends no weights to a server that it does not ask for completions: use_vllm=false")
        super(DualTrainerMixin, self)._check_args(args)  # GRPO's further settings are not there

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        return [list(record.token_ids) for record in self._draw_turn(prompt_ids, images)]  # RLOO takes no log q*

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._old_logps = None
        return super()._generate_and_score_completions(inputs)

    def _old_per_token_logps(self, output: dict[str, Any]) -> torch.Tensor | None:
        return self._old_logps

    def _apply_weights(self, output: dict[str, Any], weights: torch.Tensor) -> None:
        if self._mode.startswith("sequence"):
            output["advantages"] = output["advantages"] * weights.squeeze(1)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._mode.startswith("token"):
            self._token_weights = inputs["importance_sampling_ratio"]
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._token_weights = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        logps, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._old_logps is None:  # the policy is asked first, before a reference model and before the update
            self._old_logps = logps
        if self._token_weights is not None:  # the values stay; their gradients are multiplied
            logps = logps.detach() + self._token_weights * (logps - logps.detach())
        return logps, *rest
