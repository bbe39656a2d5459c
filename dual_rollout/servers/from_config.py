"""From a config to the clients of its servers: the place where a kind of server has its name."""

from __future__ import annotations

from collections.abc import Callable

from dual_rollout.config import CoordinatorConfig
from dual_rollout.engine import Engine
from dual_rollout.servers.http import HttpStats, HttpTransport
from dual_rollout.servers.replicas import Replicas
from dual_rollout.servers.sglang import SGLangEngine
from dual_rollout.servers.vllm import VLLMEngine

_CLIENTS: dict[str, Callable[[HttpTransport, str | None], Engine]] = {"vllm": VLLMEngine, "sglang": SGLangEngine}


class Clients:
    """Makes the clients, and closes their connections together."""

    def __init__(self, config: CoordinatorConfig):
        self._config = config
        self._open: list[HttpTransport | Replicas] = []

    def client(self, kind: str, urls: str | list[str], model: str | None, stats: HttpStats) -> Engine:
        """Of one server, or of several replicas, of `kind` "vllm" or "sglang"."""
        if isinstance(urls, str):
            return _CLIENTS[kind](self.transport(urls, stats), model)
        # There are others to ask, so that few repeats will do.
        retries = min(self._config.max_retries, 1)
        engines = [_CLIENTS[kind](self.transport(url, stats, retries), model) for url in urls]
        replicas = Replicas(engines, self._config.max_retries)
        self._open.insert(0, replicas)
        return replicas

    async def aclose(self) -> None:
        """Close all connections."""
        for connection in self._open:
            await connection.aclose()

    def transport(self, url: str, stats: HttpStats, max_retries: int | None = None) -> HttpTransport:
        """The connection to a server, for a client of another kind."""
        config = self._config
        transport = HttpTransport(
            url,
            max_retries=config.max_retries if max_retries is None else max_retries,
            request_timeout=config.request_timeout,
            total_timeout=config.total_timeout,
            pool_size=config.connection_pool_size or config.concurrency,
            stats=stats,
        )
        self._open.append(transport)
        return transport
