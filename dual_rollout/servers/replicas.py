"""Several servers of one model as one engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from dual_rollout.engine import (
    Capabilities,
    Drafts,
    Engine,
    EngineInfo,
    GrowingText,
    ScoringMethod,
    TokenIds,
    sending_once,
)
from dual_rollout.exceptions import (
    EngineError,
    EngineOversizedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineRestartedError,
    EngineUnavailableError,
)
from dual_rollout.functional.top_k import TopK, joined, taken
from dual_rollout.servers.retry import pause_s

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PROBATION_S, _LONGEST_PROBATION_S = 1.0, 60.0
_SAME_LOGPROB = 0.5  # nats; kernels and batches differ by less, other weights by more
_COMPARED_TOKENS, _COMPARED_CANDIDATES = 64, 5


@dataclass(slots=True, eq=False)
class _Replica:
    """One server. `version` counts the weights it was given; `out_until` is `time.monotonic` seconds, None when in."""

    engine: Engine
    version: int = 0
    rows: int = 0  # asked for at the moment
    out_until: float | None = None
    probation: float = field(default_factory=lambda: _FIRST_PROBATION_S)


class Replicas:
    """Implements `Engine` over several of them.

    A sequence stays with its replica, so that its prefix stays cached there; a new one goes to the least loaded. A
    replica that fails is taken out and its sequences move. It is tried again after a probation that doubles from one
    second to a minute, until it has answered for a sequence. It comes back only when it answers, serves the newest
    weights (it is given them again if it has lost or missed them), and agrees with another replica on a text.

    Args:
        max_retries: how often all are tried again, with growing pauses, when none is left.
    """

    def __init__(self, engines: Sequence[Engine], max_retries: int):
        self.url = ", ".join(engine.url for engine in engines)
        self._replicas = [_Replica(engine) for engine in engines]
        self._max_retries = max_retries
        self._version = 0
        self._sync: Callable[[Engine], Awaitable[None]] | None = None
        self._capabilities: Capabilities | None = None
        self._probing = asyncio.Lock()
        self._sample: list[int] | None = None
        self._returning: dict[_Replica, asyncio.Task[None]] = {}
        self._last_error: EngineError | None = None
        self._door = asyncio.Lock()
        self._weight_version: str | None = None

    # ---- what one replica answers -----------------------------------------------------------------------------------

    async def next_top_k(self, prompts: Sequence[TokenIds], k: int, temperature: float = 1.0) -> TopK:
        parts = await self._ask(
            prompts, lambda engine, rows: engine.next_top_k([prompts[i] for i in rows], k, temperature)
        )
        return _in_order(parts, [1] * len(prompts))

    async def draft(
        self,
        prompts: Sequence[TokenIds],
        lengths: Sequence[int],
        k: int,
        temperature: float,
        seeds: Sequence[int],
        stop_ids: Collection[int] = (),
    ) -> Drafts:
        parts = await self._ask(
            prompts,
            lambda engine, rows: engine.draft(
                [prompts[i] for i in rows],
                [lengths[i] for i in rows],
                k,
                temperature,
                [seeds[i] for i in rows],
                stop_ids,
            ),
        )
        drafts = {i: draft for rows, part in parts for i, draft in zip(rows, part.token_ids, strict=True)}
        token_ids = [drafts[i] for i in range(len(prompts))]
        return Drafts(token_ids, _in_order([(rows, part.lists) for rows, part in parts], list(map(len, token_ids))))

    async def score_drafts(
        self,
        prompts: Sequence[TokenIds],
        drafts: Sequence[np.ndarray],
        k: int,
        temperature: float,
        method: ScoringMethod,
    ) -> TopK:
        parts = await self._ask(
            prompts,
            lambda engine, rows: engine.score_drafts(
                [prompts[i] for i in rows], [drafts[i] for i in rows], k, temperature, method
            ),
        )
        return _in_order(parts, list(map(len, drafts)))

    async def named_logprobs(
        self, prompts: Sequence[TokenIds], token_ids: Sequence[TokenIds], temperature: float = 1.0
    ) -> list[np.ndarray]:
        parts = await self._ask(
            prompts,
            lambda engine, rows: engine.named_logprobs(
                [prompts[i] for i in rows], [token_ids[i] for i in rows], temperature
            ),
        )
        values = {i: value for rows, part in parts for i, value in zip(rows, part, strict=True)}
        return [values[i] for i in range(len(prompts))]

    async def score_named(
        self,
        prompts: Sequence[TokenIds],
        drafts: Sequence[np.ndarray],
        token_ids: Sequence[TokenIds],
        temperature: float = 1.0,
    ) -> list[np.ndarray]:
        ends = list(accumulate(map(len, drafts)))

        def positions(rows: Iterable[int]) -> list[int]:
            return [position for i in rows for position in range(ends[i] - len(drafts[i]), ends[i])]

        parts = await self._ask(
            prompts,
            lambda engine, rows: engine.score_named(
                [prompts[i] for i in rows],
                [drafts[i] for i in rows],
                [token_ids[position] for position in positions(rows)],
                temperature,
            ),
        )
        values = {i: value for rows, part in parts for i, value in zip(positions(rows), part, strict=True)}
        return [values[i] for i in range(len(token_ids))]

    async def score(self, token_ids: TokenIds, start: int) -> tuple[np.ndarray, np.ndarray]:
        ((_, answer),) = await self._ask([token_ids], lambda engine, _: engine.score(token_ids, start))
        return answer

    async def draw_excluding(self, prompt: TokenIds, excluded: TokenIds, temperature: float, seed: int) -> int:
        ((_, token),) = await self._ask(
            [prompt], lambda engine, _: engine.draw_excluding(prompt, excluded, temperature, seed)
        )
        return token

    async def detokenize(self, token_ids: TokenIds) -> str:
        ((_, text),) = await self._ask([token_ids], lambda engine, _: engine.detokenize(token_ids))
        return text

    # ---- what all of them answer ------------------------------------------------------------------------------------

    async def describe(self) -> EngineInfo:
        infos = await self._ask_all(lambda engine: engine.describe())
        limits = [info.max_model_len for info in infos if info.max_model_len is not None]
        return replace(infos[0], max_model_len=min(limits, default=None))

    async def probe(self, prompt: TokenIds) -> Capabilities:
        """What all of them can do.

        Raises:
            EngineProtocolError: they do not give the same log-probabilities, and so do not serve the same model.
        """
        async with self._probing:
            if self._capabilities is None:
                self._capabilities = await self._probed(prompt)
        return self._capabilities

    async def _probed(self, prompt: TokenIds) -> Capabilities:
        found = await self._ask_all(lambda engine: engine.probe(prompt))
        self._sample = list(prompt[:_COMPARED_TOKENS])
        lists = await self._ask_all(self._likeliest)
        modes = {capabilities.logprobs_mode for capabilities in found}
        if len(modes) > 1 or not all(_alike(lists[0], other) for other in lists[1:]):
            raise EngineProtocolError(
                f"the replicas do not serve one model the same way: the likeliest tokens after one text are {lists}, "
                f"log-probabilities are {' and '.join(sorted(modes))}",
                url=self.url,
            )
        abilities: dict[str, Any] = {name: all(getattr(c, name) for c in found) for name in _ABILITIES}
        limits = [capabilities.max_logprobs for capabilities in found if capabilities.max_logprobs is not None]
        return replace(
            found[0],
            max_model_len=(await self.describe()).max_model_len,
            max_logprobs=min(limits, default=None),
            named_rows=found[0].named_rows if all(c.named_rows for c in found) else None,
            scoring=tuple(method for method in found[0].scoring if all(method in c.scoring for c in found)),
            refused=tuple(dict.fromkeys(refusal for c in found for refusal in c.refused)),
            **abilities,
        )

    async def health(self) -> None:
        await self._ask_all(lambda engine: engine.health())

    async def reset_prefix_cache(self) -> None:
        await self._ask_all(lambda engine: engine.reset_prefix_cache())

    async def loads_lora(self) -> bool:
        return all(await self._ask_all(lambda engine: engine.loads_lora()))

    async def check_sees(self, path: str) -> None:
        await self._ask_all(lambda engine: engine.check_sees(path))

    async def each(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        return await self._ask_all(ask)

    async def weight_version(self) -> str | None:
        versions = {str(version) for version in await self._ask_all(lambda engine: engine.weight_version()) if version}
        return " and ".join(sorted(versions)) or None

    async def dtype(self) -> str | None:
        return (await self._ask_all(lambda engine: engine.dtype()))[0]

    async def set_weight_version(self, version: str) -> None:
        self._weight_version = version
        await self._ask_all(lambda engine: engine.set_weight_version(version))

    def use_lora(self, name: str) -> None:
        for replica in self._replicas:
            replica.engine.use_lora(name)

    def weights_given(self) -> tuple[int, list[tuple[bool, Any]]]:
        """The newest version, and of each replica whether it took it, with its own `weights_given`."""
        return self._version, [(r.version == self._version, r.engine.weights_given()) for r in self._replicas]

    def adopt_weights(self, given: tuple[int, list[tuple[bool, Any]]]) -> None:
        """A replica that did not take them stays out until the next ones: the folder is the other process's."""
        self._version, taken = given
        for replica, (took, birth) in zip(self._replicas, taken, strict=True):
            replica.version = self._version if took else -1
            replica.engine.adopt_weights(birth)
            if not took:
                error = EngineUnavailableError("did not take the newest weights", url=replica.engine.url)
                self._take_out(replica, error)

    async def reload_weights(self, path: str) -> None:
        async def sync(engine: Engine) -> None:
            await engine.check_sees(path)  # a server may die of a folder that is not there, and it goes after the sync
            await engine.reload_weights(path)

        await self._give(lambda engine: engine.reload_weights(path), again=sync)

    async def load_lora(self, name: str, path: str) -> None:
        await self._give(lambda engine: engine.load_lora(name, path), again=lambda engine: engine.load_lora(name, path))

    async def aclose(self) -> None:
        """Stop trying replicas that are out."""
        for task in self._returning.values():
            task.cancel()
        await asyncio.gather(*self._returning.values(), return_exceptions=True)

    # ---- who is asked -----------------------------------------------------------------------------------------------

    async def _ask(
        self,
        prompts: Sequence[TokenIds],
        ask: Callable[[Engine, list[int]], Awaitable[T]],
        indices: Sequence[int] | None = None,
        tried: Collection[_Replica] = (),
        attempts: int | None = None,
    ) -> list[tuple[list[int], T]]:
        """The answers to parts of `prompts`, each with the numbers of its prompts.

        A replica that does not answer is taken out, and another one asked. One that answers nonsense is taken out
        if the other does better; otherwise the prompts are to blame, and the error is raised. A request that none
        answers in `attempts` (each replica once, and `max_retries` more) is given up, however well they say they are.
        """
        if attempts is None:
            attempts = len(self._replicas) + (0 if sending_once() else self._max_retries)
        left = attempts - 1
        indices = range(len(prompts)) if indices is None else indices
        shares = await self._shares(prompts, indices, tried)

        async def part(replica: _Replica, rows: list[int]) -> list[tuple[list[int], T]]:
            replica.rows += len(rows)
            try:
                answer = await ask(replica.engine, rows)
                replica.probation = _FIRST_PROBATION_S
                return [(rows, answer)]
            except (EngineUnavailableError, EngineRestartedError) as error:
                self._take_out(replica, error)
                if left == 0:
                    raise EngineUnavailableError(f"no replica answers, last: {error}", url=self.url) from error
                again, blamed = tried, None
            except (EngineProtocolError, EngineOversizedError) as error:
                again, blamed = [*tried, replica], error
                if all(other in again or other.out_until is not None for other in self._replicas):
                    raise type(error)(str(error), url=self.url) from error
            finally:
                replica.rows -= len(rows)
            answers = await self._ask(prompts, ask, rows, again, max(left, 1))
            if blamed is not None:
                self._take_out(replica, blamed)
            return answers

        done = await asyncio.gather(*(part(*item) for item in shares.items()), return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return [answer for part_answers in done for answer in part_answers]  # type: ignore[union-attr]

    async def _shares(
        self, prompts: Sequence[TokenIds], indices: Sequence[int], tried: Collection[_Replica]
    ) -> dict[_Replica, list[int]]:
        """Which replica each prompt goes to: the one that has its beginning cached, where that is in, else the least
        loaded."""
        await self._have_some()
        inside = [r for r in self._replicas if r.out_until is None and r not in tried]
        if not inside:
            inside = [r for r in self._replicas if r.out_until is None]
        shares: dict[_Replica, list[int]] = {replica: [] for replica in inside}
        new = []
        for i in indices:
            replica = getattr(prompts[i], "replica", None)
            shares[replica].append(i) if replica in shares else new.append(i)
        for i in new:
            replica = min(inside, key=lambda replica: replica.rows + len(shares[replica]))
            shares[replica].append(i)
            prompt = prompts[i]
            if isinstance(prompt, GrowingText):
                prompt.replica = replica
        return {replica: sorted(rows) for replica, rows in shares.items() if rows}

    async def _ask_all(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        """The answers of all that are in; one that does not answer is taken out."""
        for _ in range(self._max_retries + len(self._replicas)):
            await self._have_some()
            inside = [replica for replica in self._replicas if replica.out_until is None]
            answers = await asyncio.gather(*(ask(replica.engine) for replica in inside), return_exceptions=True)
            good: list[T] = []
            for replica, answer in zip(inside, answers, strict=True):
                if isinstance(answer, (EngineUnavailableError, EngineRestartedError)):
                    self._take_out(replica, answer)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    good.append(answer)
            if good:
                return good
        raise EngineUnavailableError(f"no replica answers, last: {self._last_error}", url=self.url)

    async def _give(
        self, give: Callable[[Engine], Awaitable[None]], *, again: Callable[[Engine], Awaitable[None]]
    ) -> None:
        """New weights for all; one that does not take them, or does not say so, stays out until it has them."""
        self._version += 1
        self._sync = again
        await self._have_some()  # at least one will take them
        reached = [replica for replica in self._replicas if replica.out_until is None]
        answers = await asyncio.gather(*(give(replica.engine) for replica in reached), return_exceptions=True)
        for replica, answer in zip(reached, answers, strict=True):
            if isinstance(answer, EngineError):
                self._take_out(replica, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                replica.version = self._version
        # Those that were out are given them too, while the folder is there.
        await asyncio.gather(*(self._try(replica) for replica in self._replicas if replica.out_until is not None))
        if all(replica.out_until is not None for replica in self._replicas):
            for answer in answers:
                if isinstance(answer, EngineRejectedError):
                    raise answer
            raise EngineUnavailableError(f"no replica took the new weights, last: {self._last_error}", url=self.url)

    # ---- out and back -----------------------------------------------------------------------------------------------

    def _take_out(self, replica: _Replica, error: EngineError) -> None:
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
        for replica in self._replicas:
            over = replica.out_until is not None and time.monotonic() >= replica.out_until
            if over and replica not in self._returning:
                self._returning[replica] = asyncio.create_task(self._try(replica))
        if any(replica.out_until is None for replica in self._replicas):
            return
        async with self._door:
            for attempt in range(self._max_retries + 1):
                if any(replica.out_until is None for replica in self._replicas):
                    return
                if attempt:
                    await asyncio.sleep(pause_s(attempt))
                await asyncio.gather(*(self._try(replica) for replica in self._replicas))
            if all(replica.out_until is not None for replica in self._replicas):
                raise EngineUnavailableError(f"no replica is left, last: {self._last_error}", url=self.url)

    async def _try(self, replica: _Replica) -> None:
        """Let a replica come back if it is well and serves what the others serve."""
        try:
            try:
                await replica.engine.health()
            except EngineRestartedError:
                replica.version = -1
            if self._sync is not None and replica.version != self._version:
                version = self._version
                await self._sync(replica.engine)
                if self._weight_version is not None:
                    await replica.engine.set_weight_version(self._weight_version)
                replica.version = version
            if self._sample is not None:
                await replica.engine.probe(self._sample)  # where it was not there to be asked
                mine = await self._likeliest(replica.engine)  # what says that it is well may answer nothing
                others = [other for other in self._replicas if other.out_until is None and other is not replica]
                if others and not _alike(mine, await self._likeliest(others[0].engine)):
                    raise EngineProtocolError(
                        "does not serve the weights of the other replicas", url=replica.engine.url
                    )
            if replica.version != self._version:  # nothing to give it here, or newer ones came meanwhile
                raise EngineUnavailableError("does not have the newest weights", url=replica.engine.url)
        except EngineError as error:
            if replica.out_until is not None:  # others may have tried it at the same time
                self._take_out(replica, error)
            return
        if replica.out_until is not None:
            logger.warning("%s is back", replica.engine.url)
        replica.out_until = None

    async def _likeliest(self, engine: Engine) -> dict[int, float]:
        """Log-probabilities of the likeliest tokens after the sample."""
        top = await engine.next_top_k([self._sample or []], _COMPARED_CANDIDATES)
        return dict(zip(top.token_ids[0].tolist(), top.logprobs[0].round(3).tolist(), strict=True))


_ABILITIES = (
    "named_logprobs",
    "generate_endpoint",
    "cached_rows",
    "sessions",
    "detokenizes",
    "reloads_weights",
    "resets_prefix_cache",
    "pauses",
    "loads_lora",
)


def _alike(a: dict[int, float], b: dict[int, float]) -> bool:
    """Whether two lists may be of one model: what is likeliest in one is about as likely in the other."""
    likeliest = {max(logprobs, key=logprobs.__getitem__) for logprobs in (a, b)}
    return all(abs(a.get(token, -np.inf) - b.get(token, -np.inf)) <= _SAME_LOGPROB for token in likeliest)


def _in_order(parts: Sequence[tuple[list[int], TopK]], counts: Sequence[int]) -> TopK:
    """The rows of all parts, `counts[i]` of them for prompt i, in the order of the prompts."""
    top = joined([part for _, part in parts])
    prompts = [i for indices, _ in parts for i in indices]
    order = np.argsort(np.repeat(prompts, [counts[i] for i in prompts]), kind="stable")
    return taken(top, order)
