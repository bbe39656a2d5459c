"""Two servers with known distributions: a first-order Markov chain behind vLLM's completions API.

The next-token distribution after a prompt is row `prompt[-1]` of a transition matrix, so that the exact q* and the
frequency of every sequence can be enumerated. It answers what the client uses and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from aiohttp import web


class MarkovServer:
    """`transitions` is `(V, V)`, each row a distribution. Not part of vLLM's behaviour but useful in tests:
    `requests` keeps every completion payload, `ignore` names request fields to act as if unknown, and `processed` is
    `--logprobs-mode processed_logprobs`: log-probabilities of the next token follow the temperature. `float32` rounds
    them as a real server does. `eos` is the model's end of sequence."""

    def __init__(
        self,
        transitions: np.ndarray,
        *,
        max_model_len: int | None = 4096,
        ignore: tuple[str, ...] = (),
        processed: bool = False,
        float32: bool = False,
        eos: int | None = None,
    ):
        self.transitions = transitions
        with np.errstate(divide="ignore"):
            self._raw = np.log(transitions)
        if float32:
            self._raw = self._raw.astype(np.float32).astype(np.float64)
        self.requests: list[dict[str, Any]] = []
        self.url = ""
        self._ignore = ignore
        self._eos = eos
        self._max_model_len = max_model_len
        self._processed = processed
        self._rng = np.random.default_rng(0)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[MarkovServer]:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "chain", "max_model_len": self._max_model_len}]})

    async def _completions(self, request: web.Request) -> web.Response:
        payload = await request.json()
        self.requests.append(payload)
        options = {key: value for key, value in payload.items() if key not in self._ignore}
        prompts = options["prompt"] if isinstance(options["prompt"][0], list) else [options["prompt"]]
        vocabulary = len(self.transitions)
        if options.get("temperature", 1.0) > 2.0:
            message = f"temperature must be in [0, 2], got {options['temperature']}."
            return web.json_response({"error": {"message": message, "code": 400}}, status=400)
        if any(int(token) >= vocabulary for token in options.get("logit_bias", {})):
            message = f"logit_bias contains out-of-vocab token ids. Vocabulary size: {vocabulary}"
            return web.json_response({"error": {"message": message, "code": 400}}, status=400)
        if any(token >= vocabulary for prompt in prompts for token in prompt):
            message = "Token id is out of vocabulary"
            return web.json_response({"error": {"message": message, "code": 400}}, status=400)
        if unknown := [token for token in options.get("logit_bias", {}) if int(token) >= vocabulary]:
            message = (
                f"token_id(s) {unknown} in logit_bias contain out-of-vocab token ids. Vocabulary size: {vocabulary}"
            )
            return web.json_response({"error": {"message": message, "code": 400}}, status=400)
        await asyncio.sleep(0)
        return web.json_response({"choices": [self._choice(i, prompt, options) for i, prompt in enumerate(prompts)]})

    def _choice(self, index: int, prompt: list[int], options: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(options["seed"]) if "seed" in options else self._rng
        text, tokens, lists = list(prompt), [], []
        ends = {*options.get("stop_token_ids", ()), *(() if options.get("ignore_eos") else (self._eos,))}
        for _ in range(options.get("max_tokens", 1)):
            token, entries = self._next(text[-1], options, rng)
            text.append(token)
            tokens.append(f"token_id:{token}")
            lists.append(entries)
            if token in ends:
                break
        return {
            "index": index,
            "finish_reason": "stop" if text[-1] in ends else "length",
            "logprobs": None if options.get("logprobs") is None else _logprobs(tokens, lists),
            "prompt_logprobs": self._prompt_logprobs(prompt, options),
        }

    def _next(
        self, last: int, options: dict[str, Any], rng: np.random.Generator
    ) -> tuple[int, dict[str, float] | None]:
        """A token after `last`, and the list that goes with it."""
        temperature = options.get("temperature", 1.0)
        logits = self._raw[last]
        if temperature not in (0, 1):
            logits = logits / temperature
        token = self._sample(logits, temperature == 0, options, rng)
        if options.get("logprobs") is None:
            return token, None
        named = options.get("logprob_token_ids")
        reported = logits - np.log(np.exp(logits).sum()) if self._processed else self._raw[last]
        listed = named if named is not None else np.argsort(-reported, kind="stable")[: options["logprobs"]].tolist()
        values = np.maximum(reported, -9999.0).tolist()
        return token, {f"token_id:{i}": values[i] for i in [token, *listed]}

    @staticmethod
    def _sample(logits: np.ndarray, greedy: bool, options: dict[str, Any], rng: np.random.Generator) -> int:
        biased = logits.copy()
        for token, bias in options.get("logit_bias", {}).items():
            biased[int(token)] += bias
        if greedy:
            return int(np.argmax(biased))
        distribution = np.exp(biased - biased.max())
        return int(rng.choice(len(distribution), p=distribution / distribution.sum()))

    def _prompt_logprobs(self, prompt: list[int], options: dict[str, Any]) -> list[Any] | None:
        if options.get("prompt_logprobs") is None:
            return None
        rows: list[Any] = [None]
        for before, token in itertools.pairwise(prompt):
            raw = np.maximum(self._raw[before], -9999.0)
            listed = [token, *np.argsort(-raw)[: options["prompt_logprobs"]].tolist()]
            rows.append({str(i): {"logprob": float(raw[i])} for i in listed})
        return rows


def _logprobs(tokens: list[str], lists: list[Any]) -> dict[str, Any]:
    own = [row[token] for token, row in zip(tokens, lists, strict=True)]
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": lists}


def random_chain(rng: np.random.Generator, vocabulary: int, sharpness: float = 1.5) -> np.ndarray:
    """A transition matrix with softmax(normal · sharpness) rows."""
    logits = rng.normal(size=(vocabulary, vocabulary)) * sharpness
    matrix = np.exp(logits - logits.max(axis=1, keepdims=True))
    return matrix / matrix.sum(axis=1, keepdims=True)
