"""Several servers of one model as one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from dual_rollout.engine import Capabilities, Drafts, Engine, EngineInfo, ScoringMethod, TokenIds
from dual_rollout.exceptions import EngineProtocolError, EngineUnavailableError
from dual_rollout.functional.top_k import TopK, joined, taken
from dual_rollout.servers.replica_pool import ReplicaPool, alike

T = TypeVar("T")

_COMPARED_TOKENS = 64


class Replicas:
    """Implements `Engine` over several of them; `ReplicaPool` says which is asked, and what becomes of one that fails.

    Args:
        max_retries: how often all are tried again, with growing pauses, when none is left.
    """

    def __init__(self, engines: Sequence[Engine], max_retries: int):
        self._pool = ReplicaPool(engines, max_retries)
        self.url = self._pool.url
        self._capabilities: Capabilities | None = None
        self._probing = asyncio.Lock()

    # ---- what one replica answers -----------------------------------------------------------------------------------

    async def next_top_k(self, prompts: Sequence[TokenIds], k: int, temperature: float = 1.0) -> TopK:
        parts = await self._pool.ask(
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
        parts = await self._pool.ask(
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
        parts = await self._pool.ask(
            prompts,
            lambda engine, rows: engine.score_drafts(
                [prompts[i] for i in rows], [drafts[i] for i in rows], k, temperature, method
            ),
        )
        return _in_order(parts, list(map(len, drafts)))

    async def named_logprobs(
        self, prompts: Sequence[TokenIds], token_ids: Sequence[TokenIds], temperature: float = 1.0
    ) -> list[np.ndarray]:
        parts = await self._pool.ask(
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

        parts = await self._pool.ask(
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
        ((_, answer),) = await self._pool.ask([token_ids], lambda engine, _: engine.score(token_ids, start))
        return answer

    async def draw_excluding(
        self, prompts: Sequence[TokenIds], excluded: Sequence[TokenIds], temperature: float, seeds: Sequence[int]
    ) -> list[int]:
        parts = await self._pool.ask(
            prompts,
            lambda engine, rows: engine.draw_excluding(
                [prompts[i] for i in rows], [excluded[i] for i in rows], temperature, [seeds[i] for i in rows]
            ),
        )
        tokens = {i: token for rows, part in parts for i, token in zip(rows, part, strict=True)}
        return [tokens[i] for i in range(len(prompts))]

    async def detokenize(self, token_ids: TokenIds) -> str:
        ((_, text),) = await self._pool.ask([token_ids], lambda engine, _: engine.detokenize(token_ids))
        return text

    # ---- what all of them answer ------------------------------------------------------------------------------------

    async def describe(self) -> EngineInfo:
        infos = await self._pool.ask_all(lambda engine: engine.describe())
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
        found = await self._pool.ask_all(lambda engine: engine.probe(prompt))
        self._pool.sample = list(prompt[:_COMPARED_TOKENS])
        lists = await self._pool.ask_all(self._pool.likeliest)
        modes = {capabilities.logprobs_mode for capabilities in found}
        if len(modes) > 1 or not all(alike(lists[0], other) for other in lists[1:]):
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
        await self._pool.ask_all(lambda engine: engine.health())

    async def reset_prefix_cache(self) -> None:
        await self._pool.ask_all(lambda engine: engine.reset_prefix_cache())

    async def loads_lora(self) -> bool:
        return all(await self._pool.ask_all(lambda engine: engine.loads_lora()))

    async def check_sees(self, path: str) -> None:
        await self._pool.ask_all(lambda engine: engine.check_sees(path))

    async def each(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        return await self._pool.ask_all(ask)

    async def weight_version(self) -> str | None:
        return _named_together(await self._pool.ask_all(lambda engine: engine.weight_version()))

    async def software_version(self) -> str | None:
        return _named_together(await self._pool.ask_all(lambda engine: engine.software_version()))

    async def dtype(self) -> str | None:
        return (await self._pool.ask_all(lambda engine: engine.dtype()))[0]

    async def set_weight_version(self, version: str) -> None:
        self._pool.weight_version = version
        await self._pool.ask_all(lambda engine: engine.set_weight_version(version))

    def use_lora(self, name: str) -> None:
        for replica in self._pool.replicas:
            replica.engine.use_lora(name)

    def weights_given(self) -> tuple[int, list[tuple[bool, Any]]]:
        """The newest version, and of each replica whether it took it, with its own `weights_given`."""
        return self._pool.version, [
            (r.version == self._pool.version, r.engine.weights_given()) for r in self._pool.replicas
        ]

    def adopt_weights(self, given: tuple[int, list[tuple[bool, Any]]]) -> None:
        """A replica that did not take them stays out until the next ones: the folder is the other process's."""
        self._pool.version, taken = given
        for replica, (took, weights) in zip(self._pool.replicas, taken, strict=True):
            replica.version = self._pool.version if took else -1
            replica.engine.adopt_weights(weights)
            if not took:
                error = EngineUnavailableError("did not take the newest weights", url=replica.engine.url)
                self._pool.take_out(replica, error)

    async def reload_weights(self, path: str) -> None:
        async def sync(engine: Engine) -> None:
            await engine.check_sees(path)  # a server may die of a folder that is not there, and it goes after the sync
            await engine.reload_weights(path)

        await self._pool.give(lambda engine: engine.reload_weights(path), again=sync)

    async def load_lora(self, name: str, path: str) -> None:
        await self._pool.give(
            lambda engine: engine.load_lora(name, path), again=lambda engine: engine.load_lora(name, path)
        )

    async def aclose(self) -> None:
        """Stop trying replicas that are out."""
        await self._pool.aclose()


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


def _in_order(parts: Sequence[tuple[list[int], TopK]], counts: Sequence[int]) -> TopK:
    """The rows of all parts, `counts[i]` of them for prompt i, in the order of the prompts."""
    top = joined([part for _, part in parts])
    prompts = [i for indices, _ in parts for i in indices]
    order = np.argsort(np.repeat(prompts, [counts[i] for i in prompts]), kind="stable")
    return taken(top, order)


def _named_together(names: Sequence[str | None]) -> str | None:
    """The names that replicas give something that should be the same."""
    return " and ".join(sorted({name for name in names if name})) or None
