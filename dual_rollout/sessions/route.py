"""Routes on vLLM's API server, by `--middleware`.

- `POST /v1/dual_rollout/next_top_k`: top-k lists after texts that grow. A text that is asked for again and again is a
  session: a request that stays in vLLM's engine (its streaming input), with its keys and values. Each further token is
  sent alone, and nothing of the text is parsed, hashed, looked up or computed a second time. Lists come back as the
  arrays that the engine made.
- `POST /v1/dual_rollout/draw`: tokens that are drawn after texts, and log-probabilities of named ones, of all sequences
  of a round in one message. For the engine each is a request of one token, whose text is in the prefix cache.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response

from dual_rollout.sessions.engine_requests import EngineOutputs
from dual_rollout.sessions.request import DrawRequest, ListRequest
from dual_rollout.sessions.server import SessionServer
from dual_rollout.sessions.wire import ARRAYS, DRAW_PATH, PATH, SESSIONS_PATH
from dual_rollout.vllm_routes import answered

logger = logging.getLogger(__name__)

_ASKING = (
    "/v1/",
    "/v2/",
    "/inference/",
    "/tokenize",
    "/detokenize",
    "/ping",
)  # routes that change nothing, but for these
_CHANGING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_PAUSES = {"/pause": True, "/resume": False, "/sleep": True, "/wake_up": False}


class SessionMiddleware:
    """Adds the route when the server starts, and ends the sessions before a request that may change the model."""

    def __init__(self, app: Any):
        self._app = app
        self._server: SessionServer | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self._server = add_route(scope["app"])
        if self._server is None or scope["type"] != "http" or not may_change_model(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        async with self._server.without_sessions():
            await self._app(scope, receive, send)
            if scope["path"] in _PAUSES:
                self._server.paused = _PAUSES[scope["path"]]


def may_change_model(method: str, path: str) -> bool:
    """Whether a request may change the weights or the cache: any that is not known to ask only."""
    return method == "POST" and (path in _CHANGING or not path.startswith(_ASKING))


def add_route(app: FastAPI) -> SessionServer | None:
    """None, with a line in the log, where this vLLM is not what the route is written for."""
    try:
        server = SessionServer(app.state, EngineOutputs(app.state.engine_client))
    except AttributeError as error:
        logger.error("no sessions (dual_rollout.sessions): this version of vLLM is not known (%s)", error)
        return None
    router = APIRouter()

    @router.get(SESSIONS_PATH)
    async def describe() -> dict[str, int]:
        return server.describe()

    @router.post(PATH)
    async def next_top_k(request: Request) -> Response:
        async def work(body: Any) -> Response:
            return Response(await server.answer(ListRequest.from_json(body, server.limits())), media_type=ARRAYS)

        return await answered(request, work)

    @router.post(DRAW_PATH)
    async def draw(request: Request) -> Response:
        async def work(body: Any) -> Response:
            return Response(await server.draw(DrawRequest.from_json(body, server.limits())), media_type=ARRAYS)

        return await answered(request, work)

    _include_first(app, router)
    return server


def _include_first(app: FastAPI, router: APIRouter) -> None:
    """Before vLLM's routes, of which there are a hundred: they are tried in order, twice, for each request."""
    routes = app.router.routes
    others = len(routes)
    app.include_router(router)
    routes[:] = routes[others:] + routes[:others]
