"""What `support: tail` costs beside `support: union`, on two servers that are already running.

    python recipes/evidence/tail_cost.py --theta-url http://127.0.0.1:8000 --t-url http://127.0.0.1:8001

Both draw the same number of tokens after the same chat prompts, in turns, first one and then the other, so that a drift
of the machine's speed meets both alike; the figure to quote is the median of the ratios within a turn. Lockstep.
recipes/bench/README.md says how to start the servers. Results are written to recipes/evidence/results/tail_cost.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from dual_rollout.training.tasks import load_task

RESULTS = Path(__file__).parent / "results" / "tail_cost.json"
SUPPORTS = ("union", "tail")


async def batch(coordinator: DualVLLMCoordinator, prompts: list[Any], max_tokens: int) -> dict[str, float]:
    """Speed of one batch, and what it asked for."""
    stats = coordinator.stats
    before = stats.theta.requests + stats.t.requests, stats.decoding.tail_tokens
    started = time.perf_counter()
    outputs = await coordinator.generate_batch(prompts, max_tokens=max_tokens)
    seconds = time.perf_counter() - started
    failed = [output.error for output in outputs if output.error is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} sequences failed: {failed[0]}")
    tokens = sum(len(output.generated_tokens) for output in outputs)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "requests_per_token": (stats.theta.requests + stats.t.requests - before[0]) / tokens,
        "tail_tokens": (stats.decoding.tail_tokens - before[1]) / tokens,
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows, _ = load_task("chain_sum", size=options.concurrency * (options.turns + 1), seed=0, options={})
    prompts = [row["prompt"] for row in rows]
    turns: list[dict[str, dict[str, float]]] = []
    async with contextlib.AsyncExitStack() as stack:
        coordinators = {
            support: await stack.enter_async_context(
                DualVLLMCoordinator(
                    CoordinatorConfig(
                        theta_url=options.theta_url,
                        t_url=options.t_url,
                        top_k=options.top_k,
                        support=support,
                        decoding="lockstep",
                        ignore_eos=True,
                        max_concurrency=options.concurrency,
                    )
                )
            )
            for support in SUPPORTS
        }
        for turn in range(options.turns + 1):
            some = prompts[turn * options.concurrency : (turn + 1) * options.concurrency]
            order = SUPPORTS if turn % 2 else SUPPORTS[::-1]  # the second finds the prompts in the cache
            found = {support: await batch(coordinators[support], some, options.max_tokens) for support in order}
            print(turn, json.dumps(found), flush=True)
            if turn:  # the first one finds out what the servers are
                turns.append(found)
    ratios = [turn["tail"]["tokens_per_second"] / turn["union"]["tokens_per_second"] for turn in turns]
    settings = {name: getattr(options, name) for name in ("top_k", "concurrency", "max_tokens", "turns", "servers")}
    return {
        "settings": settings,
        "speed_of_tail_to_union": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4),
        **{
            name: {support: statistics.fmean(turn[support][name] for turn in turns) for support in SUPPORTS}
            for name in ("tokens_per_second", "requests_per_token", "tail_tokens")
        },
        "turns": turns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theta-url", required=True)
    parser.add_argument("--t-url", required=True)
    parser.add_argument("--servers", default="", help="what they are, for the record")
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=16, help="sequences at once")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--turns", type=int, default=8)
    options = parser.parse_args()
    results = asyncio.run(measure(options))
    RESULTS.parent.mkdir(exist_ok=True)
    entries = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*entries, results], indent=1) + "\n")
    print(f"tail is {results['speed_of_tail_to_union']:.3f} times as fast as union")


if __name__ == "__main__":
    main()
