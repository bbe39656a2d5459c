"""When a vLLM server was started, by which another process at its address is noticed."""

from __future__ import annotations

import re

from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError
from dual_rollout.servers.http import HttpTransport
from dual_rollout.servers.parsing import read_as


class StartTimeInMetrics:
    """When a server was started, as its /metrics tell (vLLM with one API server process, and the embedded one)."""

    def __init__(self, http: HttpTransport):
        self._http = http
        self._tells = False

    async def __call__(self) -> float | None:
        """None from one that never told.

        Raises:
            EngineProtocolError: it does not tell any more.
        """

        async def ask() -> float | None:
            try:
                metrics = await self._http.get_text("/metrics")
            except EngineRejectedError:
                metrics = ""
            if found := re.search(r"^process_start_time_seconds (\S+)$", metrics, re.MULTILINE):
                self._tells = True
                return read_as(float, found[1], self._http.url)
            if self._tells:
                what = "gave no process_start_time_seconds in /metrics, as it did before"
                raise EngineProtocolError(what, url=self._http.url)
            return None

        return await self._http.retries.query(ask)
