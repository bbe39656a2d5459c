"""The one retry policy: how often, what, and that counts never multiply."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dual_rollout.engine import sent_once
from dual_rollout.exceptions import (
    EngineError,
    EngineOversizedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineReplacedError,
    EngineRestartedError,
    EngineUnavailableError,
)
from dual_rollout.servers import retry
from dual_rollout.servers.retry import NoAnswerError, RetryPolicy

URL = "http://a"
NO_ANSWER, INVALID = NoAnswerError("refused", url=URL), EngineProtocolError("HTTP 500", url=URL)
FINAL = [
    EngineRejectedError("no", url=URL, status=400),
    EngineOversizedError("too long", url=URL),
    EngineReplacedError("other weights", url=URL),
    EngineRestartedError("lost them", url=URL),
]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(retry, "_JITTER_S", 0.0)


class Server:
    """Fails with `error` every time, and counts."""

    def __init__(self, error: Exception, max_retries: int = 3):
        self.error = error
        self.sent = self.retries = 0
        self.policy = RetryPolicy(URL, max_retries, 60.0, self.count)

    def count(self) -> None:
        self.retries += 1

    async def send(self) -> Any:
        self.sent += 1
        raise self.error

    def run(self, kind: str) -> EngineError:
        with pytest.raises(EngineError) as caught:
            asyncio.run(getattr(self.policy, kind)(self.send))
        return caught.value


@pytest.mark.parametrize("max_retries", [0, 1, 4])
@pytest.mark.parametrize(
    ("kind", "error", "repeated"),
    [("query", NO_ANSWER, True), ("query", INVALID, True), ("command", NO_ANSWER, True), ("command", INVALID, False)]
    + [(kind, error, False) for kind in ("query", "command") for error in FINAL],
    ids=str,
)
def test_what_is_sent_again(kind: str, error: Exception, repeated: bool, max_retries: int):
    server = Server(error, max_retries)
    raised = server.run(kind)
    assert server.sent == (1 + max_retries if repeated else 1) and server.retries == server.sent - 1
    assert isinstance(raised, EngineUnavailableError if error is NO_ANSWER else type(error)) and raised.url == URL
    assert error is not NO_ANSWER or f"failed {1 + max_retries} times" in str(raised)


def test_a_request_inside_another_one_is_sent_once_each_time():
    inner, outer = Server(NO_ANSWER), Server(NO_ANSWER)

    async def send() -> Any:
        return await inner.policy.command(inner.send)

    with pytest.raises(EngineUnavailableError, match="failed 4 times"):
        asyncio.run(outer.policy.query(send))
    assert inner.sent == 4


def test_inside_sent_once_nothing_is_repeated_also_in_tasks():
    server = Server(INVALID)

    async def run() -> list[Any]:
        with sent_once():
            return await asyncio.gather(*(server.policy.query(server.send) for _ in range(3)), return_exceptions=True)

    assert len(asyncio.run(run())) == server.sent == 3
    server.run("query")
    assert server.sent == 3 + 4, "what comes after it is repeated again"


def test_an_answer_at_last():
    answers: list[Any] = [NO_ANSWER, INVALID, 7]

    async def send() -> Any:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    assert asyncio.run(RetryPolicy(URL, 2, 60.0, lambda: None).query(send)) == 7
