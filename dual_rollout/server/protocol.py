"""Requests of vLLM's HTTP API: validation, and errors in vLLM's shape.

Unknown fields are ignored, as in vLLM. Fields that vLLM has and this server has not are accepted at their
neutral value and refused otherwise, because ignoring them would change the answer silently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

MAX_LOGPROB_TOKEN_IDS = 128
MAX_PROMPTS = 1024
MIN_TEMPERATURE = 1e-2
GREEDY_TEMPERATURE = 1e-5

# Field -> the values at which it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "min_tokens": (None, 0),
    "stream": (None, False),
    "echo": (None, False),
    "suffix": (None, ""),
    "stop": (None, "", []),
    "top_p": (None, 1, 1.0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "use_beam_search": (None, False),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "prompt_embeds": (None, []),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "truncate_prompt_tokens": (None,),
    "repetition_detection": (None,),
    "trace_decode_token_ids": (None,),
    "stream_options": (None,),
}


class APIError(Exception):
    """An answer with an HTTP error status and vLLM's error body."""

    def __init__(
        self, message: str, *, status: int = 400, type: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": status}}


def invalid(field: str, problem: str) -> APIError:
    """The error of a body that does not parse, before any model is asked."""
    message = f"1 validation error:\n  {{'loc': 'body.{field}', 'msg': '{problem}'}}"
    return APIError(message, type="Bad Request", param=f"body.{field}")


def not_found(model: object) -> APIError:
    return APIError(f"The model `{model}` does not exist.", status=404, type="NotFoundError", param="model")


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks of every sequence it starts. Log-probabilities are in nats."""

    max_tokens: int
    temperature: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: tuple[tuple[int, ...], ...] | None = None  # one list per scored row
    prompt_logprob_start: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_reading_prefix_cache: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def wants_prompt_rows(self) -> bool:
        return self.prompt_logprobs is not None or self.prompt_logprob_token_ids is not None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None or self.logprob_token_ids is not None


@dataclass(frozen=True)
class Limits:
    """What the server was started with, as far as requests are checked against it."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    max_num_seqs: int

    @property
    def max_num_requests(self) -> int:
        """How many requests for the model are worked on at once: they fill a step while others are read or answered.

        This bounds the memory that they take: hundreds of clients may wait, with few bytes each.
        """
        return 2 * self.max_num_seqs

    @property
    def logprobs_cap(self) -> int:
        return self.vocab_size if self.max_logprobs == -1 else self.max_logprobs


def parse_completion_sampling(body: dict[str, Any], limits: Limits) -> SamplingParams:
    """Sampling parameters of a ``/v1/completions`` body; ``max_tokens`` defaults to 16."""
    logprob_token_ids = _ids(body, "logprob_token_ids")
    if logprob_token_ids and body.get("logprobs") is None:
        raise APIError("when using `logprob_token_ids`, `logprobs` must be set.", param="logprob_token_ids")
    params = _parse_sampling(body, default_max_tokens=16)
    if params.max_tokens > limits.max_model_len:
        raise APIError(
            f"max_tokens={params.max_tokens} cannot be greater than max_model_len={limits.max_model_len}. "
            "Please request fewer output tokens.",
            param="max_tokens",
        )
    if logprob_token_ids:
        # The named tokens take the place of the most likely ones.
        params = replace(params, logprobs=None)
    _check(params, limits)
    return params


def parse_generate_sampling(body: Any, limits: Limits, prompt_len: int) -> SamplingParams:
    """``sampling_params`` of an ``/inference/v1/generate`` body; ``max_tokens`` defaults to all that fits."""
    if not isinstance(body, dict):
        raise invalid("sampling_params", "Input should be a valid dictionary")
    params = _parse_sampling(body, default_max_tokens=max(1, limits.max_model_len - prompt_len))
    if params.wants_logprobs:
        raise APIError("log-probabilities of drawn tokens are for /v1/completions in the embedded server.")
    if (rows := _id_lists(body, "prompt_logprob_token_ids")) is not None:
        skips = params.skip_reading_prefix_cache or body.get("skip_reading_prefix_cache") is None
        params = replace(params, prompt_logprob_token_ids=rows, skip_reading_prefix_cache=skips)
    params = replace(params, prompt_logprob_start=_integer(body, "prompt_logprob_start"))
    _check(params, limits)
    _check_named_rows(params, limits, prompt_len)
    return params


def parse_prompts(prompt: Any) -> list[str] | list[list[int]]:
    """``prompt`` of ``/v1/completions`` as a list of strings or of token-id lists."""
    if prompt is None or prompt == "":
        raise APIError("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise invalid("prompt", "Input should be a valid list or string")
    if not prompt:
        raise APIError("You must pass at least one prompt")
    if all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
        if len(prompt) > MAX_PROMPTS:
            raise APIError(
                f"prompt list length {len(prompt)} exceeds the maximum allowed count of {MAX_PROMPTS}.",
                param="prompt",
            )
        for ids in prompt:
            if isinstance(ids, list):
                _check_id_list(ids, "prompt")
        return prompt
    _check_id_list(prompt, "prompt")
    return [prompt]


def check_prompt(token_ids: Sequence[int], limits: Limits, max_tokens: int | None) -> None:
    """Length and vocabulary of one prompt. ``max_tokens`` None: only one token must fit after it."""
    length, limit = len(token_ids), limits.max_model_len
    if length == 0:
        raise APIError("The decoder prompt cannot be empty")
    if max_tokens is not None and length + max_tokens > limit:
        raise APIError(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{max_tokens} output tokens and your prompt contains {length} input tokens, for a total of "
            f"{length + max_tokens} tokens. "
            "Please reduce the length of the input prompt or the number of requested output tokens.",
            param="input_tokens",
        )
    if length > limit:
        raise APIError(
            f"The decoder prompt (length {length}) is longer than the maximum model length of {limit}. "
            "Make sure that `max_model_len` is no smaller than the number of text tokens."
        )
    if length == limit:
        raise APIError(
            f"The decoder prompt (length {length}) plus the number of requested output tokens "
            f"(at least 1) is longer than the maximum model length of {limit}. Make sure that "
            "`max_model_len` is no "
            "smaller than the number of text tokens (prompt + requested output tokens)."
        )
    if max(token_ids) >= limits.vocab_size:
        raise APIError(f"Token id {max(token_ids)} is out of vocabulary")


def parse_token_ids(body: dict[str, Any], field: str) -> list[int]:
    """A required list of non-negative token ids."""
    ids = body.get(field)
    if not isinstance(ids, list):
        raise invalid(field, "Input should be a valid list" if field in body else "Field required")
    _check_id_list(ids, field)
    return ids


def _check_id_list(ids: list[Any], field: str) -> None:
    for index, token_id in enumerate(ids):
        if type(token_id) is not int:
            raise invalid(f"{field}.{index}", "Input should be a valid integer")
        if token_id < 0:
            raise invalid(f"{field}.{index}", "Input should be greater than or equal to 0")


def _parse_sampling(body: dict[str, Any], *, default_max_tokens: int) -> SamplingParams:
    _refuse_unsupported(body)
    temperature = _number(body, "temperature")
    temperature = 1.0 if temperature is None else temperature
    max_tokens = _integer(body, "max_tokens")
    prompt_logprobs = _integer(body, "prompt_logprobs")
    skip = prompt_logprobs is not None
    if body.get("skip_reading_prefix_cache") is not None:
        skip = _flag(body, "skip_reading_prefix_cache")
    seed = _integer(body, "seed")
    return SamplingParams(
        max_tokens=default_max_tokens if max_tokens is None else max_tokens,
        temperature=max(temperature, MIN_TEMPERATURE) if temperature > 0 else temperature,
        seed=None if seed == -1 else seed,
        logprobs=_integer(body, "logprobs"),
        logprob_token_ids=_ids(body, "logprob_token_ids") or None,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_bias(body.get("logit_bias")),
        stop_token_ids=frozenset(_ids(body, "stop_token_ids") or ()),
        ignore_eos=_flag(body, "ignore_eos"),
        skip_reading_prefix_cache=skip,
    )


def _refuse_unsupported(body: dict[str, Any]) -> None:
    for field, neutral in NEUTRAL.items():
        value = body.get(field)
        if value is not None and value not in neutral:
            raise APIError(
                f"{field}={value!r} is not supported by the embedded server: leave it out or send "
                f"{neutral[-1]!r}, "
                "or serve the model with vLLM.",
                param=field,
            )


def _check(params: SamplingParams, limits: Limits) -> None:
    """vLLM's checks of values, in its words."""
    if not 0.0 <= params.temperature <= 2.0:
        problem = "non-negative" if params.temperature < 0 else "in [0, 2]"
        raise APIError(f"temperature must be {problem}, got {params.temperature}.", param="temperature")
    if params.max_tokens < 1:
        raise APIError(f"max_tokens must be at least 1, got {params.max_tokens}.", param="max_tokens")
    _check_count("logprobs", "sample logprobs", params.logprobs, limits)
    _check_count("prompt_logprobs", "prompt logprobs", params.prompt_logprobs, limits)
    if len(params.logprob_token_ids or ()) > MAX_LOGPROB_TOKEN_IDS:
        raise APIError(
            f"Requested logprob_token_ids of length {len(params.logprob_token_ids or ())}, which is "
            "greater than "
            f"max allowed: {MAX_LOGPROB_TOKEN_IDS}",
            param="logprob_token_ids",
        )
    for field, ids in (
        ("logprob_token_ids", params.logprob_token_ids or ()),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", [token_id for token_id, _ in params.logit_bias]),
    ):
        if outside := [token_id for token_id in ids if not 0 <= token_id < limits.vocab_size]:
            raise APIError(
                f"token_id(s) {outside} in {field} contain out-of-vocab token ids. "
                f"Vocabulary size: {limits.vocab_size}",
                param=field,
            )


def _check_count(field: str, name: str, count: int | None, limits: Limits) -> None:
    if count is None:
        return
    if count < -1:
        raise APIError(f"`{field}` must be a positive value or -1.", param=field)
    wanted = limits.vocab_size if count == -1 else count
    if wanted > limits.logprobs_cap:
        raise APIError(
            f"Requested {name} of {wanted}, which is greater than max allowed: {limits.logprobs_cap}",
            param=field,
        )


def _check_named_rows(params: SamplingParams, limits: Limits, prompt_len: int) -> None:
    field, rows, start = "prompt_logprob_token_ids", params.prompt_logprob_token_ids, params.prompt_logprob_start
    if rows is None:
        if start is not None:
            raise APIError("prompt_logprob_start requires prompt_logprob_token_ids.", param="prompt_logprob_start")
        return
    longest = max(map(len, rows), default=0)
    if longest == 0:
        raise APIError(
            "prompt_logprob_token_ids must be a non-empty integer array of shape [num_rows, num_ids].", param=field
        )
    if longest > limits.logprobs_cap:
        raise APIError(
            f"Requested {longest} token ids per row in prompt_logprob_token_ids, which is greater than max allowed: "
            f"{limits.logprobs_cap}. Set max_logprobs (--max-logprobs) to at least {longest}.",
            param=field,
        )
    if any(not -1 <= token_id < limits.vocab_size for row in rows for token_id in row):
        raise APIError(
            "prompt_logprob_token_ids contain out-of-vocab token ids (-1 pads a row). "
            f"Vocabulary size: {limits.vocab_size}",
            param=field,
        )
    if start is not None and start < 0:
        raise APIError("prompt_logprob_start must be non-negative.", param="prompt_logprob_start")
    if len(rows) != (scored := max(prompt_len - 1 - (start or 0), 0)):
        raise APIError(
            f"prompt_logprob_token_ids has {len(rows)} rows, but the prompt has {scored} scored rows "
            "(prompt_len - 1 - prompt_logprob_start).",
            param=field,
        )


def _integer(body: dict[str, Any], field: str) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        if field in ("logprobs", "prompt_logprobs"):
            raise APIError(f"`{field}` must be an integer.", param=field)
        raise invalid(field, "Input should be a valid integer")
    return value


def _flag(body: dict[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is not None and type(value) is not bool:
        raise invalid(field, "Input should be a valid boolean")
    return bool(value)


def _number(body: dict[str, Any], field: str) -> float | None:
    value = body.get(field)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise invalid(field, "Input should be a valid number")
    return float(value)


def _ids(body: dict[str, Any], field: str) -> tuple[int, ...] | None:
    value = body.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise invalid(field, "Input should be a valid list of integers")
    return tuple(value)


def _id_lists(body: dict[str, Any], field: str) -> tuple[tuple[int, ...], ...] | None:
    value = body.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise invalid(field, "Input should be a valid list of lists of integers")
    if any(type(item) is not int for row in value for item in row):
        raise invalid(field, "Input should be a valid list of lists of integers")
    return tuple(map(tuple, value))


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise invalid("logit_bias", "Input should be a valid dictionary")
    pairs = []
    for key, bias in value.items():
        if type(bias) not in (int, float):
            raise invalid(f"logit_bias.{key}", "Input should be a valid number")
        try:
            pairs.append((int(key), min(100.0, max(-100.0, float(bias)))))
        except ValueError:
            raise APIError(
                f"logit_bias contains key(s) that cannot be converted to integer token IDs: [{key!r}]",
                param="logit_bias",
            ) from None
    return tuple(pairs)
