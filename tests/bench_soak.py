"""Ten thousand short sequences against two embedded servers with tiny models: is anything lost, doubled or kept?

    python -m tests.bench_soak --sequences 10000 --concurrency 256

Prints, as it goes: sequences done, tokens per second, this process's resident memory and open files, and the most
sequences that a server had running and waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.server.launch import EmbeddedServer
from dual_rollout.types import GenerationRequest
from tests.tiny_model import make_tiny_model, perturbed_copy


@dataclass(frozen=True)
class Reading:
    """`queue` is the most sequences that a server had at once since the last reading, running and waiting."""

    done: int
    seconds: float
    rss_mb: float
    open_files: int
    queue: int

    def __str__(self) -> str:
        return f"{self.done:8d} {self.seconds:8.1f} s {self.rss_mb:8.1f} MB {self.open_files:5d} files {self.queue:5d}"


def prompt(index: int) -> list[int]:
    """No two alike, below 2^21."""
    return [5, 20 + index % 128, 20 + index // 128 % 128, 20 + index // 16384]


async def soak(
    theta_url: str, t_url: str, *, sequences: int, concurrency: int, max_tokens: int, readings: int
) -> tuple[dict[int, GenerationOutput], list[Reading], DualVLLMCoordinator]:
    """The first 100 outputs by index, and what was read on the way. An index that comes twice is an error."""
    config = CoordinatorConfig(
        theta_url=theta_url, t_url=t_url, top_k=20, seed=1, max_concurrency=concurrency, decoding="lockstep"
    )
    seen, kept, table = bytearray(sequences), dict[int, GenerationOutput](), list[Reading]()
    requests = (GenerationRequest(i, prompt(i)) for i in range(sequences))
    queue, started = 0, time.perf_counter()

    async def watch() -> None:
        nonlocal queue
        while True:
            queue = max(queue, *await asyncio.gather(*(asyncio.to_thread(_in_server, u) for u in (theta_url, t_url))))
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    try:
        async with DualVLLMCoordinator(config) as coordinator:
            async for index, output in coordinator.generate_iter(requests, max_tokens=max_tokens):
                if seen[index] or output.error is not None or output.prompt_token_ids != prompt(index):
                    raise RuntimeError(f"sequence {index}: doubled or wrong ({output.error})")
                seen[index] = 1
                if index < 100:
                    kept[index] = output
                if sum(seen) % (sequences // readings) == 0:
                    files = len(os.listdir("/proc/self/fd"))
                    table.append(Reading(sum(seen), time.perf_counter() - started, _rss_mb(), files, queue))
                    queue = 0
    finally:
        watching.cancel()
    if not all(seen):
        raise RuntimeError(f"{sequences - sum(seen)} sequences are lost")
    return kept, table, coordinator


def _in_server(url: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(int(float(value)) for value in re.findall(r"^vllm:num_requests_\w+\{.*\} (\S+)$", text, re.MULTILINE))


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=8)
    args = parser.parse_args()
    flags = ["--max-logprobs", "20", "--max-model-len", "64", "--threads", "1"]
    with tempfile.TemporaryDirectory() as folder:
        theta = make_tiny_model(Path(folder) / "theta", logit_scale=2.0)
        t = perturbed_copy(theta, Path(folder) / "t", noise=0.2)
        with EmbeddedServer(theta, flags) as a, EmbeddedServer(t, flags) as b:
            _, table, coordinator = asyncio.run(
                soak(
                    a.url,
                    b.url,
                    sequences=args.sequences,
                    concurrency=args.concurrency,
                    max_tokens=args.max_tokens,
                    readings=20,
                )
            )
    print("    done      time      memory        open  queue")
    for reading in table:
        print(reading)
    stats = coordinator.stats
    print(f"{stats.decoding.tokens} tokens, {stats.tokens_per_second:.0f} per second, {stats.retries} retries")


if __name__ == "__main__":
    main()
