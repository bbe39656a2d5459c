"""Sessions (`dual_rollout.sessions`) on a real vLLM server: the lists of texts that grow in the engine are those of the
same texts sent whole, and nothing is left of a session that ought to have ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.coordinator import CoordinatorStats
from dual_rollout.engine import GrowingText
from dual_rollout.exceptions import EngineRejectedError
from dual_rollout.servers.http import HttpTransport
from dual_rollout.servers.vllm import VLLMEngine
from dual_rollout.sessions.wire import DRAW_PATH, PATH, SESSIONS_PATH
from tests.chi_square import chi_square_p_value
from tests.hang import HANG
from tests.synced_training import lora_config
from tests.vllm.carrier_faults import FAULTS_PATH
from tests.vllm.conftest import ServerPair

PLACES = 12  # three quarters of --max-num-seqs 16
VOCAB = 280
K = 20
EXCLUDED = list(range(0, VOCAB, 3))


@contextlib.asynccontextmanager
async def client(url: str) -> AsyncIterator[VLLMEngine]:
    engine = VLLMEngine(HttpTransport(url))
    try:
        assert (await engine.probe([1, 2, 3])).sessions
        yield engine
    finally:
        await engine.aclose()


def texts(count: int, seed: int = 0) -> list[GrowingText]:
    rng = np.random.default_rng(seed)
    return [GrowingText(rng.integers(3, VOCAB, 20 + 7 * i).tolist()) for i in range(count)]


def grow(these: list[GrowingText], seed: int) -> None:
    """By one to three tokens each."""
    rng = np.random.default_rng([seed, 1])
    for text in these:
        text.extend(rng.integers(3, VOCAB, rng.integers(1, 4)).tolist())


async def begun(engine: VLLMEngine, count: int) -> list[GrowingText]:
    """Texts in sessions, each with tokens more than its session has."""
    these = texts(count)
    await engine.next_top_k(these, K)
    grow(these, 0)
    return these


async def assert_as_sent_whole(engine: VLLMEngine, these: list[GrowingText], k: int = K) -> None:
    kept = await engine.next_top_k(these, k)
    whole = await engine._requests.lists([list(text) for text in these], k, 1.0)
    np.testing.assert_array_equal(np.sort(kept.token_ids), np.sort(whole.token_ids))
    np.testing.assert_allclose(kept.logprobs, whole.logprobs, atol=1e-4)


async def sessions(engine: VLLMEngine) -> int:
    return (await engine._http.get(SESSIONS_PATH))["sessions"]


async def assert_ends(engine: VLLMEngine, left: int) -> None:
    deadline = time.monotonic() + HANG
    while (there := await sessions(engine)) != left:
        assert time.monotonic() < deadline, f"{there} sessions"
        await asyncio.sleep(0.05)


@pytest.fixture
def url(vllm_pair: ServerPair) -> str:
    """Sessions go on together there, by the scheduler that the server was given."""
    return vllm_pair.theta.url


def test_lists_are_those_of_the_same_texts_sent_whole(url: str) -> None:
    async def main() -> None:
        async with client(url) as engine:
            these = texts(PLACES + 3)  # the last are ordinary requests
            for step in range(5):
                await assert_as_sent_whole(engine, these, k=K if step != 3 else 100)
                assert await sessions(engine) == PLACES
                grow(these, step)
            await assert_as_sent_whole(engine, these[::-2])
            # Other requests find room beside the sessions.
            named = await engine.named_logprobs([list(these[0])], [[5, 7]])
            assert np.isfinite(named[0]).all()

    asyncio.run(main())


def test_texts_that_go_on_one_by_one_have_the_same_lists(url: str) -> None:
    """Each by a message of its own, as all do where the server has not the scheduler."""

    async def main() -> None:
        async with client(url) as engine:
            these = texts(6)
            for step in range(4):
                kept = await asyncio.gather(*(engine.next_top_k([text], K) for text in these))
                for text, mine in zip(these, kept, strict=True):
                    whole = await engine._requests.lists([list(text)], K, 1.0)
                    np.testing.assert_array_equal(np.sort(mine.token_ids), np.sort(whole.token_ids))
                    np.testing.assert_allclose(mine.logprobs, whole.logprobs, atol=1e-4)
                grow(these, step)

    asyncio.run(main())


def test_adapters_have_sessions_of_their_own_that_end_when_one_is_replaced(
    vllm_pair: ServerPair, lora_url: str, tmp_path: Path
) -> None:
    """Beside sessions of the base model, though never in one step with them: vLLM's CPU build gives requests without an
    adapter that of the last place then (its pull request 48421). What replaces the adapter is loaded under another name
    too, to compare with."""

    async def main(before: str, after: str) -> None:
        async with client(lora_url) as base, client(lora_url) as adapter, client(lora_url) as reference:
            await adapter.load_lora("policy", before)
            adapter.use_lora("policy")
            await reference.load_lora("reference", after)
            reference.use_lora("reference")
            of_base, of_adapter = texts(4), texts(4)
            for step in range(3):
                await assert_as_sent_whole(base, of_base)
                await assert_as_sent_whole(adapter, of_adapter)
                assert await sessions(base) == 8
                grow(of_base, step)
                grow(of_adapter, step)
            old = await adapter._requests.lists([list(text) for text in of_adapter], K, 1.0)

            body = {"lora_name": "policy", "lora_path": after, "load_inplace": True}
            await adapter._http.post("/v1/load_lora_adapter", body)
            assert await sessions(base) == 0
            new = await adapter.next_top_k(of_adapter, K)
            expected = await reference._requests.lists([list(text) for text in of_adapter], K, 1.0)
            np.testing.assert_allclose(new.logprobs, expected.logprobs, atol=1e-4)
            assert np.abs(new.logprobs - old.logprobs).max() > 0.01
            await assert_as_sent_whole(base, of_base)
            for name in ("policy", "reference"):
                await base._http.post("/v1/unload_lora_adapter", {"lora_name": name})
            with pytest.raises(EngineRejectedError, match="does not exist"):
                await adapter.next_top_k(of_adapter, K)

    folders = [str(tmp_path / name) for name in ("before", "after")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(vllm_pair.theta.model, dtype=torch.float32)
        get_peft_model(model, lora_config(init_lora_weights=False)).save_pretrained(folder)
    asyncio.run(main(*folders))


def test_texts_that_have_not_grown_are_answered_too(url: str) -> None:
    """The other server may have failed a round, or a longer list is wanted of the same text."""

    async def main() -> None:
        async with client(url) as engine:
            these = texts(4)
            for step in range(3):
                for k in (K, K, 50, K):
                    await assert_as_sent_whole(engine, these, k)
                grow(these[:2], step)  # the others stay as they are
            del these[0][15:], these[1][-1]
            await assert_as_sent_whole(engine, these)

    asyncio.run(main())


def test_sessions_end_with_their_texts_with_the_connection_and_by_themselves(url: str) -> None:
    async def main() -> None:
        async with client(url) as engine:
            await engine._http.post("/reset_prefix_cache")
            these = texts(6)
            await engine.next_top_k(these, K)
            del these[2:]
            gc.collect()
            grow(these, 0)
            await engine.next_top_k(these, K)
            assert await sessions(engine) == 2

            body = {"model": "tiny", "k": K, "temperature": 0.0, "texts": [["broken-off", 0, [3, 4, 5] * 150]]}
            async with aiohttp.ClientSession() as http:
                asked = asyncio.create_task(http.post(url + PATH, json=body))
                await asyncio.sleep(0.005)
                asked.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    (await asked).close()  # answered already: it ends by itself, below
            await assert_ends(engine, 0)
            grow(these, 1)
            await assert_as_sent_whole(engine, these)

    asyncio.run(main())


def test_new_weights_and_an_empty_cache_end_sessions(vllm_pair: ServerPair) -> None:
    async def main() -> None:
        async with client(vllm_pair.theta.url) as engine:
            these = texts(4)
            before = await engine.next_top_k(these, K)
            await engine.reset_prefix_cache()  # which vLLM does not do while anything is held
            assert await sessions(engine) == 0
            grow(these, 0)
            await assert_as_sent_whole(engine, these)
            try:
                await engine.reload_weights(str(vllm_pair.t.model))
                assert await sessions(engine) == 0
                grow(these, 1)
                await assert_as_sent_whole(engine, these)
                again = await engine.next_top_k(texts(4), K)
                assert not np.allclose(np.sort(again.logprobs), np.sort(before.logprobs), atol=1e-2)
            finally:
                await engine.reload_weights(str(vllm_pair.theta.model))
            grow(these, 2)
            await assert_as_sent_whole(engine, these)

    asyncio.run(main())


def test_requests_beside_changes_get_the_right_lists(url: str) -> None:
    async def main() -> None:
        async with client(url) as engine:

            async def rounds(seed: int) -> None:
                these = texts(4, seed)
                for step in range(12):
                    await assert_as_sent_whole(engine, these)
                    grow(these, 100 * seed + step)

            async def changes() -> None:
                while True:
                    await engine.reset_prefix_cache()
                    await asyncio.sleep(0.03)

            changing = asyncio.create_task(changes())
            await asyncio.wait_for(asyncio.gather(*(rounds(seed) for seed in (1, 2, 3))), HANG)
            assert not changing.done(), changing.exception()
            changing.cancel()

    asyncio.run(main())


def test_a_request_during_a_pause_is_answered_after_it_and_keeps_nothing_waiting(url: str) -> None:
    async def main() -> None:
        async with client(url) as engine:
            these = await begun(engine, 3)
            await engine._http.post("/pause?mode=wait")
            try:
                asked = asyncio.create_task(engine.next_top_k(these, K))
                await asyncio.sleep(0.2)
                await asyncio.wait_for(engine.reset_prefix_cache(), HANG)
                assert not asked.done()
            finally:
                await engine._http.post("/resume")
            answer = await asyncio.wait_for(asked, HANG)
            whole = await engine._requests.lists([list(text) for text in these], K, 1.0)
            np.testing.assert_allclose(answer.logprobs, whole.logprobs, atol=1e-4)
            grow(these, 1)
            await assert_as_sent_whole(engine, these)

    asyncio.run(main())


def test_a_request_that_is_sent_again_gets_the_same_answer(url: str) -> None:
    async def ask(http: aiohttp.ClientSession, *text: Any, **others: Any) -> tuple[int, bytes]:
        body = {"model": "tiny", "k": K, "temperature": 0.0, "texts": [list(text)], **others}
        async with http.post(url + PATH, json=body) as response:
            return response.status, await response.read()

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            assert (await ask(http, "mine", 0, [3, 4, 5]))[0] == 200
            first, again = [await ask(http, "mine", 3, [6]) for _ in range(2)]
            assert first == again
            assert first[0] == 200 and json.loads(first[1].splitlines()[0])["usage"]["prompt_tokens"] == 4
            assert (await ask(http, "mine", 3, [7]))[0] == 409  # another token there
            assert (await ask(http, "mine", 5, [7]))[0] == 409
            assert (await ask(http, "another", 3, [7]))[0] == 409
            assert (await ask(http, "mine", 4, [7]))[0] == 200

    asyncio.run(main())


def test_rounds_whose_carrying_message_fails_are_asked_again_and_nothing_is_lost(vllm_pair: ServerPair) -> None:
    config = CoordinatorConfig(
        theta_url=vllm_pair.theta.url, t_url=vllm_pair.t.url, top_k=K, decoding="lockstep", seed=0, ignore_eos=True
    )

    async def main() -> None:
        prompts = [list(text) for text in texts(6)]
        async with DualVLLMCoordinator(config) as coordinator, client(vllm_pair.theta.url) as engine:
            undisturbed = await coordinator.generate_batch(prompts, max_tokens=6)
            assert await engine._http.get(FAULTS_PATH) == 0
            for _ in range(2):
                await engine._http.post(FAULTS_PATH)
            outputs = await coordinator.generate_batch(prompts, max_tokens=6)
            assert await engine._http.get(FAULTS_PATH) == 0, "the faults were not met"
            assert coordinator.stats.theta.retries == 2
            for output, expected in zip(outputs, undisturbed, strict=True):
                assert output.error is None
                assert output.generated_tokens == expected.generated_tokens
                np.testing.assert_allclose(output.logprobs_theta, expected.logprobs_theta, atol=1e-4)
            del outputs, undisturbed
            gc.collect()

            # A request that the engine refuses for all: none waits for a message that does not come, and none is kept.
            await engine._http.post("/reset_prefix_cache")
            these = await begun(engine, 3)
            with pytest.raises(EngineRejectedError, match="temperature"):
                await asyncio.wait_for(engine._sessions.lists(these, K, -1.0), HANG)
            await assert_ends(engine, 0)
            await assert_as_sent_whole(engine, these)

    asyncio.run(main())


def test_draws_and_named_tokens_are_those_of_the_same_texts_sent_whole(url: str) -> None:
    """The χ² test fails for a correct program with probability 1e-4."""
    draws, seeds = 600, range(600)

    async def main() -> None:
        async with client(url) as engine:
            these = await begun(engine, 3)
            await engine.next_top_k(these, K)
            kept, asked = await sessions(engine), engine._http.stats.requests
            size = (await engine.probe([1])).vocab_size
            assert size is not None
            names = [[5, 7], [], list(range(size))]
            named = await engine.named_logprobs(these, names)
            tokens = await engine.draw_excluding(these[:1] * draws, [EXCLUDED] * draws, 1.0, seeds)
            assert engine._http.stats.requests == asked + 2, "one message each"
            whole = [
                await engine._requests.named(list(text), ids, 1.0, known=True)
                for text, ids in zip(these, names, strict=True)
            ]
            for mine, expected in zip(named, whole, strict=True):
                np.testing.assert_allclose(mine, expected, atol=1e-4)

            allowed = np.exp(await engine._requests.named(list(these[0]), list(range(size)), 1.0, known=True))
            allowed[EXCLUDED] = 0.0
            expected = draws * allowed / allowed.sum()
            assert chi_square_p_value(np.bincount(tokens, minlength=size), expected) > 1e-4
            again = [await engine._requests.draw(list(these[0]), EXCLUDED, 1.0, seed) for seed in seeds[:8]]
            assert again == tokens[:8]

            assert await sessions(engine) == kept
            grow(these, 1)
            await assert_as_sent_whole(engine, these)

    asyncio.run(main())


@pytest.mark.parametrize("options", [{"support": "tail"}, {"support": "tail", "missing": "exact"}], ids=str)
def test_rollouts_with_a_tail_are_those_of_whole_texts(vllm_pair: ServerPair, options: Any) -> None:
    """The same seed gives the same tokens, and every number is the same to rounding."""
    urls = {"theta_url": vllm_pair.theta.url, "t_url": vllm_pair.t.url}
    config = CoordinatorConfig(**urls, top_k=3, decoding="lockstep", seed=0, ignore_eos=True, **options)

    async def rollouts(sessions: bool) -> tuple[list[GenerationOutput], CoordinatorStats]:
        async with DualVLLMCoordinator(config) as coordinator:
            theta = coordinator.theta
            assert isinstance(theta, VLLMEngine)
            theta._capabilities = dataclasses.replace(await theta.probe([1, 2, 3]), sessions=sessions)
            outputs = await coordinator.generate_batch([list(text) for text in texts(6)], max_tokens=10)
            return outputs, coordinator.stats

    async def main() -> None:
        (kept, stats), (whole, plain) = await rollouts(True), await rollouts(False)
        assert stats.decoding.tail_tokens == plain.decoding.tail_tokens > 10
        assert stats.theta.requests < plain.theta.requests, "several draws share a message"
        for mine, expected in zip(kept, whole, strict=True):
            assert mine.error is None and mine.generated_tokens == expected.generated_tokens
            for name in ("alpha_history", "logprobs_q", "logprobs_theta", "logprobs_t", "importance_weights"):
                np.testing.assert_allclose(getattr(mine, name), getattr(expected, name), rtol=1e-3, atol=1e-3)

    asyncio.run(main())


def test_a_bad_text_is_refused_and_the_others_go_on(url: str) -> None:
    async def main() -> None:
        async with client(url) as engine:
            these = await begun(engine, 3)
            too_long, unknown = GrowingText([5] * 512), GrowingText([5, 10**6])
            for bad, words in ((too_long, "max-model-len"), (unknown, "token id outside")):
                with pytest.raises(EngineRejectedError, match=words):
                    await engine.next_top_k([*these, bad], K)
            with pytest.raises(EngineRejectedError, match="max-logprobs"):
                await engine.next_top_k(these, 201)
            await assert_as_sent_whole(engine, these)

    asyncio.run(main())


@pytest.mark.parametrize(
    "body",
    [
        {"model": "tiny", "temperature": 1.0, "draws": []},
        {"model": "tiny", "temperature": 1.0, "draws": [[[3], 0, []]]},
        {"model": "tiny", "temperature": 1.0, "draws": [[[], 0, [], []]]},
        {"model": "tiny", "temperature": 1.0, "draws": [[[3], 0.5, [], []]]},
        {"model": "tiny", "temperature": 1.0, "draws": [[[3], 0, [10**6], []]]},
        {"model": "tiny", "temperature": 1.0, "draws": [[[3], 0, [4], [5]]]},
        {"model": "tiny", "temperature": 1.0, "draws": [[[3], None, [], "named"]]},
        {"model": "tiny", "temperature": -1.0, "draws": [[[3], 0, [], []]]},
    ],
)
def test_malformed_draws_are_refused(url: str, body: Any) -> None:
    asyncio.run(assert_refused(url + DRAW_PATH, body))


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"model": "tiny", "k": 5, "temperature": 0.0, "texts": []},
        {"model": "tiny", "k": 5, "temperature": 0.0, "texts": [[None, 0]]},
        {"model": "tiny", "k": 5, "temperature": 0.0, "texts": [[None, 0, []]]},
        {"model": "tiny", "k": 5, "temperature": "hot", "texts": [[None, 0, [3]]]},
        {"model": "tiny", "k": 5, "temperature": 0.0, "texts": [["a", 0, [3]], ["a", 0, [4]]]},
    ],
)
def test_malformed_requests_are_refused(url: str, body: Any) -> None:
    asyncio.run(assert_refused(url + PATH, body))


async def assert_refused(url: str, body: Any) -> None:
    async with aiohttp.ClientSession() as http, http.post(url, json=body) as response:
        assert response.status == 400, await response.text()
        assert (await response.json())["error"]["message"]
