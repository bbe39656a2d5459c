"""`DualDistillationTrainer`: on-policy distillation whose rollouts come from q*, between student and teacher."""

from __future__ import annotations

from typing import Any

from trl import DistillationTrainer

from dual_rollout.training.rollout_mixin import RolloutTrainerMixin


class DualDistillationTrainer(RolloutTrainerMixin, DistillationTrainer):
    """`DistillationTrainer` with rollouts from q*; arguments as there, and those of `RolloutTrainerMixin`.

    π_θ's server serves the student and gets its weights before each rollout; π_t's serves the teacher. The loss is
    TRL's: at every drawn token, the divergence between the student's and `teacher_model`'s distributions. Where the
    rollouts come from decides which texts it is measured on, and no importance weight enters it; α and the weights
    stand in the batch for those who want them.

    `alpha_method="kl_budget"` with an `AlphaSchedule` to 0 begins near the teacher's texts, where its opinion is worth
    most, and ends at the student's own: TRB, arXiv 2605.31159. `fixed_alpha=0` is ordinary on-policy distillation.

    Raises:
        ValueError: besides those of the mixin, `use_vllm`: the rollouts come from the servers of `dual_config`.
    """

    _tag_names = [*DistillationTrainer._tag_names, "dual_rollout"]

    def _check_args(self, args: Any) -> None:
        if args.use_vllm:
            raise ValueError("the rollouts come from the servers of dual_config, not from TRL's vLLM: use_vllm=false")
        super()._check_args(args)

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        return [list(record.token_ids) for record in self._draw_turn(prompt_ids, images)]
