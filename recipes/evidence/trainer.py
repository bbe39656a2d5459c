"""The project's GRPO trainer with both models in its process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dual_rollout import CoordinatorConfig, DualGRPOTrainer
from dual_rollout.functional.importance_weights import effective_sample_size, pareto_k
from dual_rollout.record import FLOAT_COLUMNS
from dual_rollout.training.rollout_metrics import log_over_processes
from dual_rollout.training.schedules import AlphaSchedule, training_progress
from dual_rollout.types import Prompt
from recipes.evidence.models import chat_ids
from recipes.evidence.sampler import Method, PairSampler


class InProcessRollout:
    """The rollout function of a trainer whose sampler reads its very weights."""

    def __init__(
        self, config: CoordinatorConfig, schedule: AlphaSchedule, sampler: PairSampler, tokenizer: Any, seed: int
    ):
        self.config, self.schedule, self.seed = config, schedule, seed
        self._sampler, self._tokenizer = sampler, tokenizer

    def __call__(self, prompts: Sequence[Prompt], trainer: Any) -> dict[str, Any]:
        started = time.perf_counter()
        state = trainer.state
        config = self.schedule.at(self.config, training_progress(state.global_step, state.max_steps))
        method, value = alpha_rule(config) if self._sampler.has_target else ("policy", 0.0)
        t_prompts = trainer.contexts.t_prompts
        samples = self._sampler.generate(
            chat_ids(self._tokenizer, prompts),
            chat_ids(self._tokenizer, t_prompts) if t_prompts else None,
            method=method,
            value=value,
            seed=1_000_003 * self.seed + state.global_step,
        )
        batch = samples.batch
        lengths = batch.completion_mask.sum(dim=1).tolist()
        self._log(trainer, samples, time.perf_counter() - started)

        def rows(padded: torch.Tensor) -> list[list[Any]]:
            return [row[:length] for row, length in zip(padded.tolist(), lengths, strict=True)]

        prompt_lengths = batch.prompt_mask.sum(dim=1).tolist()
        return {
            "prompt_ids": [
                row[-length:] for row, length in zip(batch.prompt_ids.tolist(), prompt_lengths, strict=True)
            ],
            "completion_ids": rows(batch.completion_ids),
            "logprobs": rows(batch.logprobs_q),
            **{name: rows(getattr(batch, name)) for name in FLOAT_COLUMNS},
        }

    def _log(self, trainer: Any, samples: Any, seconds: float) -> None:
        real = samples.batch.completion_mask.bool()
        weights = samples.batch.importance_weights[real].double().cpu().numpy()
        metrics = trainer._metrics["train"]
        log_over_processes(trainer, "sampling/alpha", samples.batch.alpha[real])
        log_over_processes(trainer, "sampling/kl_theta", samples.kl_theta[real], ("mean",))
        metrics["sampling/effective_sample_size_ratio"].append(effective_sample_size(weights))
        tail = pareto_k(weights)
        if not np.isnan(tail):
            metrics["sampling/pareto_k"].append(tail)
        metrics["sampling/clipped_share"].append(float((weights > trainer._clip["clip_max"]).mean()))
        metrics["sampling/tokens"].append(float(len(weights)))
        metrics["rollout/seconds"].append(seconds)

    def close(self) -> None:
        """Nothing is open."""


class _SharedWeights:
    """The sampler reads the trainer's parameters, so there is nothing to send."""

    def sync(self, trainer: Any, rollout: Any) -> None:
        pass


class EvidenceTrainer(DualGRPOTrainer):
    """`DualGRPOTrainer` with both models in its process.

    Args:
        sampler: of the model that is trained and its target.
        baseline: "policy" takes each group's advantages from the policy's mean reward, as its weights estimate it.
    """

    def __init__(
        self,
        *args: Any,
        sampler: PairSampler,
        tokenizer: Any,
        dual_config: CoordinatorConfig,
        alpha_schedule: AlphaSchedule,
        baseline: str = "q",
        **kwargs: Any,
    ):
        self._baseline = baseline
        self._own_rollout = InProcessRollout(dual_config, alpha_schedule, sampler, tokenizer, kwargs["args"].seed)
        super().__init__(
            *args,
            rollout_func=self._own_rollout,
            processing_class=tokenizer,
            dual_config=dual_config,
            alpha_schedule=alpha_schedule,
            **kwargs,
        )

    def _make_rollout(self, config: CoordinatorConfig, schedule: AlphaSchedule | None) -> Any:
        return self._own_rollout

    def _make_weight_sync(self, method: Any) -> Any:
        return _SharedWeights()

    def _apply_weights(self, output: dict[str, Any], weights: torch.Tensor) -> None:
        if self._baseline == "policy":
            log_weights = output["logprobs_theta"] - output["sampling_per_token_logps"]
            sequence = (log_weights * output["completion_mask"]).sum(dim=1)
            rewards = self._rewards[:, 0].view(-1, self.num_generations)
            share = sequence.view(-1, self.num_generations).softmax(dim=1)
            centred = rewards - (share * rewards).sum(dim=1, keepdim=True)
            output["advantages"] = (centred / (rewards.std(dim=1, keepdim=True) + 1e-4)).flatten()
        super()._apply_weights(output, weights)


def alpha_rule(config: CoordinatorConfig) -> tuple[Method, float]:
    """The sampler's name for what the config says, and its number."""
    if config.alpha_method == "fixed":
        return "fixed", float(config.fixed_alpha or 0.0)
    if config.alpha_method == "kl_budget":
        return "kl_budget", float(config.kl_budget or 0.0)
    return "kl_symmetry", 0.0
