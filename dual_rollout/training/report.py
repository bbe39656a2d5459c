"""What a run leaves behind: metrics.jsonl while it works, and a table at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

_ROWS = (
    ("reward", "reward", "{:.3f}"),
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


class RunReport(TrainerCallback):
    """Appends each log entry to `metrics.jsonl` and keeps it for the closing table."""

    def __init__(self, folder: Path):
        self._path = folder / "metrics.jsonl"
        self._entries: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if state.global_step == 0:
                self._path.write_text("")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "reward" not in logs:
            return
        entry = {"step": state.global_step, **logs}
        self._entries.append(entry)
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def table(self) -> str:
        """First step, last step and mean over the steps of each figure."""
        lines = [f"{'':24}{'first':>10}{'last':>10}{'mean':>10}"]
        for label, name, form in _ROWS:
            values = [entry[name] for entry in self._entries if name in entry]
            if values:
                cells = (values[0], values[-1], sum(values) / len(values))
                lines.append(f"{label:24}" + "".join(f"{form.format(cell):>10}" for cell in cells))
        return "\n".join(["", *lines, ""])
