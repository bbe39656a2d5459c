"""Many short sequences: none lost or doubled, nothing beyond its bound. `tests/bench_soak.py` is the long one."""

from __future__ import annotations

import asyncio
import json
import os

from aiohttp import web

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from tests.bench_soak import prompt, soak
from tests.fault_proxy import Exchange, FaultProxy, passed_on
from tests.hang import HANG
from tests.integration.conftest import TinyPair


def test_some_hundred_sequences(tiny_pair: TinyPair) -> None:
    files = len(os.listdir("/proc/self/fd"))

    async def run() -> None:
        kept, table, coordinator = await soak(
            tiny_pair.theta_url, tiny_pair.t_url, sequences=300, concurrency=32, max_tokens=3, readings=5
        )
        assert sorted(kept) == list(range(100)) and coordinator.stats.decoding.tokens <= 900
        assert max(reading.queue for reading in table) <= 2 * 32  # as many again whose records are completed
        assert max(reading.open_files for reading in table) <= files + 2 * 32 + 16
        config = CoordinatorConfig(
            theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=20, seed=1, decoding="lockstep"
        )
        async with DualVLLMCoordinator(config) as alone:
            outputs = await alone.generate_batch([prompt(i) for i in range(20)], max_tokens=3)
        assert [output.generated_tokens for output in outputs] == [kept[i].generated_tokens for i in range(20)]

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_by_default_each_sequence_has_a_connection(tiny_pair: TinyPair) -> None:
    """Where a sequence is a request, as in drawing from π_θ alone or by the native engine: 40 are open at once, which
    the answers wait for."""

    async def wait_for_all(exchange: Exchange) -> web.StreamResponse:
        while json.loads(exchange.body)["max_tokens"] > 1 and theta.most_open < 40:
            await asyncio.sleep(0.01)
        return await passed_on(exchange)

    async def run() -> None:
        async with theta.running():
            config = CoordinatorConfig(theta_url=theta.url, t_url=tiny_pair.t_url, top_k=20, max_concurrency=40)
            async with DualVLLMCoordinator(config) as coordinator:
                outputs = await coordinator.generate_batch(
                    [prompt(i) for i in range(40)], targets=["none"] * 40, max_tokens=2
                )
            assert all(output.error is None for output in outputs) and theta.most_open == 40

    theta = FaultProxy(tiny_pair.theta_url, wait_for_all)
    asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_server_never_has_more_than_its_bound(tiny_pair: TinyPair) -> None:
    """Drafts go out in one request per sequence: `connection_pool_size` of them at once, and the others wait here."""

    async def run() -> None:
        async with FaultProxy(tiny_pair.theta_url).running() as theta, FaultProxy(tiny_pair.t_url).running() as t:
            config = CoordinatorConfig(
                theta_url=theta.url, t_url=t.url, top_k=20, seed=1, decoding="block", connection_pool_size=3
            )
            async with DualVLLMCoordinator(config) as coordinator:
                outputs = await coordinator.generate_batch([prompt(i) for i in range(24)], max_tokens=4)
            assert all(output.error is None for output in outputs)
            assert theta.most_open == 3 and t.most_open <= 3

    asyncio.run(asyncio.wait_for(run(), HANG))
