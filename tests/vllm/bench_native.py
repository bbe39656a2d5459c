"""The native engine's speed as ratios: against both servers generating plainly side by side, and the naive loop.

Two servers of one thread each and a native server of two; all three are up the whole time, and only one side is asked
at a time. Every round measures all modes in turn, so that a drift of the machine's speed meets them alike. Threads are
not bound to cores unless --bind says so: two bound threads of the native server wait for each other whenever another
process takes one of their cores::

    python -m tests.vllm.bench_native THETA T --concurrency 4 16 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
from collections.abc import Awaitable, Callable
from typing import Any

from dual_rollout import CoordinatorConfig
from dual_rollout.benchmark import Benchmark
from dual_rollout.engines import HttpTransport, NativeEngine
from tests.vllm.servers import NativeServer, VllmServer, running

MODES = ("both", "native plain", "native log q", "native scored", "naive")


async def measure(
    args: argparse.Namespace, dual: CoordinatorConfig, native: CoordinatorConfig, mode: str, concurrency: int
) -> float:
    """Tokens per second of one mode."""
    two = Benchmark(dual, max_tokens=args.max_tokens)
    one = Benchmark(native, max_tokens=args.max_tokens)
    runs: dict[str, Callable[[], Awaitable[float]]] = {
        "both": lambda: speed(two, "both"),
        "naive": lambda: speed(two, "naive"),
        "native plain": lambda: speed(one, "theta"),  # what any client of the server gets
        "native scored": lambda: speed(one, "auto"),  # `generate_batch`: with log π_θ of each token
    }

    async def speed(benchmark: Benchmark, name: str) -> float:
        return (await benchmark.run(name, concurrency, args.context)).tokens_per_second

    if mode == "native log q":
        return await with_log_q(one, native, concurrency, args)
    return await runs[mode]()


async def with_log_q(
    benchmark: Benchmark, config: CoordinatorConfig, concurrency: int, args: argparse.Namespace
) -> float:
    """Tokens with log q*, α and ψ, without scoring by π_θ: what a trainer needs that computes log π_θ itself."""
    transport = HttpTransport(config.theta_url)
    engine = NativeEngine(transport)
    loop = asyncio.get_running_loop()
    try:
        await engine.attach(1.0)
        for salt in (1, 3):
            prompts = await benchmark._prompts(concurrency, args.context, salt)
            started = loop.time()
            samples = (
                engine.generate(prompt, max_tokens=args.max_tokens, temperature=1.0, ignore_eos=True)
                for prompt in prompts
            )
            drawn = await asyncio.gather(*samples)
            seconds = loop.time() - started
        return sum(len(sample.token_ids) for sample in drawn) / seconds
    finally:
        await transport.aclose()


def placement(bind: bool, threads: int) -> dict[str, Any]:
    """Options of a server of so many threads; the harness binds them to cores by itself."""
    unbound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return {} if bind else {"environment": unbound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("theta")
    parser.add_argument("t")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--bind", action="store_true", help="bind each server's threads to cores")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are stopped
    plain = placement(args.bind, threads=1)
    theta, t = VllmServer(args.theta, core=0, **plain), VllmServer(args.t, core=1, **plain)
    native = NativeServer(args.theta, args.t, **placement(args.bind, threads=2))
    with running(native), running(theta, t):
        dual = CoordinatorConfig(theta_url=theta.url, t_url=t.url)
        alone = CoordinatorConfig(engine="native", theta_url=native.url)
        for concurrency in args.concurrency:
            speeds: dict[str, list[float]] = {mode: [] for mode in args.modes}
            for _ in range(args.rounds):
                for mode in args.modes:
                    speeds[mode].append(asyncio.run(measure(args, dual, alone, mode, concurrency)))
            both = speeds.get("both")
            for mode, values in speeds.items():
                of_both = [value / base for value, base in zip(values, both or values, strict=True)]
                print(
                    f"concurrency {concurrency:3d}  {mode:14}{statistics.median(values):8.1f} tok/s   of both: "
                    f"{statistics.median(of_both):5.2f}  ({min(of_both):.2f} to {max(of_both):.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
