"""`RolloutTrainerMixin`: what every trainer of TRL's needs for rollouts from q*, whatever its loss."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from dual_rollout.config import CoordinatorConfig
from dual_rollout.prompts import check_prompt_is_text, without_nulls
from dual_rollout.record import FLOAT_COLUMNS, SequenceRecord
from dual_rollout.training.console import Console
from dual_rollout.training.contexts import CONTEXT_COLUMNS, TargetContexts, column_names
from dual_rollout.training.correction import ImportanceSamplingMode
from dual_rollout.training.evaluation import interval, rewards_of_rows
from dual_rollout.training.kept_rollouts import KEPT_OF_A_ROW, KeptRollouts
from dual_rollout.training.metrics_log import MetricsLog
from dual_rollout.training.model_card import add_to_card, rollout_section
from dual_rollout.training.processes import fail_together
from dual_rollout.training.rollout import DualRollout
from dual_rollout.training.rollout_batch import pad_rows
from dual_rollout.training.rollout_metrics import mode_of
from dual_rollout.training.schedules import AlphaSchedule
from dual_rollout.training.trackers import Trackers
from dual_rollout.training.trl_settings import check_training_args
from dual_rollout.training.turns import ROLLOUT_COLUMNS, Turns, rows_with_results
from dual_rollout.training.weight_sync import WeightSync, WeightSyncMethod, choose_weight_sync, weight_folder
from dual_rollout.types import Prompt

_Trainer: Any = object  # a mixin over any TRL trainer, whose attributes it uses


class RolloutTrainerMixin(_Trainer):
    """Rollouts from q* for a trainer of TRL that draws its completions turn by turn, in `_generate_single_turn`.

    Before each rollout the policy's server gets the new weights; after it, α, the log-probabilities and the importance
    weights stand in the batch as `(B, T)` tensors. Before and after each rollout, log π_θ of fixed texts is compared
    between server and trainer (`sampling/policy_check`), and beyond what rounding explains the run stops.

    Evaluation is of the policy: its completions are drawn from π_θ alone, see `DualRollout`. The figures of each logged
    step and evaluation are also written to `metrics.jsonl` in the output folder (`metrics_log`). On the terminal each
    logged step is one line, and what looks wrong is said once, in words (`console`), instead of all figures as a
    dictionary.

    A resumed run goes on in the order of the data that it began with, in any epoch (TRL's sampler by itself would give
    the first epoch's order again). A checkpoint between two uses of one rollout does not hold that rollout: it is drawn
    anew, from the checkpoint's weights.

    A dataset column `t_prompt` (a string or chat messages) is what π_t sees instead of `prompt`, and a column
    `t_target` names a π_t of `CoordinatorConfig.targets`; see `dual_rollout.training.contexts`.

    With TRL's `tools`, or an `environment_factory`, every turn is drawn from q*. π_t sees its own first prompt, with
    the same tools and the environment's first observation, and then the same tokens as π_θ. The tokens of tools'
    results, which nobody drew, have no numbers (NaN) and no part in the loss or in the figures.

    Args:
        dual_config: the servers and how q* is defined.
        alpha_schedule: how α or its bounds move over the training steps.
        weight_sync: "disk" (all weights), "lora" (the adapter alone), or "auto"; see `choose_weight_sync`.
        weight_sync_dir: a folder that π_θ's server sees under the same path; inside `output_dir` when None.
        policy_check_bound: as for `DualRollout`.
        kept_rollouts: rollouts of each step that are kept in `rollouts/` of the output folder, see `KeptRollouts`.

    Raises:
        ValueError: settings of TRL that are wrong for samples from q*, or a dataset whose columns would be overwritten.
    """

    _mode: ImportanceSamplingMode = "none"  # how importance weights enter the loss
    _clip = {"clip_min": 0.0, "clip_max": 1.0}
    _train_sampler: Any = None
    _tool_rows: Callable[[list[list[int]]], list[int]] | None = None  # in TRL's tool loop: the rows it asks for
    _scoring_seconds = 0.0  # since the optimisation step began
    _rewards: torch.Tensor | None = None  # of the last rollout, `(B, reward functions)` over all processes

    def __init__(
        self,
        *args: Any,
        dual_config: CoordinatorConfig,
        alpha_schedule: AlphaSchedule | None = None,
        weight_sync: WeightSyncMethod = "auto",
        weight_sync_dir: str | Path | None = None,
        policy_check_bound: float | None = None,
        kept_rollouts: int = 8,
        **kwargs: Any,
    ):
        self._synced_step: int | None = None
        self._evaluated: list[float] = []  # rewards of the evaluation that is going on
        self.contexts = TargetContexts()
        self.policy_check_bound = policy_check_bound
        self._kept = KeptRollouts(kept_rollouts)
        self.rollout = self._make_rollout(dual_config, alpha_schedule)
        if kwargs.get("args") is not None:
            self._check_args(kwargs["args"])  # before the model is loaded
        super().__init__(*args, **kwargs)
        self._check_args(self.args)
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
        for dataset in (self.train_dataset, *held_out):
            check_columns(dataset)
        self.metrics_log = MetricsLog(Path(self.args.output_dir))
        self.console = Console.take_over(self)
        self.add_callback(self.metrics_log)
        self.add_callback(self._kept)
        self._trackers = Trackers(self)
        self.add_callback(self._trackers)
        self.add_callback(_UpdateTimer(self))
        self._weight_folder = weight_folder(self.args.output_dir, weight_sync_dir)
        self._weight_sync = self._make_weight_sync(weight_sync)

    def _make_rollout(self, config: CoordinatorConfig, schedule: AlphaSchedule | None) -> Any:
        """What draws the rollouts; to be overridden by a trainer that samples in its own process."""
        return DualRollout(config, schedule=schedule, policy_check_bound=self.policy_check_bound)

    def _make_weight_sync(self, method: WeightSyncMethod) -> WeightSync:
        """What brings new weights to the policy that is sampled from."""
        return choose_weight_sync(self, self.rollout, method, self._weight_folder)

    def _check_args(self, args: Any) -> None:
        check_training_args(args)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._synced_step = None  # steps may count from 0 again
        self.remove_sent_weights()  # of a run that was killed
        try:
            return super().train(*args, **kwargs)
        finally:
            self.console.display.end()  # a bar that an error has left

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

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, which also counts the rows that were rewarded, and bounds their mean (`interval`)."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        rewards, completions = self._evaluated, getattr(self, "num_generations_eval", 1)
        # Where the last batch is short, several processes draw for the first rows again.
        if has_length(dataloader.dataset):
            rewards = rewards[: completions * len(dataloader.dataset)]
        rows = rewards_of_rows(rewards, completions)
        if rows:
            low, high = interval(rows)
            for name, value in (("rows", len(rows)), ("low", low), ("high", high)):
                self._metrics["eval"][f"reward_{name}"].append(value)
        return output

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
                self._metrics[mode_of(self)]["perf/weight_sync_s"].append(time.perf_counter() - started)
        if getattr(self, "rollout_func", None) is not None:  # a loop of the user's, which may call `rollout` itself
            generated = super()._generate(prompts)
            _, completions, _, _, _, extra_fields, *_ = generated
            self._rollout_columns = _checked_columns(extra_fields, completions)
            return generated
        self._in_progress = self.rollout.begin(self)
        generated = super()._generate(prompts)
        _, completions, *_ = generated
        self._rollout_columns = self._turns.finish(completions)
        return generated

    def _tokenize_prompts(self, prompts: list[Prompt]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Token ids of the prompts, and, for `_generate_single_turn`, of what π_t sees instead."""
        with fail_together():
            for prompt in prompts:
                check_prompt_is_text(prompt)
            tools = self._tools_of_prompts(len(prompts))
            prompt_ids = self.rollout.encode(prompts, self, tools)
            contexts = self.contexts.with_observations(self._row_prompts, prompts)
            if contexts.t_prompts is not None:
                shown = [
                    own if other is None else other for own, other in zip(prompts, contexts.t_prompts, strict=True)
                ]
                t_ids = self.rollout.encode(shown, self, tools)
                given = zip(t_ids, contexts.t_prompts, strict=True)
                contexts = replace(contexts, t_prompts=[None if other is None else ids for ids, other in given])
            self._turns = Turns(self._in_progress, prompt_ids, contexts, self.max_completion_length)
        return prompt_ids, None, {}

    def _tools_of_prompts(self, count: int) -> list[Any]:
        """The functions that the template shows in each prompt of the batch."""
        if getattr(self, "environment_factories", None) is None:
            return [getattr(self, "tools", None)] * count
        return [self._env_tools[name] for name in self._batch_environments]

    def _draw_turn(self, contexts: list[list[int]], images: Any) -> list[SequenceRecord]:
        """The next turn: of all rows at first, then of those whose tools have given a result."""
        if images is not None:  # of a prompt they are refused before
            raise ValueError("a tool has returned an image, and rollouts from q* are of text alone: return text")
        if self._tool_rows is None:
            with fail_together():
                return self._turns.first()
        return self._turns.following(self._tool_rows(contexts), contexts)

    def _tool_call_loop(
        self, prompts: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]], completions: Any, *args: Any
    ) -> Any:
        """TRL's loop, whose turns are drawn as above. It changes these lists as it goes."""

        def rows(contexts: list[list[int]]) -> list[int]:
            found = rows_with_results(completions, completion_ids, self.max_completion_length)
            before = [prompt_ids[row] + completion_ids[row] for row in found]
            if len(found) != len(contexts) or any(c[: len(b)] != b for b, c in zip(before, contexts, strict=True)):
                raise RuntimeError("TRL's tool loop asks for other rows than expected: this version is not known")
            return found

        self._tool_rows = rows
        try:
            with fail_together():
                return super()._tool_call_loop(prompts, prompt_ids, completion_ids, completions, *args)
        finally:
            self._tool_rows = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        for row in inputs:
            if "prompt" in row:  # as the servers get it, so that reward functions and models see the same
                row["prompt"] = without_nulls(row["prompt"])
        self._rewards = None
        self.contexts, self._row_prompts = TargetContexts.from_rows(inputs), [row.get("prompt") for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        device, width = output["completion_ids"].device, output["completion_ids"].shape[1]
        for name in FLOAT_COLUMNS:
            rows = self._rollout_columns[name]
            output[_BATCH_NAMES.get(name, name)] = pad_rows(rows, 0.0, width=width).to(device)
        if not self.model.training and (rewards := self._total_rewards()) is not None:
            self._evaluated += rewards.tolist()
        if self.model.training:
            self._trackers.add(self._rollout_columns)
        if self.model.training and self._kept.wants(self.state.global_step + 1):
            self._kept.keep(self.state.global_step + 1, self._rows_to_keep(output), self._tokenizer_name())
        self._correct(output)
        self._scoring_seconds += time.perf_counter() - started
        return output

    def _rows_to_keep(self, output: dict[str, Any]) -> list[dict[str, Any]]:
        """The first rows of this process's rollout, before the weights are in its advantages."""
        rows: list[dict[str, Any]] = []
        advantages, rewards = output.get("advantages"), self._own_rewards()
        numbers = {name: self._rollout_columns.get(column) for name, column in KEPT_OF_A_ROW.items()}
        for i in range(min(self._kept.limit, len(output["completion_ids"]))):
            length = len(self._rollout_columns["alpha"][i])
            rows.append(
                {
                    "prompt": self._row_prompts[i],
                    "t_prompt": None if self.contexts.t_prompts is None else self.contexts.t_prompts[i],
                    "t_target": None if self.contexts.targets is None else self.contexts.targets[i],
                    "reward": None if rewards is None else rewards[i],
                    "advantage": None if advantages is None else float(advantages[i]),
                    "generated_tokens": output["completion_ids"][i, :length].tolist(),
                    **{name: None if column is None else column[i] for name, column in numbers.items()},
                }
            )
        return rows

    def _own_rewards(self) -> list[float] | None:
        """The reward of each row of this process's rollout, as TRL adds them up; NaN where no function gave one."""
        total = self._total_rewards()
        if total is None:
            return None
        return list(total.chunk(self.accelerator.num_processes)[self.accelerator.process_index].tolist())

    def _total_rewards(self) -> torch.Tensor | None:
        """Of the rows of all processes."""
        if self._rewards is None:
            return None
        total = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(dim=1)
        total[self._rewards.isnan().all(dim=1)] = torch.nan
        return total

    def _tokenizer_name(self) -> str:
        processing: Any = self.processing_class
        return str(getattr(processing, "tokenizer", processing).name_or_path)

    def _correct(self, output: dict[str, Any]) -> None:
        """Put into the batch what a loss needs to be that of the policy."""


class _UpdateTimer(TrainerCallback):
    """Seconds of an optimisation step, all its batches and the optimizer's step, without rollouts and their scoring."""

    def __init__(self, trainer: RolloutTrainerMixin):
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
    taken = sorted({*([] if dataset is None else column_names(dataset))} & {*ROLLOUT_COLUMNS})
    if taken:
        raise ValueError(f"the dataset's columns {', '.join(taken)} would be overwritten by the rollout's: rename them")


def _checked_columns(columns: dict[str, Any], completions: list[list[int]]) -> dict[str, Any]:
    """What a user's `rollout_func` has returned beside the completions, if it has the numbers of each token.

    Raises:
        ValueError: columns are missing, or not as long as the completions.
    """
    wanted = [len(ids) for ids in completions]
    for name in FLOAT_COLUMNS:
        if [len(row) for row in columns.get(name, ())] != wanted:
            raise ValueError(
                f"rollout_func must return {', '.join(FLOAT_COLUMNS)}, each with a float for every token of every "
                f"completion (NaN where env_mask is 0), as trainer.rollout(prompts, trainer) does: {name} is "
                f"{'missing' if name not in columns else 'of other lengths'}"
            )
    return columns


def drawn_mask(batch: dict[str, Any]) -> torch.Tensor:
    """`(B, T)`, 1 at tokens that the rollout drew, and 0 at tools' results, at padding, and in rows that TRL masks."""
    mask: torch.Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


_BATCH_NAMES = {"logprobs_q": "sampling_per_token_logps"}
"""The record's columns stand in the batch as `(B, T)` tensors, but for TRL's own name of the one that it uses."""
