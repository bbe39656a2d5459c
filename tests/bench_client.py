"""What the client costs per token position: from the bytes of two servers' answers to a sampled, recorded token.

    python -m tests.bench_client --top-k 100 --batch 64

No sockets and no models: the transport replays answers of vLLM's shape, made from random but LLM-like distributions.
"total" is `generate_batch` on them, everything included; the parts are measured apart, and "record and loop" is what
remains of the total.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import orjson

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from dual_rollout import coordinator as coordinator_module
from dual_rollout.functional import merge_lists, next_token_distribution, sample_rows, solve_kl_symmetry
from dual_rollout.servers import HttpStats, HttpTransport, VLLMEngine
from dual_rollout.servers.from_config import Clients

VOCABULARY = 49_152
ANSWERS = 8  # different ones, replayed in turn


class ReplayTransport(HttpTransport):
    """Answers completions from prepared bytes; counts the seconds spent in JSON, and those of its own pretence."""

    def __init__(self, bodies: list[bytes]):
        super().__init__("http://replay")
        self.writing = self.reading = self.pretending = 0.0
        self._bodies = bodies
        self._turn = 0

    async def get(self, path: str) -> Any:
        return {"data": [{"id": "replay", "root": None, "max_model_len": None}]} if path == "/v1/models" else None

    async def get_text(self, path: str) -> str:
        return "process_start_time_seconds 1.0\n"  # what it says of one text differs from turn to turn

    async def post(self, path: str, payload: Any = None, **_: Any) -> Any:
        started = time.perf_counter()
        orjson.dumps(payload)
        self.writing += (written := time.perf_counter()) - started
        body = self._answer(payload)
        self.pretending += (ready := time.perf_counter()) - written
        answer = orjson.loads(body)
        self.reading += time.perf_counter() - ready
        self.answered = time.monotonic()
        return answer

    def _answer(self, payload: dict[str, Any]) -> bytes:
        prompts = payload["prompt"] if isinstance(payload["prompt"][0], list) else [payload["prompt"]]
        if payload.get("prompt_logprobs") is not None:
            body = scores(prompts[0])
        else:
            body = self._bodies[self._turn % len(self._bodies)]
            self._turn += 1
            if len(prompts) < body.count(b'"index":'):
                answer = orjson.loads(body)  # the probe and the last rounds ask for fewer
                body = orjson.dumps({**answer, "choices": answer["choices"][: len(prompts)]})
        body = body.replace(b"cmpl-0", f"cmpl-{payload.get('request_id', 0)}".encode(), 1)
        return body.replace(b'"prompt_tokens":0', b'"prompt_tokens":%d' % sum(map(len, prompts)), 1)


class Replays(Clients):
    """Clients whose transports replay `bodies`, π_θ's server's and π_t's."""

    def __init__(self, config: CoordinatorConfig, bodies: tuple[list[bytes], list[bytes]]):
        super().__init__(config)
        self.transports: list[ReplayTransport] = []
        self._bodies = bodies

    def transport(self, url: str, stats: HttpStats, max_retries: int | None = None) -> HttpTransport:
        self.transports.append(ReplayTransport(self._bodies[len(self.transports)]))
        return self.transports[-1]


def scores(prompt: list[int]) -> bytes:
    """An answer to a request for the log-probabilities of the prompt's own tokens."""
    rows = [None, *({str(token): {"logprob": -3.0, "rank": 9}} for token in prompt[1:])]
    return orjson.dumps({"id": "cmpl-0", "choices": [{"index": 0, "prompt_logprobs": rows}]})


def answer(logits: np.ndarray, top_k: int) -> bytes:
    """A completions answer of vLLM for `(B, V)` logits at temperature 0, float32 log-probabilities."""
    logp = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    choices = []
    for index, row in enumerate(logp):
        top = np.argsort(-row)[:top_k]
        listed = {f"token_id:{i}": float(row[i]) for i in top.tolist()}
        first = next(iter(listed))
        logprobs = {
            "text_offset": [0],
            "token_logprobs": [listed[first]],
            "tokens": [first],
            "top_logprobs": [listed],
        }
        choices.append(
            {
                "index": index,
                "text": " the",
                "logprobs": logprobs,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
            }
        )
    usage = {"prompt_tokens": 0, "completion_tokens": len(choices), "prompt_tokens_details": None}
    head = {"id": "cmpl-0", "object": "text_completion", "model": "replay"}
    return orjson.dumps({**head, "choices": choices, "usage": usage})


def make_answers(batch: int, top_k: int) -> tuple[list[bytes], list[bytes]]:
    """Zipf-like distributions over a shuffled vocabulary; π_t's logits are π_θ's plus noise."""
    rng = np.random.default_rng(0)
    theta, t = [], []
    for _ in range(ANSWERS):
        zipf = -1.3 * np.log(np.arange(1, VOCABULARY + 1))
        logits = np.stack([rng.permutation(zipf) for _ in range(batch)]) + rng.normal(size=(batch, VOCABULARY)) * 0.5
        theta.append(answer(logits, top_k))
        t.append(answer(logits + rng.normal(size=logits.shape) * 0.7, top_k))
    return theta, t


def milliseconds(run: Callable[[], Any], repeats: int = 30) -> float:
    """The median over `repeats` runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))


async def measure_total(
    bodies: tuple[list[bytes], list[bytes]], batch: int, top_k: int, prompt_tokens: int, max_tokens: int
) -> tuple[float, list[ReplayTransport]]:
    """Seconds of `generate_batch` without the replay's own work, and both transports."""
    config = CoordinatorConfig(top_k=top_k, seed=0, max_concurrency=batch, decoding="lockstep")
    replays = Replays(config, bodies)
    with mock.patch.object(coordinator_module, "Clients", return_value=replays):
        coordinator = DualVLLMCoordinator(config)
    transports = replays.transports
    prompts = np.random.default_rng(1).integers(0, VOCABULARY, (batch, prompt_tokens)).tolist()
    await coordinator.generate_batch(prompts, max_tokens=2)
    for transport in transports:
        transport.writing = transport.reading = transport.pretending = 0.0
    started = time.perf_counter()
    outputs = await coordinator.generate_batch(prompts, max_tokens=max_tokens)
    seconds = time.perf_counter() - started - sum(transport.pretending for transport in transports)
    await coordinator.aclose()
    faults = [output.error for output in outputs if output.error]
    if faults:
        raise RuntimeError(faults[0])
    return seconds, transports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    batch, positions = args.batch, args.batch * args.max_tokens

    bodies = make_answers(batch, args.top_k)
    seconds, transports = asyncio.run(measure_total(bodies, batch, args.top_k, args.prompt_tokens, args.max_tokens))
    per_position = 1e6 / positions
    parts = {
        "write requests (JSON)": per_position * sum(transport.writing for transport in transports),
        "read answers (JSON)": per_position * sum(transport.reading for transport in transports),
    }

    async def lists(own: list[bytes]) -> tuple[Any, float]:
        transport = ReplayTransport(own)
        engine = VLLMEngine(transport)
        await engine.describe()
        prompts = [[1]] * batch
        top, started = await engine.next_top_k(prompts, args.top_k), time.perf_counter()
        transport.writing = transport.reading = transport.pretending = 0.0
        for _ in range(20):
            await engine.next_top_k(prompts, args.top_k)
        json = transport.writing + transport.reading + transport.pretending
        return top, (time.perf_counter() - started - json) / 20

    (theta, seconds_theta), (t, seconds_t) = (asyncio.run(lists(own)) for own in bodies)
    parts["parse to arrays"] = 1e6 * (seconds_theta + seconds_t) / batch
    candidates = merge_lists(theta, t)
    distribution = next_token_distribution(candidates)
    uniforms = np.random.default_rng(2).random(batch)
    step = 1e3 / batch
    parts["merge"] = step * milliseconds(lambda: merge_lists(theta, t))
    parts["solve alpha, q*"] = step * milliseconds(lambda: next_token_distribution(candidates))
    parts["sample"] = step * milliseconds(lambda: sample_rows(np.exp(distribution.log_q), uniforms))
    total = per_position * seconds
    parts["record and loop"] = total - sum(parts.values())

    union = float((candidates.token_ids >= 0).sum(axis=1).mean())
    print(f"k={args.top_k} B={batch}, {args.prompt_tokens}-token prompts, {union:.0f} candidates, both servers:")
    for name, value in parts.items():
        print(f"  {name:24s} {value:7.1f} us per position")
    print(f"  {'total':24s} {total:7.1f} us per position")

    rng = np.random.default_rng(3)
    rows = [rng.dirichlet(np.full(200, 0.2), 64) + 1e-12 for _ in range(2)]
    print(f"solve_kl_symmetry on (64, 200): {milliseconds(lambda: solve_kl_symmetry(*rows)):.2f} ms")


if __name__ == "__main__":
    main()
