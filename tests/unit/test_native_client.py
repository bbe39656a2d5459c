"""The native engine's client and decoder against answers that a server gives, and some that none should."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig
from dual_rollout.decoding.call import CallSettings
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError, EngineUnavailableError
from dual_rollout.functional.pseudo_tokens import FLOOR, NUM_PSEUDO_TOKENS, POLICY_ROW, SCALES
from dual_rollout.samplers.native import NativeSampler
from dual_rollout.servers.http import HttpStats
from dual_rollout.servers.native import NativeEngine, NativeSample
from dual_rollout.servers.retry import RetryPolicy

VOCAB_SIZE = 20
ALPHA, KL_THETA, KL_T = 0.25, 0.5, 0.75
LOG_Q, LOGP_THETA = -1.0, -1.5

Spoil = Callable[[dict[str, Any]], None]


class Server:
    """In place of the transport: draws the tokens 1, 2, 3, ...; `spoils` are done to one answer each, in turn."""

    url = "http://native"
    discontinuities = 0
    answered = math.inf

    def __init__(self) -> None:
        self.stats = HttpStats()
        self.retries = RetryPolicy(self.url, max_retries=2, total_timeout=60.0, count=self.count_retry)
        self.payloads: list[dict[str, Any]] = []
        self.spoils: list[Spoil] = []

    def count_retry(self) -> None:
        self.stats.retries += 1

    async def get(self, path: str) -> Any:
        assert path == "/v1/models"
        return {"data": [{"id": "model", "max_model_len": 64}]}

    async def get_text(self, path: str) -> str:
        assert path == "/metrics"
        return "process_start_time_seconds 1.5\n"

    async def post(self, path: str, payload: dict[str, Any], *, max_bytes: int) -> Any:
        names = payload.get("logprob_token_ids", [])
        if any(name >= VOCAB_SIZE + NUM_PSEUDO_TOKENS for name in names):
            raise EngineRejectedError(f"Vocabulary size: {VOCAB_SIZE + NUM_PSEUDO_TOKENS}", url=self.url, status=400)
        self.payloads.append(payload)
        choice = self.prompt_rows(payload) if "prompt_logprobs" in payload else self.sample(payload, names)
        if self.spoils:
            self.spoils.pop(0)(choice)
        return {"choices": [{"index": 0, **choice}]}

    def sample(self, payload: dict[str, Any], names: list[int]) -> dict[str, Any]:
        numbers = (0.0, ALPHA, KL_THETA, KL_T, 1.0)
        carried = {f"token_id:{name}": FLOOR - SCALES[name - VOCAB_SIZE] * numbers[name - VOCAB_SIZE] for name in names}
        tokens = [f"token_id:{1 + i}" for i in range(payload["max_tokens"])]
        rows = [{token: LOG_Q, **carried} for token in tokens]
        return {"finish_reason": "length", "logprobs": {"tokens": tokens, "top_logprobs": rows}}

    def prompt_rows(self, payload: dict[str, Any]) -> dict[str, Any]:
        (text,) = payload["prompt"]
        values = [POLICY_ROW if token >= VOCAB_SIZE else LOGP_THETA for token in text]
        rows = [{str(token): {"logprob": value}} for token, value in zip(text, values, strict=True)]
        return {"finish_reason": "length", "prompt_logprobs": [None, *rows[1:]]}


def change_row(name: int, value: Any) -> Spoil:
    return lambda choice: choice["logprobs"]["top_logprobs"][1].update({f"token_id:{name}": value})


def other_list(choice: dict[str, Any]) -> None:
    choice["logprobs"]["top_logprobs"][0] = {f"token_id:{i}": -3.0 for i in range(5)}


def lose_a_row(choice: dict[str, Any]) -> None:
    choice["logprobs"]["top_logprobs"].pop()


def lose_a_token(choice: dict[str, Any]) -> None:
    for column in choice["logprobs"].values():
        column.pop()


def draw_a_pseudo_token(choice: dict[str, Any]) -> None:
    choice["logprobs"]["tokens"][0] = f"token_id:{VOCAB_SIZE}"


SPOILT_SAMPLES = {
    "another client's list": other_list,
    "fewer rows than tokens": lose_a_row,
    "ended early without a stop": lose_a_token,
    "a token beyond the vocabulary": draw_a_pseudo_token,
    "null": change_row(VOCAB_SIZE + 1, None),
    "no α": change_row(VOCAB_SIZE + 1, -9999.0),
    "α beyond 1": change_row(VOCAB_SIZE + 1, FLOOR - 1.5 * SCALES[1]),
    "a negative divergence": change_row(VOCAB_SIZE + 2, FLOOR + 1.0),
    "a positive log-probability": change_row(2, 0.5),
    "an impossible token": change_row(2, -9999.0),
    "no log-probabilities": lambda choice: choice.update(logprobs=None),
}


def sample(server: Server, *spoils: Spoil) -> NativeSample:
    async def run() -> NativeSample:
        engine = NativeEngine(server)  # type: ignore[arg-type]
        await engine.attach(1.0)
        server.spoils += spoils
        return await engine.generate([4, 5], max_tokens=3, temperature=1.0)

    return asyncio.run(run())


def test_what_is_carried_is_read() -> None:
    found = sample(Server())
    assert found.token_ids == [1, 2, 3] and found.finish_reason == "length"
    assert found.log_q.tolist() == [LOG_Q] * 3
    assert [column.tolist() for column in (found.alpha, found.kl_theta, found.kl_t)] == [
        [ALPHA] * 3,
        [KL_THETA] * 3,
        [KL_T] * 3,
    ]


@pytest.mark.parametrize("spoil", SPOILT_SAMPLES.values(), ids=SPOILT_SAMPLES.keys())
def test_an_invalid_sample_is_drawn_again(spoil: Spoil) -> None:
    server = Server()
    assert sample(server, spoil).log_q.tolist() == [LOG_Q] * 3
    assert server.stats.retries == 1
    with pytest.raises(EngineProtocolError):
        sample(Server(), spoil, spoil, spoil)


def test_a_divergence_that_vllm_cut_off_is_not_a_number() -> None:
    server = Server()
    found = sample(server, change_row(VOCAB_SIZE + 3, -9999.0))
    assert server.stats.retries == 0
    assert np.isnan(found.kl_t).tolist() == [False, True, False] and found.alpha.tolist() == [ALPHA] * 3


@pytest.mark.parametrize("value", [None, math.nan, 0.5, "gone"])
def test_invalid_policy_rows_are_asked_for_again(value: Any) -> None:
    def spoil(choice: dict[str, Any]) -> None:
        row = choice["prompt_logprobs"][2]
        row.clear() if value == "gone" else row.update({"1": {"logprob": value}})

    async def run() -> np.ndarray:
        engine = NativeEngine(server)  # type: ignore[arg-type]
        await engine.attach(1.0)
        server.spoils.append(spoil)
        return await engine.policy_logprobs([4, 5, 1, 2], 2)

    server = Server()
    assert asyncio.run(run()).tolist() == [LOGP_THETA] * 2
    assert server.stats.retries == 1


def test_no_sequence_is_begun_once_the_server_is_gone() -> None:
    class Gone(Server):
        asked = 0

        async def post(self, path: str, payload: dict[str, Any], *, max_bytes: int) -> Any:
            if "seed" not in payload:
                return await super().post(path, payload, max_bytes=max_bytes)
            self.asked += 1
            if payload["prompt"][0] == [4, 1]:
                raise EngineUnavailableError("gone", url=self.url)
            await asyncio.sleep(0)
            return await super().post(path, payload, max_bytes=max_bytes)

    all_of_them = [DecodingSequence([4, i], [4, i], max_tokens=3, stop_ids=(), key=(0, i)) for i in range(20)]
    server, finished = Gone(), []

    async def note(sequence: DecodingSequence) -> None:
        finished.append(sequence)

    async def run() -> None:
        engine = NativeEngine(server)  # type: ignore[arg-type]
        await engine.attach(1.0)
        config = CoordinatorConfig(engine="native", policy_logprobs=False, max_concurrency=2, seed=0)
        sampler = NativeSampler(engine, PolicyWeights(), DecodingStats())
        await sampler.sample(all_of_them, CallSettings(config, on_finished=note))

    asyncio.run(run())
    assert server.asked == 2
    assert len(finished) == 20 and all_of_them[0].tokens == [1, 2, 3]
    assert sum(isinstance(sequence.failure, EngineUnavailableError) for sequence in all_of_them) == 19


def test_tokens_that_one_model_lacks_are_refused_in_prompts() -> None:
    async def run() -> None:
        engine = NativeEngine(Server())  # type: ignore[arg-type]
        await engine.attach(1.0)
        await engine.generate([4, VOCAB_SIZE], max_tokens=3, temperature=1.0)

    with pytest.raises(EngineRejectedError, match=f"token {VOCAB_SIZE}"):
        asyncio.run(run())


@pytest.mark.parametrize("policy_logprobs", [True, False])
def test_log_policy_costs_a_request_only_where_it_is_wanted(policy_logprobs: bool) -> None:
    sequence = DecodingSequence([4, 5], [4, 5], max_tokens=3, stop_ids=(), key=(0, 0))
    stats, server = DecodingStats(), Server()

    async def run() -> int:
        engine = NativeEngine(server)  # type: ignore[arg-type]
        await engine.attach(1.0)
        asked = len(server.payloads)
        config = CoordinatorConfig(engine="native", policy_logprobs=policy_logprobs)
        sampler = NativeSampler(engine, PolicyWeights(), stats)
        await sampler.sample([sequence], CallSettings(config, with_diagnostics=True))
        return len(server.payloads) - asked

    assert asyncio.run(run()) == 1 + policy_logprobs
    assert sequence.failure is None and sequence.tokens == [1, 2, 3]
    record = sequence.record
    assert record.logprobs_q == [LOG_Q] * 3 and record.alpha == [ALPHA] * 3
    assert record.diagnostics["kl_diff"] == [KL_T - KL_THETA] * 3
    assert stats.scored_tokens == 3 * policy_logprobs
    psi = -(1 - ALPHA) * KL_THETA - ALPHA * KL_T
    logp_t = (LOG_Q + psi - (1 - ALPHA) * LOGP_THETA) / ALPHA
    weight = math.exp(LOGP_THETA - LOG_Q)
    expected = [LOGP_THETA, logp_t, weight] if policy_logprobs else [math.nan] * 3
    columns = (record.logprobs_theta, record.logprobs_t, record.importance_weights)
    for column, value in zip(columns, expected, strict=True):
        assert column == pytest.approx([value] * 3, nan_ok=True)
