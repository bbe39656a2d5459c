"""What a run leaves behind: metrics.jsonl while it works, and a table at its end."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dual_rollout.training.display import plain_table
from dual_rollout.training.evaluation import before_and_after

SUMMARY_HEADINGS = ("", "first", "last", "mean")
_ROWS = (
    ("reward of q*", "reward", "{:.3f}"),
    ("reward of the policy", "eval_reward", "{:.3f}"),  # in the evaluations
    ("α mean", "sampling/alpha/mean", "{:.3f}"),
    ("weight π_θ/q* mean", "sampling/importance_sampling_ratio/mean", "{:.3f}"),
    ("weight π_θ/q* min", "sampling/importance_sampling_ratio/min", "{:.2g}"),
    ("weight π_θ/q* max", "sampling/importance_sampling_ratio/max", "{:.2f}"),
    ("ESS ratio", "sampling/effective_sample_size_ratio", "{:.3f}"),
    ("tokens/s", "rollout/tokens_per_second", "{:.1f}"),
    ("rollout, s", "rollout/seconds", "{:.1f}"),
    ("weight sync, s", "perf/weight_sync_s", "{:.1f}"),
    ("update, s", "perf/update_s", "{:.1f}"),
)


def _is_of_a_step(logs: dict[str, Any]) -> bool:
    """Whether a log entry is about training steps or an evaluation (of one of several datasets, `eval_<name>_loss`).

    The last entry is about the whole run, and has figures of the steps that `logging_steps` has left over, if any.
    """
    return "reward" in logs or any(
        name == "loss" or (name.startswith("eval_") and name.endswith("_loss")) for name in logs
    )


class MetricsLog(TrainerCallback):
    """Appends the figures of each training step and evaluation that are logged to `metrics.jsonl`.

    A resumed run continues the file after the step it begins from; other runs begin it anew.
    """

    def __init__(self, folder: Path):
        self._path = folder / "metrics.jsonl"
        self._entries: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._entries = self._written_until(state.global_step)
            rewritten = self._path.with_suffix(".tmp")
            rewritten.write_text("".join(map(_line, self._entries)))
            rewritten.replace(self._path)  # whole or not at all, for this run may be killed too

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or not _is_of_a_step(logs):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)  # an evaluation may come before any training
        entry = {"step": state.global_step, **logs}
        self._entries.append(entry)
        with self._path.open("a") as file:
            file.write(_line(entry))

    def _written_until(self, step: int) -> list[dict[str, Any]]:
        """The file's entries up to `step`; those after it are of a run that was killed and will be written again."""
        entries = []
        lines = self._path.read_text().splitlines() if step > 0 and self._path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line, cut off
                entries.append(json.loads(line))
        return [entry for entry in entries if entry["step"] <= step]

    def evaluated_at(self, step: int) -> bool:
        """Whether the policy was evaluated after that step, on rows that are counted."""
        return any(entry["step"] == step and "eval_reward_rows" in entry for entry in self._entries)

    def before_and_after(self) -> str:
        """The policy's own reward before and after the run, with its rows and intervals, where it was evaluated."""
        return before_and_after(self._entries)

    def summary(self, unlogged: dict[str, float] | None = None) -> list[tuple[str, ...]]:
        """Name, first entry, last entry and mean over the entries of each figure that there is, as `SUMMARY_HEADINGS`.

        Args:
            unlogged: figures of the steps since the last entry, of a run that has stopped.
        """
        entries = [*self._entries, *([unlogged] if unlogged else [])]
        rows = []
        for label, name, form in _ROWS:
            values = [entry[name] for entry in entries if entry.get(name) is not None]
            if values:
                rows.append((label, *map(form.format, (values[0], values[-1], sum(values) / len(values)))))
        return rows

    def table(self) -> str:
        """The summary as plain text, in 54 columns; nothing where there is none."""
        return plain_table(SUMMARY_HEADINGS, self.summary())


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
