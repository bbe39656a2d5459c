"""The loop of `DualRolloutWorker`, in a thread instead of its process."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from typing import Any

from accelerate import PartialState
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from dual_rollout.training.async_grpo import DualRolloutLoop
from tests.hang import HANG

VERSION = 3  # of the weights, as the trainer would say


def make_loop(**options: Any) -> DualRolloutLoop:
    """A loop with what TRL's worker shares with it, and up to four conversations at once."""
    context = multiprocessing.get_context("spawn")
    return DualRolloutLoop(
        model_name="policy",
        rollout_buffer=queue.Queue(),
        model_version_value=context.Value("i", VERSION),
        heartbeat_value=context.Value("d", 0.0),
        failed_event=context.Event(),
        exception_info_queue=queue.Queue(),
        metrics_queue=queue.Queue(),
        max_inflight_tasks=4,
        **options,
    )


class LoopInThread:
    """A rollout worker for TRL's trainer."""

    def __init__(self, loop: DualRolloutLoop):
        self.rollout_buffer, self.metrics_queue = loop.rollout_buffer, loop._metrics_queue
        self._loop, self._thread = loop, threading.Thread(target=loop.run, daemon=True)

    def start(self) -> None:
        PartialState(cpu=True)  # for its logger, as in TRL's process
        self._thread.start()

    def stop(self) -> None:
        self._loop._loop.call_soon_threadsafe(self._loop._stop_event.set)
        self._thread.join(timeout=HANG)
        assert not self._thread.is_alive()

    def update_model_version(self, model_version: int) -> None:
        self._loop._model_version_value.value = model_version

    def check_health(self, stale_after_s: float) -> None:
        assert self._thread.is_alive()


def samples_of(loop: DualRolloutLoop, count: int) -> list[RolloutSample]:
    """Its first samples."""
    worker = LoopInThread(loop)
    worker.start()
    try:
        return [worker.rollout_buffer.get(timeout=HANG) for _ in range(count)]
    finally:
        worker.stop()
