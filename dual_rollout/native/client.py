"""The client of a vLLM server that draws whole rollouts from q* (`dual-rollout serve-native`). Needs no vLLM."""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dual_rollout.config import AlphaRule
from dual_rollout.engine import TokenIds
from dual_rollout.exceptions import EngineRejectedError, PreflightError
from dual_rollout.native.wire import BOUNDS, NUMBERS, PATH
from dual_rollout.servers.http import USUAL_RESPONSE_BYTES
from dual_rollout.servers.parsing import read_as
from dual_rollout.servers.vllm import VLLMEngine
from dual_rollout.types import FinishReason

_ROUNDING = 1e-4  # of float32, in a number that is at the end of what it may be


@dataclass(frozen=True, slots=True)
class NativeServerInfo:
    """What a native server is.

    Attributes:
        target: folder or hub name of π_t; None where one model is π_θ and π_t, each with a prompt of its own.
        vocab_size: π_θ's.
        common_vocab_size: tokens that both models have; prompts have no others.
        max_model_len: longest prompt and completion together, on either side.
        max_requests: that it works on at once; more wait. A rollout with two prompts is two, any other one.
        cache_blocks, block_size: of its KV cache; tokens in a block.
    """

    target: str | None
    vocab_size: int
    common_vocab_size: int
    max_model_len: int
    max_requests: int
    cache_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class NativeSample:
    """T tokens drawn from q*; `NUMBERS` but for the first are here by their names, which are the record's.

    Attributes:
        token_ids: the stop token included when there was one.
        alpha, logprobs_q, logprobs_theta, logprobs_t, kl_theta, kl_t: `(T,)` float64, nats; of the request's
            temperature.
        finish_reason: "stop" or "length".
        restarts: how often the two sides fell out of step and were begun again from the tokens so far.
    """

    token_ids: list[int]
    alpha: np.ndarray
    logprobs_q: np.ndarray
    logprobs_theta: np.ndarray
    logprobs_t: np.ndarray
    kl_theta: np.ndarray
    kl_t: np.ndarray
    finish_reason: FinishReason
    restarts: int


class NativeEngine(VLLMEngine):
    """A vLLM server that draws rollouts from q*. As an `Engine` it is π_θ."""

    _server: NativeServerInfo | None = None

    async def native_server(self) -> NativeServerInfo:
        """What it is. Asked once.

        Raises:
            PreflightError: a server that draws no rollouts.
        """
        if self._server is None:
            try:
                answer = await self._http.get(PATH)
            except EngineRejectedError as error:
                if error.status != 404:
                    raise
                raise PreflightError(
                    f"{self.url} draws no rollouts from q*: start it with dual-rollout serve-native (docs/native.md)"
                ) from error
            self._server = read_as(_info, answer, self.url)
        return self._server

    async def _describe_again(self) -> None:
        await super()._describe_again()
        self._server = None

    async def reloads_weights(self) -> bool:
        """Whether it takes new weights of π_θ from disk, and can forget the prefixes it has cached."""
        return {"/collective_rpc", "/reset_prefix_cache"} <= set((await self._told("/openapi.json")).get("paths", ()))

    async def draw(
        self,
        prompt: TokenIds,
        t_prompt: TokenIds | None,
        *,
        max_tokens: int,
        temperature: float,
        rule: AlphaRule,
        seed: int,
        start: int = 0,
        stop_token_ids: Collection[int] = (),
        t_model: str | None = None,
    ) -> NativeSample:
        """Draw up to `max_tokens` tokens after both prompts.

        Args:
            t_prompt: what π_t sees; None draws from π_θ alone.
            seed: in [0, 2^63); with the position, the random numbers.
            start: tokens of the rollout that are in the prompts already.
            t_model: served name of π_t, an adapter's for example; None is the server's own model or its second one.
        """
        await self.describe()
        payload: dict[str, Any] = {
            "prompt_token_ids": list(prompt),
            "t_prompt_token_ids": None if t_prompt is None else list(t_prompt),
            "max_tokens": max_tokens,
            "stop_token_ids": sorted(stop_token_ids),
            "seed": seed,
            "start": start,
            "temperature": temperature,
            "t_model": t_model,
            **asdict(rule),
        }
        return await self._checked.ask(
            f"{PATH}/generate",
            payload,
            lambda answer: self._sample(answer, max_tokens, stop_token_ids),
            model=self._asked_for,
            models=self._answering,
            prompt_tokens=0,  # it does not count them
            max_bytes=USUAL_RESPONSE_BYTES,
        )

    async def compare_values(self) -> float:
        """The largest difference, nats, of log-probabilities of a few tokens from those of the same server for their
        text: of both sides, and where a second model is π_t, which it does not score, of π_θ's alone."""
        prompts, worst = ((1, 2, 3), (4, 5, 6, 7, 8)), 0.0
        own_name = (await self.describe()).model
        sample = await self.draw(*prompts, max_tokens=8, temperature=1.0, rule=AlphaRule(), seed=0, t_model=own_name)
        sides = ((prompts[0], sample.logprobs_theta), (prompts[1], sample.logprobs_t))
        for prompt, drawn in sides[: 1 if (await self.native_server()).target else 2]:
            own, _ = await self.score([*prompt, *sample.token_ids], len(prompt))
            worst = max(worst, float(np.abs(own - drawn).max()))
        return worst

    def _sample(self, answer: dict[str, Any], max_tokens: int, stop_token_ids: Collection[int]) -> NativeSample:
        token_ids, finish_reason = answer["token_ids"], answer["finish_reason"]
        if not isinstance(token_ids, list) or not 1 <= len(token_ids) <= max_tokens:
            raise self._parser.invalid(f"not 1 to {max_tokens} tokens")
        if finish_reason != ("stop" if token_ids[-1] in stop_token_ids else "length"):
            raise self._parser.invalid(f"{finish_reason!r} as the reason to end with token {token_ids[-1]}")
        if finish_reason == "length" and len(token_ids) < max_tokens:
            raise self._parser.invalid(f"{len(token_ids)} tokens of {max_tokens}, and no stop")
        numbers = np.frombuffer(base64.b64decode(answer["numbers"]), "<f4").reshape(len(token_ids), -1)
        found = dict(zip(answer["columns"], numbers.T.astype(np.float64), strict=True))
        columns = {name: self._within(name, found[name]) for name in NUMBERS[1:]}
        ids, restarts = self._parser.ids(token_ids).tolist(), int(answer["restarts"])
        return NativeSample(token_ids=ids, **columns, finish_reason=finish_reason, restarts=restarts)

    def _within(self, name: str, column: np.ndarray) -> np.ndarray:
        """The column without what rounding has put beyond its bounds."""
        low, high = BOUNDS[name]
        possible = np.isfinite(column) & (low - _ROUNDING <= column) & (column <= high + _ROUNDING)
        if not possible.all():
            raise self._parser.invalid(f"{column[~possible][0]:g} as {name}, which is in [{low:g}, {high:g}]")
        return column.clip(low, high)


def _info(answer: dict[str, Any]) -> NativeServerInfo:
    target, *numbers = (answer[name] for name in NativeServerInfo.__slots__)
    return NativeServerInfo(None if target is None else str(target), *map(int, numbers))
