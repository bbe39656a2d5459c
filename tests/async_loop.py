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


def samples_of(loop: DualRolloutLoop, count: int) -> list[RolloutSample]:
    """Its first samples."""
    PartialState(cpu=True)  # for its logger, as in TRL's process
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    try:
        samples = [loop.rollout_buffer.get(timeout=HANG) for _ in range(count)]
    finally:
        loop._loop.call_soon_threadsafe(loop._stop_event.set)
        thread.join(timeout=HANG)
    assert not thread.is_alive()
    return samples
