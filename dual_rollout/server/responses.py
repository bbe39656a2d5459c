"""Finished sequences as vLLM's JSON."""

from __future__ import annotations

import base64
import io
import itertools
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
from aiohttp import web

from dual_rollout.server.sampler import TokenLogprobs
from dual_rollout.server.scheduler import Sequence

LOWEST_LOGPROB = -9999.0


class Responses:
    """Answers to requests that ran the model."""

    def __init__(self, tokenizer: Any, vocab_size: int):
        self._tokenizer = tokenizer
        self._id_keys = [f"token_id:{token_id}" for token_id in range(vocab_size)]
        self._decoded: dict[int, str] = {}

    def completions(self, body: dict[str, Any], name: str, sequences: list[Sequence]) -> web.Response:
        as_ids = bool(body.get("return_tokens_as_token_ids"))
        return_ids = bool(body.get("return_token_ids"))
        choices = [
            {
                "index": index,
                "text": self._text(sequence),
                "logprobs": self._completion_logprobs(sequence, as_ids),
                "finish_reason": sequence.finish_reason,
                "token_ids": sequence.output_ids if return_ids else None,
                "prompt_logprobs": _prompt_logprobs(sequence),
                "prompt_token_ids": sequence.tokens[: sequence.num_prompt] if return_ids else None,
            }
            for index, sequence in enumerate(sequences)
        ]
        return json_response(
            {
                "id": f"cmpl-{body.get('request_id') or uuid.uuid4().hex}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": name,
                "choices": choices,
                "usage": _usage(sequences),
            }
        )

    def generate(self, body: dict[str, Any], name: str, sequence: Sequence) -> web.Response:
        choice = {"index": 0, "finish_reason": sequence.finish_reason, "token_ids": sequence.output_ids}
        return json_response(
            {
                "request_id": f"generate-tokens-{body.get('request_id') or uuid.uuid4().hex}",
                "model": name,
                "created": int(time.time()),
                "choices": [choice],
                "usage": _usage([sequence]),
                "prompt_logprobs": _prompt_logprobs(sequence),
                "prompt_token_id_logprobs": _prompt_scores(sequence),
            }
        )

    def _decode(self, token_id: int) -> str:
        text = self._decoded.get(token_id)
        if text is None:
            text = self._decoded[token_id] = self._tokenizer.decode([token_id])
        return text

    def _text(self, sequence: Sequence) -> str:
        """The output without the token that stopped it, and without special tokens."""
        ids = sequence.output_ids
        return self._tokenizer.decode(ids[:-1] if sequence.finish_reason == "stop" else ids, skip_special_tokens=True)

    def _completion_logprobs(self, sequence: Sequence, as_ids: bool) -> dict[str, Any] | None:
        if not sequence.params.wants_logprobs:
            return None
        name = self._id_keys.__getitem__ if as_ids else self._decode
        # With logprobs=-1 vLLM's completions list nothing beside the sampled token's own value.
        listed = [] if sequence.params.logprobs == -1 else sequence.logprobs
        tokens = [name(int(entry.token_ids[0])) for entry in sequence.logprobs]
        return {
            "text_offset": list(itertools.accumulate(map(len, tokens[:-1]), initial=0)) if tokens else [],
            "token_logprobs": [max(float(entry.logprobs[0]), LOWEST_LOGPROB) for entry in sequence.logprobs],
            "tokens": tokens,
            "top_logprobs": [_as_dict(entry, name) for entry in listed] or [{} for _ in tokens],
        }


def _prompt_logprobs(sequence: Sequence) -> list[dict[str, Any] | None] | None:
    """None for the first token, then one row per prompt token computed in this request."""
    if sequence.params.prompt_logprobs is None:
        return None
    rows = [_as_dict(entry, str) for entry in sequence.prompt_rows]
    return [None, *({token: {"logprob": value} for token, value in row.items()} for row in rows)]


def _as_dict(entry: TokenLogprobs, name: Callable[[int], str]) -> dict[str, float]:
    values = np.maximum(entry.logprobs, np.float32(LOWEST_LOGPROB)).tolist()
    return dict(zip(map(name, entry.token_ids.tolist()), values, strict=True))


def _prompt_scores(sequence: Sequence) -> str | None:
    """Scores of named tokens as base64 ``.npy``; None when they begin before the first computed row."""
    params = sequence.params
    if params.prompt_logprob_token_ids is None or sequence.prompt_scores_missed:
        return None
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(sequence.prompt_scores), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _usage(sequences: list[Sequence]) -> dict[str, Any]:
    """Counts over all prompts; like vLLM, ``cached_tokens`` is that of the last prompt."""
    prompt_tokens = sum(sequence.num_prompt for sequence in sequences)
    completion_tokens = sum(len(sequence.tokens) - sequence.num_prompt for sequence in sequences)
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sequences[-1].cached_tokens,
        },
    }


def json_response(content: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")
