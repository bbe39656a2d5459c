"""JSON over a pooled connection to one server, with bounded retries."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import aiohttp
import orjson
from aiohttp.http_exceptions import HttpProcessingError

from dual_rollout.exceptions import (
    EngineOversizedError,
    EngineProtocolError,
    EngineRejectedError,
)
from dual_rollout.servers.retry import NoAnswerError, RetryPolicy
from dual_rollout.sessions.wire import ARRAYS

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "DUAL_ROLLOUT_API_KEY"
PROXY_VARIABLE = "DUAL_ROLLOUT_PROXY"
MAX_RESPONSE_BYTES = 256 * 2**20
"""Longest answer that is ever read; 100 log-probabilities for each of 30,000 prompt tokens are about 200 MB."""
USUAL_RESPONSE_BYTES = 16 * 2**20
"""Longest answer to a request that asks for no lists; the largest known are schemas (/openapi.json), about 1 MB."""

_ERROR_BYTES = 2**20  # read of the body of an error
_RETRIED_STATUS = (408, 429, 502, 503, 504)
_PART_BYTES = 2**16
_KEEP_ALIVE_S = 4.0  # uvicorn, and so vLLM, closes idle connections after 5 s
_SHOWN_CHARACTERS = 1000  # of an error's body


def longest_answer(choices: int, logprobs: int) -> int:
    """Bytes that an answer of so many choices with so many listed log-probabilities may have: several times what a
    token's number, text, rank and log-probability take as JSON."""
    return min(2**20 + 4096 * choices + 256 * logprobs, MAX_RESPONSE_BYTES)


@dataclass(slots=True)
class HttpStats:
    """Totals of one server's connection: counts, bytes and seconds spent waiting for answers."""

    requests: int = 0
    retries: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


class HttpTransport:
    """Requests to one server, sent again as `RetryPolicy` says.

    Bound to the event loop it is first used in; `aclose()` there. The API key, if any, is read from the environment
    variable `DUAL_ROLLOUT_API_KEY`; it goes to the servers of the config alone, for redirects are not followed, and is
    struck out of every message, also where a server repeats it.

    Requests go straight to the server, also where `http_proxy` is set; see `proxy_for`.

    Attributes:
        discontinuities: after each of them another process may answer: new connections, attempts that got no answer,
            and 5xx, as from a proxy while the server behind it is restarted.
        answered: when the last other answer came, `time.monotonic` seconds.
        retries: the policy, for requests that belong together, or whose answers are checked.

    Args:
        pool_size: open connections at most; more requests wait on this side.

    Raises:
        ValueError: credentials in the URL.
    """

    def __init__(
        self,
        url: str,
        *,
        max_retries: int = 5,
        request_timeout: float = 120.0,
        total_timeout: float = 600.0,
        pool_size: int = 32,
        stats: HttpStats | None = None,
    ):
        if "@" in urlsplit(url).netloc:
            raise ValueError(f"a server's URL must not hold a user name or password: set {API_KEY_VARIABLE} instead")
        self.url = url
        self.discontinuities = 0
        self.answered = 0.0
        self.stats = HttpStats() if stats is None else stats
        self.retries = RetryPolicy(url, max_retries, total_timeout, self._count_retry)
        self._timeout = aiohttp.ClientTimeout(total=request_timeout)
        self._pool_size = pool_size
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str) -> Any:
        """The parsed JSON answer to a GET (None for an empty body)."""
        return self._parse(path, *await self._request("GET", path, None, USUAL_RESPONSE_BYTES))

    async def get_text(self, path: str) -> str:
        """The answer to a GET as it is."""
        content, _ = await self._request("GET", path, None, USUAL_RESPONSE_BYTES)
        return content.decode("utf-8", "replace")

    async def post(self, path: str, payload: Any = None, *, max_bytes: int = USUAL_RESPONSE_BYTES) -> Any:
        """The parsed JSON answer to a POST of `payload` as JSON (None for an empty body). Of `ARRAYS` it is the JSON of
        the first line, with what follows as the bytes "arrays".

        Args:
            max_bytes: a longer answer is not read to its end, and is an `EngineOversizedError`.
        """
        body = orjson.dumps(payload) if payload is not None else b""
        return self._parse(path, *await self._request("POST", path, body, max_bytes))

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(self, method: str, path: str, body: bytes | None, max_bytes: int) -> tuple[bytearray, str]:
        """The content of the answer and its type."""
        return await self.retries.command(lambda: self._attempt(method, path, body, max_bytes))

    async def _attempt(self, method: str, path: str, body: bytes | None, max_bytes: int) -> tuple[bytearray, str]:
        started = time.perf_counter()
        failure: NoAnswerError | None = None
        try:
            async with self._open_session().request(
                method, self.url + path, data=body, allow_redirects=False
            ) as response:
                content = await self._read(response, max_bytes)
        except (aiohttp.ClientError, HttpProcessingError, TimeoutError, OSError) as error:
            failure = self._no_answer(f"{method} {path}", error)
        finally:
            self.stats.requests += 1
            self.stats.bytes_sent += len(body or b"")
            self.stats.seconds += time.perf_counter() - started
        if failure is not None:
            self.discontinuities += 1
            raise failure  # not from aiohttp's error, which holds the request's headers
        if response.status >= 500:
            self.discontinuities += 1
        else:
            self.answered = time.monotonic()
        self.stats.bytes_received += len(content)
        if response.status in _RETRIED_STATUS:
            raise NoAnswerError(
                f"{method} {path} answered HTTP {response.status}: {_error_message(content)}",
                url=self.url,
                retry_after=_retry_after(response.headers.get("Retry-After")),
            )
        if 300 <= response.status < 400:
            location = _redacted(response.headers.get("Location", "nowhere"))
            raise EngineRejectedError(
                f"{method} {path} is redirected to {location:.200}, which is not followed: give the final address",
                url=self.url,
                status=response.status,
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

    async def _read(self, response: aiohttp.ClientResponse, max_bytes: int) -> bytearray:
        """The body; of an error its beginning."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise EngineProtocolError(
                f"an answer is compressed ({encoding[:40]}), which was not asked for: switch compression off in the "
                "proxy before the server",
                url=self.url,
            )
        if response.status != 200:
            max_bytes = _ERROR_BYTES
        content = bytearray()
        while len(content) <= max_bytes:
            if not (part := await response.content.read(_PART_BYTES)):
                return content
            content += part
        response.close()  # the rest is not read
        if response.status == 200:
            content.clear()  # an error keeps what its frames hold, as long as it is kept
            raise EngineOversizedError(
                f"{response.url.path} answers with more than {max_bytes} bytes, several times what was asked for",
                url=self.url,
            )
        return content

    def _parse(self, path: str, content: bytes | bytearray, content_type: str) -> Any:
        arrays: bytes | bytearray | None = None
        if content_type == ARRAYS:
            content, _, arrays = content.partition(b"\n")
        if not content or content_type not in ("application/json", ARRAYS):
            return None
        try:
            answer = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise EngineProtocolError(f"{path} answered with broken JSON ({error})", url=self.url) from error
        return answer if arrays is None or not isinstance(answer, dict) else {**answer, "arrays": arrays}

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Compressed answers are not taken: a few bytes may stand for gigabytes.
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            if key := os.environ.get(API_KEY_VARIABLE, "").strip():
                headers["Authorization"] = f"Bearer {key}"
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._pool_size, keepalive_timeout=_KEEP_ALIVE_S),
                timeout=self._timeout,
                headers=headers,
                proxy=proxy_for(self.url),
                auto_decompress=False,
                trace_configs=[self._watch_connections()],
            )
        return self._session

    def _watch_connections(self) -> aiohttp.TraceConfig:
        async def count(*_: Any) -> None:
            self.discontinuities += 1

        config = aiohttp.TraceConfig()
        config.on_connection_create_end.append(count)
        return config

    def _no_answer(self, what: str, error: Exception) -> NoAnswerError:
        closed = isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError))
        refused = isinstance(error, aiohttp.ClientConnectorError)
        text = _redacted(f"{type(error).__name__}: {error}".rstrip(": "))[:_SHOWN_CHARACTERS]
        return NoAnswerError(f"{what} got no answer ({text})", url=self.url, closed=closed and not refused)

    def _count_retry(self) -> None:
        self.stats.retries += 1


def proxy_for(url: str) -> str | None:
    """The proxy on the way to a server: `DUAL_ROLLOUT_PROXY`, but none to loopback addresses and what `no_proxy` names.

    `http_proxy` and `https_proxy` are not used. On clusters they lead out to the internet, and the proxy cannot reach
    the nodes on which the servers run.
    """
    proxy, host = os.environ.get(PROXY_VARIABLE, "").strip(), urlsplit(url).hostname or ""
    if not proxy or _is_loopback(host) or proxy_bypass(host):
        return None
    return proxy


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _retry_after(header: str | None) -> float:
    """Seconds to wait, as a number or until a date."""
    if header and header.isascii() and header.isdigit():
        return float(header[:9])
    try:
        until = parsedate_to_datetime(header or "")
        now = datetime.now(UTC) if until.tzinfo else datetime.now(UTC).replace(tzinfo=None)
        return max(0.0, (until - now).total_seconds())
    except (ValueError, OverflowError):
        return 0.0


def _redacted(text: str) -> str:
    """Without the API key, should a server have repeated it."""
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    return text.replace(key, "[API key]") if key else text


_TITLE = re.compile(r"<title[^>]*>\s*(.*?)\s*</title>", re.IGNORECASE | re.DOTALL)


def _without_markup(text: str) -> str:
    """Of an HTML page, which another kind of server answers with, its title alone."""
    if not text.lstrip()[:15].lower().startswith(("<!doctype html", "<html")):
        return text
    title = _TITLE.search(text)
    return f'an HTML page, "{title[1]}"' if title else "an HTML page"


def _error_message(content: bytes | bytearray) -> str:
    """The message inside an error body of vLLM's or FastAPI's shape, else the body; its beginning, if it is long."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        body = None
    inner = body.get("error", body) if isinstance(body, dict) else body
    message = (inner.get("message") or inner.get("detail")) if isinstance(inner, dict) else inner
    if not isinstance(message, str):
        message = _without_markup(content.decode("utf-8", "replace"))
    return _redacted(message)[:_SHOWN_CHARACTERS]


def shown(value: Any, length: int = 100) -> str:
    """The beginning of what a server said, for a message. It may be nested too deeply for `repr`."""
    try:
        return repr(value)[:length]
    except RecursionError:
        return "something deeply nested"
