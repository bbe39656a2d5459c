"""A server of pairs as the tests ask it, and what its answers should be by transformers over the whole vocabulary."""

from __future__ import annotations

import asyncio
import base64
import json
import urllib.request
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import torch

from dual_rollout.native.wire import NUMBERS
from tests.chi_square import chi_square_p_value
from tests.hang import HANG
from tests.vllm.servers import NativeServer


def ragged_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 250, size=int(size)).tolist() for size in rng.integers(1, 60, size=count)]


Prompts = tuple[list[int], list[int] | None]


@dataclass(frozen=True)
class Pairs:
    """A server of pairs, and its model."""

    server: NativeServer
    model: Any

    async def rollout(self, session: aiohttp.ClientSession, prompts: Prompts, **body: Any) -> dict[str, Any]:
        body = {"prompt_token_ids": prompts[0], "t_prompt_token_ids": prompts[1], **body}
        async with session.post(self.server.url + "/v1/dual_rollout/generate", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
        raw = base64.b64decode(answer.pop("numbers"))
        columns = np.frombuffer(raw, "<f4").reshape(-1, len(NUMBERS) - 1).T.astype(float)
        assert answer["columns"] == list(NUMBERS[1:])
        return {**answer, **dict(zip(NUMBERS[1:], columns, strict=True)), "prompts": prompts}

    def rollouts(self, prompts: Sequence[Prompts], bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """All at once, in order."""

        async def all_of_them(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
            return await asyncio.gather(
                *(self.rollout(session, pair, **body) for pair, body in zip(prompts, bodies, strict=True))
            )

        return in_session(all_of_them)

    def fell_apart(self, rollout: dict[str, Any]) -> int:
        """How often it was begun again, but for the times that the token which marks rows that are alone was drawn."""
        return rollout["restarts"] - rollout["token_ids"][:-1].count(self.model.config.vocab_size - 1)

    def describe(self) -> dict[str, Any]:
        async def get(session: aiohttp.ClientSession) -> dict[str, Any]:
            async with session.get(self.server.url + "/v1/dual_rollout") as response:
                return await response.json()

        return in_session(get)


def in_session(work: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=HANG)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            return await work(session)

    return asyncio.run(run())


def adapter_route(server: NativeServer, what: str, **body: Any) -> None:
    """vLLM's own, whose answers are plain text."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/{what}_lora_adapter", json.dumps(body).encode(), headers)
    urllib.request.urlopen(request, timeout=HANG).read()


def prompts_of(count: int, seed: int = 0) -> list[Prompts]:
    """Of 1 to 59 tokens, unlike on the two sides."""
    return list(zip(ragged_prompts(count, seed), ragged_prompts(count, seed + 100), strict=True))


def logprobs_of(model: Any, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """`(len(tokens), V)` float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens], device=model.device)).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).cpu().numpy()


def distributions_of(rollout: dict[str, Any], theta: Any, t: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log π_θ, log π_t and log q of the reported α, each `(T, V)`."""
    logp_theta = logprobs_of(theta, rollout["prompts"][0], rollout["token_ids"])
    logp_t = logprobs_of(t, rollout["prompts"][1] or rollout["prompts"][0], rollout["token_ids"])
    path = (1 - rollout["alpha"][:, None]) * logp_theta + rollout["alpha"][:, None] * logp_t
    return logp_theta, logp_t, path - np.log(np.exp(path).sum(1, keepdims=True))


def largest_errors(rollouts: Sequence[dict[str, Any]], theta: Any, t: Any = None) -> dict[str, float]:
    errors: dict[str, float] = {}
    for rollout in rollouts:
        logp_theta, logp_t, log_q = distributions_of(rollout, theta, t or theta)
        q, chosen = np.exp(log_q), (np.arange(len(log_q)), rollout["token_ids"])
        expected = {
            "logprobs_q": log_q[chosen],
            "logprobs_theta": logp_theta[chosen],
            "logprobs_t": logp_t[chosen],
            "kl_theta": (q * (log_q - logp_theta)).sum(1),
            "kl_t": (q * (log_q - logp_t)).sum(1),
        }
        for name, values in expected.items():
            errors[name] = max(errors.get(name, 0.0), float(np.abs(rollout[name] - values).max()))
    return errors


def distribution_p_value(rollouts: Sequence[dict[str, Any]], theta: Any, t: Any = None) -> float:
    """Whether the tokens are draws from q: each is put at a random place of its share of [0, 1], and all places
    together are uniform then. Chi-square in 20 cells. The shares are in the order of log π_t − log π_θ, so that draws
    from another α, or from one side alone, are not uniform whatever the contexts."""
    rng, places = np.random.default_rng(0), []
    for rollout in rollouts:
        logp_theta, logp_t, log_q = distributions_of(rollout, theta, t or theta)
        places.append(places_of(rollout["token_ids"], logp_t - logp_theta, np.exp(log_q), rng))
    return uniform_p_value(np.concatenate(places))


def places_of(tokens: list[int], slope: np.ndarray, q: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`(T,)`, of `(T, V)` slopes and probabilities."""
    order = slope.argsort(axis=1, kind="stable")
    rows, ends = np.arange(len(q)), np.take_along_axis(q, order, 1).cumsum(1)
    return ends[rows, order.argsort(axis=1)[rows, tokens]] - rng.random(len(q)) * q[rows, tokens]


def uniform_p_value(places: np.ndarray) -> float:
    counts = np.histogram(places, 20, (0, 1))[0]
    return chi_square_p_value(counts, np.full(20, counts.sum() / 20))
