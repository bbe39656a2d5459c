"""The client of a vLLM server that samples from q* itself (`dual-rollout serve-native`)."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from dual_rollout.engine import TokenIds
from dual_rollout.exceptions import EngineRejectedError, PreflightError
from dual_rollout.functional.pseudo_tokens import FLOOR, NUM_PSEUDO_TOKENS, POLICY_ROW, decode
from dual_rollout.servers.pairs import PairEngine
from dual_rollout.servers.vllm_answers import token_ids_of
from dual_rollout.types import FinishReason

_PROBE = (0,)  # a prompt that any model takes
_NO_VOCABULARY_HAS = 10**9
_LOOSE = 40.0  # nats the normaliser of a row can be off zero at a temperature that is not the server's


@dataclass(frozen=True, slots=True)
class NativeSample:
    """T tokens drawn from q* by the server.

    Attributes:
        token_ids: the stop token included when there was one.
        log_q: `(T,)` log q*(y), nats.
        alpha: `(T,)` the α of each position.
        kl_theta, kl_t: `(T,)` KL(q‖π_θ) and KL(q‖π_t) of each position, nats.
        finish_reason: "stop" or "length".
    """

    token_ids: list[int]
    log_q: np.ndarray
    alpha: np.ndarray
    kl_theta: np.ndarray
    kl_t: np.ndarray
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class NativeServerInfo:
    """What a native server is; None where it does not say.

    Attributes:
        model: the served name.
        target: folder or hub name of π_t.
        version: vLLM's.
        vocab_size: tokens, without the pseudo-tokens.
        rule: how it chooses α: `fixed_alpha` (or None), `alpha_min`, `alpha_max`.
        reloads_weights: it takes new weights of π_θ from disk, and can forget the prefixes it has cached.
    """

    model: str
    target: str | None
    version: str | None
    vocab_size: int
    rule: dict[str, float | None] | None
    reloads_weights: bool


class NativeEngine(PairEngine):
    """π_θ and π_t behind one server. As an `Engine` it is π_θ where weights are updated, and q* where tokens are.

    Nobody else may ask this server for top-k log-probabilities meanwhile: in the CPU build's model runner, requests
    with `logprob_token_ids`, as all of these are, spoil other kinds in the same step (not each other).
    """

    _vocab_size: int | None = None
    _temperature: float | None = None

    async def _describe_again(self) -> None:
        await super()._describe_again()
        self._temperature = None  # another process may have other settings: the next batch looks at them again

    async def attach(self, temperature: float) -> None:
        """Find the pseudo-tokens, and check that the server is what it should be; once for each temperature in turn.

        Raises:
            PreflightError: it samples from another law, or α is solved for another temperature.
        """
        if temperature == self._temperature:
            return
        if self._vocab_size is None:
            self._vocab_size = await self._find_vocab_size()
        names = self._pseudo_tokens(NUM_PSEUDO_TOKENS)
        carried = await self._ask(
            [_PROBE],
            lambda choices: self._rows(choices[0], names)[0, 1:],
            temperature=temperature,
            logprobs=len(names),
            logprob_token_ids=names,
        )
        if abs(carried[0] * temperature - FLOOR) > _LOOSE * temperature or carried.max() > carried[0]:
            raise PreflightError(f"{self.url} is no native q* server: start it with dual-rollout serve-native")
        solved_at = decode(carried.tolist(), temperature)[-1]
        if abs(solved_at - temperature) > 1e-3:
            raise PreflightError(
                f"{self.url} solves α for temperature {solved_at:.3g}, but {temperature:g} is asked for: start "
                f"dual-rollout serve-native with --temperature {temperature:g} (and without --logprobs-mode)"
            )
        (logprob,) = await self.policy_logprobs([*_PROBE, names[0]], len(_PROBE))
        if abs(logprob - POLICY_ROW) > 1e-2:
            raise PreflightError(
                f"{self.url} does not score prompts with π_θ: dual_rollout.native does not know this version of vLLM"
            )
        self._temperature = temperature

    async def examine(self, temperature: float) -> NativeServerInfo:
        """What the server is, for a report; `attach` and its errors included."""
        info = await self.describe()
        await self.attach(temperature)
        version, schema = [await self._told(path) for path in ("/version", "/openapi.json")]
        settings = ((await self._model_config()).get("hf_overrides") or {}).get("dual_rollout") or {}
        names = ("fixed_alpha", "alpha_min", "alpha_max")
        return NativeServerInfo(
            model=info.model,
            target=settings.get("t"),
            version=version.get("version"),
            vocab_size=self._pseudo_tokens(1)[0],
            rule={name: settings[name] for name in names} if settings else None,
            reloads_weights={"/collective_rpc", "/reset_prefix_cache"} <= set(schema.get("paths", ())),
        )

    async def generate(
        self,
        prompt: TokenIds,
        *,
        max_tokens: int,
        temperature: float,
        stop_token_ids: Collection[int] = (),
        ignore_eos: bool = False,
        seed: int | None = None,
    ) -> NativeSample:
        """Draw up to `max_tokens` tokens after `prompt` in one request. `attach` comes first."""
        size = self._pseudo_tokens(1)[0]
        if max(prompt) >= size:
            raise EngineRejectedError(
                f"the prompt has token {max(prompt)}, and the two models have {size} in common",
                url=self.url,
                status=400,
            )
        names = self._pseudo_tokens(4)
        options: dict[str, Any] = {} if seed is None else {"seed": seed}
        return await self._ask(
            [prompt],
            lambda choices: self._sample(choices[0], names, max_tokens, temperature),
            max_tokens=max_tokens,
            temperature=temperature,
            logprobs=len(names),
            logprob_token_ids=names,
            stop_token_ids=sorted(token for token in stop_token_ids if token < size),
            ignore_eos=ignore_eos,
            **options,
        )

    def _sample(self, choice: dict[str, Any], names: list[int], max_tokens: int, temperature: float) -> NativeSample:
        rows, token_ids = self._rows(choice, names), token_ids_of(choice["logprobs"]["tokens"])
        stopped = choice["finish_reason"] == "stop"
        if not 1 <= len(rows) <= max_tokens or (len(rows) < max_tokens and not stopped):
            raise self._parser.invalid(f"{len(rows)} tokens of {max_tokens}, and no stop")
        if token_ids.min() < 0 or token_ids.max() >= names[0] or np.isinf(rows[:, 0]).any():
            raise self._parser.invalid("tokens that q* cannot draw")
        alpha, kl_theta, kl_t = np.array([decode(row, temperature) for row in rows[:, 1:].tolist()]).T
        # A divergence may be NaN: vLLM cuts large ones off.
        if (alpha < 0.0).any() or (alpha > 1.0).any() or (kl_theta < 0.0).any() or (kl_t < 0.0).any():
            raise self._parser.invalid("α outside [0, 1], or a negative divergence")
        return NativeSample(token_ids.tolist(), rows[:, 0], alpha, kl_theta, kl_t, "stop" if stopped else "length")

    async def policy_logprobs(self, token_ids: TokenIds, start: int, temperature: float = 1.0) -> np.ndarray:
        """log π_θ, at the server's temperature, of the tokens of one text from `start` >= 1 on; computed anew."""

        def read(choices: list[dict[str, Any]]) -> np.ndarray:
            rows = self._parser.prompt_rows(choices[0], token_ids)[start:]
            own = [row[str(token)]["logprob"] for row, token in zip(rows, token_ids[start:], strict=True)]
            return self._parser.logprobs(own)

        return await self._ask([token_ids], read, temperature=temperature, prompt_logprobs=0)

    async def score(self, token_ids: TokenIds, start: int) -> tuple[np.ndarray, np.ndarray]:
        """log π_θ; of two models at the server's temperature, and of the most likely tokens nothing is known (NaN)."""
        if await self.pair_server() is not None:
            return await super().score(token_ids, start)
        own = await self.policy_logprobs(token_ids, start)
        return own, np.full(len(own), np.nan)

    async def _find_vocab_size(self) -> int:
        """From the refusal of a token that cannot be; vLLM says it nowhere else."""
        try:
            await self._ask([_PROBE], len, logprobs=1, logprob_token_ids=[_NO_VOCABULARY_HAS])
        except EngineRejectedError as error:
            if found := re.search(r"Vocabulary size: (\d+)", str(error)):
                return int(found[1]) - NUM_PSEUDO_TOKENS
            raise
        raise PreflightError(f"{self.url} knows no logprob_token_ids: engine native needs vLLM 0.26 or later")

    def _pseudo_tokens(self, count: int) -> list[int]:
        if self._vocab_size is None:
            raise RuntimeError("attach() has not been called")
        return list(range(self._vocab_size, self._vocab_size + count))

    def _rows(self, choice: dict[str, Any], names: list[int]) -> np.ndarray:
        """`(T, 1 + len(names))` log-probabilities: the sampled token's, then those of the pseudo-tokens `names`."""
        logprobs, keys = choice["logprobs"], [f"token_id:{name}" for name in names]
        try:
            values = [
                row[key]
                for row, sampled in zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True)
                for key in (sampled, *keys)
            ]
        except KeyError as error:
            raise self._parser.invalid(
                f"no log-probability of {error}; is another client asking this server for top-k lists? That garbles "
                "requests in the same step"
            ) from error
        return self._parser.logprobs(values).reshape(-1, 1 + len(names))
