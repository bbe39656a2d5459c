"""Questions to a vLLM server that may be asked again, and whose answers are checked for what they say of themselves."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from dual_rollout.engines.answers import Numbers, asked_again, read_as
from dual_rollout.engines.http import HttpTransport, shown
from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError, EngineRestartedError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_IDLE_S = 1.0  # a restart takes longer, and without an open connection nothing tells of it


class Questions:
    """Asks one server; what was answered with a 500, broken JSON or nonsense is asked again, at most twice.

    Every question is numbered (`request_id`), and the answer must be to that one: a proxy may give an earlier answer
    again. Where a server does not repeat the number, the count of prompt tokens must fit.
    """

    def __init__(self, http: HttpTransport):
        self._http = http
        self._numbers = Numbers()
        self._born: float | None = None  # start of the process that took the weights; None before it took any
        self._tells = False  # when it was started
        self._lost = False  # since then it was found to be another
        self._seen = 0  # `http.interruptions` when it was last known to be that process
        self._confirming = asyncio.Lock()

    async def ask(
        self,
        path: str,
        payload: Mapping[str, Any],
        read: Callable[[dict[str, Any]], T],
        *,
        models: set[str],
        prompt_tokens: int,
        max_bytes: int,
    ) -> T:
        """What `read` makes of the answer.

        Args:
            read: raises `EngineProtocolError`, or one of `MALFORMED`, when it is of no use.
            models: names that the answer may give for its model.
            prompt_tokens: tokens of all prompts together.
            max_bytes: the longest answer that can be right.

        Raises:
            EngineProtocolError: three answers were of no use.
            EngineRestartedError: the server has lost the weights that it was given.
        """
        if self._lost or time.monotonic() - self._http.answered > _IDLE_S:
            await self.confirm()

        async def once() -> T:
            number = self._numbers.next()
            try:
                answer = await self._http.post(path, {**payload, "request_id": number}, max_bytes=max_bytes)
            except EngineRejectedError as error:
                if error.status == 404:  # a model of that name: the adapter is lost
                    await self.confirm()
                raise
            if self._http.interruptions != self._seen:
                await self.confirm()
            self._check(path, answer, number, models, prompt_tokens)
            return read_as(read, answer, self._http.url)

        return await asked_again(self._http, once)

    def _check(self, path: str, answer: Any, number: str, models: set[str], prompt_tokens: int) -> None:
        """Whether it is an answer to that request."""
        if not isinstance(answer, dict):
            raise self._useless("no JSON object")
        name = answer.get("id") or answer.get("request_id")
        if not self._numbers.fit(path, name, number):
            raise self._useless(f"an answer to another request ({shown(name)})")
        model = answer.get("model")
        if isinstance(model, str) and model not in models:
            raise self._useless(f"an answer of the model {model:.80}")
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(counted, int) and counted != prompt_tokens:
            raise self._useless(f"an answer to {counted} prompt tokens instead of {prompt_tokens}")

    def _useless(self, what: str) -> EngineProtocolError:
        return EngineProtocolError(f"gave {what}", url=self._http.url)

    async def took_weights(self, take: Callable[[], Awaitable[None]]) -> None:
        """Give the server weights, and from then on notice when it is restarted, and so has lost them."""
        async with self._confirming:
            self._born = None  # whatever comes of it, the old ones are gone
            before = await self._birth()
            await take()
            seen = self._http.interruptions
            born = await self._birth()
            if born != before:
                raise EngineRestartedError("was restarted while it took new weights", url=self._http.url)
            if born is None:
                logger.warning("%s does not tell when it was started: a restart would go unnoticed", self._http.url)
            self._born, self._seen, self._lost = born, seen, False

    @property
    def born(self) -> float | None:
        """When the server process that took the weights was started; None where it does not say, or took none."""
        return self._born

    def adopt(self, born: float | None) -> None:
        """Notice a restart as if the weights that the process of that birth took had been given from here."""
        self._born, self._lost = born, False
        self._seen = -1  # the first answer is confirmed: it may have been restarted since

    async def confirm(self) -> None:
        """Raise if the server is another process than the one that took the weights, if it took any."""
        if self._born is None:
            return
        async with self._confirming:
            seen = self._http.interruptions
            self._lost = self._lost or (self._born is not None and await self._birth() != self._born)
            if self._lost:
                raise EngineRestartedError("was restarted, and has lost the weights it was given", url=self._http.url)
            self._seen = seen

    async def _birth(self) -> float | None:
        """When the server was started; None from one that never told."""

        async def ask() -> float | None:
            try:
                metrics = await self._http.get_text("/metrics")
            except EngineRejectedError:
                metrics = ""
            if found := re.search(r"^process_start_time_seconds (\S+)$", metrics, re.MULTILINE):
                self._tells = True
                return read_as(float, found[1], self._http.url)
            if self._tells or self._born is not None:
                raise self._useless("no process_start_time_seconds in /metrics, as it did before")
            return None

        return await asked_again(self._http, ask)
