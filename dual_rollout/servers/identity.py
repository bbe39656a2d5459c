"""Whether the server that answers is still the one that answered before."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import numpy as np

from dual_rollout.engine import TokenIds
from dual_rollout.exceptions import EngineReplacedError, EngineRestartedError
from dual_rollout.functional.top_k import TopK
from dual_rollout.servers.http import HttpTransport

logger = logging.getLogger(__name__)

NextTokens = list[dict[int, float]]
"""The likeliest tokens after each of several texts, as `{token id: log-probability}`."""

KNOWN_BY = 20
"""Tokens of each list that a model is known by."""

_IDLE_S = 1.0  # behind a proxy whose connections stay open, nothing tells of a restart while nothing is asked
_SAME_MODEL = 0.1  # nats, in the mean; kernels and batches differ by less, also in bfloat16
_TEXTS = 8


class ServerIdentity:
    """Notices that another process answers at a server's address, and whether that one serves the same model.

    The process is known by the time at which it was started. That is remembered before the first request, and asked for
    again when a connection was opened, a request was interrupted or answered with a 5xx (as a proxy does while it
    exchanges what is behind it), or nothing was answered for a second. A process that was given weights must stay the
    same. Any other may be started again: then it must serve the model that was there at first, by folder and by what it
    says after a few texts. A server that does not tell its start is known by the texts alone.

    Args:
        started: when the server's process was, seconds; None where it does not tell.
        describe_again: ask which model is served. Raises `EngineReplacedError` if it is another.
        next_tokens: the likeliest tokens after each of the texts; always the same number of them.
    """

    def __init__(
        self,
        http: HttpTransport,
        *,
        started: Callable[[], Awaitable[float | None]],
        describe_again: Callable[[], Awaitable[None]],
        next_tokens: Callable[[Sequence[TokenIds]], Awaitable[NextTokens]],
    ):
        self._http = http
        self._started = started
        self._describe_again = describe_again
        self._next_tokens = next_tokens
        self._given_to: float | None = None  # the process that took weights; None before it took any
        self._process: float | None = None  # that answered last
        self._same: set[float] = set()  # starts of processes that serve the model that was there at first
        self._texts: list[list[int]] = []
        self._expected: NextTokens | None = None  # after the texts
        self._has_weights = False  # that were given to it
        self._began = False
        self._lost = False  # the last check failed
        self._checks = 0
        self._seen = 0  # `http.discontinuities` at the last check
        self._checking = asyncio.Lock()

    @property
    def given_to(self) -> float | None:
        """When the process that was given weights was started; None where it does not say, or was given none."""
        return self._given_to

    async def before_request(self) -> None:
        """Raise if the server was replaced while nothing was asked of it."""
        if not self._began or self._lost or time.monotonic() - self._http.answered > _IDLE_S:
            await self.confirm()

    async def after_answer(self) -> None:
        """Raise if the answer may be of another server than the one that was asked first."""
        if self._http.discontinuities != self._seen:
            await self.confirm()

    async def confirm(self) -> None:
        """Raise unless the server is the one that was there at first, or another process with the same model.

        Raises:
            EngineRestartedError: the server has lost the weights that it was given.
            EngineReplacedError: it serves another model than at first.
        """
        checks = self._checks
        async with self._checking:
            if self._checks > checks and not self._lost:
                return  # somebody else's check began after this call, and is over
            self._checks += 1
            seen, began, self._lost = self._http.discontinuities, self._began, True
            await (self._check() if began else self._begin())
            self._began, self._lost, self._seen = True, False, seen

    async def _begin(self) -> None:
        started = await self._started()
        if self._given_to is not None and started != self._given_to:
            raise self._restarted()
        if started is not None:
            self._same.add(started)
            self._process = started
        elif self._texts:
            self._expected = await self._next_tokens(self._texts)

    async def _check(self) -> None:
        started = await self._started()
        if self._given_to is not None:
            if started != self._given_to:
                raise self._restarted()
            return
        if started is not None and started == self._process:
            return
        try:
            await self._describe_again()
            if self._expected is not None and started not in self._same:
                distance = _distance(self._expected, await self._next_tokens(self._texts))
                if distance > _SAME_MODEL:
                    raise EngineReplacedError(
                        f"was replaced by a server of other weights: log-probabilities after the same texts differ by "
                        f"{distance:.2g} nats in the mean. Start it with the model that this run began with, or begin "
                        "a new run",
                        url=self._http.url,
                    )
        except EngineReplacedError as error:
            raise self._restarted() if self._has_weights else error from None
        if started is not None:
            if started not in self._same:
                logger.warning("%s was restarted, with the same model", self._http.url)
            self._same.add(started)
            self._process = started

    def _restarted(self) -> EngineRestartedError:
        return EngineRestartedError("was restarted, and has lost the weights it was given", url=self._http.url)

    async def remember_model(self, text: TokenIds) -> None:
        """Remember what the model says after several beginnings of a text, to know it again."""
        lengths = np.linspace(1, len(text), min(_TEXTS, len(text))).astype(int)
        self._texts = [list(text[:length]) for length in lengths]
        self._expected = await self._next_tokens(self._texts)
        await self.after_answer()

    async def took_weights(self, take: Callable[[], Awaitable[None]]) -> None:
        """Give the server weights, and from then on notice when it is restarted, and so has lost them."""
        async with self._checking:
            self._given_to, self._expected, self._same = (
                None,
                None,
                set(),
            )  # whatever comes of it, the old ones are gone
            before = await self._started()
            await take()
            seen = self._http.discontinuities
            started = await self._started()
            if started != before:
                raise EngineRestartedError("was restarted while it took new weights", url=self._http.url)
            if started is None and not self._texts:
                logger.warning("%s does not tell when it was started: a restart would go unnoticed", self._http.url)
            self._given_to, self._seen, self._has_weights, self._lost = started, seen, True, False
            self._began = started is not None  # else what it says is remembered at the first request

    def adopt(self, given_to: float | None) -> None:
        """Notice a restart as if the process that was started at `given_to` had got the weights from here."""
        self._given_to, self._expected, self._same = given_to, None, set()
        self._has_weights, self._lost = True, False
        self._began = False  # it may have been restarted since


def listed(top: TopK) -> NextTokens:
    """Lists as dictionaries, without what is impossible."""
    return [
        {token: logprob for token, logprob in zip(ids, logprobs, strict=True) if logprob > -np.inf}
        for ids, logprobs in zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True)
    ]


def _distance(before: Sequence[Mapping[int, float]], now: Sequence[Mapping[int, float]]) -> float:
    """Mean difference of log-probabilities; of a token that one list lacks, at least that to its least likely one."""
    differences = [
        abs(a.get(token, min(a.values())) - b.get(token, min(b.values())))
        for a, b in zip(before, now, strict=True)
        for token in {*a, *b}
    ]
    return float(np.mean(differences))
