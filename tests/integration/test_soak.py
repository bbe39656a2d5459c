"""Many short sequences: none lost or doubled, nothing beyond its bound. `tests/bench_soak.py` is the long one."""

from __future__ import annotations

import asyncio
import os

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from tests.bench_soak import prompt, soak
from tests.fault_proxy import FaultProxy
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
