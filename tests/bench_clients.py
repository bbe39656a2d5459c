"""Many clients at once at one embedded server: how long it is silent, what memory it takes, how fast it stops.

    python -m tests.bench_clients --model outputs/models/SmolLM2-135M-Instruct --clients 200

Every client asks for the log-probabilities of a prompt and of a few tokens, without a pause, until the server is told
to stop. Prints the answers by status, the longest silence of `/health`, resident memory, and the seconds until it is
gone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import aiohttp
import psutil

from dual_rollout.server.launch import EmbeddedServer


async def ask(session: aiohttp.ClientSession, url: str, index: int, answered: list[int]) -> None:
    body = {
        "model": "m",
        "prompt": [(17 * index + i) % 1000 + 5 for i in range(200)],
        "max_tokens": 8,
        "logprobs": 100,
        "prompt_logprobs": 100,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    with contextlib.suppress(aiohttp.ClientError):
        while True:
            async with session.post(url + "/v1/completions", json=body) as response:
                await response.read()
                answered.append(response.status)


async def watch(session: aiohttp.ClientSession, url: str, process: psutil.Process, seconds: float) -> tuple[float, int]:
    """The longest silence of `/health`, in seconds, and the largest resident memory, in bytes."""
    silence, memory, end = 0.0, 0, time.monotonic() + seconds
    while time.monotonic() < end:
        asked = time.monotonic()
        async with session.get(url + "/health"):
            silence = max(silence, time.monotonic() - asked)
        memory = max(memory, process.memory_info().rss)
        await asyncio.sleep(0.2)
    return silence, memory


async def load(url: str, pid: int, clients: int, seconds: float) -> None:
    answered: list[int] = []
    process = psutil.Process(pid)
    before = process.memory_info().rss
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        tasks = [asyncio.create_task(ask(session, url, i, answered)) for i in range(clients)]
        silence, memory = await watch(session, url, process, seconds)
        stopped = time.monotonic()
        os.kill(pid, signal.SIGINT)
        while psutil.pid_exists(pid) and process.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.05)
        stopped = time.monotonic() - stopped
        for task in tasks:
            task.cancel()
    statuses = {status: answered.count(status) for status in sorted(set(answered))}
    print(f"{clients} clients, {seconds:g} s: answers {statuses}")
    print(
        f"/health silent for {silence:.1f} s at most; resident memory {before / 2**20:.0f} to {memory / 2**20:.0f} MiB"
    )
    print(f"stopped {stopped:.1f} s after SIGINT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with EmbeddedServer(options.model, ["--max-logprobs", "100", "--served-model-name", "m"]) as server:
        assert server.process is not None
        asyncio.run(load(server.url, server.process.pid, options.clients, options.seconds))


if __name__ == "__main__":
    main()
