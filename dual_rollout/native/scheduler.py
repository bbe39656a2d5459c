"""vLLM's own scheduler, to which both requests of a pair come at once: `--scheduler-cls`.

Requests arrive one by one, and an idle engine begins with the first at once: its partner would be a step late, and the
pair never in step. The longer prompt goes first, so that the shorter one fits into what its last chunk leaves of a
step's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from dual_rollout.native.wire import Member


class _PairsTogether(Scheduler):
    """Holds a request of a pair until its partner is there."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._held: dict[str, Any] = {}

    def add_request(self, request: Any) -> None:
        params = request.sampling_params
        member = None if params is None else Member.from_extra_args(params.extra_args)
        if member is None or member.side in ("both", "alone"):
            super().add_request(request)
        elif member.rollout not in self._held:
            self._held[member.rollout] = request
        else:
            pair = (self._held.pop(member.rollout), request)
            for side in sorted(pair, key=lambda one: one.num_prompt_tokens, reverse=True):
                super().add_request(side)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: Any) -> Any:
        if request_ids is not None:
            request_ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        self._held = {
            pair: request
            for pair, request in self._held.items()
            if request_ids is not None and request.request_id not in request_ids
        }
        return super().finish_requests(request_ids, finished_status)


class _AsyncPairScheduler(_PairsTogether, AsyncScheduler):
    pass


def pair_scheduler(vllm_config: Any, **options: Any) -> Scheduler:
    """The scheduler that vLLM would have made, with pairs kept together."""
    kind = _AsyncPairScheduler if vllm_config.scheduler_config.async_scheduling else _PairsTogether
    return kind(vllm_config=vllm_config, **options)
