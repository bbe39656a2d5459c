"""What trackers get besides the figures that transformers sends them: histograms of α and of the weights, and texts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from dual_rollout.prompts import as_text

TRACKERS = ("tensorboard", "trackio", "wandb")

BINS = {
    "sampling/alpha_histogram": np.linspace(0, 1, 51),
    "sampling/log_weight_histogram": np.linspace(-8, 8, 65),
}
"""The bounds of the bins, which are the same in all steps; log π_θ/q* beyond ±8 is counted in the last ones."""

_ROWS = 16  # of a table of texts


class Trackers(TrainerCallback):
    """Sends the histograms of all tokens drawn since the last log, over all processes, at every log of training.

    With `log_completions` TRL sends its table of completions to trackio and wandb; here tensorboard gets it, as text.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._wanted = [name for name in TRACKERS if name in (trainer.args.report_to or [])]
        self._counts = {name: np.zeros(len(bounds) - 1) for name, bounds in BINS.items()}

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Count a rollout's tokens. All processes must call it.

        Args:
            columns: the numbers of this process's tokens, `(T,)` floats per row, NaN at tokens that have none.
        """
        if not self._wanted:
            return
        alpha, theta, q = (
            np.concatenate([np.asarray(row, dtype=np.float64) for row in columns[name]])
            for name in ("alpha", "logprobs_theta", "logprobs_q")
        )
        for (name, counts), values in zip(self._counts.items(), (alpha, theta - q), strict=True):
            values = np.clip(values[~np.isnan(values)], BINS[name][0], BINS[name][-1])
            own = torch.tensor(np.histogram(values, BINS[name])[0], device=self._trainer.accelerator.device)
            counts += self._trainer.accelerator.gather(own[None]).sum(dim=0).cpu().numpy()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        found = {name: counts.copy() for name, counts in self._counts.items() if counts.any()}
        if found and self._trainer.model.training:
            for tracker in self._wanted:
                self._send(tracker, found, state.global_step)
            for counts in self._counts.values():
                counts[:] = 0
        if "reward" in logs or "eval_reward" in logs:
            self._send_texts("train" if "reward" in logs else "eval", state.global_step)

    def _send(self, tracker: str, histograms: Mapping[str, np.ndarray], step: int) -> None:
        if tracker == "tensorboard":
            for writer in self._tensorboard_writers():
                for name, counts in histograms.items():
                    _add_histogram(writer, f"train/{name}", counts, BINS[name], step)
            return
        module = sys.modules[tracker]  # transformers has imported it for its own callback
        made = {
            f"train/{name}": module.Histogram(np_histogram=(counts.astype(int), BINS[name]))
            for name, counts in histograms.items()
        }
        module.log({**made, "train/global_step": step})  # as transformers sends a step's figures

    def _send_texts(self, mode: str, step: int) -> None:
        logged = getattr(self._trainer, "_logs", {})
        if "tensorboard" not in self._wanted or not getattr(self._trainer, "log_completions", False) or not logged:
            return
        columns = {
            "prompt": [as_text(prompt) for prompt in logged["prompt"]],
            "completion": [as_text(completion) for completion in logged["completion"]],
            **logged["rewards"],
            **logged["extra"],
            "advantage": logged["advantages"],
        }
        for writer in self._tensorboard_writers():
            writer.add_text(f"{mode}/completions", _markdown_table(columns), step)

    def _tensorboard_writers(self) -> list[Any]:
        callbacks = self._trainer.callback_handler.callbacks
        found = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
        return [writer for writer in found if writer is not None]


def _add_histogram(writer: Any, name: str, counts: np.ndarray, bounds: np.ndarray, step: int) -> None:
    """Sums are of the bins' middles, for the values themselves are not kept."""
    middles, there = (bounds[:-1] + bounds[1:]) / 2, np.flatnonzero(counts)
    writer.add_histogram_raw(
        name,
        min=float(bounds[there[0]]),
        max=float(bounds[there[-1] + 1]),
        num=int(counts.sum()),
        sum=float(counts @ middles),
        sum_squares=float(counts @ middles**2),
        bucket_limits=bounds[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def _markdown_table(columns: Mapping[str, Sequence[Any]]) -> str:
    rows = list(zip(*columns.values(), strict=False))[:_ROWS]
    lines = [list(columns), ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
