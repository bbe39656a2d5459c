"""What sessions are worth: lockstep on two vLLM servers that have them, by sessions and by whole texts, in turn.

    python -m tests.bench_sessions --theta-url URL --t-url URL --tokenizer FOLDER [--concurrency 4 16 64]
        [--support tail --top-k 20]

Both servers are started with the flags of docs/serving.md's "Sessions". `both` is plain generation by the two, side by
side. Rows are medians; ratios medians of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
import time
from collections.abc import AsyncIterator

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from dual_rollout.benchmark import Benchmark
from dual_rollout.servers import VLLMEngine

_WARM_UPS = 2  # each way finds out in how many groups it is fastest


async def lockstep(coordinator: DualVLLMCoordinator, prompts: list[list[int]], max_tokens: int) -> float:
    """Tokens per second."""
    started = time.perf_counter()
    for output in await coordinator.generate_batch(prompts, max_tokens=max_tokens):
        assert output.error is None, output.error
    return len(prompts) * max_tokens / (time.perf_counter() - started)


@contextlib.asynccontextmanager
async def coordinator_of(config: CoordinatorConfig, *, sessions: bool) -> AsyncIterator[DualVLLMCoordinator]:
    """With a tuner of its own; `sessions` False lets it take the servers for some that have none."""
    async with DualVLLMCoordinator(config) as coordinator:
        for engine in (coordinator.theta, coordinator.t):
            assert isinstance(engine, VLLMEngine)
            found = await engine.probe([1, 2, 3])
            if not found.sessions:
                raise SystemExit(f"{engine.url} has no sessions")
            engine._capabilities = dataclasses.replace(found, sessions=sessions)
        yield coordinator


async def main(args: argparse.Namespace) -> None:
    config = CoordinatorConfig(
        theta_url=args.theta_url,
        t_url=args.t_url,
        tokenizer=args.tokenizer,
        top_k=args.top_k,
        support=args.support,
        decoding="lockstep",
        ignore_eos=True,
        max_concurrency=max(args.concurrency),
    )
    bench = Benchmark(config, max_tokens=args.max_tokens)
    print(f"{'sequences':>9} {'both':>8} {'whole':>8} {'of both':>8} {'sessions':>9} {'of both':>8} {'of whole':>9}")
    for count in args.concurrency:
        turns = []
        async with coordinator_of(config, sessions=False) as whole, coordinator_of(config, sessions=True) as kept:
            for turn in range(args.repeat + _WARM_UPS):
                both = (await bench.run("both", count, args.context)).tokens_per_second
                speeds = [
                    await lockstep(coordinator, await bench._prompts(count, args.context), args.max_tokens)
                    for coordinator in (whole, kept)
                ]
                if turn >= _WARM_UPS:
                    turns.append((both, *speeds))
        both, *speeds = (statistics.median(column) for column in zip(*turns, strict=True))
        ratios = [statistics.median(turn[i] / turn[j] for turn in turns) for i, j in ((1, 0), (2, 0), (2, 1))]
        speed = f"{count:>9} {both:>8.0f} {speeds[0]:>8.0f} {ratios[0]:>8.2f}"
        print(f"{speed} {speeds[1]:>9.0f} {ratios[1]:>8.2f} {ratios[2]:>9.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--theta-url", required=True)
    parser.add_argument("--t-url", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--support", choices=["union", "tail"], default="union")
    parser.add_argument("--repeat", type=int, default=5)
    asyncio.run(main(parser.parse_args()))
