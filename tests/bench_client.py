"""What the client costs per token position: from the bytes of two servers' answers to a sampled, recorded token.

    python -m tests.bench_client --top-k 100 --batch 64

No sockets and no models: the transport replays answers of vLLM's shape, made from random but LLM-like distributions.
"total" is `generate_batch` on them in one group, everything included; the parts are measured apart, and "record and
loop" is what remains of the total. "with sessions" is the total where servers keep the texts.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import orjson

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from dual_rollout import coordinator as coordinator_module
from dual_rollout.decoding import tuner
from dual_rollout.functional import merge_lists, next_token_distribution, sample_rows, solve_kl_symmetry
from dual_rollout.functional.top_k import TopK
from dual_rollout.servers import HttpStats, HttpTransport, VLLMEngine
from dual_rollout.servers.from_config import Clients
from dual_rollout.sessions.wire import ARRAYS, PATH, encoded

VOCABULARY = 49_152
ANSWERS = 8  # different ones, replayed in turn


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one server says, in turn: lists as arrays, and as bodies of completions."""

    lists: list[TopK]
    bodies: list[bytes]


class ReplayTransport(HttpTransport):
    """Answers from prepared lists; counts the seconds spent in JSON, and those of its own pretence."""

    def __init__(self, answers: Answers):
        super().__init__("http://replay")
        self.writing = self.reading = self.pretending = 0.0
        self._answers = answers
        self._turn = 0

    async def get(self, path: str) -> Any:
        return {"data": [{"id": "replay", "root": None, "max_model_len": None}]} if path == "/v1/models" else None

    async def get_text(self, path: str) -> str:
        return "process_start_time_seconds 1.0\n"  # what it says of one text differs from turn to turn

    async def post(self, path: str, payload: Any = None, **_: Any) -> Any:
        started = time.perf_counter()
        orjson.dumps(payload)
        self.writing += (written := time.perf_counter()) - started
        body, kind = (
            (self._arrays(payload), ARRAYS) if path == PATH else (self._completion(payload), "application/json")
        )
        self.pretending += (ready := time.perf_counter()) - written
        answer = self._parse(path, body, kind)
        self.reading += time.perf_counter() - ready
        self.answered = time.monotonic()
        return answer

    def _arrays(self, payload: dict[str, Any]) -> bytes:
        self._turn += 1
        lists, count = self._answers.lists[self._turn % ANSWERS], len(payload["texts"])
        head = {"request_id": payload["request_id"], "model": payload["model"], "kept": [True] * count}
        return encoded(head, lists.token_ids[:count], lists.logprobs[:count])

    def _completion(self, payload: dict[str, Any]) -> bytes:
        prompts = payload["prompt"] if isinstance(payload["prompt"][0], list) else [payload["prompt"]]
        if payload.get("prompt_logprobs") is not None:
            body = scores(prompts[0])
        else:
            body = self._answers.bodies[self._turn % ANSWERS]
            self._turn += 1
            if len(prompts) < body.count(b'"index":'):
                answer = orjson.loads(body)  # the probe and the last rounds ask for fewer
                body = orjson.dumps({**answer, "choices": answer["choices"][: len(prompts)]})
        body = body.replace(b"cmpl-0", f"cmpl-{payload.get('request_id', 0)}".encode(), 1)
        return body.replace(b'"prompt_tokens":0', b'"prompt_tokens":%d' % sum(map(len, prompts)), 1)


class Replays(Clients):
    """Clients whose transports replay the answers of π_θ's server and of π_t's."""

    def __init__(self, config: CoordinatorConfig, answers: tuple[Answers, Answers]):
        super().__init__(config)
        self.transports: list[ReplayTransport] = []
        self._answers = answers

    def transport(self, url: str, stats: HttpStats, max_retries: int | None = None) -> HttpTransport:
        self.transports.append(ReplayTransport(self._answers[len(self.transports)]))
        return self.transports[-1]


def scores(prompt: list[int]) -> bytes:
    """An answer to a request for the log-probabilities of the prompt's own tokens."""
    rows = [None, *({str(token): {"logprob": -3.0, "rank": 9}} for token in prompt[1:])]
    return orjson.dumps({"id": "cmpl-0", "choices": [{"index": 0, "prompt_logprobs": rows}]})


def top_k_lists(logits: np.ndarray, top_k: int) -> TopK:
    """Those of `(B, V)` logits, float32 log-probabilities."""
    logp = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    ids = np.argsort(-logp, axis=1)[:, :top_k]
    return TopK(ids, np.take_along_axis(logp, ids, axis=1))


def completion(lists: TopK) -> bytes:
    """A completions answer of vLLM at temperature 0 with these lists."""
    choices = []
    for index, (ids, logprobs) in enumerate(zip(lists.token_ids.tolist(), lists.logprobs.tolist(), strict=True)):
        listed = {f"token_id:{token}": logprob for token, logprob in zip(ids, logprobs, strict=True)}
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


def make_answers(batch: int, top_k: int) -> tuple[Answers, Answers]:
    """Of π_θ's server and of π_t's: Zipf-like distributions over a shuffled vocabulary; π_t's logits are π_θ's plus
    noise."""
    rng = np.random.default_rng(0)
    theta, t = [], []
    for _ in range(ANSWERS):
        zipf = -1.3 * np.log(np.arange(1, VOCABULARY + 1))
        logits = np.stack([rng.permutation(zipf) for _ in range(batch)]) + rng.normal(size=(batch, VOCABULARY)) * 0.5
        theta.append(top_k_lists(logits, top_k))
        t.append(top_k_lists(logits + rng.normal(size=logits.shape) * 0.7, top_k))
    return Answers(theta, list(map(completion, theta))), Answers(t, list(map(completion, t)))


def one_group_alone(self: tuner.Tuner, config: CoordinatorConfig, load: tuner.Load) -> tuner.Plan:
    """Instead of `Tuner.choose`: nothing is tried."""
    return tuner.Plan(tuner.Choice("lockstep", 1), 8, tuner.Measured())


def milliseconds(run: Callable[[], Any], repeats: int = 30) -> float:
    """The median over `repeats` runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))


async def measure_total(
    answers: tuple[Answers, Answers], batch: int, top_k: int, prompt_tokens: int, max_tokens: int, *, sessions: bool
) -> tuple[float, list[ReplayTransport]]:
    """Seconds of `generate_batch` without the replay's own work, and both transports."""
    config = CoordinatorConfig(top_k=top_k, seed=0, max_concurrency=batch, decoding="lockstep")
    replays = Replays(config, answers)
    with mock.patch.object(coordinator_module, "Clients", return_value=replays):
        coordinator = DualVLLMCoordinator(config)
    for engine in (coordinator.theta, coordinator.t):
        assert isinstance(engine, VLLMEngine)
        engine._capabilities = dataclasses.replace(await engine.probe([1, 2, 3]), sessions=sessions)
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

    answers = make_answers(max(batch, 8), args.top_k)  # the probe asks for 8
    one_group = mock.patch.object(tuner.Tuner, "choose", one_group_alone)
    sizes = batch, args.top_k, args.prompt_tokens, args.max_tokens
    with one_group:
        seconds, transports = asyncio.run(measure_total(answers, *sizes, sessions=False))
        with_sessions, _ = asyncio.run(measure_total(answers, *sizes, sessions=True))
    per_position = 1e6 / positions
    parts = {
        "write requests (JSON)": per_position * sum(transport.writing for transport in transports),
        "read answers (JSON)": per_position * sum(transport.reading for transport in transports),
    }

    async def lists(own: Answers) -> tuple[Any, float]:
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

    (theta, seconds_theta), (t, seconds_t) = (asyncio.run(lists(own)) for own in answers)
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
    print(f"  {'total with sessions':24s} {per_position * with_sessions:7.1f} us per position")

    rng = np.random.default_rng(3)
    rows = [rng.dirichlet(np.full(200, 0.2), 64) + 1e-12 for _ in range(2)]
    print(f"solve_kl_symmetry on (64, 200): {milliseconds(lambda: solve_kl_symmetry(*rows)):.2f} ms")


if __name__ == "__main__":
    main()
