"""JSON over a pooled connection to one server, with bounded retries."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
)

from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError, EngineUnavailableError

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "DUAL_ROLLOUT_API_KEY"
_RETRIED_STATUS = (429, 502, 503, 504)
_KEEP_ALIVE_S = 4.0  # uvicorn, and so vLLM, closes idle connections after 5 s
_backoff = wait_exponential_jitter(multiplier=0.25, max=15.0, jitter=0.25)


@dataclass(slots=True)
class HttpStats:
    """Totals of one server's connection: counts, bytes and seconds spent waiting for answers."""

    requests: int = 0
    retries: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


class _TransientError(Exception):
    """An attempt that may succeed when repeated; `retry_after` (seconds) if the server said when.

    `closed`: the server closed the connection, which may have been idle for long or follow an internal error of an
    earlier request; a new one may do at once.
    """

    def __init__(self, message: str, retry_after: float = 0.0, *, closed: bool = False):
        super().__init__(message)
        self.retry_after = retry_after
        self.closed = closed


class HttpTransport:
    """Requests to one server. Transport errors, 429 and 502-504 are repeated with exponential backoff and jitter.

    Bound to the event loop it is first used in; `aclose()` there. The API key, if any, is read from the environment
    variable `DUAL_ROLLOUT_API_KEY` and never logged.
    """

    def __init__(
        self,
        url: str,
        *,
        max_retries: int = 5,
        request_timeout: float = 120.0,
        total_timeout: float = 600.0,
        pool_size: int = 32,
    ):
        self.url = url
        self.stats = HttpStats()
        self._max_retries = max_retries
        self._total_timeout = total_timeout
        self._timeout = aiohttp.ClientTimeout(total=request_timeout)
        self._pool_size = pool_size
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str) -> Any:
        """The parsed JSON answer to a GET (None for an empty body)."""
        return self._parse(path, *await self._request("GET", path, None))

    async def get_text(self, path: str) -> str:
        """The answer to a GET as it is."""
        content, _ = await self._request("GET", path, None)
        return content.decode("utf-8", "replace")

    async def post(self, path: str, payload: Any = None) -> Any:
        """The parsed JSON answer to a POST of `payload` as JSON (None for an empty body)."""
        body = orjson.dumps(payload) if payload is not None else b""
        return self._parse(path, *await self._request("POST", path, body))

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(self, method: str, path: str, body: bytes | None) -> tuple[bytes, str]:
        """The content of the answer and its type."""
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_TransientError),
            stop=stop_after_attempt(self._max_retries + 1) | stop_after_delay(self._total_timeout),
            wait=_wait,
            before_sleep=self._note_retry,
        )
        try:
            async with asyncio.timeout(self._total_timeout):
                async for attempt in attempts:
                    with attempt:
                        return await self._attempt(method, path, body)
        except RetryError as error:
            last = error.last_attempt.exception()
            tries = error.last_attempt.attempt_number
            raise EngineUnavailableError(
                f"{method} {path} failed {tries} times, last: {last}. Is the server up? "
                "(max_retries and request_timeout bound the attempts)",
                url=self.url,
            ) from last
        except TimeoutError as error:
            raise EngineUnavailableError(
                f"{method} {path} took longer than total_timeout={self._total_timeout:g} s", url=self.url
            ) from error
        raise AssertionError("tenacity returns or raises")

    async def _attempt(self, method: str, path: str, body: bytes | None) -> tuple[bytes, str]:
        started = time.perf_counter()
        try:
            async with self._open_session().request(method, self.url + path, data=body) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            closed = isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError))
            refused = isinstance(error, aiohttp.ClientConnectorError)
            raise _TransientError(
                f"{type(error).__name__}: {error}".rstrip(": "), closed=closed and not refused
            ) from error
        finally:
            self.stats.requests += 1
            self.stats.bytes_sent += len(body or b"")
            self.stats.seconds += time.perf_counter() - started
        self.stats.bytes_received += len(content)
        if response.status in _RETRIED_STATUS:
            raise _TransientError(
                f"HTTP {response.status}: {_error_message(content)}",
                _retry_after(response.headers.get("Retry-After")),
            )
        if 400 <= response.status < 500:
            raise EngineRejectedError(
                f"{method} {path} was refused with HTTP {response.status}: {_error_message(content)}",
                url=self.url,
                status=response.status,
            )
        if response.status != 200:
            raise EngineProtocolError(
                f"{method} {path} answered HTTP {response.status}: {_error_message(content)}", url=self.url
            )
        return content, response.content_type

    def _parse(self, path: str, content: bytes, content_type: str) -> Any:
        if not content or content_type != "application/json":
            return None
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise EngineProtocolError(f"{path} answered with broken JSON ({error})", url=self.url) from error

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Content-Type": "application/json"}
            if key := os.environ.get(API_KEY_VARIABLE):
                headers["Authorization"] = f"Bearer {key}"
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._pool_size, keepalive_timeout=_KEEP_ALIVE_S),
                timeout=self._timeout,
                headers=headers,
            )
        return self._session

    def _note_retry(self, state: RetryCallState) -> None:
        self.stats.retries += 1
        error = state.outcome.exception() if state.outcome else None
        logger.warning("%s: %s; attempt %d, trying again", self.url, error, state.attempt_number)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if not isinstance(error, _TransientError):
        return _backoff(state)
    if error.closed and state.attempt_number == 1:
        return 0.0
    return max(_backoff(state), error.retry_after)


def _retry_after(header: str | None) -> float:
    return float(header) if header and header.isdigit() else 0.0


def _error_message(content: bytes) -> str:
    """The message inside an error body of vLLM's or FastAPI's shape, else the body's beginning."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        return content[:300].decode("utf-8", "replace")
    if isinstance(body, dict):
        inner = body.get("error", body)
        return str(inner.get("message") or inner.get("detail") or inner) if isinstance(inner, dict) else str(inner)
    return str(body)[:300]
