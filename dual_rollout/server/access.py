"""Who may ask the embedded server for what, and from where it takes weights."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from dual_rollout.server.protocol import APIError

CHANGING_ROUTES = {
    "/collective_rpc",
    "/reset_prefix_cache",
    "/update_weight_version",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
}
OPEN_ROUTES = {"/health"}


class Access:
    """With an `api_key` every request but `/health` must bring it. Without one, the routes that change what is served
    answer to programs of this machine alone, and never to a web page. With `weights_dir`, new weights come from inside
    it alone.
    """

    def __init__(self, api_key: str | None, weights_dir: str | None):
        self._api_key = api_key
        self._weights_dir = weights_dir

    @web.middleware
    async def check(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """A middleware that refuses what may not be asked."""
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else ""
        if self._api_key is not None:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if route not in OPEN_ROUTES and not _same(given, self._api_key):
                raise APIError(
                    "Unauthorized: the server's VLLM_API_KEY must come as a bearer token",
                    status=401,
                    type="Unauthorized",
                )
        elif route in CHANGING_ROUTES and not (is_local(request.remote) and "Origin" not in request.headers):
            raise APIError(
                f"{route} changes what is served, and answers to programs of the server's own machine alone unless it "
                "was started with VLLM_API_KEY in its environment and the request brings that key",
                status=403,
                type="Forbidden",
            )
        return await handler(request)

    def check_folder(self, path: str) -> None:
        """Refuse weights from outside `weights_dir`, symbolic links resolved."""
        if self._weights_dir is None:
            return
        root = Path(self._weights_dir).resolve()
        for place in (Path(path), *Path(path).glob("*")):
            if not place.resolve().is_relative_to(root):
                raise APIError(f"{path} is not inside --weights-dir {self._weights_dir}", status=403, type="Forbidden")


def _same(given: str, key: str) -> bool:
    """Whether a header holds the key, in a time that does not say how much of it is right."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), key.encode())


def is_local(address: str | None) -> bool:
    """Whether a peer's address is a loopback one; an IPv4 address may come inside an IPv6 one."""
    try:
        peer = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return False
    return (getattr(peer, "ipv4_mapped", None) or peer).is_loopback
