"""Bringing the policy's new weights to its server."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from dual_rollout.training.rollout import DualRollout


class DiskWeightSync:
    """Full weights through a folder that trainer and server both see.

    Each version is written to a folder of its own and removed after the server has loaded it, so that a server never
    reads a file that is being written.

    Args:
        folder: a folder inside the run's output folder, on a file system shared with the server.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def sync(self, trainer: Any, rollout: DualRollout) -> float:
        """Write the trainer's weights, make π_θ's server load them, and return the seconds it took.

        All processes wait until the server has them; the main process alone writes and asks.
        """
        started = time.perf_counter()
        accelerator = trainer.accelerator
        model = accelerator.unwrap_model(trainer.model)
        if accelerator.is_main_process:
            version = (self._folder / f"step-{trainer.state.global_step}").resolve()
            model.save_pretrained(version)
            rollout.reload_policy_weights(str(version))
            shutil.rmtree(version)
        accelerator.wait_for_everyone()
        return time.perf_counter() - started
