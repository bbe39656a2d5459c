"""The client of a native server against answers that it gives, and some that none should."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig, DualRollout
from dual_rollout.config import AlphaRule
from dual_rollout.decoding.call import CallSettings
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.exceptions import EngineRejectedError, PreflightError
from dual_rollout.native.capacity import CacheRoom, Places
from dual_rollout.native.client import NativeEngine, NativeSample, NativeServerInfo
from dual_rollout.samplers.native import NativeSampler
from dual_rollout.servers.http import HttpStats
from dual_rollout.servers.retry import RetryPolicy

COLUMNS = ["alpha", "logprobs_q", "logprobs_theta", "logprobs_t", "kl_theta", "kl_t"]
SERVER = {
    "vocab_size": 20,
    "common_vocab_size": 18,
    "max_model_len": 64,
    "max_requests": 5,
    "cache_blocks": 100,
    "block_size": 4,
}
NUMBERS = [0.25, -1.0, -1.5, -0.5, 0.125, 0.0]

Change = Callable[[dict[str, Any]], Any]


class Server:
    """In place of the transport: draws the tokens 1, 2, 3, ...; each of `changes` is made to one answer, in turn."""

    url = "http://pairs"
    discontinuities = 0
    answered = math.inf

    def __init__(self, *changes: Change, native: bool = True, target: str | None = None, **described: int) -> None:
        self.stats = HttpStats()
        self.retries = RetryPolicy(self.url, max_retries=2, total_timeout=60.0, count=self.count_retry)
        self.payloads: list[dict[str, Any]] = []
        self._changes = list(changes)
        self._native, self._target, self._described = native, target, SERVER | described
        self.asked = self.most_asked = 0

    def count_retry(self) -> None:
        self.stats.retries += 1

    async def get(self, path: str) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "model", "max_model_len": 64}]}
        assert path == "/v1/dual_rollout"
        if not self._native:
            raise EngineRejectedError("Not Found", url=self.url, status=404)
        return {"target": self._target, **self._described, "rollouts": 0}

    async def get_text(self, path: str) -> str:
        return "process_start_time_seconds 1.5\n"

    async def post(self, path: str, payload: dict[str, Any], *, max_bytes: int) -> Any:
        assert path == "/v1/dual_rollout/generate"
        self.payloads.append(payload)
        self.asked += 1
        self.most_asked = max(self.most_asked, self.asked)
        await asyncio.sleep(0)
        self.asked -= 1
        count = payload["max_tokens"]
        answer = {
            "request_id": payload["request_id"],
            "model": payload["model"],
            "token_ids": list(range(1, 1 + count)),
            "finish_reason": "length",
            "restarts": 2,
            "columns": COLUMNS,
            "numbers": packed([NUMBERS] * count),
        }
        if self._changes:
            self._changes.pop(0)(answer)
        return answer


def packed(rows: list[list[float]]) -> str:
    return base64.b64encode(np.array(rows, "<f4").tobytes()).decode()


def numbers(**changed: float) -> Change:
    row = [changed.get(name, value) for name, value in zip(COLUMNS, NUMBERS, strict=True)]
    return lambda answer: answer.update(numbers=packed([NUMBERS, row, NUMBERS]))


INVALID: dict[str, Change] = {
    "too many tokens": lambda answer: answer["token_ids"].append(7),
    "too few": lambda answer: answer.update(token_ids=[1, 2], numbers=packed([NUMBERS] * 2)),
    "none": lambda answer: answer.update(token_ids=[], numbers=""),
    "a stop that is none": lambda answer: answer.update(finish_reason="stop"),
    "fewer numbers": lambda answer: answer.update(numbers=packed([NUMBERS] * 2)),
    "no numbers": lambda answer: answer.pop("numbers"),
    "other columns": lambda answer: answer.update(columns=COLUMNS[1:]),
    "α beyond 1": numbers(alpha=1.5),
    "NaN": numbers(logprobs_t=math.nan),
    "a positive log-probability": numbers(logprobs_q=0.5),
    "a negative divergence": numbers(kl_theta=-0.1),
    "another request's": lambda answer: answer.update(request_id=answer["request_id"] + "1"),
    "another model's": lambda answer: answer.update(model="other"),
}


def drawn(server: Server, t_prompt: list[int] | None = None) -> NativeSample:
    async def run() -> NativeSample:
        engine = NativeEngine(server)  # type: ignore[arg-type]
        rule = AlphaRule(alpha_method="kl_budget", kl_budget=0.5)
        return await engine.draw([4, 5], t_prompt, max_tokens=3, temperature=0.7, rule=rule, seed=3)

    return asyncio.run(run())


def test_what_is_asked_and_what_is_read() -> None:
    server = Server()
    sample = drawn(server, [6])
    (payload,) = server.payloads
    assert payload["prompt_token_ids"] == [4, 5] and payload["t_prompt_token_ids"] == [6]
    assert (payload["alpha_method"], payload["kl_budget"], payload["temperature"]) == ("kl_budget", 0.5, 0.7)
    assert sample.token_ids == [1, 2, 3] and sample.finish_reason == "length" and sample.restarts == 2
    assert [getattr(sample, name)[1] for name in COLUMNS] == NUMBERS


@pytest.mark.parametrize("change", INVALID.values(), ids=INVALID.keys())
def test_an_invalid_answer_is_asked_for_again(change: Change) -> None:
    server = Server(change)
    assert drawn(server).token_ids == [1, 2, 3]
    assert len(server.payloads) == 2 and server.stats.retries == 1


def sequence(prompt: list[int], t_prompt: list[int]) -> DecodingSequence:
    return DecodingSequence(prompt, t_prompt, max_tokens=3, stop_ids=(), key=(1, 2))


def sampled(
    server: Server,
    sequences: list[DecodingSequence],
    *,
    without_target: bool = False,
    stats: DecodingStats | None = None,
    **options: Any,
) -> list[DecodingSequence]:
    async def run() -> None:
        engine = NativeEngine(server)  # type: ignore[arg-type]
        sampler = NativeSampler(engine, PolicyWeights(), stats or DecodingStats(), without_target=without_target)
        config = CoordinatorConfig(engine="native", **options)
        await (await sampler.ready(sequences, config)).sample(sequences, CallSettings(config))

    asyncio.run(run())
    return sequences


def test_the_server_says_what_it_is() -> None:
    async def found(server: Server) -> NativeServerInfo:
        return await NativeEngine(server).native_server()  # type: ignore[arg-type]

    assert asyncio.run(found(Server(target="/t"))) == NativeServerInfo(target="/t", **SERVER)
    with pytest.raises(PreflightError, match="start it with dual-rollout serve-native"):
        asyncio.run(found(Server(native=False)))


def test_a_model_card_of_its_rollouts_names_one_server_and_no_lists() -> None:
    """Which needs no answer from it."""
    with DualRollout(CoordinatorConfig(engine="native", theta_url="http://127.0.0.1:9", max_retries=0)) as rollout:
        assert rollout.servers_in_words() == "one native server" and rollout.list_settings == {}
        assert rollout.served_model("theta") == rollout.served_model("t") == "unknown"
    with DualRollout(CoordinatorConfig(top_k=7)) as rollout:
        assert rollout.list_settings == {"top_k": 7, "support": "union", "missing": "floor", "decoding": "auto"}


def test_every_number_is_in_the_record() -> None:
    (drawn,) = sampled(Server(), [sequence([4], [7])])
    assert drawn.record.alpha[0] == 0.25 and drawn.record.logprobs_q[0] == -1.0
    assert (drawn.record.logprobs_theta[0], drawn.record.logprobs_t[0]) == (-1.5, -0.5)
    assert drawn.record.importance_weights[0] == pytest.approx(math.exp(-0.5))
    (alone,) = sampled(Server(), [sequence([4], [7])], without_target=True)
    assert alone.record.importance_weights[0] == 1.0 and math.isnan(alone.record.logprobs_t[0])


@pytest.mark.parametrize(
    ("target", "t_prompt", "without_target", "most"),
    [(None, [7], False, 2), (None, [4], False, 2), (None, [7], True, 5), ("/t", [7], False, 2), ("/t", [4], False, 5)],
)
def test_no_more_are_asked_for_than_the_server_has_places(
    target: str | None, t_prompt: list[int], without_target: bool, most: int
) -> None:
    """Five: for two rollouts of two requests, or five of one. Of one model all with a target may be two, since the
    policy may be an adapter."""
    server = Server(target=target)
    sequences = sampled(server, [sequence([4], t_prompt) for _ in range(12)], without_target=without_target)
    assert [each.done and each.failure is None for each in sequences] == [True] * 12
    assert server.most_asked == most


def test_rollouts_that_wait_for_the_cache_are_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Of one prompt token a side and three of the rollout: four blocks of four tokens."""

    def waits(**small: int) -> int:
        stats = DecodingStats()
        sequences = sampled(Server(**small), [sequence([4], [7]) for _ in range(6)], stats=stats)
        assert all(each.done for each in sequences)
        return stats.cache_waits

    assert waits(max_requests=8, cache_blocks=11) == 4 and waits(max_requests=4, cache_blocks=11) == 0
    (said,) = [record.message for record in caplog.records if "KV cache" in record.message]
    assert "holds 2 rollouts" in said and "places for 4" in said and "--gpu-memory-utilization" in said


def test_the_target_may_be_an_adapter() -> None:
    names = []
    for without_target in (False, True):
        sampled(server := Server(), [sequence([4], [7])], without_target=without_target, t_model="adapter")
        names.append(server.payloads[0]["t_model"])
    assert names == ["adapter", None]


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_places_are_given_in_turn(count: int) -> None:
    """Those that are cancelled while they wait, or while they have them, give theirs back."""
    taken: list[int] = []
    most = 0

    async def run() -> None:
        places = Places(5)

        async def work(i: int) -> None:
            nonlocal most
            async with places.taken(1 + i % 3 if i else count):
                taken.append(i)
                most = max(most, 5 - places._free)
                await asyncio.sleep(0.0 if i % 2 else 0.001)

        tasks = [asyncio.create_task(work(i)) for i in range(40)]
        await asyncio.sleep(0)
        for task in tasks[3:40:4]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert places._free == 5

    asyncio.run(run())
    assert taken == sorted(taken) and most <= 5 and len(taken) >= 30


def test_the_cache_holds_what_is_begun() -> None:
    """Rollouts of two prompts, 3 and 6 tokens, of at most 10: nine blocks of four tokens until it is known that
    they are short, then five."""
    most: list[int] = []

    async def run(lengths: list[int]) -> None:
        room, begun = CacheRoom(18, block_size=4), 0
        most.append(0)

        async def work(length: int) -> None:
            nonlocal begun
            async with room.taken([3, 6], 10):
                begun += 1
                most[-1] = max(most[-1], begun)
                await asyncio.sleep(0)
                begun -= 1
            room.note(length)

        await asyncio.gather(*(work(length) for length in lengths[:2]))
        await asyncio.gather(*(work(length) for length in lengths[2:]))

    asyncio.run(run([10] * 12))
    asyncio.run(run([2] * 12))
    asyncio.run(run([1] * 2))
    assert most == [2, 3, 2]
