"""SGLang's lists as base64 against nested JSON: bytes of a position, and the client's time to read it.

    python -m tests.bench_binary_lists [--top-k 100] [--prompts 64] [--repeat 200]

A stub writes the same answer in both forms, once; then the client's own code reads each again and again, JSON included.
Both are read in turns by one process, so their ratio hardly depends on what else the machine does; the times do.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import aiohttp
import numpy as np
import orjson

from dual_rollout.functional.top_k import TopK
from dual_rollout.servers.sglang_answers import BINARY_LISTS, SGLangParser
from dual_rollout.servers.sglang_requests import sampling
from tests.markov_server import random_chain
from tests.sglang_stub import SGLangStub, markov

VOCABULARY = 1000


async def answers(prompts: int, k: int) -> tuple[bytes, bytes]:
    """What a server says of the next token of some prompts: nested, and as base64."""
    chain = random_chain(np.random.default_rng(0), VOCABULARY)
    request: dict[str, Any] = {
        "input_ids": [[i % VOCABULARY] for i in range(prompts)],
        "sampling_params": sampling(),
        "return_logprob": True,
        "top_logprobs_num": k,
        "rid": [str(i) for i in range(prompts)],
    }
    async with SGLangStub(markov(chain), binary_lists=True).running() as stub, aiohttp.ClientSession() as session:
        bodies = []
        for flags in ({}, BINARY_LISTS):
            async with session.post(f"{stub.url}/generate", json={**request, **flags}) as answer:
                bodies.append(orjson.dumps(orjson.loads(await answer.read())))  # without the blanks of Python's JSON
    return bodies[0], bodies[1]


def read(body: bytes, k: int) -> TopK:
    parser = SGLangParser("http://bench")
    metas = [parser.meta_info(answer, [0], lambda _: True) for answer in orjson.loads(body)]
    return parser.next_lists(metas, k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=64, help="positions of an answer")
    parser.add_argument("--repeat", type=int, default=200)
    args = parser.parse_args()
    bodies = asyncio.run(answers(args.prompts, args.top_k))
    one, other = (read(body, args.top_k) for body in bodies)
    assert (one.token_ids == other.token_ids).all() and (one.logprobs == other.logprobs).all()
    seconds: list[list[float]] = [[], []]
    for _ in range(args.repeat):
        for body, times in zip(bodies, seconds, strict=True):
            start = time.process_time()
            read(body, args.top_k)
            times.append(time.process_time() - start)
    print("| lists | bytes per position | µs per position (median) |\n|---|---|---|")
    sizes = [len(body) / args.prompts for body in bodies]
    micros = [1e6 * float(np.median(times)) / args.prompts for times in seconds]
    for name, size, micro in zip(("nested JSON", "base64"), sizes, micros, strict=True):
        print(f"| {name} | {size:.0f} | {micro:.1f} |")
    print(f"| ratio | {sizes[0] / sizes[1]:.1f} | {micros[0] / micros[1]:.1f} |")


if __name__ == "__main__":
    main()
