"""Run sequences to their end in the configured mode."""

from __future__ import annotations

import time
from collections.abc import Iterable

from dual_rollout.decoding.block import Block
from dual_rollout.decoding.lockstep import Lockstep
from dual_rollout.decoding.record import Recorder
from dual_rollout.decoding.scheduler import Mode, Scheduler
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.tuner import Choice, Tuner


async def decode(sequences: Iterable[DecodingSequence], recorder: Recorder, tuner: Tuner) -> None:
    """Decode all sequences to their end, in place, at most `max_concurrency` in flight.

    A fault of one prompt ends that sequence only, with its `failure` set.
    """
    scheduler = Scheduler(sequences, recorder)
    # The first round reads the prompts, whatever the mode: no measure of any.
    await scheduler.run(_mode(tuner.first(recorder.config), recorder), groups=1, rounds=1)
    while not scheduler.done:
        choice, rounds = tuner.choose(recorder.config, scheduler.load)
        before, started = recorder.stats.tokens, time.perf_counter()
        await scheduler.run(_mode(choice, recorder), groups=choice.groups, rounds=rounds)
        tuner.observe(choice, recorder.stats.tokens - before, time.perf_counter() - started)
    await scheduler.finish()


def _mode(choice: Choice, recorder: Recorder) -> Mode:
    if choice.mode == "lockstep":
        return Lockstep(recorder)
    return Block(recorder, choice.num_draft_tokens, adaptive=recorder.config.num_draft_tokens is None)
