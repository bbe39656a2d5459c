"""What client and server of sessions tell each other. Needs no vLLM."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

PATH = "/v1/dual_rollout/next_top_k"
"""Where lists are asked for; under /v1, where vLLM asks for its API key."""
SESSIONS_PATH = "/v1/dual_rollout/sessions"
"""How many sessions there are, and may be."""
UNKNOWN_SESSION = 409
"""The status of an answer to a request that goes on with a text which the server has not kept."""
CARRIED = "dual_rollout_carried"
"""The key of `SamplingParams.extra_args` under which one session brings the engine the tokens of others, see
`scheduler.py`."""
MIDDLEWARE = "dual_rollout.sessions.route.SessionMiddleware"
"""The --middleware that has the routes."""
SCHEDULER = "dual_rollout.sessions.scheduler.session_scheduler"
"""The --scheduler-cls that takes the tokens of all."""

_TYPES = {"token_ids": "<i4", "logprobs": "<f4"}


def encoded(token_ids: np.ndarray, logprobs: np.ndarray) -> dict[str, Any]:
    """Lists `(B, k)` as fields of a JSON object."""
    arrays = {"token_ids": token_ids, "logprobs": logprobs}
    return {"k": token_ids.shape[1]} | {
        name: base64.b64encode(array.astype(_TYPES[name]).tobytes()).decode() for name, array in arrays.items()
    }


def decoded(answer: dict[str, Any], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The token ids and log-probabilities, both `(count, k)`, of an answer.

    Raises:
        ValueError, KeyError, TypeError: it has none, or not as many.
    """
    ids, logprobs = (np.frombuffer(base64.b64decode(answer[name]), kind) for name, kind in _TYPES.items())
    shape = (count, int(answer["k"]))
    return ids.reshape(shape), logprobs.reshape(shape)
