"""The transport against a server that misbehaves in every way that a network has."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import shutil
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from dual_rollout import CoordinatorConfig
from dual_rollout.exceptions import (
    EngineError,
    EngineOversizedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineUnavailableError,
)
from dual_rollout.servers import HttpTransport, parsing, retry
from dual_rollout.servers.http import USUAL_RESPONSE_BYTES, longest_answer, shown
from tests.hang import HANG

Answer = Callable[[web.Request], Any]


class FaultyServer:
    """Gives the n-th request the n-th answer, and the last one from then on. `arrivals` are times in seconds."""

    def __init__(self, *answers: Answer):
        self._answers = answers
        self.arrivals: list[float] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[FaultyServer]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.arrivals.append(time.perf_counter())
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.read())
        return await self._answers[min(len(self.arrivals), len(self._answers)) - 1](request)


def status(code: int, body: Any = None, **headers: str) -> Answer:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(
            body if body is not None else {"error": {"message": f"code {code}"}}, status=code, headers=headers
        )

    return answer


async def ok(_: web.Request) -> web.Response:
    return web.json_response({"fine": True})


async def empty(_: web.Request) -> web.Response:
    return web.Response()


async def broken_json(_: web.Request) -> web.Response:
    return web.Response(text='{"choices": [', content_type="application/json")


async def plain_text_error(_: web.Request) -> web.Response:
    return web.Response(text="no such route", status=404)


async def reset_in_the_body(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"half": ')
    request.transport.abort()
    return response


async def reset_at_once(request: web.Request) -> web.StreamResponse:
    request.transport.abort()
    return web.Response()


async def hangs(_: web.Request) -> web.Response:
    await asyncio.sleep(3600)
    return web.Response()


def post(server: FaultyServer, payload: Any = None, *, max_bytes: int = USUAL_RESPONSE_BYTES, **options: Any) -> Any:
    async def run() -> Any:
        async with server.running():
            transport = HttpTransport(server.url, **{"max_retries": 1, **options})
            try:
                return await transport.post("/v1/completions", payload, max_bytes=max_bytes)
            finally:
                server.stats = transport.stats
                await transport.aclose()

    return asyncio.run(asyncio.wait_for(run(), HANG))


def test_json_goes_out_and_comes_back():
    server = FaultyServer(ok)
    assert post(server, {"prompt": [1, 2]}) == {"fine": True}
    assert server.bodies == [b'{"prompt":[1,2]}']
    assert server.headers[0]["Content-Type"] == "application/json"
    assert (server.stats.requests, server.stats.retries, server.stats.bytes_sent) == (1, 0, 16)
    assert server.stats.bytes_received == len('{"fine": true}') and server.stats.seconds > 0


def test_an_empty_answer_is_none():
    assert post(FaultyServer(empty)) is None


@pytest.mark.parametrize(
    "fault", [status(429), status(502), status(503), status(504), reset_in_the_body, reset_at_once, hangs]
)
def test_what_may_pass_is_repeated(fault):
    server = FaultyServer(fault, ok)
    assert post(server, {"a": 1}, request_timeout=3.0 if fault is hangs else 60.0) == {"fine": True}
    assert len(server.arrivals) == 2 and server.bodies[0] == server.bodies[1]
    assert server.stats.retries == 1 and server.stats.requests == 2


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (status(503), "code 503"),
        (reset_in_the_body, "Client"),
        (hangs, "Timeout"),
    ],
)
@pytest.mark.parametrize("max_retries", [0, 1])
def test_what_does_not_pass_is_unavailable(fault, cause, max_retries):
    server = FaultyServer(fault)
    with pytest.raises(EngineUnavailableError) as caught:
        post(server, max_retries=max_retries, request_timeout=0.3 if fault is hangs else 60.0)
    assert len(server.arrivals) == max_retries + 1
    message = str(caught.value)
    assert caught.value.url == server.url and server.url in message and "/v1/completions" in message
    assert cause in message and "max_retries" in message and "request_timeout" in message


def test_a_refused_connection_is_unavailable():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    async def run() -> None:
        transport = HttpTransport(url, max_retries=1)
        try:
            await transport.get("/health")
        finally:
            await transport.aclose()
            assert transport.stats.requests == 2

    with pytest.raises(EngineUnavailableError, match=rf"{url}.*failed 2 times.*Is the server up\?.*max_retries"):
        asyncio.run(asyncio.wait_for(run(), HANG))


def test_retry_after_is_obeyed():
    server = FaultyServer(status(429, **{"Retry-After": "1"}), ok)
    assert post(server) == {"fine": True}
    assert server.arrivals[1] - server.arrivals[0] >= 1.0


def test_a_closed_connection_is_replaced_at_once(monkeypatch):
    """vLLM closes idle connections, and those of requests after an internal error, without saying so."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 1000.0)  # which `total_timeout` does not allow
    monkeypatch.setattr(retry, "_LONGEST_PAUSE_S", 1000.0)
    server = FaultyServer(reset_at_once, ok)
    assert post(server) == {"fine": True}


def test_repeats_wait_longer_each_time():
    server = FaultyServer(status(503), status(503), status(503), ok)
    assert post(server, max_retries=3) == {"fine": True}
    gaps = [b - a for a, b in zip(server.arrivals, server.arrivals[1:], strict=False)]
    assert all(gap >= least for gap, least in zip(gaps, (0.25, 0.5, 1.0), strict=True))


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (status(400), 400, "code 400"),
        (status(404, {"detail": "Not Found"}), 404, "Not Found"),
        (status(422, {"error": "flat"}), 422, "flat"),
        (status(401, {"message": "no key"}), 401, "no key"),
        (plain_text_error, 404, "no such route"),
    ],
)
def test_a_refusal_is_not_repeated(fault, code, words):
    server = FaultyServer(fault)
    with pytest.raises(EngineRejectedError, match=words) as caught:
        post(server, max_retries=5)
    assert len(server.arrivals) == 1
    assert caught.value.status == code and server.url in str(caught.value) and str(code) in str(caught.value)


@pytest.mark.parametrize(("fault", "words"), [(broken_json, "broken JSON"), (status(500), "500.*code 500")])
def test_what_the_api_does_not_promise_is_a_protocol_error(fault, words):
    server = FaultyServer(fault)
    with pytest.raises(EngineProtocolError, match=words) as caught:
        post(server, max_retries=5)
    assert len(server.arrivals) == 1 and server.url in str(caught.value)


@pytest.mark.parametrize("fault", [hangs, status(503), status(429, **{"Retry-After": "1000"})])
def test_total_timeout_bounds_it_all(fault):
    """Without it each would outlast the 100 s after which `post` is given up."""
    server = FaultyServer(fault)
    with pytest.raises(EngineUnavailableError) as caught:
        post(server, max_retries=1000, request_timeout=1000.0, total_timeout=0.8)
    assert "total_timeout" in str(caught.value) and server.url in str(caught.value)


def test_the_api_key_comes_from_the_environment_and_stays_out_of_messages(monkeypatch):
    monkeypatch.setenv("DUAL_ROLLOUT_API_KEY", "a-test-value")
    server = FaultyServer(status(401))
    with pytest.raises(EngineRejectedError) as caught:
        post(server)
    assert server.headers[0]["Authorization"] == "Bearer a-test-value"
    assert "a-test-value" not in str(caught.value)


async def echoes_the_key(request: web.Request) -> web.Response:
    return web.json_response({"error": {"message": "x" * 995 + request.headers["Authorization"]}}, status=400)


async def echoes_the_key_for_now(request: web.Request) -> web.Response:
    return web.Response(text=f"busy: {dict(request.headers)}", status=503)


async def moved_with_the_key(request: web.Request) -> web.Response:
    location = f"http://127.0.0.1:9/{request.headers['Authorization'].split()[1]}"
    return web.Response(status=307, headers={"Location": location})


async def bad_status_line(request: web.Request) -> web.StreamResponse:
    request.transport.write(b"NOT HTTP AT ALL\r\n\r\n")
    request.transport.close()
    return web.Response()


@pytest.mark.parametrize("fault", [echoes_the_key, echoes_the_key_for_now, moved_with_the_key, bad_status_line])
def test_the_api_key_is_struck_out_wherever_a_server_repeats_it(monkeypatch, caplog, fault):
    monkeypatch.setenv("DUAL_ROLLOUT_API_KEY", "a-secret-value\n")
    with caplog.at_level(0), pytest.raises(EngineError) as caught:
        post(FaultyServer(fault))
    error: BaseException | None = caught.value
    while error is not None:  # the whole chain, as a log of the exception would show it
        assert "a-secret" not in f"{error} {error!r} {error.args}"
        error = error.__cause__ or error.__context__
    assert "a-secret" not in caplog.text


def test_redirects_are_not_followed():
    server = FaultyServer(moved_to_itself, ok)
    with pytest.raises(EngineRejectedError, match="redirected to /elsewhere, which is not followed"):
        post(server)
    assert len(server.arrivals) == 1


async def moved_to_itself(_: web.Request) -> web.Response:
    return web.Response(status=308, headers={"Location": "/elsewhere"})


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    for _ in range(1000):
        await response.write(b" " * 2**16)
    return response


def test_an_answer_without_end_is_cut_off():
    server = FaultyServer(endless)
    with pytest.raises(EngineOversizedError, match="more than 1000000 bytes"):
        post(server, request_timeout=20.0, max_bytes=1_000_000)
    assert len(server.arrivals) == 1


def test_the_longest_answer_allowed_follows_from_what_is_asked_for():
    """On a real answer of vLLM a listed token takes about 40 bytes, in a row of a prompt about 66."""
    assert longest_answer(1, 0) < 2 * 2**20
    assert 66 * 101 * 30_000 < longest_answer(1, 101 * 30_000) <= 256 * 2**20
    assert longest_answer(64, 64 * 101) < 4 * 2**20


@pytest.mark.parametrize("code", [200, 500])
def test_a_compressed_answer_is_refused_before_it_is_unpacked(code: int):
    async def bomb(request: web.Request) -> web.Response:
        assert request.headers["Accept-Encoding"] == "identity"
        content = gzip.compress(bytes(50 * 2**20))
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        return web.Response(body=content, status=code, headers=headers)

    server = FaultyServer(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(EngineProtocolError, match="compressed"):
            post(server)
        assert tracemalloc.get_traced_memory()[1] < 2 * 50 * 2**20, "the server's own and no other"
    finally:
        tracemalloc.stop()


def test_an_error_does_not_keep_the_answer(monkeypatch: pytest.MonkeyPatch):
    """Sequences keep their errors, and an error the local variables of where it was raised."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(retry, "_JITTER_S", 0.0)
    read: list[weakref.ref[Any]] = []

    class Answer:
        pass

    async def ask() -> None:
        answer = Answer()
        read.append(weakref.ref(answer))
        parsing.read_as(lambda answer: answer["choices"], answer, "http://a")

    async def run() -> EngineProtocolError:
        with pytest.raises(EngineProtocolError, match="another shape") as caught:
            await HttpTransport("http://a", max_retries=2).retries.query(ask)
        return caught.value

    kept = asyncio.run(run())
    assert kept.__traceback__ is not None and [answer() for answer in read] == [None] * 3


def test_of_a_long_error_the_beginning_is_read():
    async def endless_error(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=400, headers={"Content-Type": "application/json"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                await response.write(b"too long " * 2**13)
        return response

    server = FaultyServer(endless_error)
    with pytest.raises(EngineRejectedError, match="too long too long") as caught:
        post(server, request_timeout=20.0)
    assert len(str(caught.value)) < 2000 and len(server.arrivals) == 1


NESTED = b"[" * 1000 + b"]" * 1000


@pytest.mark.parametrize("body", [NESTED, b'{"error": %b}' % NESTED, b'{"error": {"message": %b}}' % NESTED])
@pytest.mark.parametrize(("code", "error"), [(400, EngineRejectedError), (500, EngineProtocolError)])
def test_an_error_that_is_deeply_nested_is_one_like_others(body: bytes, code: int, error: type[EngineError]):
    async def nested(_: web.Request) -> web.Response:
        return web.Response(body=body, status=code, content_type="application/json")

    with pytest.raises(error, match=r"\[\[\["):
        post(FaultyServer(nested))


def test_what_is_shown_of_an_answer_may_be_nested():
    assert shown(orjson.loads(NESTED)) in ("something deeply nested", "[" * 100)  # Python 3.13 nests further
    assert shown({"a": [1]}, 5) == "{'a':"


@pytest.mark.parametrize("url", ["http://user:hunter2@127.0.0.1:9", "https://hunter2@host"])
def test_credentials_do_not_belong_in_a_url(url):
    for refuse in (
        HttpTransport,
        lambda url: CoordinatorConfig(theta_url=url),
        lambda url: CoordinatorConfig(t_url=[url]),
    ):
        with pytest.raises(ValueError, match="DUAL_ROLLOUT_API_KEY") as caught:
            refuse(url)
        assert "hunter2" not in str(caught.value)


def test_retry_after_may_be_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    server = FaultyServer(status(429, **{"Retry-After": later}), ok)
    with pytest.raises(EngineUnavailableError, match="total_timeout"):
        post(server, total_timeout=600.0)
    assert len(server.arrivals) == 1


@pytest.mark.parametrize(
    "header",
    [
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Sat, 01 Jan 0001 00:00:00 +9999",
        "soon",
        "-5",
        "Mon, 99 Foo 20 1:1:1",
    ],
)
def test_a_date_that_is_none_is_no_reason_to_wait(header: str):
    server = FaultyServer(status(429, **{"Retry-After": header}), ok)
    assert post(server) == {"fine": True}, "years would be more than total_timeout"


def test_a_wait_that_total_timeout_does_not_allow_is_not_begun():
    server = FaultyServer(status(429, **{"Retry-After": "1000"}), ok)
    with pytest.raises(EngineUnavailableError, match="total_timeout"):
        post(server, total_timeout=500.0)  # five times what `post` is given
    assert len(server.arrivals) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate, signed by itself, of 127.0.0.1."""
    openssl, file = shutil.which("openssl"), tmp_path_factory.mktemp("tls") / "server.pem"
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    options = ["-x509", "-nodes", "-days", "1", "-keyout", str(file), "-out", str(file) + ".crt"]
    subprocess.run([openssl, "req", *options, *curve, *subject], check=True, capture_output=True, timeout=HANG)
    return file


def test_a_server_whose_certificate_nobody_vouches_for_gets_no_request(certificate: Path, monkeypatch):
    monkeypatch.setenv("DUAL_ROLLOUT_API_KEY", "a-test-value")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(f"{certificate}.crt", certificate)

    async def run() -> Any:
        server = FaultyServer(ok)
        async with server.running(context):
            transport = HttpTransport(server.url, max_retries=0)
            try:
                return await transport.post("/v1/completions", {})
            finally:
                assert server.arrivals == [], "nor the key"
                await transport.aclose()

    with pytest.raises(EngineUnavailableError, match=r"[Cc]ertificate"):
        asyncio.run(asyncio.wait_for(run(), HANG))


def get_models(url: str) -> Any:
    async def run() -> Any:
        transport = HttpTransport(url, max_retries=0)
        try:
            return await transport.get("/v1/models")
        finally:
            await transport.aclose()

    return asyncio.run(asyncio.wait_for(run(), HANG))


async def proxied(request: web.Request) -> web.Response:
    return web.json_response({"for": request.headers["Host"], "with a key": "Authorization" in request.headers})


@pytest.fixture
def proxy() -> Iterator[FaultyServer]:
    """In a thread of its own, for `get_models` has a loop of its own."""
    server, loop = FaultyServer(proxied), asyncio.new_event_loop()
    ready, done = threading.Event(), asyncio.Event()

    async def run() -> None:
        async with server.running():
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    ready.wait(60)
    yield server
    loop.call_soon_threadsafe(done.set)
    thread.join()


NODE = "http://node7.cluster.invalid:8000"


def test_a_proxy_for_the_internet_is_not_for_servers(monkeypatch, proxy):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(EngineUnavailableError):
        get_models(NODE)
    assert proxy.arrivals == []


def test_a_proxy_that_is_asked_for_is_used_but_for_loopback_and_no_proxy(monkeypatch, proxy):
    monkeypatch.setenv("DUAL_ROLLOUT_PROXY", proxy.url)
    monkeypatch.setenv("no_proxy", "other.host")
    assert get_models(NODE) == {"for": "node7.cluster.invalid:8000", "with a key": False}
    own = FaultyServer(ok)

    async def local() -> Any:
        async with own.running():
            return [
                await asyncio.to_thread(get_models, url) for url in (own.url, own.url.replace("127.0.0.1", "localhost"))
            ]

    assert asyncio.run(local()) == [{"fine": True}] * 2
    monkeypatch.setenv("no_proxy", "other.host, .cluster.invalid")
    with pytest.raises(EngineUnavailableError):
        get_models(NODE)
    assert len(proxy.arrivals) == 1


def test_requests_share_a_bounded_pool():
    async def count(_: web.Request) -> web.Response:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        if most == 3:
            three_open.set()
        await three_open.wait()
        await asyncio.sleep(0.02)  # in which a fourth would come
        open_now -= 1
        return web.json_response({})

    open_now = most = 0
    three_open = asyncio.Event()
    server = FaultyServer(count)

    async def run() -> None:
        async with server.running():
            transport = HttpTransport(server.url, pool_size=3)
            await asyncio.gather(*(transport.get("/") for _ in range(12)))
            await transport.aclose()

    asyncio.run(asyncio.wait_for(run(), HANG))
    assert most == 3 and len(server.arrivals) == 12
