"""A proxy in front of a real server that spoils answers, or gives none, when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

ROUTES = ("/v1/completions", "/inference/v1/generate", "/v1/dual_rollout/generate")
"""Those that everything sampled comes from."""


@dataclass
class Exchange:
    """One request to the proxy. `number` counts those to `ROUTES` from 1; `send` passes a body on."""

    request: web.Request
    body: bytes
    number: int
    send: Callable[[bytes], Awaitable[tuple[int, bytes]]]

    def ask(self) -> Awaitable[tuple[int, bytes]]:
        """Pass it on."""
        return self.send(self.body)

    @property
    def prompts(self) -> list[list[int]]:
        """Of a completion, which has a list of prompts or one alone; none of another request."""
        asked = json.loads(self.body).get("prompt", [])
        return [asked] if asked and isinstance(asked[0], int) else asked


Fault = Callable[[Exchange], Awaitable[web.StreamResponse]]


class FaultProxy:
    """Passes everything on to `target`, but requests to `ROUTES` that `when` picks by number go to `fault`.

    Attributes:
        completions: requests to `ROUTES` so far.
        injected: how many of them met the fault.
        open_now, most_open: requests being answered, and the most at once.
    """

    def __init__(self, target: str, fault: Fault | None = None, when: Callable[[int], bool] = lambda number: True):
        self.target = target
        self.fault = fault
        self.when = when
        self.url = ""
        self.completions = self.injected = self.open_now = self.most_open = 0
        self.earlier: list[bytes] = []
        self._runner: web.AppRunner | None = None
        self._port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FaultProxy]:
        async with aiohttp.ClientSession() as self._session:
            await self.start()
            try:
                yield self
            finally:
                await self.stop()

    async def start(self) -> None:
        """Listen, on the same port as before if it listened before."""
        app = web.Application(client_max_size=2**28)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """Refuse connections from now on."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()

        async def send(body: bytes) -> tuple[int, bytes]:
            headers = {"Content-Type": "application/json"}
            url = self.target + request.path_qs
            async with self._session.request(request.method, url, data=body or None, headers=headers) as answer:
                return answer.status, await answer.read()

        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            if request.path in ROUTES:
                self.completions += 1
                if self.fault is not None and self.when(self.completions):
                    self.injected += 1
                    return await self.fault(Exchange(request, body, self.completions, send))
            status, content = await send(body)
            if request.path in ROUTES:
                self.earlier.append(content)
        except aiohttp.ClientError:  # the server behind is gone
            request.transport.abort()  # type: ignore[union-attr]
            return web.Response()
        finally:
            self.open_now -= 1
        kind = "text/plain" if request.path == "/metrics" else "application/json"
        return web.Response(body=content, status=status, content_type=kind)


# ---- faults ---------------------------------------------------------------------------------------------------------


async def passed_on(exchange: Exchange) -> web.StreamResponse:
    """No fault."""
    status, content = await exchange.ask()
    return web.Response(body=content, status=status, content_type="application/json")


async def reset(exchange: Exchange) -> web.StreamResponse:
    exchange.request.transport.abort()  # type: ignore[union-attr]
    return web.Response()


async def reset_in_the_body(exchange: Exchange) -> web.StreamResponse:
    _, content = await exchange.ask()
    response = web.StreamResponse(headers={"Content-Length": str(len(content)), "Content-Type": "application/json"})
    await response.prepare(exchange.request)
    await response.write(content[: len(content) // 2])
    exchange.request.transport.abort()  # type: ignore[union-attr]
    return response


async def half_a_document(exchange: Exchange) -> web.StreamResponse:
    _, content = await exchange.ask()
    return web.Response(body=content[: len(content) // 2], content_type="application/json")


async def hang(exchange: Exchange) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


def once_each(fault: Fault) -> Fault:
    """No question meets the fault twice, however often and in which order it is asked."""
    met: set[str] = set()

    async def either(exchange: Exchange) -> web.StreamResponse:
        question = json.dumps({**json.loads(exchange.body), "request_id": None})
        if question in met:
            return await passed_on(exchange)
        met.add(question)
        return await fault(exchange)

    return either


def error(status: int, **headers: str) -> Fault:
    async def fault(_: Exchange) -> web.StreamResponse:
        return web.json_response({"error": {"message": f"injected {status}"}}, status=status, headers=headers)

    return fault


async def not_json(_: Exchange) -> web.StreamResponse:
    return web.Response(text="<html>welcome to the captive portal</html>", content_type="text/html")


async def nested_error(_: Exchange) -> web.StreamResponse:
    return web.Response(
        body=b'{"error": %b}' % (b"[" * 1000 + b"]" * 1000), status=500, content_type="application/json"
    )


async def nested_answer(_: Exchange) -> web.StreamResponse:
    return web.Response(body=b'{"choices": %b}' % (b"[" * 1000 + b"]" * 1000), content_type="application/json")


async def endless(exchange: Exchange) -> web.StreamResponse:
    """300 MB of an answer, if they are taken."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(exchange.request)
    with contextlib.suppress(ConnectionError):
        for _ in range(300):
            await response.write(b" " * 10**6)
    return response


def changed(change: Callable[[Any], Any]) -> Fault:
    """The real answer with `change` made to it: in place, or what it returns."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        _, content = await exchange.ask()
        answer = json.loads(content)
        result = change(answer)
        return web.Response(text=json.dumps(answer if result is None else result), content_type="application/json")

    return fault


def earlier_answer(proxy: FaultProxy) -> Fault:
    """An answer that was given before, to another request."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        return web.Response(body=proxy.earlier[-1], content_type="application/json")

    return fault
