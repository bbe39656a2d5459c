"""vLLM's own scheduler, to which all sessions of a request go on at once: `--scheduler-cls`.

Without it each further token is a message to the engine, which begins a step with the first few that have come, so that
a round of lockstep takes several steps. With it one session's message carries the tokens of all. And the lists of a
step leave as one array: vLLM would send three for each of them, in as many parts of a message.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import RequestStatus, StreamingUpdate

from dual_rollout.sessions.wire import CARRIED, SESSION_PREFIX

logger = logging.getLogger(__name__)


class _TogetherScheduler(Scheduler):
    def add_request(self, request: Any) -> None:
        carried = self._taken_from(request)
        update = StreamingUpdate.from_request(request) if carried else None
        super().add_request(request)
        for request_id, token_ids in carried:
            session = self.requests.get(request_id)
            if update is None or session is None or session.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
                logger.error("session %s is not there to go on: its request gets no answer", request_id)
                continue
            # As for a message of its own, see `Scheduler.add_request`.
            self._update_request_as_session(session, dataclasses.replace(update, prompt_token_ids=token_ids))

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        made = super().update_from_output(*args, **kwargs)
        for of_client in made.values():
            _join_lists([output for output in of_client.outputs if output.request_id.startswith(SESSION_PREFIX)])
        return made

    @staticmethod
    def _taken_from(request: Any) -> list[tuple[str, list[int]]]:
        """What the request carries for others, taken out of it."""
        params = request.sampling_params
        if params is None or not params.extra_args or CARRIED not in params.extra_args:
            return []
        return params.extra_args.pop(CARRIED)


class _AsyncTogetherScheduler(_TogetherScheduler, AsyncScheduler):
    pass


def _join_lists(outputs: Sequence[Any]) -> None:
    """Give the first of them that has a list those of all that have one, in order; of a session each has one row."""
    listed = [output for output in outputs if output.new_logprobs is not None and output.new_token_ids]
    if len(listed) > 1:
        ids, logprobs, ranks = (
            np.concatenate(parts) for parts in zip(*(output.new_logprobs[:3] for output in listed), strict=True)
        )
        for output in listed:
            output.new_logprobs = None
        listed[0].new_logprobs = LogprobsLists(ids, logprobs, ranks)


def session_scheduler(vllm_config: Any, **options: Any) -> Scheduler:
    """The scheduler that vLLM would have made, to which sessions go on together."""
    kind = _AsyncTogetherScheduler if vllm_config.scheduler_config.async_scheduling else _TogetherScheduler
    return kind(vllm_config=vllm_config, **options)
