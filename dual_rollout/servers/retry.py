"""The one retry policy: which requests are sent again, how often, and after what pause.

A request to a server is sent at most `1 + max_retries` times, whatever went wrong with it:

| fault | sent again |
|---|---|
| no connection, connection lost, time-out, 408, 429, 502-504 | yes, after a pause of at least `Retry-After` |
| another 5xx, broken JSON, an answer that fails a check | yes; but not a command, such as to take new weights |
| another 4xx, a redirect, an answer that is far too long | no: the same would come again |

Pauses are 0.25 s, doubled each time up to 15 s, with as much as 0.25 s more at random. No pause is begun that would end
after `total_timeout`.

Requests that belong together (an answer, and whether it is still that server's) are sent again together: inside one
that may be sent again, and inside `sent_once`, others are sent once. So the counts add up and never multiply. How many
requests a batch can cost is in docs/scale.md.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from dual_rollout.engine import sending_once, sent_once
from dual_rollout.exceptions import EngineProtocolError, EngineUnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _JITTER_S = 0.25, 15.0, 0.25


class NoAnswerError(EngineUnavailableError):
    """One attempt got no answer, or one that says to try again.

    Attributes:
        retry_after: seconds until the server wants to be asked again; 0 where it does not say.
        closed: the server closed the connection, which may have been idle for long or follow an internal error of an
            earlier request; a new one may do at once.
    """

    def __init__(self, message: str, *, url: str, retry_after: float = 0.0, closed: bool = False):
        super().__init__(message, url=url)
        self.retry_after = retry_after
        self.closed = closed


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How requests to the server at `url` are sent again.

    Attributes:
        max_retries: times that one request is sent again.
        total_timeout: seconds for a request with everything that is sent again.
        count: called for each time.
    """

    url: str
    max_retries: int
    total_timeout: float
    count: Callable[[], None]

    async def command(self, send: Callable[[], Awaitable[T]]) -> T:
        """What `send` gives, sent again where it got no answer."""
        return await self._repeat(send, (NoAnswerError,))

    async def query(self, send: Callable[[], Awaitable[T]]) -> T:
        """What `send` gives, sent again also where the answer was of no use. Asking twice must do no harm."""
        return await self._repeat(send, (NoAnswerError, EngineProtocolError))

    async def _repeat(self, send: Callable[[], Awaitable[T]], repeated: tuple[type[Exception], ...]) -> T:
        once = sending_once()
        deadline = time.monotonic() + self.total_timeout
        try:
            async with asyncio.timeout(self.total_timeout):
                for attempt in itertools.count():
                    try:
                        with sent_once():
                            return await send()
                    except repeated as error:
                        _let_go(error)
                        if once:
                            raise
                        pause = _pause_after(error, attempt)
                        if attempt == self.max_retries or time.monotonic() + pause > deadline:
                            raise _given_up(error, attempt + 1) from error
                        logger.warning("%s; attempt %d, trying again", error, attempt + 1)
                    self.count()
                    await asyncio.sleep(pause)
        except TimeoutError as error:
            what = f"took longer than total_timeout={self.total_timeout:g} s"
            raise EngineUnavailableError(what, url=self.url) from error
        raise AssertionError("the loop returns or raises")


def pause_s(attempt: int) -> float:
    """Seconds before what has failed `attempt` + 1 times is tried again."""
    return min(_FIRST_PAUSE_S * 2.0 ** min(attempt, 10), _LONGEST_PAUSE_S)


def _pause_after(error: Exception, attempt: int) -> float:
    pause = pause_s(attempt) + random.uniform(0.0, _JITTER_S)
    if not isinstance(error, NoAnswerError):
        return pause
    return 0.0 if error.closed and attempt == 0 else max(pause, error.retry_after)


def _given_up(error: Exception, attempts: int) -> Exception:
    """The same kind of error, and what it took."""
    url = getattr(error, "url", "")
    last = str(error).removeprefix(f"{url}: ")
    if isinstance(error, NoAnswerError):
        bounds = "(max_retries, request_timeout and total_timeout bound the attempts)"
        return EngineUnavailableError(f"failed {attempts} times, last: {last}. Is the server up? {bounds}", url=url)
    return EngineProtocolError(last if attempts == 1 else f"{last} ({attempts} times)", url=url)


def _let_go(error: BaseException | None) -> None:
    """Drop what the frames of an error hold, such as a long answer: a failed sequence keeps its error."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
