"""The client of a vLLM server that draws whole rollouts from pairs of prompts (`dual-rollout serve-native MODEL`)."""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from dual_rollout.config import AlphaRule
from dual_rollout.engine import TokenIds
from dual_rollout.exceptions import EngineRejectedError
from dual_rollout.servers.http import USUAL_RESPONSE_BYTES
from dual_rollout.servers.parsing import read_as
from dual_rollout.servers.vllm import VLLMEngine
from dual_rollout.types import FinishReason

_PATH = "/v1/dual_rollout"
_COLUMNS = ("alpha", "log_q", "log_theta", "log_t", "kl_theta", "kl_t")
_ROUNDING = 1e-4  # of float32, in a divergence that is 0 or a log-probability


@dataclass(frozen=True, slots=True)
class PairServerInfo:
    """What a server of pairs is.

    Attributes:
        vocab_size: its model's.
        max_model_len: longest prompt and completion together, on either side.
        max_pairs: that it draws at once; more wait.
    """

    vocab_size: int
    max_model_len: int
    max_pairs: int


@dataclass(frozen=True, slots=True)
class PairSample:
    """T tokens drawn from q*.

    Attributes:
        token_ids: the stop token included when there was one.
        alpha, log_q, log_theta, log_t, kl_theta, kl_t: `(T,)` float64, nats; of the request's temperature.
        finish_reason: "stop" or "length".
        restarts: how often the two sides fell out of step and were begun again from the tokens so far.
    """

    token_ids: list[int]
    alpha: np.ndarray
    log_q: np.ndarray
    log_theta: np.ndarray
    log_t: np.ndarray
    kl_theta: np.ndarray
    kl_t: np.ndarray
    finish_reason: FinishReason
    restarts: int


class PairEngine(VLLMEngine):
    """A vLLM server that may be one of pairs. As an `Engine` it is π_θ."""

    _pairs: PairServerInfo | None = None
    _asked_for_pairs = False

    async def pair_server(self) -> PairServerInfo | None:
        """What it is; None where it draws no pairs. Asked once."""
        if not self._asked_for_pairs:
            try:
                answer = await self._http.get(_PATH)
            except EngineRejectedError as error:
                if error.status != 404:
                    raise
            else:
                self._pairs = read_as(_info, answer, self.url)
            self._asked_for_pairs = True
        return self._pairs

    async def _describe_again(self) -> None:
        await super()._describe_again()
        self._asked_for_pairs = False

    async def draw_pair(
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
    ) -> PairSample:
        """Draw up to `max_tokens` tokens after both prompts.

        Args:
            t_prompt: what π_t sees; None draws from π_θ alone.
            seed: in [0, 2^63); with the position, the random numbers.
            start: tokens of the rollout that are in the prompts already.
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
            "alpha_method": rule.method,
            "fixed_alpha": rule.fixed_alpha,
            "kl_budget": rule.kl_budget,
            "alpha_min": rule.alpha_min,
            "alpha_max": rule.alpha_max,
        }
        return await self._requests.ask(
            f"{_PATH}/generate",
            payload,
            lambda answer: self._pair_sample(answer, max_tokens, stop_token_ids),
            model=self._asked_for,
            models=self._answering,
            prompt_tokens=0,  # it does not count them
            max_bytes=USUAL_RESPONSE_BYTES,
        )

    async def compare_values(self) -> float:
        """The largest difference, nats, of both sides' log-probabilities of a few tokens from the same server's own."""
        prompts, worst = ((1, 2, 3), (4, 5, 6, 7, 8)), 0.0
        sample = await self.draw_pair(*prompts, max_tokens=8, temperature=1.0, rule=AlphaRule(), seed=0)
        for prompt, drawn in zip(prompts, (sample.log_theta, sample.log_t), strict=True):
            own, _ = await self.score([*prompt, *sample.token_ids], len(prompt))
            worst = max(worst, float(np.abs(own - drawn).max()))
        return worst

    def _pair_sample(self, answer: dict[str, Any], max_tokens: int, stop_token_ids: Collection[int]) -> PairSample:
        token_ids, finish_reason = answer["token_ids"], answer["finish_reason"]
        if not isinstance(token_ids, list) or not 1 <= len(token_ids) <= max_tokens:
            raise self._parser.invalid(f"not 1 to {max_tokens} tokens")
        if finish_reason != ("stop" if token_ids[-1] in stop_token_ids else "length"):
            raise self._parser.invalid(f"{finish_reason!r} as the reason to end with token {token_ids[-1]}")
        if finish_reason == "length" and len(token_ids) < max_tokens:
            raise self._parser.invalid(f"{len(token_ids)} tokens of {max_tokens}, and no stop")
        numbers = np.frombuffer(base64.b64decode(answer["numbers"]), "<f4").reshape(len(token_ids), -1)
        found = dict(zip(answer["columns"], numbers.T.astype(np.float64), strict=True))
        columns = [found[name] for name in _COLUMNS]
        alpha, logprobs, divergences = columns[0], np.array(columns[1:4]), np.array(columns[4:])
        if not np.isfinite(numbers).all() or (logprobs > _ROUNDING).any() or (divergences < -_ROUNDING).any():
            raise self._parser.invalid("numbers that are no log-probabilities or divergences")
        if ((alpha < 0.0) | (alpha > 1.0)).any():
            raise self._parser.invalid("α outside [0, 1]")
        ids = self._parser.ids(token_ids).tolist()
        log_q, log_theta, log_t = np.minimum(logprobs, 0.0)
        kl_theta, kl_t = np.maximum(divergences, 0.0)
        restarts = int(answer["restarts"])
        return PairSample(ids, alpha, log_q, log_theta, log_t, kl_theta, kl_t, finish_reason, restarts)


def _info(answer: dict[str, Any]) -> PairServerInfo:
    return PairServerInfo(*(int(answer[name]) for name in PairServerInfo.__slots__))
