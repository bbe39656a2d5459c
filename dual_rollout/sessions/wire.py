"""What client and server of sessions tell each other. Needs no vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

ARRAYS = "application/vnd.dual-rollout.arrays"
"""The media type of answers: a line of JSON, and behind it arrays, which the client finds under "arrays"."""

_IDS, _LOGPROBS = np.dtype("<i4"), np.dtype("<f4")


def encoded(answer: Mapping[str, Any], token_ids: np.ndarray, logprobs: np.ndarray) -> bytes:
    """An answer with lists `(B, k)`."""
    return _bytes({**answer, "k": token_ids.shape[1]}, token_ids, logprobs)


def decoded(answer: Mapping[str, Any], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The token ids and log-probabilities, both `(count, k)`, of an answer.

    Raises:
        ValueError, KeyError, TypeError: it has none, or not as many.
    """
    k = int(answer["k"])
    ids, logprobs = _arrays(answer["arrays"], count * k, count * k)
    return ids.reshape(count, k), logprobs.reshape(count, k)


def encoded_draws(answer: Mapping[str, Any], token_ids: Sequence[int], named: Sequence[np.ndarray]) -> bytes:
    """An answer with B tokens, and for each an array of log-probabilities."""
    return _bytes(answer, np.array(token_ids), np.concatenate(named))


def decoded_draws(answer: Mapping[str, Any], counts: Sequence[int]) -> tuple[list[int], list[np.ndarray]]:
    """The tokens of an answer, one for each of `counts`, and as many log-probabilities as each says.

    Raises:
        ValueError, KeyError, TypeError: it has none, or not as many.
    """
    ids, values = _arrays(answer["arrays"], len(counts), sum(counts))
    return ids.tolist(), np.split(values, np.cumsum(counts)[:-1])


def _bytes(head: Mapping[str, Any], token_ids: np.ndarray, logprobs: np.ndarray) -> bytes:
    arrays = token_ids.astype(_IDS).tobytes() + logprobs.astype(_LOGPROBS).tobytes()
    return json.dumps(head).encode() + b"\n" + arrays


def _arrays(content: bytes | bytearray, ids: int, logprobs: int) -> tuple[np.ndarray, np.ndarray]:
    """So many token ids, and behind them so many log-probabilities."""
    if len(content) != ids * _IDS.itemsize + logprobs * _LOGPROBS.itemsize:
        raise ValueError(f"{len(content)} bytes for {ids} token ids and {logprobs} log-probabilities")
    return np.frombuffer(content, _IDS, ids), np.frombuffer(content, _LOGPROBS, logprobs, ids * _IDS.itemsize)
