"""What is compared: each arm as settings of the library, and how large a run is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dual_rollout import CoordinatorConfig
from dual_rollout.training.correction import ImportanceSamplingMode
from dual_rollout.training.schedules import AlphaSchedule

SUPERVISED = 10.0
"""A loss with a signal at every token takes a higher learning rate than a policy gradient, by this factor."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        sampling: fields of `CoordinatorConfig` that say which q* the rollouts come from; none: the policy alone.
        schedule: how they move over the steps.
        correction: how the weights enter the loss.
        baseline: the mean reward that a group's advantages are taken from: of q*'s samples, or of the policy, which is
            the mean weighted by the sequences' weights.
        t_prompt: what the target sees; "{answer}" makes the untrained policy, shown the answer, the target.
        imitation: share of the steps that imitate the teacher's correct samples before GRPO begins.
        distillation: distillation on the rollouts instead of GRPO.
        learning_rate: tuned, see README.md.
        rate_factor: what the rates to choose from are multiplied by.
        rate_of: the arm whose learning rate it takes; none: its own is tuned.
        seeds: runs at most.
        hard_task_only: whether it is left out of the tasks after a scale's first.
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    schedule: AlphaSchedule = field(default_factory=AlphaSchedule)
    correction: ImportanceSamplingMode = "token_truncate"
    baseline: Literal["q", "policy"] = "q"
    t_prompt: str | None = None
    imitation: float = 0.0
    distillation: bool = False
    learning_rate: float = 0.0
    rate_factor: float = 1.0
    rate_of: str | None = None
    seeds: int = 5
    hard_task_only: bool = False

    @property
    def samples_from_q(self) -> bool:
        return bool(self.sampling)

    def config(self) -> CoordinatorConfig:
        # No server is asked: the sampler is in the process.
        sampling = self.sampling or {"alpha_method": "fixed", "fixed_alpha": 0.0}
        return CoordinatorConfig(theta_url="http://in-process", t_url="http://in-process", **sampling)


_SYMMETRY = {"alpha_method": "kl_symmetry"}
_FIXED = {"alpha_method": "fixed", "fixed_alpha": 0.5}
_TO_POLICY = AlphaSchedule(shape="linear", fixed_alpha_end=0.0)
_BUDGET = {"alpha_method": "kl_budget", "kl_budget": 0.5}
_BUDGET_TO_POLICY = AlphaSchedule(shape="linear", kl_budget_end=0.0)
_VARIANT: dict[str, Any] = {"rate_of": "kl_symmetry", "seeds": 3, "hard_task_only": True}

ARMS = {
    "grpo": Arm(),
    "kl_symmetry": Arm(_SYMMETRY),
    "kl_budget": Arm(_BUDGET, _BUDGET_TO_POLICY),
    "fixed": Arm(_FIXED, _TO_POLICY),
    "fixed_unweighted": Arm(_FIXED, _TO_POLICY, correction="none"),
    "sft_grpo": Arm(imitation=0.2),
    "teacher": Arm({"alpha_method": "fixed", "fixed_alpha": 1.0}, seeds=3),
    "distillation": Arm(distillation=True, rate_factor=SUPERVISED, seeds=3),
    "distillation_from_q": Arm(
        _BUDGET, _BUDGET_TO_POLICY, correction="none", distillation=True, rate_factor=SUPERVISED, seeds=3
    ),
    "answer_in_prompt": Arm(_SYMMETRY, t_prompt="{question} (The correct answer is {answer}.)", seeds=3),
    "kl_symmetry_token_mask": Arm(_SYMMETRY, correction="token_mask", **_VARIANT),
    "kl_symmetry_sequence_mask": Arm(_SYMMETRY, correction="sequence_mask", **_VARIANT),
    "kl_symmetry_unweighted": Arm(_SYMMETRY, correction="none", **_VARIANT),
    "kl_symmetry_policy_baseline": Arm(_SYMMETRY, baseline="policy", **_VARIANT),
}


@dataclass(frozen=True)
class Scale:
    """How large a run is.

    Attributes:
        steps: updates; each takes `prompts` × `generations` new completions.
        micro: completions per forward and backward pass.
        evaluate_every: steps between two evaluations, the first at 0.
        held_out: questions per evaluation.
        seeds: runs of each arm.
        tuning_steps: updates of the runs that the learning rate is chosen by, unless they cannot tell two rates apart.
        tell_apart: by how much the best rate must succeed more often than the next for no second round of tuning.
        learning_rates: to choose from; the first where none has been tuned.
        teacher_steps, teacher_batch, teacher_rate: updates of the teacher at most, rows of each, and learning rate.
        teacher_check: updates between two examinations of it.
        from_scratch: whether policy and teacher are two stages of a small model's training, and not SmolLM2.
        tasks: what is run unless asked for otherwise.
    """

    steps: int
    prompts: int
    generations: int
    micro: int
    evaluate_every: int
    held_out: int
    seeds: int
    tuning_steps: int
    tell_apart: float
    learning_rates: tuple[float, ...]
    teacher_steps: int
    teacher_batch: int
    teacher_rate: float
    teacher_check: int
    from_scratch: bool
    tasks: tuple[str, ...]

    @property
    def rows(self) -> int:
        return self.prompts * self.generations


SCALES = {
    "gpu": Scale(
        steps=100,
        prompts=8,
        generations=8,
        micro=32,
        evaluate_every=20,
        held_out=256,
        seeds=5,
        tuning_steps=30,
        tell_apart=0.006,  # two standard errors of a success of 1% in 1,024 samples
        learning_rates=(3e-6, 1e-6, 1e-5),
        teacher_steps=1500,
        teacher_batch=64,
        teacher_rate=3e-4,
        teacher_check=25,
        from_scratch=False,
        tasks=("products", "short_sums"),
    ),
    "cpu": Scale(
        steps=100,
        prompts=8,
        generations=8,
        micro=32,
        evaluate_every=25,
        held_out=256,
        seeds=3,
        tuning_steps=30,
        tell_apart=0.0,
        learning_rates=(1e-4, 3e-5),
        teacher_steps=3000,
        teacher_batch=32,
        teacher_rate=3e-3,
        teacher_check=50,
        from_scratch=True,
        tasks=("sums", "easier_sums"),
    ),
}
TUNING_SEED = 100
"""Not among the seeds that are reported; nor is the next one."""
