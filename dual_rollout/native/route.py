"""`POST /v1/dual_rollout/generate` on vLLM's API server: a whole rollout per request, `--middleware`.

Its two sides are requests of the server's own engine, or one where a row has both: the engine holds two models, or the
sides are the same. Two are paired there and restarted here when they fall out of step. The numbers come back as arrays:
no list of log-probabilities per token.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import secrets
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from dual_rollout.config import AlphaRule
from dual_rollout.native.capacity import Places
from dual_rollout.native.refusals import refuse_config
from dual_rollout.native.wire import NUMBERS, PATH, Member, Side, check_temperature
from dual_rollout.vllm_routes import (
    adapter_of,
    answered,
    cache_tokens,
    check_served,
    check_token_ids,
    is_int,
    served_names,
)

logger = logging.getLogger(__name__)

_VAIN_ATTEMPTS = 60
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 1.0


class RolloutMiddleware:
    """Adds the route to the application when the server starts; requests pass through."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            try:
                refuse_config(scope["app"].state.engine_client.vllm_config)
            except ValueError as error:  # raised, it would be taken for an application without a start
                logger.error("%s", error)
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            add_route(scope["app"])
        await self._app(scope, receive, send)


def add_route(app: FastAPI) -> None:
    """Under /v1, where vLLM's own middleware asks for the API key."""
    router, server = APIRouter(prefix=PATH), RolloutServer(app.state)

    @router.get("")
    async def describe() -> dict[str, Any]:
        return server.describe()

    @router.post("/generate")
    async def generate(request: Request) -> Response:
        async def work(body: Any) -> Response:
            rollout = RolloutRequest.from_json(body, server.limits())
            server.check_steps(rollout)
            server.check_adapters(rollout)
            return JSONResponse(await server.generate(rollout))

        return await answered(request, work)

    app.include_router(router)


@dataclass(frozen=True)
class Limits:
    """What a rollout must keep to; `vocab_size` is π_θ's, of which π_t knows `common_vocab_size`."""

    vocab_size: int
    common_vocab_size: int
    max_model_len: int
    names: frozenset[str]
    adapters: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """The body of a request.

    Attributes:
        prompt_token_ids: what π_θ sees.
        t_prompt_token_ids: what π_t sees; None samples from π_θ alone.
        max_tokens: of the completion.
        stop_token_ids: it ends with the first of these.
        seed: with it, the same tokens come in any company; random when None.
        rule: how α is chosen; its fields are fields of the body.
        temperature: divides both models' logits.
        model, t_model: served names, of the model itself or of LoRA adapters that are loaded; None is the former.
        start: tokens of the rollout that are in the prompts already, from which the random numbers go on.
        request_id: comes back in the answer.
    """

    prompt_token_ids: list[int]
    t_prompt_token_ids: list[int] | None = None
    max_tokens: int
    stop_token_ids: list[int] = field(default_factory=list)
    seed: int | None = None
    rule: AlphaRule = field(default_factory=AlphaRule)
    temperature: float = 1.0
    model: str | None = None
    t_model: str | None = None
    start: int = 0
    request_id: str | None = None

    @classmethod
    def from_json(cls, body: Any, limits: Limits) -> RolloutRequest:
        """Raises `ValueError`, saying which field to mend."""
        if not isinstance(body, Mapping):
            raise ValueError("the body must be a JSON object")
        of_rule = {spec.name for spec in fields(AlphaRule)}
        own = {spec.name for spec in fields(cls)} - {"rule"}
        if unknown := set(body) - own - of_rule:
            raise ValueError(f"unknown field {min(unknown)!r}; known are {', '.join(sorted(own | of_rule))}")
        if missing := {"prompt_token_ids", "max_tokens"} - set(body):
            raise ValueError(f"{min(missing)} is missing")
        rule = AlphaRule(**{name: value for name, value in body.items() if name in of_rule})
        rollout = cls(rule=rule, **{name: value for name, value in body.items() if name in own})
        rollout._check(limits)
        return rollout

    def _check(self, limits: Limits) -> None:
        seen_by_both = limits.vocab_size if self.t_prompt_token_ids is None else limits.common_vocab_size
        check_token_ids("prompt_token_ids", self.prompt_token_ids, seen_by_both, may_be_empty=False)
        if self.t_prompt_token_ids is not None:
            check_token_ids("t_prompt_token_ids", self.t_prompt_token_ids, seen_by_both, may_be_empty=False)
        check_temperature(self.temperature)
        check_token_ids("stop_token_ids", self.stop_token_ids, limits.vocab_size, may_be_empty=True)
        if not is_int(self.max_tokens) or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be a whole number >= 1, got {self.max_tokens!r:.80}")
        if self.seed is not None and not (is_int(self.seed) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed must be a whole number in [0, 2^63), got {self.seed!r:.80}")
        for name, prompt in (
            ("prompt_token_ids", self.prompt_token_ids),
            ("t_prompt_token_ids", self.t_prompt_token_ids),
        ):
            if prompt is not None and len(prompt) + self.max_tokens > limits.max_model_len:
                raise ValueError(
                    f"{name} has {len(prompt)} tokens, which leaves no room for max_tokens {self.max_tokens} in the "
                    f"server's context of {limits.max_model_len} (--max-model-len)"
                )
        if not is_int(self.start) or self.start < 0:
            raise ValueError(f"start must be a whole number >= 0, got {self.start!r:.80}")
        served = limits.names | limits.adapters
        for model in (self.model, self.t_model):
            if model is not None:
                check_served(model, served)


@dataclass
class Counts:
    """Since the server's start: rollouts, attempts at them, and attempts of which nothing could be kept."""

    rollouts: int = 0
    attempts: int = 0
    vain: int = 0


class RolloutServer:
    """Draws rollouts from the engine of an API server, whose `app.state` it is given."""

    def __init__(self, state: Any):
        self._state = state
        self._counts = Counts()
        self._places: Places | None = None
        self._asked: dict[str, asyncio.Future[bytes | None]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._number = 0

    @property
    def _engine(self) -> Any:
        return self._state.engine_client

    @property
    def _two_models(self) -> dict[str, Any] | None:
        """What `serving.config_overrides` says of π_t; None where one model is both."""
        return getattr(self._engine.model_config.hf_config, "dual_rollout", None)

    def limits(self) -> Limits:
        model, two_models = self._engine.model_config, self._two_models
        vocab_size = model.get_vocab_size()
        common = min(vocab_size, two_models["vocab_size_t"]) if two_models else vocab_size
        return Limits(vocab_size, common, model.max_model_len, *served_names(self._state))

    def describe(self) -> dict[str, Any]:
        limits, two_models = self.limits(), self._two_models
        return {
            "target": two_models["t"] if two_models else None,
            "vocab_size": limits.vocab_size,
            "common_vocab_size": limits.common_vocab_size,
            "max_model_len": limits.max_model_len,
            "adapters": sorted(limits.adapters),
            "max_requests": self._max_requests(),
            "cache_blocks": self._cache_blocks(),
            "block_size": self._engine.vllm_config.cache_config.block_size,
            **asdict(self._counts),
        }

    def check_steps(self, rollout: RolloutRequest) -> None:
        """Raise `ValueError` where both prompts can never be read to their end in the same step."""
        config = self._engine.vllm_config
        budget = config.scheduler_config.max_num_batched_tokens - config.scheduler_config.max_num_seqs
        if rollout.t_prompt_token_ids is None or len(self._prompts_of(rollout)) == 1:
            return
        if config.cache_config.enable_prefix_caching:
            needed, why = 2 * config.cache_config.block_size, "two blocks of its KV cache"
        else:
            needed = len(rollout.prompt_token_ids) + len(rollout.t_prompt_token_ids) + 2 * rollout.max_tokens
            why = "both prompts and their completions, since prefix caching is off"
        if budget < needed:
            raise ValueError(
                "both prompts must be read to their end in one step: start the server with --max-num-batched-tokens "
                f"{needed + config.scheduler_config.max_num_seqs} or more, --max-num-seqs and {why}"
            )

    def check_adapters(self, rollout: RolloutRequest) -> None:
        """Raise `ValueError` where both sides have adapters, and no step of the engine holds two."""
        loaded = self._state.openai_serving_models.lora_requests
        sides = (rollout.model,) if rollout.t_prompt_token_ids is None else (rollout.model, rollout.t_model)
        named = {name for name in sides if name is not None and name in loaded}
        if named and len(named) > self._engine.vllm_config.lora_config.max_loras:
            raise ValueError(
                f"the sides have the adapters {' and '.join(sorted(named))}, which are never in one step: start the "
                f"server with --max-loras {len(named)} or more"
            )

    async def generate(self, rollout: RolloutRequest) -> dict[str, Any]:
        """One rollout, as the answer's JSON.

        Raises:
            ValueError, VLLMClientError: the request is at fault.
            RuntimeError: the sides cannot be brought into step.
        """
        if self._places is None:
            self._places = Places(self._max_requests())
        seed = secrets.randbits(63) if rollout.seed is None else rollout.seed
        tokens: list[int] = []
        parts: list[np.ndarray] = []
        attempts = vain = 0
        async with self._places.taken(len(self._prompts_of(rollout))):
            self._counts.rollouts += 1
            while not (tokens and (len(tokens) == rollout.max_tokens or tokens[-1] in rollout.stop_token_ids)):
                numbers = await self._attempt(rollout, tokens, seed)
                attempts += 1
                self._counts.attempts += 1
                tokens += numbers[:, 0].astype(int).tolist()
                parts.append(numbers)
                vain = 0 if len(numbers) else vain + 1
                if vain:
                    self._counts.vain += 1
                    await self._wait_after(vain)
        numbers = np.concatenate(parts)
        return {
            "request_id": rollout.request_id,
            "model": rollout.model,
            "token_ids": tokens,
            "finish_reason": "stop" if tokens[-1] in rollout.stop_token_ids else "length",
            "restarts": attempts - 1,
            "columns": NUMBERS[1:],
            "numbers": base64.b64encode(numbers[:, 1:].astype("<f4").tobytes()).decode(),
        }

    async def _attempt(self, rollout: RolloutRequest, tokens: Sequence[int], seed: int) -> np.ndarray:
        """`(n, 7)` numbers of the tokens that come after `tokens`; n may be 0."""
        name, mark = uuid.uuid4().hex, self._engine.model_config.get_vocab_size() - 1
        prompts, rule = self._prompts_of(rollout), rollout.rule
        if "alone" in prompts:
            rule = AlphaRule(alpha_method="fixed", fixed_alpha=0.0)
        marks = [mark] if len(prompts) > 1 else []  # one row lacks no partner
        drawn: dict[str, list[int]] = {}
        tasks = []
        for side, prompt in prompts.items():
            member = Member(
                rollout=name,
                side=side,
                seed=seed,
                start=rollout.start + len(tokens),
                mark=mark,
                rule=rule,
                temperature=rollout.temperature,
            )
            params = SamplingParams(
                temperature=0.0,
                max_tokens=rollout.max_tokens - len(tokens),
                stop_token_ids=[*rollout.stop_token_ids, *marks],
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=member.to_extra_args(),
            )
            adapter = adapter_of(self._state, rollout.t_model if side == "t" else rollout.model)
            tasks.append(asyncio.create_task(self._request(side, [*prompt, *tokens], params, adapter, name, drawn)))
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            left, stops = rollout.max_tokens - len(tokens), set(rollout.stop_token_ids) - set(marks)
            if len(drawn) < len(ended) or any(_is_early(own, left, stops) for own in drawn.values()):
                # With its mark, or aborted. What its partner draws is in vain, and it may not even have begun.
                await self._engine.abort([_request_id(name, side) for side in prompts])
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            record = await self._take(name)
        if record is None or len(drawn) < len(prompts):
            return np.empty((0, len(NUMBERS)), np.float32)
        return _agreed(np.frombuffer(record, np.float32).reshape(-1, len(NUMBERS)), list(drawn.values()))

    async def _request(
        self, side: str, prompt: list[int], params: Any, adapter: Any, name: str, drawn: dict[str, list[int]]
    ) -> None:
        stream = self._engine.generate(
            tokens_input(prompt),
            params,
            _request_id(name, side),
            lora_request=adapter,
        )
        async with contextlib.aclosing(stream):
            async for output in stream:
                drawn[side] = list(output.outputs[0].token_ids)

    async def _take(self, name: str) -> bytes | None:
        """The rollout's record. Those asked for while the workers answer are fetched together by the next call."""
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._asked[name] = future
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._fetch())
        return await future

    async def _fetch(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                answers = await self._engine.collective_rpc("dual_rollout_take", args=(list(asked),))
            except Exception as error:
                for future in asked.values():
                    if not future.done():
                        future.set_exception(RuntimeError(f"the engine does not give its numbers: {error}"))
                continue
            for name, future in asked.items():
                if future.done():
                    continue
                records = [answer[name] for answer in answers if answer and name in answer]
                if _differ(records):
                    future.set_exception(
                        RuntimeError(
                            "the ranks of the engine drew different tokens, so that their numbers mean nothing: report "
                            "it, with vLLM's version and its flags"
                        )
                    )
                else:
                    future.set_result(records[0] if records else None)

    async def _wait_after(self, vain: int) -> None:
        """Longer after each attempt in vain: other rollouts end meanwhile, and leave memory or room in a step."""
        if vain >= _VAIN_ATTEMPTS:
            raise RuntimeError(
                f"after {vain} attempts the two prompts were not read in one step: raise --max-num-batched-tokens "
                "above the length of both, leave prefix caching on, or give the KV cache more memory"
            )
        if vain > 1:
            await asyncio.sleep(min(_FIRST_PAUSE_S * 2.0 ** (vain - 2), _LONGEST_PAUSE_S))

    def _prompts_of(self, rollout: RolloutRequest) -> dict[Side, list[int]]:
        """The prompt of each request that the rollout is."""
        theta, t = rollout.prompt_token_ids, rollout.t_prompt_token_ids
        if t is None:
            return {"alone": theta}
        if theta == t and adapter_of(self._state, rollout.model) is adapter_of(self._state, rollout.t_model):
            return {"both": theta}
        return {"theta": theta, "t": t}

    def _cache_blocks(self) -> int:
        """Of the KV cache; vLLM keeps one for itself. Models with several kinds of layers take several for a token."""
        config = self._engine.vllm_config
        return cache_tokens(config) // config.cache_config.block_size - 1

    def _max_requests(self) -> int:
        return self._engine.vllm_config.scheduler_config.max_num_seqs


def _agreed(record: np.ndarray, drawn: list[list[int]]) -> np.ndarray:
    """The rows of the record up to the first that one side did not draw, or that was drawn by one side alone."""
    length = min(len(record), *map(len, drawn))
    good = ~np.isnan(record[:length]).any(axis=1)
    for tokens in drawn:
        good &= record[:length, 0] == tokens[:length]
    return record[: length if good.all() else int(good.argmin())]


def _differ(records: list[bytes]) -> bool:
    """Whether the ranks of an engine, each of which draws for itself from the same logits, drew different tokens."""
    tokens = [np.frombuffer(record, np.float32).reshape(-1, len(NUMBERS))[:, 0] for record in records]
    return any(not np.array_equal(tokens[0], other, equal_nan=True) for other in tokens[1:])


def _is_early(tokens: Sequence[int], most: int, stops: Collection[int]) -> bool:
    """Whether a side has ended before it had `most` tokens, or one of `stops`."""
    return len(tokens) < most and not (tokens and tokens[-1] in stops)


def _request_id(name: str, side: str) -> str:
    return f"dual-rollout-{name}-{side}"
