"""Run sequences to their end in the configured mode."""

from __future__ import annotations

import time
from collections.abc import Iterable

from dual_rollout.decoding.block import Block
from dual_rollout.decoding.lockstep import Lockstep
from dual_rollout.decoding.outage import Outage
from dual_rollout.decoding.policy import Policy, Surviving
from dual_rollout.decoding.record import Recorder
from dual_rollout.decoding.scheduler import Mode, OnFinished, Scheduler
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.tuner import Choice, Tuner

_STEADY = 0.75  # of the sequences in flight must still be, or others in their place: a batch that runs out is slow


async def decode(
    sequences: Iterable[DecodingSequence],
    recorder: Recorder,
    tuner: Tuner,
    outage: Outage,
    on_finished: OnFinished | None = None,
) -> None:
    """Decode all sequences to their end, in place, at most `max_concurrency` in flight.

    `sequences` is consumed as places become free. A fault of one prompt ends that sequence only, with its `failure`
    set. `outage` remembers, beyond this call, that π_t's server is gone.
    """

    def mode(choice: Choice) -> Mode:
        return Surviving(_mode(choice, recorder), recorder, outage)

    scheduler = Scheduler(sequences, recorder, on_finished)
    try:
        # The first round reads the prompts, whatever the mode: no measure of any.
        await scheduler.run(mode(tuner.first(recorder.config)), groups=1, rounds=1)
        while not scheduler.done:
            plan = tuner.choose(recorder.config, scheduler.load)
            tokens, active, started = scheduler.tokens, scheduler.active, time.perf_counter()
            await scheduler.run(mode(plan.choice), groups=plan.choice.groups, rounds=plan.rounds)
            if scheduler.active >= _STEADY * active:
                plan.note(scheduler.tokens - tokens, time.perf_counter() - started)
        await scheduler.finish()
    finally:
        scheduler.abandon()


async def decode_policy(
    sequences: Iterable[DecodingSequence],
    recorder: Recorder,
    *,
    lost: bool = False,
    on_finished: OnFinished | None = None,
) -> None:
    """The same from π_θ alone, each sequence on its own; the target is not asked. `lost`: its server is gone."""
    scheduler = Scheduler(sequences, recorder, on_finished)
    try:
        await scheduler.run(Policy(recorder, lost=lost), groups=recorder.config.max_concurrency)
        await scheduler.finish()
    finally:
        scheduler.abandon()


def _mode(choice: Choice, recorder: Recorder) -> Mode:
    if choice.mode == "lockstep":
        return Lockstep(recorder)
    adaptive = recorder.config.num_draft_tokens is None
    return Block(recorder, choice.num_draft_tokens, choice.scoring, adaptive=adaptive)
