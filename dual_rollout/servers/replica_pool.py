"""Which replica is asked, which is taken out, and when it comes back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from dual_rollout.engine import Engine, GrowingText, TokenIds, sending_once
from dual_rollout.exceptions import (
    EngineError,
    EngineOversizedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineRestartedError,
    EngineUnavailableError,
)
from dual_rollout.servers.retry import pause_s

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PROBATION_S, _LONGEST_PROBATION_S = 1.0, 60.0
_SAME_LOGPROB = 0.5  # nats; kernels and batches differ by less, other weights by more
_COMPARED_CANDIDATES = 5


@dataclass(slots=True, eq=False)
class Replica:
    """One server. `version` counts the weights it was given; `out_until` is `time.monotonic` seconds, None when in."""

    engine: Engine
    version: int = 0
    rows: int = 0  # asked for at the moment
    out_until: float | None = None
    probation: float = field(default_factory=lambda: _FIRST_PROBATION_S)


@dataclass(frozen=True, slots=True)
class _Part:
    """The numbers of prompts that are asked for together; `tried` are the replicas whose answers were invalid."""

    rows: list[int]
    attempt: int = 1
    tried: tuple[Replica, ...] = ()


_NO_ANSWER = (EngineUnavailableError, EngineRestartedError)
_INVALID = (EngineProtocolError, EngineOversizedError)


class ReplicaPool:
    """The servers of one model, those in use and those that are out for a while.

    A sequence stays with its replica, so that its prefix stays cached there; a new one goes to the least loaded. A
    replica that fails is taken out and its sequences move. It is tried again after a probation that doubles from one
    second to a minute, until it has answered for a sequence. It comes back only when it answers, serves the newest
    weights (it is given them again if it has lost or missed them), and agrees with another replica on a text.

    Args:
        max_retries: how often all are tried again, with growing pauses, when none is left.

    Attributes:
        version: counts the weights that were given.
        weight_version: what the servers say the newest weights are, for one that is given them later.
        sample: the text that replicas are compared on; None until they are probed.
    """

    def __init__(self, engines: Sequence[Engine], max_retries: int):
        self.url = ", ".join(engine.url for engine in engines)
        self.replicas = [Replica(engine) for engine in engines]
        self.version = 0
        self.weight_version: str | None = None
        self.sample: list[int] | None = None
        self._max_retries = max_retries
        self._sync: Callable[[Engine], Awaitable[None]] | None = None
        self._returning: dict[Replica, asyncio.Task[None]] = {}
        self._last_error: EngineError | None = None
        self._return_lock = asyncio.Lock()

    async def ask(
        self, prompts: Sequence[TokenIds], ask: Callable[[Engine, list[int]], Awaitable[T]]
    ) -> list[tuple[list[int], T]]:
        """The answers to parts of `prompts`, each with the numbers of its prompts.

        A replica that does not answer is taken out, and another one asked. One whose answer is invalid is taken out
        if the others do better; otherwise the prompts are to blame, and the error is raised. A request that none
        answers in as many attempts as there are replicas, and `max_retries` more, is given up, whatever their health
        checks say.
        """
        waiting = [_Part(list(range(len(prompts))))] if prompts else []
        running: dict[asyncio.Task[T], tuple[Replica, _Part]] = {}
        answers: list[tuple[list[int], T]] = []
        invalid: dict[Replica, EngineError] = {}
        try:
            while waiting or running:
                for part in waiting:
                    for replica, share in await self._shares(prompts, part):
                        running[asyncio.create_task(self._ask_one(replica, share.rows, ask))] = replica, share
                waiting = []
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in running if task.done()]:
                    replica, part = running.pop(task)
                    error = task.exception()
                    if error is None:
                        answers.append((part.rows, task.result()))
                        continue
                    waiting.append(self._again(part, replica, error))
                    if isinstance(error, _INVALID):
                        invalid[replica] = error
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        for replica, fault in invalid.items():
            self.take_out(replica, fault)
        return answers

    async def _ask_one(self, replica: Replica, rows: list[int], ask: Callable[[Engine, list[int]], Awaitable[T]]) -> T:
        replica.rows += len(rows)
        try:
            answer = await ask(replica.engine, rows)
        except _NO_ANSWER as error:
            self.take_out(replica, error)
            raise
        finally:
            replica.rows -= len(rows)
        replica.probation = _FIRST_PROBATION_S
        return answer

    def _again(self, part: _Part, replica: Replica, error: BaseException) -> _Part:
        """What is left to be asked after an error; raises it where asking again is of no use."""
        if isinstance(error, _INVALID):
            tried = (*part.tried, replica)
            if all(other in tried or other.out_until is not None for other in self.replicas):
                raise type(error)(str(error), url=self.url) from error
            return replace(part, attempt=part.attempt + 1, tried=tried)
        if isinstance(error, _NO_ANSWER):
            if part.attempt >= len(self.replicas) + (0 if sending_once() else self._max_retries):
                raise EngineUnavailableError(f"no replica answers, last: {error}", url=self.url) from error
            return replace(part, attempt=part.attempt + 1)
        raise error

    async def _shares(self, prompts: Sequence[TokenIds], part: _Part) -> list[tuple[Replica, _Part]]:
        """Which replica each prompt goes to: the one that has its beginning cached, where that is in, else the least
        loaded."""
        await self._have_some()
        inside = [replica for replica in self.replicas if replica.out_until is None]
        inside = [replica for replica in inside if replica not in part.tried] or inside
        shares: dict[Replica, list[int]] = {replica: [] for replica in inside}
        new = []
        for i in part.rows:
            replica = getattr(prompts[i], "replica", None)
            shares[replica].append(i) if replica in shares else new.append(i)
        for i in new:
            replica = min(inside, key=lambda replica: replica.rows + len(shares[replica]))
            shares[replica].append(i)
            prompt = prompts[i]
            if isinstance(prompt, GrowingText):
                prompt.replica = replica
        return [(replica, replace(part, rows=sorted(rows))) for replica, rows in shares.items() if rows]

    async def ask_all(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        """The answers of all that are in; one that does not answer is taken out."""
        for _ in range(self._max_retries + len(self.replicas)):
            await self._have_some()
            inside = [replica for replica in self.replicas if replica.out_until is None]
            answers = await asyncio.gather(*(ask(replica.engine) for replica in inside), return_exceptions=True)
            good: list[T] = []
            for replica, answer in zip(inside, answers, strict=True):
                if isinstance(answer, _NO_ANSWER):
                    self.take_out(replica, answer)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    good.append(answer)
            if good:
                return good
        raise EngineUnavailableError(f"no replica answers, last: {self._last_error}", url=self.url)

    async def give(
        self, give: Callable[[Engine], Awaitable[None]], *, again: Callable[[Engine], Awaitable[None]]
    ) -> None:
        """New weights for all; one that does not take them, or does not say so, stays out until it has them."""
        self.version += 1
        self._sync = again
        await self._have_some()  # at least one will take them
        reached = [replica for replica in self.replicas if replica.out_until is None]
        answers = await asyncio.gather(*(give(replica.engine) for replica in reached), return_exceptions=True)
        for replica, answer in zip(reached, answers, strict=True):
            if isinstance(answer, EngineError):
                self.take_out(replica, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                replica.version = self.version
        # Those that were out are given them too, while the folder is there.
        await asyncio.gather(*(self._try(replica) for replica in self.replicas if replica.out_until is not None))
        if all(replica.out_until is not None for replica in self.replicas):
            for answer in answers:
                if isinstance(answer, EngineRejectedError):
                    raise answer
            raise EngineUnavailableError(f"no replica took the new weights, last: {self._last_error}", url=self.url)

    async def aclose(self) -> None:
        """Stop trying replicas that are out."""
        for task in self._returning.values():
            task.cancel()
        await asyncio.gather(*self._returning.values(), return_exceptions=True)

    # ---- out and back -----------------------------------------------------------------------------------------------

    def take_out(self, replica: Replica, error: EngineError) -> None:
        if isinstance(error, EngineRestartedError):
            replica.version = -1
        self._last_error = error
        if replica.out_until is None:
            logger.warning("taken out for %.0f s at least: %s", replica.probation, error)
        replica.out_until = time.monotonic() + replica.probation
        replica.probation = min(2 * replica.probation, _LONGEST_PROBATION_S)

    async def _have_some(self) -> None:
        """Let those return whose probation is over, aside; wait for them only if none is in."""
        self._returning = {replica: task for replica, task in self._returning.items() if not task.done()}
        for replica in self.replicas:
            over = replica.out_until is not None and time.monotonic() >= replica.out_until
            if over and replica not in self._returning:
                self._returning[replica] = asyncio.create_task(self._try(replica))
        if any(replica.out_until is None for replica in self.replicas):
            return
        async with self._return_lock:
            for attempt in range(self._max_retries + 1):
                if any(replica.out_until is None for replica in self.replicas):
                    return
                if attempt:
                    await asyncio.sleep(pause_s(attempt))
                await asyncio.gather(*(self._try(replica) for replica in self.replicas))
            if all(replica.out_until is not None for replica in self.replicas):
                raise EngineUnavailableError(f"no replica is left, last: {self._last_error}", url=self.url)

    async def _try(self, replica: Replica) -> None:
        """Let a replica come back if it is healthy and serves what the others serve."""
        try:
            try:
                await replica.engine.health()
            except EngineRestartedError:
                replica.version = -1
            if self._sync is not None and replica.version != self.version:
                version = self.version
                await self._sync(replica.engine)
                if self.weight_version is not None:
                    await replica.engine.set_weight_version(self.weight_version)
                replica.version = version
            if self.sample is not None:
                await replica.engine.probe(self.sample)  # where it was not there to be asked
                mine = await self.likeliest(replica.engine)  # health can pass while completions fail
                others = [other for other in self.replicas if other.out_until is None and other is not replica]
                if others and not alike(mine, await self.likeliest(others[0].engine)):
                    raise EngineProtocolError(
                        "does not serve the weights of the other replicas", url=replica.engine.url
                    )
            if replica.version != self.version:  # nothing to give it here, or newer ones came meanwhile
                raise EngineUnavailableError("does not have the newest weights", url=replica.engine.url)
        except EngineError as error:
            if replica.out_until is not None:  # others may have tried it at the same time
                self.take_out(replica, error)
            return
        if replica.out_until is not None:
            logger.warning("%s is back", replica.engine.url)
        replica.out_until = None

    async def likeliest(self, engine: Engine) -> dict[int, float]:
        """Log-probabilities of the likeliest tokens after the sample."""
        top = await engine.next_top_k([self.sample or []], _COMPARED_CANDIDATES)
        return dict(zip(top.token_ids[0].tolist(), top.logprobs[0].round(3).tolist(), strict=True))


def alike(a: dict[int, float], b: dict[int, float]) -> bool:
    """Whether two lists may be of one model: what is likeliest in one is about as likely in the other."""
    likeliest = {max(logprobs, key=logprobs.__getitem__) for logprobs in (a, b)}
    return all(abs(a.get(token, -np.inf) - b.get(token, -np.inf)) <= _SAME_LOGPROB for token in likeliest)
