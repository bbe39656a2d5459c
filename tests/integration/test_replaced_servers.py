"""Servers that are started again while a client uses them: with the same model, under another name, with another model.

A proxy stands for the server's address; what is behind it is exchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.engine import GrowingText
from dual_rollout.exceptions import EngineReplacedError
from dual_rollout.servers import HttpTransport, SGLangEngine, VLLMEngine, identity, replica_pool
from tests import fault_proxy
from tests.fault_proxy import FaultProxy
from tests.hang import HANG
from tests.integration.conftest import TinyPair
from tests.markov_server import MarkovServer, random_chain
from tests.sglang_stub import SGLangStub
from tests.tiny_model import perturbed_copy
from tests.warm_servers import WarmServer

PROMPTS = [[10 + i, 20, 30 + 2 * i] for i in range(8)]
FLAGS = ["--max-logprobs", "-1", "--max-model-len", "256", "--threads", "1"]
OPTIONS: dict[str, Any] = {
    "top_k": 20,
    "seed": 3,
    "decoding": "lockstep",
    "max_retries": 3,
    "request_timeout": 20.0,
    "ignore_eos": True,
}
LONGER_THAN_IDLE_S = identity._IDLE_S + 0.1


@pytest.fixture(autouse=True)
def _short_probation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_pool, "_FIRST_PROBATION_S", 0.1)


@pytest.fixture(scope="module")
def same_name_url(tiny_models: tuple[Path, Path]) -> Iterator[str]:
    """A second process with π_θ's model."""
    with WarmServer(tiny_models[0], FLAGS) as server:
        yield server.url


@pytest.fixture(scope="module")
def other_name_url(tiny_models: tuple[Path, Path]) -> Iterator[str]:
    """π_θ's model under another served name."""
    with WarmServer(tiny_models[0], [*FLAGS, "--served-model-name", "renamed"]) as server:
        yield server.url


@pytest.fixture(scope="module")
def rewritten(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """π_θ's model, and slightly other weights from the same folder, as when a run writes over its last checkpoint."""
    folder = tmp_path_factory.mktemp("rewritten") / "model"
    shutil.copytree(tiny_models[0], folder)
    with WarmServer(folder, FLAGS) as first:
        shutil.rmtree(folder)
        perturbed_copy(tiny_models[0], folder, noise=0.1, seed=9)
        with WarmServer(folder, FLAGS) as second:
            yield first.url, second.url


@pytest.fixture
def impostor_url(tiny_pair: TinyPair) -> str:
    return tiny_pair.t_url


async def exchange(proxy: FaultProxy, target: str) -> None:
    """What a client sees of a restart: connections are lost."""
    await proxy.stop()
    proxy.target = target
    await proxy.start()


async def exchange_behind_a_balancer(proxy: FaultProxy, target: str) -> None:
    """Connections stay; while nothing is behind it, the balancer answers."""
    proxy.target, proxy.fault = target, fault_proxy.error(502)
    until = proxy.completions + 2
    proxy.when = lambda number: number <= until


async def generate(coordinator: DualVLLMCoordinator, max_tokens: int = 8) -> list[GenerationOutput]:
    return await coordinator.generate_batch(PROMPTS, max_tokens=max_tokens)


def tokens(outputs: list[GenerationOutput]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


async def undisturbed(theta_url: str, t_url: str) -> list[list[int]]:
    async with DualVLLMCoordinator(CoordinatorConfig(theta_url=theta_url, t_url=t_url, **OPTIONS)) as coordinator:
        return tokens(await generate(coordinator))


@contextlib.asynccontextmanager
async def behind_a_proxy(
    pair: TinyPair, side: str, behind: str | None = None, **options: Any
) -> AsyncIterator[tuple[DualVLLMCoordinator, FaultProxy]]:
    """A coordinator, and the proxy before the server of that side, which serves π_θ's model on both sides."""
    async with FaultProxy(behind or pair.theta_url).running() as proxy:
        urls = {"theta_url": proxy.url, "t_url": pair.t_url} if side == "theta" else {}
        urls = urls or {"theta_url": pair.t_url, "t_url": proxy.url}
        config = CoordinatorConfig(**urls, **{**OPTIONS, **options})
        async with DualVLLMCoordinator(config) as coordinator:
            yield coordinator, proxy


async def in_mid_batch(
    coordinator: DualVLLMCoordinator, meanwhile: Callable[[], Awaitable[None]]
) -> list[GenerationOutput]:
    """A batch, with something done after its third round."""
    before = coordinator.stats.decoding.tokens
    task = asyncio.create_task(generate(coordinator))
    while coordinator.stats.decoding.tokens < before + 3 * len(PROMPTS):
        await asyncio.sleep(0.001)
    assert not task.done()
    await meanwhile()
    return await task


EXCHANGES = [exchange, exchange_behind_a_balancer]


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize("side", ["theta", "t"])
@pytest.mark.parametrize("same_folder", [False, True])
def test_another_model_in_mid_batch_ends_what_would_mix(
    tiny_pair: TinyPair, rewritten: tuple[str, str], side: str, how: Any, same_folder: bool
):
    first, second = rewritten
    second = second if same_folder else tiny_pair.t_url
    reason = "other weights" if same_folder else "replaced by a server of /"

    async def run() -> None:
        async with behind_a_proxy(tiny_pair, side, behind=first) as (coordinator, proxy):
            urls = (tiny_pair.theta_url, tiny_pair.t_url) if side == "theta" else (tiny_pair.t_url, tiny_pair.theta_url)
            expected = await undisturbed(*urls)
            outputs = await in_mid_batch(coordinator, lambda: how(proxy, second))
            for output, ids in zip(outputs, expected, strict=True):
                assert reason in str(output.error)
                assert 3 <= len(output.generated_tokens) < 8
                assert output.generated_tokens == ids[: len(output.generated_tokens)], "none is the other model's"
            outputs = await generate(coordinator)
            assert all(reason in str(output.error) and not output.generated_tokens for output in outputs)
            await exchange(proxy, first)
            assert tokens(await generate(coordinator)) == expected

    asyncio.run(asyncio.wait_for(run(), HANG))


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("how", EXCHANGES)
def test_the_same_model_in_another_process_goes_on(
    tiny_pair: TinyPair, same_name_url: str, other_name_url: str, how: Any
):
    """Also under another name, if the name is asked from the server."""

    async def run() -> None:
        async with behind_a_proxy(tiny_pair, "theta") as (coordinator, proxy):
            expected = await undisturbed(tiny_pair.theta_url, tiny_pair.t_url)
            for url in (same_name_url, other_name_url, tiny_pair.theta_url):
                assert tokens(await in_mid_batch(coordinator, lambda url=url: how(proxy, url))) == expected

    asyncio.run(asyncio.wait_for(run(), HANG))


@pytest.mark.usefixtures("short_pauses")
def test_a_name_that_the_config_gives_must_stay(
    tiny_pair: TinyPair, tiny_models: tuple[Path, Path], other_name_url: str
):
    async def run() -> None:
        async with behind_a_proxy(tiny_pair, "theta", theta_model=str(tiny_models[0])) as (coordinator, proxy):
            outputs = await in_mid_batch(coordinator, lambda: exchange(proxy, other_name_url))
            assert all("serves ['renamed']" in str(output.error) for output in outputs)

    asyncio.run(asyncio.wait_for(run(), HANG))


@pytest.mark.usefixtures("short_pauses")
def test_on_target_failure_holds_for_a_target_that_was_replaced(tiny_pair: TinyPair, impostor_url: str):
    async def run() -> None:
        async with behind_a_proxy(tiny_pair, "t", on_target_failure="policy") as (coordinator, proxy):
            outputs = await in_mid_batch(coordinator, lambda: exchange(proxy, impostor_url))
            assert all(output.error is None and output.without_target[-1] for output in outputs)

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_server_that_was_replaced_while_it_was_idle(tiny_pair: TinyPair, rewritten: tuple[str, str]):
    """Behind a balancer whose connections stay, and which answers nothing itself meanwhile."""

    async def run() -> None:
        async with behind_a_proxy(tiny_pair, "theta", behind=rewritten[0]) as (coordinator, proxy):
            tokens(await generate(coordinator, 2))
            proxy.target = rewritten[1]
            await asyncio.sleep(LONGER_THAN_IDLE_S)
            outputs = await generate(coordinator, 2)
            assert all("other weights" in str(output.error) and not output.generated_tokens for output in outputs)

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_replica_that_was_replaced_while_it_was_idle_gives_no_token(
    tiny_pair: TinyPair, rewritten: tuple[str, str], other_name_url: str
):
    """It is out as long as it serves other weights, and in again with the right ones."""
    first, second = rewritten

    async def run() -> None:
        expected = await undisturbed(tiny_pair.theta_url, tiny_pair.t_url)
        async with FaultProxy(first).running() as proxy:
            config = CoordinatorConfig(theta_url=[proxy.url, tiny_pair.theta_url], t_url=tiny_pair.t_url, **OPTIONS)
            async with DualVLLMCoordinator(config) as coordinator:
                assert tokens(await generate(coordinator)) == expected
                await exchange(proxy, second)
                before = proxy.completions
                for _ in range(3):
                    assert tokens(await generate(coordinator)) == expected
                    await asyncio.sleep(0.15)
                tries = proxy.completions - before
                assert 1 <= tries <= 8, "asked for what it is, and for no token"
                await exchange(proxy, first)
                deadline = asyncio.get_running_loop().time() + HANG
                while proxy.completions < before + tries + 10:
                    assert asyncio.get_running_loop().time() < deadline
                    assert tokens(await generate(coordinator)) == expected
                    await asyncio.sleep(0.15)

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_replica_restarted_under_another_name_serves_its_half(tiny_pair: TinyPair, other_name_url: str):
    async def run() -> None:
        expected = await undisturbed(tiny_pair.theta_url, tiny_pair.t_url)
        async with FaultProxy(tiny_pair.theta_url).running() as proxy:
            config = CoordinatorConfig(theta_url=[proxy.url, tiny_pair.theta_url], t_url=tiny_pair.t_url, **OPTIONS)
            async with DualVLLMCoordinator(config) as coordinator:
                assert tokens(await in_mid_batch(coordinator, lambda: exchange(proxy, other_name_url))) == expected

    asyncio.run(asyncio.wait_for(run(), HANG))


@pytest.mark.parametrize(
    ("client", "make"),
    [(VLLMEngine, MarkovServer), (SGLangEngine, lambda chain: SGLangStub(lambda text: chain[text[-1]]))],
)
def test_a_server_that_does_not_tell_its_start_is_known_by_what_it_says(client: Any, make: Any):
    chain, other = (random_chain(np.random.default_rng(seed), 10) for seed in (1, 2))

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            urls = [
                (await stack.enter_async_context(make(transitions).running())).url
                for transitions in (chain, chain, other)
            ]
            proxy = await stack.enter_async_context(FaultProxy(urls[0]).running())
            engine = client(HttpTransport(proxy.url))
            await engine.probe([1, 2, 3])
            first = await engine.next_top_k([[1, 2]], 4)
            await exchange(proxy, urls[1])
            np.testing.assert_array_equal((await engine.next_top_k([[1, 2]], 4)).token_ids, first.token_ids)
            await exchange(proxy, urls[2])
            with pytest.raises(EngineReplacedError, match="other weights"):
                await engine.next_top_k([[1, 2]], 4)
            await engine.aclose()

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_server_that_was_started_again_without_sessions_is_sent_whole_texts(
    tiny_pair: TinyPair, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        engine = VLLMEngine(HttpTransport(tiny_pair.theta_url))
        try:
            found = await engine.probe([1, 2, 3])
            text = GrowingText([5, 6, 7])
            whole = await engine.next_top_k([text], 5)
            engine._capabilities = dataclasses.replace(found, sessions=True)  # as the server before it had them
            again = await engine.next_top_k([text], 5)
        finally:
            await engine.aclose()
        np.testing.assert_array_equal(whole.token_ids, again.token_ids)

    asyncio.run(main())
    assert "has no sessions any more" in caplog.text
