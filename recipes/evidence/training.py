"""One arm, trained and examined."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import GRPOConfig

from dual_rollout.training.console import Console
from dual_rollout.training.schedules import training_progress
from recipes.evidence.arms import SUPERVISED, Arm, Scale
from recipes.evidence.models import Examiner, chat_ids, load_model, load_tokenizer
from recipes.evidence.sampler import Method, PairSampler, Samples
from recipes.evidence.supervised import Optimiser, distil, imitate
from recipes.evidence.tasks import Task
from recipes.evidence.trainer import EvidenceTrainer, alpha_rule

Record = Callable[..., None]
_FINAL_DRAWS = 4
_EXAMINED_AT_ONCE = 128
_ROOM = 40  # tokens that a target may see more of

_LOGGED = {
    "reward": "reward",
    "frac_reward_zero_std": "groups_without_signal",
    "sampling/alpha/mean": "alpha",
    "sampling/kl_theta/mean": "kl_theta",
    "sampling/effective_sample_size_ratio": "ess",
    "sampling/pareto_k": "pareto_k",
    "sampling/clipped_share": "clipped_share",
    "sampling/importance_sampling_ratio/mean": "weight",
    "sampling/policy_drift/mean": "drift",
    "sampling/tokens": "tokens",
    "completions/mean_length": "length",
    "rollout/seconds": "rollout_s",
    "perf/update_s": "update_s",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
}


class Workbench:
    """A task's models and samplers, kept from run to run: what is compiled and captured once serves all runs.

    Args:
        start, teacher: folders of the untrained policy and of π_t.
    """

    def __init__(self, task: Task, scale: Scale, start: Path, teacher: Path):
        self.task, self.scale = task, scale
        self.tokenizer = load_tokenizer(start)
        self.policy, self.start, self.teacher = load_model(start), load_model(start), load_model(teacher)
        for model in (self.start, self.teacher):
            model.eval().requires_grad_(False)
        self.rows, self.reward = task.training_rows()
        self.examiner = Examiner(task, self.tokenizer, scale.held_out)
        self._samplers: dict[tuple[int, int, int], PairSampler] = {}
        self._prompt_width = _ROOM + max(
            map(len, chat_ids(self.tokenizer, self.rows["prompt"]) + self.examiner.prompts)
        )

    def reset(self) -> Any:
        """The policy, untrained again; its parameters stay where they are."""
        vars(self.policy).pop("forward", None)  # TRL's own, of the last run
        self.policy.load_state_dict(self.start.state_dict())
        return self.policy

    def sampler(self, policy: Any, target: Any, rows: int) -> PairSampler:
        key = (id(policy), id(target), rows)
        if key not in self._samplers:
            self._samplers[key] = PairSampler(
                policy,
                target,
                rows=rows,
                prompt_width=self._prompt_width,
                max_tokens=self.task.max_tokens,
                stop_id=self.tokenizer.eos_token_id,
            )
        return self._samplers[key]


def train_arm(bench: Workbench, arm: Arm, steps: int, seed: int, record: Record) -> None:
    """Train the policy by one arm for `steps` updates; `record` takes the kind of a line and its values."""
    torch.manual_seed(seed)
    run = _RunningArm(bench, arm, seed, record)
    run.examine()
    imitated = round(arm.imitation * steps)
    if imitated:
        run.imitate(imitated)
    if arm.distillation:
        run.distil(steps)
    else:
        run.reinforce(steps - imitated)
    run.examine_at_the_end()


class _RunningArm:
    def __init__(self, bench: Workbench, arm: Arm, seed: int, record: Record):
        self._bench, self._arm, self._seed, self._record = bench, arm, seed, record
        self._scale, self._tokenizer = bench.scale, bench.tokenizer
        self._policy = bench.reset()
        target = (bench.start if arm.t_prompt else bench.teacher) if arm.samples_from_q else None
        self._sampler = bench.sampler(self._policy, target, self._scale.rows)
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    def examine(self, **options: int) -> None:
        sampler = self._bench.sampler(self._policy, None, min(_EXAMINED_AT_ONCE, self._scale.held_out))
        success = self._bench.examiner.examine(sampler, self._seed, **options)
        self._record("evaluation", step=self.step, tokens=self.tokens, seconds=self.seconds, **success)

    def examine_at_the_end(self) -> None:
        """More samples per question, and how far training has moved the policy: KL(π_θ‖π_start) on its own samples."""
        sampler = self._bench.sampler(self._policy, None, min(_EXAMINED_AT_ONCE, self._scale.held_out))
        self._record("final", **self._bench.examiner.examine(sampler, self._seed, draws=_FINAL_DRAWS))
        both = self._bench.sampler(self._policy, self._bench.start, self._scale.rows)
        samples = both.generate(self._bench.examiner.prompts, method="fixed", value=0.0, seed=self._seed)
        total = samples.kl_t.sum()
        tokens = samples.batch.completion_mask.sum()
        self._record("moved", kl_per_token=(total / tokens).item(), kl_per_sequence=(total / len(samples.kl_t)).item())

    def after_step(self, seconds: float, tokens: int, **figures: float) -> None:
        """Count a step, record it, and examine the policy when it is time."""
        self.step += 1
        self.seconds += seconds
        self.tokens += tokens
        self._record("step", step=self.step, seconds=seconds, tokens=tokens, **figures)
        if self.step % self._scale.evaluate_every == 0:
            self.examine()

    def reinforce(self, steps: int) -> None:
        """GRPO, in the project's trainer."""
        scale, arm, rows = self._scale, self._arm, self._bench.rows
        if arm.t_prompt:
            shown = [arm.t_prompt.format(**row) for row in rows]
            rows = rows.add_column("t_prompt", [[{"role": "user", "content": text}] for text in shown])
        with tempfile.TemporaryDirectory() as scratch:
            trainer = EvidenceTrainer(
                model=self._policy,
                reward_funcs=self._bench.reward,
                train_dataset=rows,
                args=GRPOConfig(
                    output_dir=scratch,
                    seed=self._seed,
                    max_steps=steps,
                    learning_rate=arm.learning_rate,
                    lr_scheduler_type="constant_with_warmup",
                    warmup_steps=5,
                    weight_decay=0.0,
                    per_device_train_batch_size=scale.micro,
                    gradient_accumulation_steps=scale.rows // scale.micro,
                    num_generations=scale.generations,
                    max_completion_length=self._bench.task.max_tokens,
                    temperature=1.0,
                    beta=0.0,
                    bf16=False,
                    gradient_checkpointing=False,
                    use_cpu=not torch.cuda.is_available(),
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                ),
                callbacks=[_StepRecorder(self)],
                dual_config=arm.config(),
                alpha_schedule=arm.schedule,
                importance_sampling_mode=arm.correction,
                sampler=self._sampler,
                tokenizer=self._tokenizer,
                baseline=arm.baseline,
            )
            trainer.remove_callback(Console)  # every step is recorded
            trainer.train()

    def imitate(self, steps: int) -> None:
        """Supervised steps on the teacher's own samples that are right."""
        teacher = self._bench.sampler(self._bench.teacher, None, self._scale.rows)
        optimiser = Optimiser(self._policy, SUPERVISED * self._arm.learning_rate)
        order = random.Random(self._seed)
        self._policy.train()
        for step in range(steps):
            started = time.perf_counter()
            rows, samples = self._draw(teacher, order, step)
            texts = self._tokenizer.batch_decode(samples.batch.completion_ids, skip_special_tokens=True)
            right = [score > 0 for score in self._bench.reward(texts, rows["task_index"])]
            pairs = _pairs(samples.batch)
            kept = [pair for pair, is_right in zip(pairs, right, strict=True) if is_right]
            loss = imitate(self._policy, optimiser, kept, micro=self._scale.micro) if kept else 0.0
            tokens = sum(len(completion) for _, completion in pairs)
            self.after_step(time.perf_counter() - started, tokens, loss=loss, reward=sum(right) / len(right))

    def distil(self, steps: int) -> None:
        """Distillation: rollouts of the policy, or of q*, and the teacher's distribution at every position."""
        optimiser = Optimiser(self._policy, self._arm.learning_rate)
        order = random.Random(self._seed)
        self._policy.train()
        for step in range(steps):
            started = time.perf_counter()
            _, samples = self._draw(self._sampler, order, step, *self._rule(step, steps))
            pairs = _pairs(samples.batch)
            loss = distil(self._policy, self._bench.teacher, optimiser, pairs, micro=self._scale.micro)
            tokens = sum(len(completion) for _, completion in pairs)
            self.after_step(time.perf_counter() - started, tokens, loss=loss)

    def _rule(self, step: int, steps: int) -> tuple[Method, float]:
        """How the arm's rollouts are drawn at `step`."""
        if not self._arm.samples_from_q:
            return "policy", 0.0
        return alpha_rule(self._arm.schedule.at(self._arm.config(), training_progress(step, steps)))

    def _draw(
        self, sampler: PairSampler, order: random.Random, step: int, method: Method = "policy", value: float = 0.0
    ) -> tuple[Any, Samples]:
        """As many different training rows as a step of GRPO has completions, and a sample for each."""
        rows = self._bench.rows.select(order.sample(range(len(self._bench.rows)), self._scale.rows))
        seed = 1_000_003 * self._seed + step
        prompts = chat_ids(self._tokenizer, rows["prompt"])
        return rows, sampler.generate(prompts, method=method, value=value, seed=seed)


class _StepRecorder(TrainerCallback):
    """Hands each step of the trainer to the running arm."""

    def __init__(self, run: _RunningArm):
        self._run = run

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds = time.perf_counter() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "reward" in logs:
            figures = {short: logs[name] for name, short in _LOGGED.items() if name in logs}
            self._run.after_step(self._seconds, int(figures.pop("tokens")), **figures)


def _pairs(batch: Any) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions without padding."""
    prompt_lengths, lengths = (mask.sum(dim=1).tolist() for mask in (batch.prompt_mask, batch.completion_mask))
    prompts = [row[len(row) - n :] for row, n in zip(batch.prompt_ids.tolist(), prompt_lengths, strict=True)]
    completions = [row[:n] for row, n in zip(batch.completion_ids.tolist(), lengths, strict=True)]
    return list(zip(prompts, completions, strict=True))
