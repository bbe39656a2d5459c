"""A run's folder: whether a new run may begin in it, which checkpoint to go on from, and what a stopped run leaves."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerState, TrainingArguments
from trl import GRPOConfig

logger = logging.getLogger(__name__)

FAILED_START = ("server_theta.log", "server_t.log", "theta_weights", "runs")
"""What a run may have written before its first step. A new run writes over it."""


def check_output_dir(training: GRPOConfig, *, overwrite: bool) -> None:
    """Refuse to mix this run's files with those of another. What a start leaves that failed is not in the way.

    Raises:
        ValueError: the output folder is not empty, and nothing says to resume or to overwrite.
    """
    folder = Path(str(training.output_dir))
    resumes = str(training.resume_from_checkpoint).lower() not in ("none", "false")
    if resumes or overwrite or not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file: name a folder")
    if any(map(_is_of_a_run, folder.iterdir())):
        raise ValueError(
            f"output_dir={folder} is not empty: name another, set resume_from_checkpoint: true to go on with the run "
            "in it, or dual_overwrite_output_dir: true to write over it"
        )


def _is_of_a_run(path: Path) -> bool:
    if path.name == "metrics.jsonl":  # begun with the training, its first line comes with a step
        return path.stat().st_size > 0
    return path.name not in FAILED_START


def checkpoint_to_resume(training: GRPOConfig) -> str | None:
    """The folder that `resume_from_checkpoint` names; for `true` the last whole checkpoint of `output_dir`, if any.

    A run may have been killed while it wrote a checkpoint. Such a folder is passed over with a warning.

    Raises:
        ValueError: there are checkpoints, but of a run with another number of processes, or they are weights alone.
    """
    wanted = str(training.resume_from_checkpoint).lower()
    if wanted in ("none", "false"):
        return None
    if wanted != "true":
        return training.resume_from_checkpoint
    if training.save_only_model:
        raise ValueError("resume_from_checkpoint needs more than save_only_model saves: set that to false")
    folder = Path(str(training.output_dir))
    found = _checkpoints(folder)
    whole = [path for path in found if _is_whole(path)]
    for path in found:
        if path not in whole:
            logger.warning("%s was not written to its end: passed over", path)
    if not whole:
        logger.warning("resume_from_checkpoint: no checkpoint in %s yet, the run begins at step 0", folder)
        return None
    processes, streams = PartialState().num_processes, len(list(whole[0].glob("rng_state*.pth")))
    if streams != processes:
        raise ValueError(
            f"resume_from_checkpoint: {whole[0]} was written by {streams} processes, and its data order and random "
            f"streams cannot be continued by {processes}: launch {streams}, or name the folder itself to go on without"
        )
    return str(whole[0])


def what_is_kept(training: TrainingArguments, state: TrainerState) -> str:
    """Of a run that stopped early: how far it came, what of that is kept, and how to go on.

    Args:
        state: the trainer's, with the steps done and to do.
    """
    done, folder = state.global_step, Path(str(training.output_dir))
    came = f"The run stopped after {done} of {state.max_steps} steps." if done else "The run stopped in its first step."
    last = next((path for path in _checkpoints(folder) if _step(path) <= done and _is_whole(path)), None)
    if last is not None and not training.save_only_model:
        lost = done - _step(last)
        steps = (
            "" if not lost else f" {lost} step{'s' if lost > 1 else ''} after it {'are' if lost > 1 else 'is'} lost."
        )
        return f"{came} The last checkpoint is {last}.{steps} Go on from it with --resume_from_checkpoint true."
    if not done:
        return f"{came} Nothing was trained; the same command begins anew."
    saves = "save_strategy is no" if training.save_strategy == "no" else f"save_steps is {training.save_steps:g}"
    return (
        f"{came} They are lost: there is no checkpoint to go on from ({saves}). Begin anew with "
        "--dual_overwrite_output_dir true, and save more often with --save_strategy steps --save_steps N."
    )


def _checkpoints(folder: Path) -> list[Path]:
    """All of a folder's, the last one first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """Whether everything was written, the trainer's state last; a random state that was cut off is no zip file."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    streams = list(checkpoint.glob("rng_state*.pth"))
    return bool(streams) and all(map(zipfile.is_zipfile, streams))
