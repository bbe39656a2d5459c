"""What client and server of sessions tell each other. Needs no vLLM."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

PATH = "/v1/dual_rollout/next_top_k"
"""Where lists are asked for; under /v1, where vLLM asks for its API key."""
DRAW_PATH = "/v1/dual_rollout/draw"
"""Where tokens are drawn, and log-probabilities of named ones asked for."""
SESSIONS_PATH = "/v1/dual_rollout/sessions"
"""How many sessions there are, and may be."""
UNKNOWN_SESSION = 409
"""The status of an answer to a request that goes on with a text which the server has not kept."""
CARRIED = "dual_rollout_carried"
"""The key of `SamplingParams.extra_args` under which one session brings the engine the tokens of others, see
`scheduler.py`."""
SESSION_PREFIX = "dual-rollout-session-"
"""Begins the names of the engine's requests that are sessions; of those in a step the first has the lists of all, see
`scheduler.py`."""
MIDDLEWARE = "dual_rollout.sessions.route.SessionMiddleware"
"""The --middleware that has the routes."""
SCHEDULER = "dual_rollout.sessions.scheduler.session_scheduler"
"""The --scheduler-cls that takes the tokens of all."""

_IDS, _LOGPROBS = "<i4", "<f4"


def encoded(token_ids: np.ndarray, logprobs: np.ndarray) -> dict[str, Any]:
    """Lists `(B, k)` as fields of a JSON object."""
    return {"k": token_ids.shape[1], "token_ids": _base64(token_ids, _IDS), "logprobs": _base64(logprobs, _LOGPROBS)}


def decoded(answer: dict[str, Any], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The token ids and log-probabilities, both `(count, k)`, of an answer.

    Raises:
        ValueError, KeyError, TypeError: it has none, or not as many.
    """
    ids, logprobs = _array(answer["token_ids"], _IDS), _array(answer["logprobs"], _LOGPROBS)
    shape = (count, int(answer["k"]))
    return ids.reshape(shape), logprobs.reshape(shape)


def encoded_draws(token_ids: Sequence[int], named: Sequence[np.ndarray]) -> dict[str, Any]:
    """B tokens, and for each an array of log-probabilities, as fields of a JSON object."""
    return {"token_ids": _base64(np.array(token_ids), _IDS), "named": _base64(np.concatenate(named), _LOGPROBS)}


def decoded_draws(answer: dict[str, Any], counts: Sequence[int]) -> tuple[list[int], list[np.ndarray]]:
    """The tokens of an answer, one for each of `counts`, and as many log-probabilities as each says.

    Raises:
        ValueError, KeyError, TypeError: it has none, or not as many.
    """
    ids, values = _array(answer["token_ids"], _IDS), _array(answer["named"], _LOGPROBS)
    if len(ids) != len(counts) or len(values) != sum(counts):
        raise ValueError(f"{len(ids)} tokens and {len(values)} log-probabilities for {len(counts)} texts")
    return ids.tolist(), np.split(values, np.cumsum(counts)[:-1])


def _base64(array: np.ndarray, kind: str) -> str:
    return base64.b64encode(array.astype(kind).tobytes()).decode()


def _array(encoded: Any, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(encoded), kind)
