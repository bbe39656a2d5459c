"""A middleware for vLLM's server under test: as often as it is told, a message that carries others' tokens fails."""

from __future__ import annotations

from typing import Any

FAULTS_PATH = "/v1/carrier_faults"
"""POST for one more fault; the answer to GET is how many are still to come."""


class CarrierFaults:
    def __init__(self, app: Any):
        from dual_rollout.sessions.engine_requests import ListOf  # the tests, which import this file, have no vLLM

        self._app = app
        self._left = 0
        sampling = ListOf.sampling

        def failing(params: Any, kind: Any, carried: Any = ()) -> Any:
            if carried and self._left:
                self._left -= 1
                raise RuntimeError("a message that carries others' tokens fails (a fault for tests)")
            return sampling(params, kind, carried)

        ListOf.sampling = failing  # type: ignore[method-assign]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != FAULTS_PATH:
            await self._app(scope, receive, send)
            return
        from starlette.responses import JSONResponse

        self._left += scope["method"] == "POST"
        await JSONResponse(self._left)(scope, receive, send)
