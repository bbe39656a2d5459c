"""Who advances with whom, how faults are kept apart, and how the fastest way is chosen."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.call import CallSettings, DecodingCall
from dual_rollout.decoding.scheduler import Scheduler, advance
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.tuner import Choice, Load, Tuner
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.engine import sending_once
from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError, EngineUnavailableError
from tests.hang import HANG


def sequences(count: int, max_tokens: int = 4) -> list[DecodingSequence]:
    return [DecodingSequence([i], [i], max_tokens=max_tokens, stop_ids=frozenset(), key=(0, i)) for i in range(count)]


def add_token(sequence: DecodingSequence) -> None:
    sequence.append(1, alpha=0.5, logprobs_q=0.0, logprobs_theta=0.0, logprobs_t=0.0, tops=(0.0, 0.0))


class OneToken:
    """A mode that gives every sequence a token, and refuses a round with one of `bad` prompts in it."""

    def __init__(self, bad: set[int] | None = None, down: bool = False):
        self.rounds: list[int] = []
        self._bad = bad or set()
        self._down = down

    async def advance(self, batch: list[DecodingSequence]) -> None:
        self.rounds.append(len(batch))
        await asyncio.sleep(0)
        if self._down:
            raise EngineUnavailableError("gone", url="http://nowhere")
        if any(sequence.context_theta[0] in self._bad for sequence in batch):
            raise EngineRejectedError("bad prompt", url="http://nowhere", status=400)
        for sequence in batch:
            add_token(sequence)


def scheduler_of(sequences: Iterable[DecodingSequence], max_concurrency: int, **settings: Any) -> Scheduler:
    nobody: Any = None
    config = CoordinatorConfig(max_concurrency=max_concurrency)
    return Scheduler(
        sequences, DecodingCall(nobody, nobody, CallSettings(config, **settings), DecodingStats()), PolicyWeights()
    )


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_every_sequence_ends_and_no_round_exceeds_the_limit(groups: int) -> None:
    all_of_them = sequences(23, max_tokens=3)
    mode, scheduler = OneToken(), scheduler_of(all_of_them, 8)

    async def run() -> None:
        await scheduler.run(mode, groups=groups)
        await scheduler.finish()

    asyncio.run(run())
    assert [len(sequence.tokens) for sequence in all_of_them] == [3] * 23
    assert scheduler.done
    assert max(mode.rounds) <= -(-8 // groups)
    assert sum(mode.rounds) == 3 * 23


def test_rounds_can_be_counted_and_resumed() -> None:
    all_of_them = sequences(4, max_tokens=5)
    scheduler = scheduler_of(all_of_them, 4)

    async def run() -> None:
        await scheduler.run(OneToken(), groups=2, rounds=2)
        assert {len(sequence.tokens) for sequence in all_of_them} == {2}
        await scheduler.run(OneToken(), groups=1, rounds=None)
        await scheduler.finish()

    asyncio.run(run())
    assert {len(sequence.tokens) for sequence in all_of_them} == {5}


def test_a_bad_prompt_is_found_and_fails_alone() -> None:
    batch = sequences(9)
    asyncio.run(advance(OneToken(bad={4}), batch))
    assert [sequence.failure is not None for sequence in batch] == [i == 4 for i in range(9)]
    assert [len(sequence.tokens) for sequence in batch] == [0 if i == 4 else 1 for i in range(9)]


def test_a_server_that_is_gone_fails_the_round() -> None:
    batch = sequences(3)
    mode = OneToken(down=True)
    asyncio.run(advance(mode, batch))
    assert all(isinstance(sequence.failure, EngineUnavailableError) for sequence in batch)
    assert mode.rounds == [3], "a dead server is not asked again for every sequence"


@pytest.mark.parametrize("count", [1, 4, 64])
def test_what_is_answered_badly_is_sent_once_in_halves(count: int) -> None:
    """2n − 1 requests at most, which the clients do not repeat, but for the first."""
    batch, mode = sequences(count), OneToken(bad=set(range(count)))
    repeatable: list[bool] = []

    class Watched:
        async def advance(self, batch: list[DecodingSequence]) -> None:
            repeatable.append(not sending_once())
            await mode.advance(batch)

    asyncio.run(advance(Watched(), batch))
    assert all(isinstance(sequence.failure, (EngineProtocolError, EngineRejectedError)) for sequence in batch)
    assert repeatable == [True] + [False] * (2 * count - 2)


def test_no_sequence_begins_once_a_server_is_gone() -> None:
    all_of_them = sequences(50)
    mode = OneToken(down=True)
    scheduler = scheduler_of(all_of_them, 4)

    async def run() -> None:
        await scheduler.run(mode, groups=2)
        await scheduler.finish()

    asyncio.run(run())
    assert all(isinstance(sequence.failure, EngineUnavailableError) for sequence in all_of_them)
    assert len(mode.rounds) == 2, "each group finds it out once"


def test_the_random_stream_of_a_position_can_be_asked_twice() -> None:
    first, other = sequences(2)
    numbers = first.rewind().random(3)
    assert (first.rewind().random(3) == numbers).all()
    assert (other.rewind().random(3) != numbers).all()
    add_token(first)
    assert (first.rewind().random(3) != numbers).all()
    assert (sequences(1)[0].rewind().random(3) == numbers).all()


SPEEDS = {"lockstep, 1 group": 100.0, "lockstep, 2 groups": 150.0}


def blocks(groups: int, length: int, scoring: str = "prefixes") -> str:
    return f"block, {groups} group{'s' if groups > 1 else ''}, {length} draft tokens scored by {scoring}"


def drive(tuner: Tuner, config: CoordinatorConfig, load: Load, speeds: dict[str, float], times: int) -> list[str]:
    """Choose `times` times, reporting the given tokens per second; the choices by name."""
    made = []
    for _ in range(times):
        plan = tuner.choose(config, load)
        plan.note(tokens=round(1000 * speeds[str(plan.choice)]), seconds=1000.0)
        made.append(str(plan.choice))
    return made


@pytest.mark.parametrize("faster", ["prefixes", "token_ids"])
@pytest.mark.parametrize("block_speed", [30.0, 140.0, 400.0])
def test_auto_settles_on_the_fastest(block_speed: float, faster: str) -> None:
    methods = ("token_ids", "prefixes")
    speeds = SPEEDS | {
        blocks(2, n, method): block_speed * f * (1.0 if method == faster else 0.6)
        for n, f in ((2, 0.9), (4, 1), (8, 1.1))
        for method in methods
    }
    speeds |= {blocks(1, 4, method): 0.7 * speeds[blocks(2, 4, method)] for method in methods}
    tuner = Tuner(methods)
    made = drive(tuner, CoordinatorConfig(), Load.of(16, 60), speeds, 16)
    assert len(set(made[-5:])) == 1
    assert speeds[made[-1]] >= 0.95 * max(speeds.values())
    assert str(tuner.chosen) == made[-1]
    tried = [name for name in made if "block" in name]
    if block_speed < 100:
        assert len(tried) == 1, "a hopeless block is tried once"
    else:
        assert {blocks(2, 4, method) for method in methods} < set(tried), "the ways to score are compared"
        assert len(set(tried)) == 5, "and the faster is tried in one group and at other lengths"


def test_auto_compares_only_the_two_best_again_when_the_load_changes() -> None:
    speeds = SPEEDS | {blocks(2, n): s for n, s in ((4, 140.0), (8, 200.0), (2, 90.0))} | {blocks(1, 4): 90.0}
    tuner, config = Tuner(), CoordinatorConfig()
    drive(tuner, config, Load.of(16, 60), speeds, 12)
    later = drive(tuner, config, Load.of(16, 200), speeds | {"lockstep, 2 groups": 300.0}, 8)
    assert set(later) == {blocks(2, 8), "lockstep, 2 groups"}
    assert later[-1] == "lockstep, 2 groups"


@pytest.mark.parametrize("options", [{"seed": 0}, {"temperature": 0.7}, {"decoding": "lockstep"}], ids=str)
def test_auto_blocks_only_where_the_distribution_and_the_tokens_stay_the_same(options: dict[str, object]) -> None:
    made = drive(Tuner(), CoordinatorConfig(**options), Load.of(16, 60), SPEEDS, 6)  # type: ignore[arg-type]
    assert not any("block" in name for name in made)


FAST_BLOCKS = SPEEDS | {blocks(groups, n): 600.0 for groups in (1, 2) for n in (2, 4, 8)}


def test_what_is_known_of_blocks_is_no_advice_to_a_call_that_must_not_draft() -> None:
    tuner, load = Tuner(), Load.of(16, 60)
    assert "block" in drive(tuner, CoordinatorConfig(), load, FAST_BLOCKS, 9)[-1]
    for config in (CoordinatorConfig(seed=1), CoordinatorConfig(temperature=0.7)):
        assert not any("block" in name for name in drive(tuner, config, load, FAST_BLOCKS, 9))
    assert "block" in drive(tuner, CoordinatorConfig(), Load.of(16, 200), FAST_BLOCKS, 1)[0]


def test_drafts_at_a_temperature_are_for_servers_that_report_it() -> None:
    made = drive(Tuner(processed=True), CoordinatorConfig(temperature=0.7), Load.of(16, 60), FAST_BLOCKS, 9)
    assert "block" in made[-1]


def test_auto_tries_no_block_where_both_servers_keep_texts() -> None:
    speeds = FAST_BLOCKS | {"lockstep, 4 groups": 100.0}
    made = drive(Tuner(sessions=True), CoordinatorConfig(), Load.of(16, 60), speeds, 9)
    assert made[-1] == "lockstep, 2 groups" and not any("block" in name for name in made)
    config = CoordinatorConfig(decoding="block", num_draft_tokens=4)
    assert "block" in drive(Tuner(sessions=True), config, Load.of(16, 60), FAST_BLOCKS, 1)[0], "who asks for it gets it"


@pytest.mark.parametrize(
    ("sequences", "two", "four", "best"),
    [(64, 130.0, 145.0, 4), (64, 130.0, 132.0, 2), (64, 90.0, 200.0, 1), (4, 130.0, 200.0, 2)],
)
def test_four_groups_are_tried_where_two_gain_and_both_servers_keep_texts(
    sequences: int, two: float, four: float, best: int
) -> None:
    speeds = {"lockstep, 1 group": 100.0, "lockstep, 2 groups": two, "lockstep, 4 groups": four}
    made = drive(Tuner(sessions=True), CoordinatorConfig(decoding="lockstep"), Load.of(sequences, 60), speeds, 9)
    assert made[-1] == f"lockstep, {best} group{'s' if best > 1 else ''}"
    assert ("lockstep, 4 groups" in made) == (sequences == 64 and two > 100.0)


def test_trials_that_a_change_of_load_interrupted_are_made_at_the_next() -> None:
    tuner, config = Tuner(), CoordinatorConfig()
    drive(tuner, config, Load.of(16, 60), FAST_BLOCKS, 2)  # lockstep alone
    assert "block" in drive(tuner, config, Load.of(16, 120), FAST_BLOCKS, 9)[-1]
    assert "block" in drive(tuner, config, Load.of(16, 240), FAST_BLOCKS, 9)[-1]


def test_what_was_slow_is_tried_again_after_a_while() -> None:
    tuner, config, load = Tuner(), CoordinatorConfig(), Load.of(16, 60)
    slow = FAST_BLOCKS | {name: 20.0 for name in FAST_BLOCKS if "block" in name}
    made = drive(tuner, config, load, slow, 100)
    assert Counter(made).most_common(1)[0][0] == "lockstep, 2 groups"
    assert 3 <= sum("block" in name for name in made) <= 6
    assert "block" in drive(tuner, config, load, FAST_BLOCKS, 40)[-1]


def test_a_first_trial_that_paid_for_the_start_is_made_good() -> None:
    """Making room, warming up: what is tried first looks slow, and the second best would be kept for long."""
    tuner, load = Tuner(), Load.of(16, 60)
    config = CoordinatorConfig(decoding="lockstep")
    assert drive(tuner, config, load, {"lockstep, 1 group": 40.0}, 1) == ["lockstep, 1 group"]
    assert drive(tuner, config, load, {"lockstep, 1 group": 100.0, "lockstep, 2 groups": 70.0}, 6)[-1] == (
        "lockstep, 1 group"
    )


def test_the_two_best_are_measured_for_long_where_rounds_are_short() -> None:
    tuner, load, config = Tuner(), Load.of(16, 60), CoordinatorConfig(decoding="lockstep")
    rounds: Counter[str] = Counter()
    while tuner.chosen is None:
        plan = tuner.choose(config, load)
        if tuner.chosen is None:
            rounds[str(plan.choice)] += plan.rounds
        plan.note(tokens=16 * plan.rounds, seconds=plan.rounds * (0.05 if plan.choice.groups == 1 else 10.0))
    assert rounds == {"lockstep, 1 group": 6 + 24, "lockstep, 2 groups": 6 + 6}


def test_a_sequence_that_cannot_begin_ends_all_groups() -> None:
    def rows() -> Iterator[DecodingSequence]:
        yield from sequences(1, max_tokens=1)
        yield from sequences(3, max_tokens=10**6)
        raise ValueError("a bad row")

    mode, scheduler = OneToken(), scheduler_of(rows(), 4)

    async def run() -> None:
        with pytest.raises(ValueError, match="a bad row"):
            await scheduler.run(mode, groups=2)
        rounds = len(mode.rounds)
        await asyncio.sleep(0.01)
        assert len(mode.rounds) <= rounds + 1

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_block_stays_block() -> None:
    speeds = {blocks(groups, 3, method): speed for groups, method, speed in _BLOCK_SPEEDS}
    config = CoordinatorConfig(decoding="block", num_draft_tokens=3)
    tuner = Tuner(("token_ids", "prefixes"))
    assert drive(tuner, config, Load.of(4, 60), speeds, 7)[-1] == blocks(1, 3, "prefixes")
    assert tuner.first(config) == Choice("block", 1, 3, "token_ids")


_BLOCK_SPEEDS = ((2, "token_ids", 1.0), (2, "prefixes", 2.0), (1, "prefixes", 3.0))
