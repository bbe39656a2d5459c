"""What is asked of a vLLM server that keeps texts (`dual_rollout.sessions`): each further token is sent alone."""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dual_rollout.engine import GrowingText, TokenIds
from dual_rollout.exceptions import EngineRejectedError
from dual_rollout.functional.top_k import TopK
from dual_rollout.servers.http import longest_answer
from dual_rollout.servers.parsing import AnswerParser
from dual_rollout.servers.vllm_checked_requests import CheckedRequests
from dual_rollout.sessions.wire import DRAW_PATH, PATH, UNKNOWN_SESSION, decoded, decoded_draws

_RUN = secrets.token_hex(6)
_numbers = itertools.count()


class _Known:
    """What the server has of one text.

    Attributes:
        name: that it keeps it under.
        tokens: how many of them; 0 for none.
        before: how many it had before the last request, which it answers again when it is sent again.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.name = f"{_RUN}-{next(_numbers)}"
        self.tokens = self.before = 0

    def at(self, length: int) -> int:
        """From where on to send a text of that length, of which it has the beginning."""
        return self.tokens if length > self.tokens else self.before


class SessionRequests:
    """Requests to one server's routes for sessions.

    Args:
        model, models: see `CheckedRequests.ask`.
    """

    def __init__(
        self,
        requests: CheckedRequests,
        parser: AnswerParser,
        *,
        model: Callable[[], str],
        models: Callable[[], set[str]],
    ):
        self._requests = requests
        self._parser = parser
        self._model, self._models = model, models
        self._texts: dict[int, _Known] = {}
        self._ended: list[str] = []

    async def lists(self, texts: Sequence[TokenIds], k: int, temperature: float) -> TopK:
        """The k most likely tokens after each text; `temperature` as vLLM's completions take it."""
        known = [self._known(text) for text in texts]
        try:
            answer = await self._ask(texts, known, k, temperature)
        except EngineRejectedError as error:
            if error.status != UNKNOWN_SESSION:
                raise
            # It has been started again, has new weights, or was asked for nothing in a while.
            for mine in known:
                self._forget(mine)
            answer = await self._ask(texts, known, k, temperature)
        lists, kept = answer
        for mine, text, there in zip(known, texts, kept, strict=True):
            if mine is not None:
                mine.before, mine.tokens = (mine.at(len(text)), len(text)) if there else (0, 0)
        return lists

    async def draw(
        self, texts: Sequence[TokenIds], excluded: Sequence[TokenIds], temperature: float, seeds: Sequence[int]
    ) -> list[int]:
        """A token after each text, as `ScoringEngine.draw_excluding`."""
        tokens, _ = await self._drawn(texts, seeds, excluded, [[]] * len(texts), temperature)
        return tokens

    async def named(self, texts: Sequence[TokenIds], names: Sequence[TokenIds], temperature: float) -> list[np.ndarray]:
        """Log-probabilities of named tokens after each text; `temperature` as in `lists`."""
        wanted = [i for i, ids in enumerate(names) if ids]
        found = [np.empty(0)] * len(texts)
        if wanted:
            nothing: list[Any] = [[]] * len(wanted)
            asked = [texts[i] for i in wanted], [None] * len(wanted), nothing, [names[i] for i in wanted]
            for i, values in zip(wanted, (await self._drawn(*asked, temperature))[1], strict=True):
                found[i] = values
        return found

    async def _drawn(
        self,
        texts: Sequence[TokenIds],
        seeds: Sequence[int | None],
        excluded: Sequence[TokenIds],
        names: Sequence[TokenIds],
        temperature: float,
    ) -> tuple[list[int], list[np.ndarray]]:
        def read(answer: dict[str, Any]) -> tuple[list[int], list[np.ndarray]]:
            tokens, values = decoded_draws(answer, list(map(len, names)))
            return self._parser.ids(tokens).tolist(), [self._parser.named(part) for part in values]

        return await self._requests.ask(
            DRAW_PATH,
            {"temperature": temperature, "draws": list(zip(texts, seeds, excluded, names, strict=True))},
            read,
            model=self._model,
            models=self._models,
            prompt_tokens=sum(map(len, texts)),
            max_bytes=longest_answer(len(texts), len(texts) + sum(map(len, names))),
        )

    def _known(self, text: TokenIds) -> _Known | None:
        """None for a text that is asked for once."""
        if not isinstance(text, GrowingText) or not text.grows:
            return None
        if (mine := self._texts.get(id(text))) is None:
            mine = self._texts[id(text)] = _Known()
            weakref.finalize(text, self._end, id(text)).atexit = False
        if len(text) < mine.tokens:
            self._forget(mine)
        return mine

    def _end(self, key: int) -> None:
        self._forget(self._texts.pop(key))

    def _forget(self, mine: _Known | None) -> None:
        """Let the server end a session, with the next request; it does so by itself after a while."""
        if mine is not None and mine.tokens:
            self._ended.append(mine.name)
            mine.forget()

    async def _ask(
        self, texts: Sequence[TokenIds], known: Sequence[_Known | None], k: int, temperature: float
    ) -> tuple[TopK, list[bool]]:
        ended, self._ended = self._ended, []
        sent = [
            [mine.name, (at := mine.at(len(text))), text[at:]] if mine is not None else [None, 0, text]
            for mine, text in zip(known, texts, strict=True)
        ]

        def read(answer: dict[str, Any]) -> tuple[TopK, list[bool]]:
            ids, logprobs = decoded(answer, len(texts))
            kept = [there is True for there in answer["kept"]]
            if len(kept) != len(texts) or ids.shape[1] > k:
                raise self._parser.invalid(f"lists of {ids.shape[1]} tokens for {len(kept)} texts")
            lengths = np.full(len(texts), ids.shape[1])
            return self._parser.lists(ids.ravel(), logprobs.ravel(), lengths, k), kept

        return await self._requests.ask(
            PATH,
            {"k": k, "temperature": temperature, "texts": sent, "ended": ended},
            read,
            model=self._model,
            models=self._models,
            prompt_tokens=sum(map(len, texts)),
            max_bytes=longest_answer(len(texts), k * len(texts)),
        )
