"""The client of a server of pairs against answers that it gives, and some that none should."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig
from dual_rollout.config import AlphaRule
from dual_rollout.decoding.call import CallSettings
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.exceptions import EngineRejectedError, PreflightError
from dual_rollout.samplers.native import NativeSampler
from dual_rollout.servers.http import HttpStats
from dual_rollout.servers.native import NativeEngine
from dual_rollout.servers.pairs import PairSample, PairServerInfo
from dual_rollout.servers.retry import RetryPolicy

COLUMNS = ["alpha", "log_q", "log_theta", "log_t", "kl_theta", "kl_t"]
NUMBERS = [0.25, -1.0, -1.5, -0.5, 0.125, 0.0]

Change = Callable[[dict[str, Any]], Any]


class Server:
    """In place of the transport: draws the tokens 1, 2, 3, ...; each of `changes` is made to one answer, in turn."""

    url = "http://pairs"
    discontinuities = 0
    answered = math.inf

    def __init__(self, *changes: Change, pairs: bool = True) -> None:
        self.stats = HttpStats()
        self.retries = RetryPolicy(self.url, max_retries=2, total_timeout=60.0, count=self.count_retry)
        self.payloads: list[dict[str, Any]] = []
        self._changes = list(changes)
        self._pairs = pairs

    def count_retry(self) -> None:
        self.stats.retries += 1

    async def get(self, path: str) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "model", "max_model_len": 64}]}
        assert path == "/v1/dual_rollout"
        if not self._pairs:
            raise EngineRejectedError("Not Found", url=self.url, status=404)
        return {"vocab_size": 20, "max_model_len": 64, "max_pairs": 4, "rollouts": 0}

    async def get_text(self, path: str) -> str:
        return "process_start_time_seconds 1.5\n"

    async def post(self, path: str, payload: dict[str, Any], *, max_bytes: int) -> Any:
        assert path == "/v1/dual_rollout/generate"
        self.payloads.append(payload)
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
    "NaN": numbers(log_t=math.nan),
    "a positive log-probability": numbers(log_q=0.5),
    "a negative divergence": numbers(kl_theta=-0.1),
    "another request's": lambda answer: answer.update(request_id=answer["request_id"] + "1"),
    "another model's": lambda answer: answer.update(model="other"),
}


def drawn(server: Server, t_prompt: list[int] | None = None) -> PairSample:
    async def run() -> PairSample:
        engine = NativeEngine(server)  # type: ignore[arg-type]
        rule = AlphaRule(method="kl_budget", kl_budget=0.5)
        return await engine.draw_pair([4, 5], t_prompt, max_tokens=3, temperature=0.7, rule=rule, seed=3)

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


def sampler(server: Server, **options: Any) -> NativeSampler:
    return NativeSampler(NativeEngine(server), PolicyWeights(), DecodingStats(), **options)  # type: ignore[arg-type]


def sequence(prompt: list[int], t_prompt: list[int]) -> DecodingSequence:
    return DecodingSequence(prompt, t_prompt, max_tokens=3, stop_ids=(), key=(1, 2))


def test_the_server_says_which_of_the_two_it_is() -> None:
    async def found(pairs: bool) -> PairServerInfo | None:
        return await NativeEngine(Server(pairs=pairs)).pair_server()  # type: ignore[arg-type]

    assert asyncio.run(found(True)) == PairServerInfo(vocab_size=20, max_model_len=64, max_pairs=4)
    assert asyncio.run(found(False)) is None


def test_two_models_refuse_a_later_sequence_with_two_prompts() -> None:
    config, (one, two) = CoordinatorConfig(engine="native"), (sequence([4], [7]), sequence([4], [8]))
    asyncio.run(sampler(Server(pairs=False)).sample([one, two], CallSettings(config)))
    assert all("shows both models one prompt" in str(each.failure) and not each.tokens for each in (one, two))


@pytest.mark.parametrize(
    ("options", "t_prompt", "rule", "message"),
    [
        ({}, [7], {}, "shows π_t another prompt"),
        ({"without_target": True}, [4], {}, "draws from π_θ alone"),
        ({}, [4], {"alpha_method": "entropy"}, "knows alpha_method 'entropy'"),
    ],
)
def test_two_models_refuse_what_only_pairs_can(
    options: dict[str, Any], t_prompt: list[int], rule: dict[str, Any], message: str
) -> None:
    config = CoordinatorConfig(engine="native", theta_url="http://pairs", **rule)
    with pytest.raises(PreflightError, match=message):
        asyncio.run(sampler(Server(pairs=False), **options).ready([sequence([4], t_prompt)], config))
