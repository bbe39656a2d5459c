"""The requests that a vLLM server answers, one method each, with what is read from the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from dual_rollout.engine import TokenIds
from dual_rollout.functional.top_k import TopK, joined
from dual_rollout.servers.http import longest_answer
from dual_rollout.servers.vllm_answers import CompletionParser, token_ids_of
from dual_rollout.servers.vllm_checked_requests import CheckedRequests
from dual_rollout.servers.vllm_named_rows import NamesSent, width
from dual_rollout.servers.vllm_npy import decoded_floats

T = TypeVar("T")

_MAX_NAMED_TOKENS = 128  # vLLM's own cap on logprob_token_ids

# vLLM fills what is not said from the model's generation_config.json, so everything is said.
_PLAIN_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class VLLMRequests:
    """Requests to one server's model.

    Args:
        described: to be awaited before a request, which needs the model's name.
        model: the name to ask for, at the moment.
        models: names that answers may give for it.

    Attributes:
        prompts_per_request: the most that the server takes together.
    """

    def __init__(
        self,
        requests: CheckedRequests,
        parser: CompletionParser,
        *,
        described: Callable[[], Awaitable[Any]],
        model: Callable[[], str],
        models: Callable[[], set[str]],
    ):
        self._requests, self._parser = requests, parser
        self._described, self._model, self._models = described, model, models
        self.prompts_per_request = 1024  # vLLM's own cap

    async def complete(
        self,
        prompts: Sequence[TokenIds],
        read: Callable[[list[dict[str, Any]]], T],
        *,
        watched: bool = True,
        **options: Any,
    ) -> T:
        """What `read` makes of the choices of a completion. `watched` as in `CheckedRequests.ask`."""
        await self._described()
        payload = {
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "max_tokens": 1,
            "return_tokens_as_token_ids": True,
            **_PLAIN_SAMPLING,
            **options,
        }
        return await self._requests.ask(
            "/v1/completions",
            payload,
            lambda answer: read(self._parser.choices(answer, len(prompts))),
            model=self._model,
            models=self._models,
            prompt_tokens=(prompt_tokens := sum(map(len, prompts))),
            max_bytes=longest_answer(len(prompts), _listed(len(prompts), prompt_tokens, payload)),
            watched=watched,
        )

    async def generate(self, text: TokenIds, sampling: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]) -> T:
        """What `read` makes of the answer of the token-in/token-out endpoint."""
        await self._described()
        payload = {"token_ids": text, "sampling_params": sampling}
        return await self._requests.ask(
            "/inference/v1/generate",
            payload,
            read,
            model=self._model,
            models=self._models,
            prompt_tokens=len(text),
            max_bytes=longest_answer(1, _listed(1, len(text), sampling)),
        )

    async def lists(self, prompts: Sequence[TokenIds], k: int, temperature: float, *, watched: bool = True) -> TopK:
        """The lists after each prompt; `watched` as in `CheckedRequests.ask`."""
        sent, size = on_wire(temperature), self.prompts_per_request

        def ask(together: Sequence[TokenIds]) -> Awaitable[TopK]:
            return self.complete(
                together,
                lambda choices: self._parser.drafts(choices, 1, k, greedy=sent == 0.0).lists,
                watched=watched,
                logprobs=k,
                temperature=sent,
            )

        return joined(await asyncio.gather(*(ask(prompts[i : i + size]) for i in range(0, len(prompts), size))))

    async def score_prompt(self, text: TokenIds, count: int, k: int) -> TopK:
        """Lists for the last `count` tokens of a text, computed anew."""
        return await self.complete(
            [text],
            lambda choices: self._parser.scored(self._parser.prompt_rows(choices[0], text)[-count:], text[-count:], k),
            temperature=0.0,
            prompt_logprobs=k,
        )

    async def score_after_cache(self, text: TokenIds, count: int, k: int) -> TopK:
        """Lists for the last `count` tokens of a text, whose beginning the prefix cache may have."""
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, "detokenize": False}

        def whole(answer: Mapping[str, Any]) -> TopK:
            rows = answer["prompt_logprobs"]
            if not isinstance(rows, list) or len(rows) < count:
                raise self._parser.invalid(f"prompt_logprobs without rows for the last {count} tokens")
            return self._parser.scored(rows[-count:], text[-count:], k)

        def uncached(answer: Mapping[str, Any]) -> TopK | None:
            # Rows are missing at the beginning: those of cached tokens, and in a text seen before, some of the last.
            rows = answer["prompt_logprobs"]
            return whole(answer) if len(rows) >= count and all(rows[-count:]) else None

        top = await self.generate(text, {**sampling, "skip_reading_prefix_cache": False}, uncached)
        if top is None:
            top = await self.generate(text, {**sampling, "skip_reading_prefix_cache": True}, whole)
        return top

    async def named(self, prompt: TokenIds, token_ids: TokenIds, temperature: float, *, known: bool) -> np.ndarray:
        """Log-probabilities of named tokens after a prompt; `known`: the server has been seen to give them."""
        parts = [np.empty(0)]
        for first in range(0, len(token_ids), _MAX_NAMED_TOKENS):
            names = list(token_ids[first : first + _MAX_NAMED_TOKENS])
            parts.append(
                await self.complete(
                    [prompt],
                    partial(self._parser.named_values, names, known=known),
                    logprobs=0,
                    logprob_token_ids=names,
                    temperature=on_wire(temperature),
                )
            )
        return self._parser.named(np.concatenate(parts))

    async def draw(self, prompt: TokenIds, excluded: TokenIds, temperature: float, seed: int) -> int:
        """A token drawn after a prompt, where the excluded are as unlikely as vLLM can make them."""

        def read(choices: list[dict[str, Any]]) -> int:
            keys, _ = self._parser.sampled(choices[0], 1)
            return int(self._parser.ids(token_ids_of(keys))[0])

        bias = {str(token): -100.0 for token in excluded}
        return await self.complete([prompt], read, logprobs=0, temperature=temperature, logit_bias=bias, seed=seed)

    async def named_rows(self, text: TokenIds, count: int, names: NamesSent) -> np.ndarray:
        """`(count, width)` log-probabilities of named tokens at the last `count` tokens of a text."""
        shape = (count, width(names))
        sampling = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprob_token_ids": names,
            "prompt_logprob_start": len(text) - 1 - count,  # row i is about token i + 1
            "detokenize": False,
        }

        def whole(answer: Mapping[str, Any]) -> np.ndarray:
            return self._parser.named(decoded_floats(answer["prompt_token_id_logprobs"], shape))

        def uncached(answer: Mapping[str, Any]) -> np.ndarray | None:
            # Rows are missing where the prefix cache has the first of them.
            try:
                return None if answer["prompt_token_id_logprobs"] is None else whole(answer)
            except ValueError:
                return None

        values = await self.generate(text, {**sampling, "skip_reading_prefix_cache": False}, uncached)
        if values is None:
            values = await self.generate(text, {**sampling, "skip_reading_prefix_cache": True}, whole)
        return values


def _listed(prompts: int, prompt_tokens: int, options: Mapping[str, Any]) -> int:
    """Log-probabilities that an answer to a request with these options has at most."""
    named = len(options.get("logprob_token_ids", ()))
    listed = prompts * options["max_tokens"] * (1 + max(options.get("logprobs", 0), named))
    if (k := options.get("prompt_logprobs")) is not None:
        listed += prompt_tokens * (1 + k)
    if names := options.get("prompt_logprob_token_ids"):
        listed += (prompt_tokens - options["prompt_logprob_start"]) * width(names)
    return listed


def on_wire(temperature: float) -> float:
    """At temperature 0 vLLM reports log_softmax(logits) in both log-probability modes, like at 1, and the list never
    holds a sampled token beyond the k most likely."""
    return 0.0 if temperature == 1.0 else temperature
