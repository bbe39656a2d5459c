"""What a training run shows while it works: one bar, one line per logged step, and each alarm once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from dual_rollout.training.alarms import alarms
from dual_rollout.training.display import Display, display_for_stdout

Column = tuple[str, int, str, str]
COLUMNS: tuple[Column, ...] = (
    ("reward q*", 10, "reward", "{:.3f}"),
    ("α", 6, "sampling/alpha/mean", "{:.2f}"),
    ("ESS", 6, "sampling/effective_sample_size_ratio", "{:.2f}"),
    ("w max", 7, "sampling/importance_sampling_ratio/max", "{:.2f}"),
    ("drift", 8, "sampling/policy_drift/mean", "{:.2g}"),
    ("tok/s", 7, "rollout/tokens_per_second", "{:.0f}"),
    ("rollout", 9, "rollout/seconds", "{:.1f} s"),
    ("sync", 8, "perf/weight_sync_s", "{:.1f} s"),
    ("update", 8, "perf/update_s", "{:.1f} s"),
)
"""Heading, width, metric and form of what a line shows of a step; with the step's number it fits 80 columns. A log
entry without the first of them is not about steps."""

WITHOUT_REWARDS = (("loss", 10, "loss", "{:.3g}"), *COLUMNS[1:])
"""The same for a trainer that has no rewards, as those of distillation."""

STEP_WIDTH = 6
HEADING_EVERY = 20


class Console(TrainerCallback):
    """Takes the place of transformers' callbacks that print all of a step's figures as a dictionary.

    Every figure is in `metrics.jsonl` and goes to the trackers; here are those that one looks at while a run works.
    `trainer.remove_callback(Console)` makes a run silent.
    """

    def __init__(self, display: Display, columns: Sequence[Column] = COLUMNS) -> None:
        self.display = display
        self._columns = columns
        self._lines = 0
        self._said: set[str] = set()

    @classmethod
    def take_over(cls, trainer: Any) -> Console:
        """A console in the place of the trainer's own."""
        for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            trainer.remove_callback(callback)
        console = cls(display_for_stdout(), COLUMNS if hasattr(trainer, "reward_funcs") else WITHOUT_REWARDS)
        trainer.add_callback(console)
        return console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self.display.begin(state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.display.show_bar()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.display.show_bar()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.display.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if self._columns[0][2] in logs:
            if self._lines % HEADING_EVERY == 0:
                self.display.heading(heading_line(self._columns))
            self._lines += 1
            self.display.line(step_line(state.global_step, logs, self._columns))
        for line in evaluation_lines(state.global_step, logs):
            self.display.line(line)
        for name, text in alarms(logs).items():
            if name not in self._said:
                self._said.add(name)
                self.display.alarm(text)
        if getattr(args, "log_completions", False):
            self.display.hide_bar()  # TRL now prints its table past our display

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.display.end()


def heading_line(columns: Sequence[Column] = COLUMNS) -> str:
    return f"{'step':>{STEP_WIDTH}}" + "".join(f"{heading:>{width}}" for heading, width, _, _ in columns)


def step_line(step: int, logs: dict[str, Any], columns: Sequence[Column] = COLUMNS) -> str:
    """The figures of a step under `heading_line`; a dash for what it does not have."""
    cells = [form.format(logs[name]) if logs.get(name) is not None else "–" for _, _, name, form in columns]
    widths = [width for _, width, _, _ in columns]
    return f"{step:>{STEP_WIDTH}}" + "".join(f" {cell:>{width - 1}}" for cell, width in zip(cells, widths, strict=True))


def evaluation_lines(step: int, logs: dict[str, Any]) -> list[str]:
    """One line per evaluated dataset: the reward of the policy alone."""
    lines = []
    for name, value in logs.items():
        if name.startswith("eval_") and name.endswith("reward"):
            dataset = name.removeprefix("eval_").removesuffix("reward").rstrip("_")
            words = f"reward of the policy alone, evaluated {dataset}".rstrip()
            lines.append(f"{step:>{STEP_WIDTH}} {value:>9.3f}  {words}")
    return lines
