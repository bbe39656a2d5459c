"""Several servers of one model: shared load, sequences that stay and move, weights that reach all."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.exceptions import EngineProtocolError, EngineRestartedError, EngineUnavailableError
from dual_rollout.server.launch import EmbeddedServer
from dual_rollout.servers import HttpTransport, Replicas, VLLMEngine, identity, replica_pool
from tests import fault_proxy
from tests.fault_proxy import Exchange, FaultProxy
from tests.hang import HANG
from tests.integration.conftest import TinyPair
from tests.markov_server import MarkovServer, random_chain
from tests.tiny_model import perturbed_copy
from tests.warm_servers import WarmServer

V = 10
THETA, T = (random_chain(np.random.default_rng(seed), V) for seed in (1, 2))
FLAGS = ["--max-logprobs", "-1", "--max-model-len", "256", "--threads", "1"]
OPTIONS: dict[str, Any] = {"top_k": V, "seed": 5, "decoding": "lockstep", "max_retries": 2, "request_timeout": 20.0}


def tokens(outputs: list[GenerationOutput]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


@pytest.fixture(autouse=True)
def _short_probation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_pool, "_FIRST_PROBATION_S", 0.1)


@pytest.mark.parametrize("options", [{}, {"decoding": "block"}, {"support": "tail", "top_k": 3}], ids=str)
def test_replicas_give_the_tokens_of_one_server(options: dict[str, Any]) -> None:
    prompts = [[i % V, 2] for i in range(12)]

    async def run(count: int) -> tuple[list[list[int]], list[MarkovServer]]:
        servers = [MarkovServer(THETA) for _ in range(count)] + [MarkovServer(T) for _ in range(count)]
        async with asyncio.timeout(60), contextlib.AsyncExitStack() as stack:
            urls = [(await stack.enter_async_context(server.running())).url for server in servers]
            config = CoordinatorConfig(theta_url=urls[:count], t_url=urls[count:], **{**OPTIONS, **options})
            async with DualVLLMCoordinator(config) as coordinator:
                return tokens(await coordinator.generate_batch(prompts, max_tokens=8)), servers

    one, _ = asyncio.run(run(1))
    three, servers = asyncio.run(run(3))
    assert one == three
    for server in servers:
        assert len(server.requests) >= 8, "each has its share"


def test_a_sequence_stays_with_its_replica() -> None:
    """No two of the servers see prompts that begin alike, but for what is asked of all or of nobody's sequence."""

    async def run() -> None:
        servers = [MarkovServer(THETA), MarkovServer(THETA), MarkovServer(T)]
        async with servers[0].running() as a, servers[1].running() as b, servers[2].running() as t:
            config = CoordinatorConfig(theta_url=[a.url, b.url], t_url=t.url, **OPTIONS)
            async with DualVLLMCoordinator(config) as coordinator:
                await coordinator.generate_batch([[i % V, i // V, 7] for i in range(30)], max_tokens=6)
        seen = [
            {
                tuple(prompt[:3])
                for request in server.requests
                for prompt in request["prompt"]
                if isinstance(prompt, list) and len(prompt) in (4, 5, 6)
            }
            for server in servers[:2]
        ]
        assert len(seen[0]) == len(seen[1]) == 15 and not seen[0] & seen[1]

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_replica_that_fails_is_replaced_and_comes_back(tiny_pair: TinyPair) -> None:
    prompts = [[10 + i, 20] for i in range(8)]

    async def run() -> None:
        async with FaultProxy(tiny_pair.t_url).running() as a, FaultProxy(tiny_pair.t_url).running() as b:
            async with DualVLLMCoordinator(
                CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, **{**OPTIONS, "top_k": 20})
            ) as alone:
                expected = tokens(await alone.generate_batch(prompts, max_tokens=10))
            config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=[a.url, b.url], **{**OPTIONS, "top_k": 20})
            async with DualVLLMCoordinator(config) as coordinator:
                task = asyncio.create_task(coordinator.generate_batch(prompts, max_tokens=10))
                while coordinator.stats.decoding.tokens < 16:
                    await asyncio.sleep(0.001)
                await a.stop()
                assert tokens(await task) == expected
                before = b.completions
                await a.start()
                at_a = a.completions
                while a.completions <= at_a + 5:
                    assert tokens(await coordinator.generate_batch(prompts, max_tokens=10)) == expected
                assert b.completions > before

    asyncio.run(asyncio.wait_for(run(), HANG))


@pytest.mark.parametrize(("seconds", "taken_out"), [(0.05, False), (30.0, True)])
def test_a_very_slow_replica(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, seconds: float, taken_out: bool
) -> None:
    """It holds up its sequences until the time-out at most, and changes no token."""
    monkeypatch.setattr(replica_pool, "_FIRST_PROBATION_S", HANG)  # the run ends before it is tried again
    prompts = [[10 + i, 20] for i in range(6)]
    options = {**OPTIONS, "top_k": 20, "request_timeout": 4.0 if taken_out else 60.0}

    async def late(exchange: Exchange) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        status, content = await exchange.ask()
        return web.Response(body=content, status=status, content_type="application/json")

    async def run() -> None:
        async with FaultProxy(tiny_pair.t_url, late, lambda number: number > 20).running() as slow:
            config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, **options)
            async with DualVLLMCoordinator(config) as alone:
                expected = tokens(await alone.generate_batch(prompts, max_tokens=20))
            urls = [slow.url, tiny_pair.t_url]
            config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=urls, **options)
            async with DualVLLMCoordinator(config) as coordinator:
                assert tokens(await coordinator.generate_batch(prompts, max_tokens=20)) == expected
            assert slow.injected >= 1
            assert (slow.injected <= 3) is taken_out, "no round waits for it again while it is out"

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_replica_that_answers_nonsense_is_replaced(tiny_pair: TinyPair) -> None:
    async def run() -> None:
        async with FaultProxy(tiny_pair.t_url, fault_proxy.error(500), lambda number: number > 30).running() as a:
            config = CoordinatorConfig(
                theta_url=tiny_pair.theta_url, t_url=[a.url, tiny_pair.t_url], **{**OPTIONS, "top_k": 20}
            )
            async with DualVLLMCoordinator(config) as coordinator:
                tokens(await coordinator.generate_batch([[10 + i, 20] for i in range(8)], max_tokens=30))
            assert a.injected >= 2, "asked once more before it is taken out"

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_prompt_that_no_replica_can_answer_takes_none_out(tiny_pair: TinyPair) -> None:
    async def fault(exchange: Exchange) -> web.StreamResponse:
        status, content = await exchange.ask()
        if any(prompt[:1] == [77] for prompt in exchange.prompts):
            status, content = 500, b"{}"
        return web.Response(body=content, status=status, content_type="application/json")

    async def run() -> None:
        async with FaultProxy(tiny_pair.t_url, fault).running() as a, FaultProxy(tiny_pair.t_url, fault).running() as b:
            config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=[a.url, b.url], **{**OPTIONS, "top_k": 20})
            async with DualVLLMCoordinator(config) as coordinator:
                prompts = [[10, 20], [77, 20], [11, 20]]
                outputs = await coordinator.generate_batch(prompts, max_tokens=4)
                assert [output.error is None for output in outputs] == [True, False, True]

    asyncio.run(asyncio.wait_for(run(), HANG))


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("fault", [fault_proxy.reset, fault_proxy.error(429), fault_proxy.error(500), fault_proxy.hang])
def test_replicas_that_say_they_are_well_and_answer_nothing_are_reported(
    tiny_pair: TinyPair, fault: fault_proxy.Fault
) -> None:
    async def run() -> None:
        async with FaultProxy(tiny_pair.t_url).running() as a, FaultProxy(tiny_pair.t_url).running() as b:
            options = {**OPTIONS, "top_k": 20, "max_retries": 1, "request_timeout": 1.0}
            config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=[a.url, b.url], **options)
            async with DualVLLMCoordinator(config) as coordinator:
                tokens(await coordinator.generate_batch([[10, 20]], max_tokens=2))
                a.fault = b.fault = fault
                outputs = await coordinator.generate_batch([[10 + i, 20] for i in range(4)], max_tokens=4)
                assert all(a.url in str(output.error) and output.generated_tokens == [] for output in outputs)
                a.fault = b.fault = None
                tokens(await coordinator.generate_batch([[10, 20]], max_tokens=2))

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_replica_that_does_not_confirm_new_weights_stays_out_until_it_does() -> None:
    """The second of two answers nonsense to the update, once: it may have the old weights, and is given them again."""

    class Server:
        def __init__(self, url: str, nonsense: int):
            self.url, self.nonsense, self.weights = url, nonsense, "old"

        async def health(self) -> None:
            pass

        async def check_sees(self, path: str) -> None:
            pass

        async def reload_weights(self, path: str) -> None:
            if self.nonsense:
                self.nonsense -= 1
                raise EngineProtocolError("HTTP 500", url=self.url)
            self.weights = path

    async def run() -> None:
        servers = [Server("a", 0), Server("b", 1), Server("c", 2)]
        both = Replicas(servers, max_retries=0)  # type: ignore[arg-type]
        await both.reload_weights("new")
        assert [server.weights for server in servers] == ["new", "new", "old"]
        assert await both.each(lambda engine: asyncio.sleep(0, engine.url)) == ["a", "b"]
        while servers[2].weights != "new":
            await both.health()
            await asyncio.sleep(0.05)
        assert await both.each(lambda engine: asyncio.sleep(0, engine.url)) == ["a", "b", "c"]

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_when_all_are_gone_it_is_said() -> None:
    async def run() -> None:
        urls = ["http://127.0.0.1:9", "http://127.0.0.1:10"]
        engine = Replicas([VLLMEngine(HttpTransport(url, max_retries=0)) for url in urls], max_retries=1)
        with pytest.raises(EngineUnavailableError, match="no replica is left") as caught:
            await engine.describe()
        assert all(url in str(caught.value) for url in urls) and caught.value.url == engine.url

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_replicas_of_different_models_are_refused(tiny_pair: TinyPair) -> None:
    async def run() -> None:
        async with MarkovServer(THETA).running() as a, MarkovServer(T).running() as b:
            config = CoordinatorConfig(theta_url=[a.url, b.url], t_url=b.url, **OPTIONS)
            async with DualVLLMCoordinator(config) as coordinator:
                with pytest.raises(EngineProtocolError, match="replicas do not serve one model"):
                    await coordinator.generate_batch([[3, 1]], max_tokens=2)

    asyncio.run(asyncio.wait_for(run(), HANG))


# ---- weights --------------------------------------------------------------------------------------------------------


def test_a_sequence_that_would_mix_weights_is_an_error() -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            theta, t = [await stack.enter_async_context(MarkovServer(chain).running()) for chain in (THETA, T)]
            config = CoordinatorConfig(theta_url=theta.url, t_url=t.url, **OPTIONS)
            async with DualVLLMCoordinator(config) as opened:
                opened.weight_version = 3
                task = asyncio.create_task(opened.generate_batch([[1], [2]], max_tokens=200))
                while opened.stats.decoding.tokens < 10:
                    await asyncio.sleep(0.001)
                opened.weight_version = 4
                assert all("from version 3 to 4" in str(output.error) for output in await task)
                (output,) = await opened.generate_batch([[1]], max_tokens=5)
                assert output.error is None and output.weight_version == 4

    asyncio.run(asyncio.wait_for(run(), HANG))


async def restart(server: EmbeddedServer, meanwhile: Any = None) -> None:
    """In no less time than a start by its command takes, on which the client counts."""
    assert server.process is not None
    server.process.kill()
    await asyncio.to_thread(server.process.wait)
    if meanwhile is not None:
        await meanwhile
    await asyncio.sleep(identity._IDLE_S + 0.1)
    await asyncio.to_thread(server.start)


async def answers(engine: Any) -> bool:
    try:
        await engine.next_top_k([[10, 20, 30]], 1)
    except EngineRestartedError:
        return False
    return True


async def best(engine: Any) -> float:
    return float((await engine.next_top_k([[10, 20, 30]], 1)).logprobs.max())


def test_new_weights_reach_all_and_one_that_missed_them_stays_out(
    tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Server b is killed; it comes back with the old weights. While their folder is there it is given the new ones;
    once that is gone it stays out, and the next weights bring it back."""
    new, newer = (perturbed_copy(tiny_models[0], tmp_path / str(i), noise=0.5, seed=i) for i in (7, 8))
    gone = tmp_path / "gone"

    async def run(a: EmbeddedServer, b: EmbeddedServer) -> None:
        engines = [VLLMEngine(HttpTransport(server.url, max_retries=0)) for server in (a, b)]
        both = Replicas(engines, max_retries=1)
        try:
            old = await best(both)
            await both.reload_weights(str(new))
            value = await best(engines[0])
            assert abs(value - old) > 1e-3 and await best(engines[1]) == pytest.approx(value, abs=1e-4)

            await restart(b)
            with pytest.raises(EngineRestartedError, match="restarted"):
                await engines[1].next_top_k([[10, 20, 30]], 1)
            while not await answers(
                engines[1]
            ):  # b is asked for the second of the two: found out, and given the weights
                top = await both.next_top_k([[10, 20, 30], [10, 20, 30]], 1)
                assert top.logprobs.max(axis=1) == pytest.approx([value, value], abs=1e-4)
                await asyncio.sleep(0.05)
            assert await best(engines[1]) == pytest.approx(value, abs=1e-4)

            new.rename(gone)
            await restart(b)
            for _ in range(4):
                top = await both.next_top_k([[10, 20, 30], [10, 20, 30]], 1)
                assert top.logprobs.max(axis=1) == pytest.approx([value, value], abs=1e-4)
                await asyncio.sleep(0.2)
            await both.reload_weights(str(newer))
            assert await best(engines[0]) != pytest.approx(value, abs=1e-3)
            assert await best(engines[1]) == pytest.approx(await best(engines[0]), abs=1e-4)
        finally:
            await both.aclose()
            for engine in engines:
                await engine.aclose()

    with WarmServer(tiny_models[0], FLAGS) as a, WarmServer(tiny_models[0], FLAGS) as b:
        asyncio.run(asyncio.wait_for(run(a, b), HANG))


def test_another_process_uses_only_what_took_the_weights_and_notices_restarts(
    tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """One client gives the weights, as the main process does, another one is told. Both weights are so alike that the
    comparison of replicas lets either pass."""
    new, newer = (perturbed_copy(tiny_models[0], tmp_path / str(i), noise=0.02, seed=i) for i in (7, 8))

    async def run(a: EmbeddedServer, b: EmbeddedServer) -> None:
        giver, told = ([VLLMEngine(HttpTransport(s.url, max_retries=0)) for s in (a, b)] for _ in range(2))
        main, other = Replicas(giver, max_retries=1), Replicas(told, max_retries=1)
        alone = VLLMEngine(HttpTransport(b.url, max_retries=0))

        def tell(to: Any, what: Any) -> None:
            to.adopt_weights(pickle.loads(pickle.dumps(what)))

        async def check(expected: float) -> None:
            for _ in range(4):  # of two prompts each replica that is in gets one
                top = await other.next_top_k([[10, 20, 30], [10, 20, 30]], 1)
                assert top.logprobs.max(axis=1) == pytest.approx([expected, expected], abs=1e-4)
                await asyncio.sleep(0.2)

        try:
            old = await best(other)
            await check(old)
            await restart(b, meanwhile=main.reload_weights(str(new)))  # back with the old weights
            value = await best(giver[0])
            assert 1e-3 < abs(value - old) < 0.3
            tell(other, main.weights_given())
            await check(value)

            await main.reload_weights(str(newer))
            value = await best(giver[1])
            assert 1e-3 < abs(value - old) < 0.3 and value == pytest.approx(await best(giver[0]), abs=1e-4)
            tell(other, main.weights_given())
            tell(alone, giver[1].weights_given())
            await check(value)
            assert await best(told[1]) == pytest.approx(await best(alone), abs=1e-4)

            await restart(a)
            await check(value)  # b alone goes on
            await restart(b)
            with pytest.raises(EngineRestartedError, match="restarted"):
                await best(alone)
        finally:
            for client in (main, other, *giver, *told, alone):
                await client.aclose()

    with WarmServer(tiny_models[0], FLAGS) as a, WarmServer(tiny_models[0], FLAGS) as b:
        asyncio.run(asyncio.wait_for(run(a, b), HANG))
