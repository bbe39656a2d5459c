"""The client of an unmodified vLLM server (and of the embedded one, which speaks the same)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any, TypeVar

import numpy as np

from dual_rollout.engine import (
    Capabilities,
    Drafts,
    Engine,
    EngineInfo,
    ScoringMethod,
    TokenIds,
    prefixes,
)
from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError, EngineReplacedError
from dual_rollout.functional.top_k import TopK, at_temperature, joined
from dual_rollout.servers.http import HttpTransport
from dual_rollout.servers.identity import KNOWN_BY, NextTokens, ServerIdentity, listed
from dual_rollout.servers.parsing import MALFORMED
from dual_rollout.servers.probe import warn_of_refusals
from dual_rollout.servers.shared_lock import SharedLock
from dual_rollout.servers.vllm_answers import CompletionParser
from dual_rollout.servers.vllm_checked_requests import CheckedRequests
from dual_rollout.servers.vllm_model_weights import VLLMModelWeights
from dual_rollout.servers.vllm_models import served_model
from dual_rollout.servers.vllm_named_rows import requests_for, values_of
from dual_rollout.servers.vllm_probe import Probe, summary
from dual_rollout.servers.vllm_requests import VLLMRequests, on_wire
from dual_rollout.servers.vllm_sessions import SessionRequests
from dual_rollout.servers.vllm_start_time import StartTimeInMetrics

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_BIASED_TOKENS = 1024  # on logit_bias: newer model runners fail on more, for everybody
_LOWEST_TEMPERATURE = 0.01  # vLLM takes anything lower, but for 0, as this


class VLLMEngine(VLLMModelWeights):
    """One model behind a vLLM server's HTTP API; implements `Engine`.

    Args:
        model: the served name; the first one listed when None.
    """

    def __init__(self, transport: HttpTransport, model: str | None = None):
        identity = ServerIdentity(
            transport,
            started=StartTimeInMetrics(transport),
            describe_again=self._describe_again,
            next_tokens=self._next_tokens,
        )
        super().__init__(transport, identity)
        self._parser = CompletionParser(transport.url)
        self._checked = CheckedRequests(transport, self._identity)
        self._requests = VLLMRequests(
            self._checked, self._parser, described=self.describe, model=self._asked_for, models=self._answering
        )
        self._sessions = SessionRequests(self._checked, self._parser, model=self._asked_for, models=self._answering)
        self._wanted = model
        self._names: set[str] = set()
        self._info: EngineInfo | None = None
        self._capabilities: Capabilities | None = None
        self._probing = asyncio.Lock()
        self._warned = False
        self._gate = SharedLock()

    async def describe(self) -> EngineInfo:
        if self._info is None:
            info, self._names = await self._http.retries.query(self._served_model)
            self._info = info
        return self._info

    async def _describe_again(self) -> None:
        """The server was restarted: is it the same model, perhaps under another name?"""
        before = await self.describe()
        try:
            now, names = await self._http.retries.query(self._served_model)
        except EngineRejectedError as error:
            raise EngineReplacedError(f"was replaced by a server of another model ({error})", url=self.url) from error
        if now.root != before.root:
            raise EngineReplacedError(
                f"was replaced by a server of {now.root}, and served {before.root} before. Start it with the model "
                "that this run began with, or begin a new run",
                url=self.url,
            )
        self._info, self._names = now, names

    async def _next_tokens(self, texts: Sequence[TokenIds]) -> NextTokens:
        cap = self._capabilities.max_logprobs if self._capabilities is not None else None
        return listed(await self._requests.lists(texts, min(cap or KNOWN_BY, KNOWN_BY), 1.0, watched=False))

    async def _served_model(self) -> tuple[EngineInfo, set[str]]:
        return await served_model(self._http, self._wanted)

    async def software_version(self) -> str | None:
        version = (await self._told("/version")).get("version")
        return version if isinstance(version, str) else None

    async def probe(self, prompt: TokenIds) -> Capabilities:
        async with self._probing:
            if self._capabilities is None:
                probe = Probe(
                    self._http,
                    await self.describe(),
                    prompt,
                    version=self.software_version,
                    lists=self._lists,
                    named=self._named_alone,
                    loads_lora=self.loads_lora,
                    sessions=self._sessions.lists,
                )
                try:
                    self._capabilities = await probe.run()
                except MALFORMED as error:
                    raise EngineProtocolError(
                        f"answers to the probe have another shape ({type(error).__name__}: {error})", url=self.url
                    ) from error
                self._parser.vocab_size = self._capabilities.vocab_size
                if not self._capabilities.prompt_lists:
                    self._requests.prompts_per_request = 1
                await self._identity.remember_model(probe.prompt)
                logger.info("%s: %s", self.url, summary(self._capabilities))
                warn_of_refusals(self.url, self._capabilities.refused)
        return self._capabilities

    async def next_top_k(self, prompts: Sequence[TokenIds], k: int, temperature: float = 1.0) -> TopK:
        if temperature == 1.0 or await self._reports_processed(prompts[0]):
            return await self._lists(prompts, k, temperature)
        return at_temperature(await self._lists(prompts, k, 1.0), temperature)

    async def draft(
        self,
        prompts: Sequence[TokenIds],
        lengths: Sequence[int],
        k: int,
        temperature: float,
        seeds: Sequence[int],
        stop_ids: Collection[int] = (),
    ) -> Drafts:
        raw = temperature != 1.0 and not await self._reports_processed(prompts[0])
        self._check_draws_at(temperature)
        await self._check_room(prompts, lengths)

        # The draft ends where the sequence would. vLLM refuses stop ids that the model cannot say.
        size = self._parser.vocab_size
        ends = sorted(token for token in stop_ids if size is None or token < size)

        def draft(prompt: TokenIds, length: int, seed: int) -> Awaitable[Drafts]:
            return self._requests.complete(
                [prompt],
                lambda choices: self._parser.drafts(choices, length, k),
                max_tokens=length,
                logprobs=k,
                temperature=temperature,
                seed=seed,
                stop_token_ids=ends,
                ignore_eos=True,
            )

        # One request each: in a list with one seed all sequences would get the same noise.
        async with self._gate.shared():
            drafts = await asyncio.gather(*map(draft, prompts, lengths, seeds))
        lists = joined([draft.lists for draft in drafts])
        token_ids = list(chain.from_iterable(draft.token_ids for draft in drafts))
        return Drafts(token_ids, at_temperature(lists, temperature) if raw else lists)

    async def score_drafts(
        self,
        prompts: Sequence[TokenIds],
        drafts: Sequence[np.ndarray],
        k: int,
        temperature: float,
        method: ScoringMethod,
    ) -> TopK:
        if method == "prefixes" or (temperature != 1.0 and await self._reports_processed(prompts[0])):
            return await self.next_top_k(prefixes(prompts, drafts), k, temperature)
        # Rows of prompts are at temperature 1, whatever the request's.
        score = self._requests.score_after_cache if method == "token_ids" else self._requests.score_prompt
        parts = await asyncio.gather(
            *(score([*prompt, *draft.tolist()], len(draft), k) for prompt, draft in zip(prompts, drafts, strict=True))
        )
        top = joined(parts)
        return top if temperature == 1.0 else at_temperature(top, temperature)

    async def named_logprobs(
        self, prompts: Sequence[TokenIds], token_ids: Sequence[TokenIds], temperature: float = 1.0
    ) -> list[np.ndarray]:
        if not prompts:
            return []
        if temperature != 1.0 and not await self._reports_processed(prompts[0]):
            raise EngineRejectedError(
                'missing="exact" at temperature != 1 needs --logprobs-mode processed_logprobs',
                url=self.url,
                status=400,
            )
        # vLLM applies one list of names to a whole completion, hence one request per prompt without sessions. In some
        # versions such a request garbles the lists of ordinary ones that share its step, hence the gate.
        async with self._gate.alone():
            named = await self._by_sessions(lambda: self._sessions.named(prompts, token_ids, on_wire(temperature)))
            if named is not None:
                return named
            return await asyncio.gather(
                *(self._named(prompt, ids, temperature) for prompt, ids in zip(prompts, token_ids, strict=True))
            )

    async def score_named(
        self,
        prompts: Sequence[TokenIds],
        drafts: Sequence[np.ndarray],
        token_ids: Sequence[TokenIds],
        temperature: float = 1.0,
    ) -> list[np.ndarray]:
        # Rows of prompts are at temperature 1, whatever the request's.
        if temperature != 1.0 or not (await self.probe(prompts[0])).named_rows:
            return await self.named_logprobs(prefixes(prompts, drafts), token_ids, temperature)
        ends = list(accumulate(map(len, drafts)))
        rows = await asyncio.gather(
            *(
                self._score_named_rows([*prompt, *draft.tolist()], len(prompt), token_ids[end - len(draft) : end])
                for prompt, draft, end in zip(prompts, drafts, ends, strict=True)
            )
        )
        return list(chain.from_iterable(rows))

    async def score(self, token_ids: TokenIds, start: int) -> tuple[np.ndarray, np.ndarray]:
        def read(choices: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
            rows = self._parser.prompt_rows(choices[0], token_ids)[start:]
            own = [row[str(token)]["logprob"] for row, token in zip(rows, token_ids[start:], strict=True)]
            top = [max(entry["logprob"] for entry in row.values()) for row in rows]
            return self._parser.scores(own, top)

        return await self._parser.scores_twice(
            lambda: self._requests.complete([token_ids], read, temperature=0.0, prompt_logprobs=1)
        )

    async def draw_excluding(
        self, prompts: Sequence[TokenIds], excluded: Sequence[TokenIds], temperature: float, seeds: Sequence[int]
    ) -> list[int]:
        self._check_draws_at(temperature)
        excluded = [ids[:_MAX_BIASED_TOKENS] for ids in excluded]
        tokens = await self._by_sessions(lambda: self._sessions.draw(prompts, excluded, temperature, seeds))
        if tokens is not None:
            return tokens
        return await asyncio.gather(
            *(
                self._requests.draw(prompt, ids, temperature, seed)
                for prompt, ids, seed in zip(prompts, excluded, seeds, strict=True)
            )
        )

    async def detokenize(self, token_ids: TokenIds) -> str:
        info = await self.describe()

        async def ask() -> str:
            answer = await self._http.post("/detokenize", {"model": info.model, "tokens": list(token_ids)})
            if not isinstance(answer, dict) or not isinstance(answer.get("prompt"), str):
                raise EngineProtocolError("/detokenize answered without a text", url=self.url)
            return answer["prompt"]

        return await self._http.retries.query(ask)

    async def health(self) -> None:
        await self._http.get("/health")
        await self._identity.confirm()

    async def each(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        return [await ask(self)]

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _lists(self, prompts: Sequence[TokenIds], k: int, temperature: float) -> TopK:
        async with self._gate.shared():
            lists = await self._by_sessions(lambda: self._sessions.lists(prompts, k, on_wire(temperature)))
            if lists is not None:
                return lists
            return await self._requests.lists(prompts, k, temperature)

    async def _by_sessions(self, ask: Callable[[], Awaitable[T]]) -> T | None:
        """None from a server that has no sessions, or none any more."""
        if self._capabilities is None or not self._capabilities.sessions:
            return None
        try:
            return await ask()
        except EngineRejectedError as error:
            if error.status != 404:
                raise
            self._capabilities = replace(self._capabilities, sessions=False)
            logger.warning("%s has no sessions any more; whole texts are sent instead (%s)", self.url, error)
            return None

    async def _score_named_rows(self, text: TokenIds, start: int, token_ids: Sequence[TokenIds]) -> list[np.ndarray]:
        """Log-probabilities of the named tokens at each position of a text from `start` on, one list of names each."""
        named = [position for position, ids in enumerate(token_ids) if ids]
        if not named:
            return [np.empty(0) for _ in token_ids]
        first, end = named[0], named[-1] + 1
        found = await self.probe(text)
        assert found.named_rows is not None
        names = token_ids[first:end]
        requests = requests_for(found.named_rows, names, found.max_logprobs)
        answers = await asyncio.gather(
            *(self._requests.named_rows(text[: start + end], end - first, request) for request in requests)
        )
        rows = values_of(found.named_rows, names, answers)
        nothing = np.empty(0)
        return [*[nothing] * first, *rows, *[nothing] * (len(token_ids) - end)]

    def _asked_for(self) -> str:
        assert self._info is not None
        return self._lora or self._info.model

    def _answering(self) -> set[str]:
        """Names that answers may give for their model."""
        return self._names if self._lora is None else {self._lora}

    async def _reports_processed(self, prompt: TokenIds) -> bool:
        """Whether log-probabilities follow the temperature."""
        processed = (await self.probe(prompt)).logprobs_mode == "processed"
        if not processed and not self._warned:
            self._warned = True
            logger.warning(
                "%s reports raw log-probabilities; at temperature != 1 the mass outside the top-k list is "
                "approximated. Start it with --logprobs-mode processed_logprobs to have them exact.",
                self.url,
            )
        return processed

    def _check_draws_at(self, temperature: float) -> None:
        if temperature < _LOWEST_TEMPERATURE:
            raise EngineRejectedError(
                f"takes temperature {temperature:g} as {_LOWEST_TEMPERATURE:g} where it draws: set temperature to "
                f"{_LOWEST_TEMPERATURE:g} or more",
                url=self.url,
                status=400,
            )

    async def _check_room(self, prompts: Sequence[TokenIds], lengths: Sequence[int]) -> None:
        """From 0.32 on vLLM draws as many tokens as fit, and says nothing, where earlier versions refuse."""
        limit = (await self.describe()).max_model_len
        longest = max((len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True)), default=0)
        if limit is not None and longest > limit:
            raise EngineRejectedError(
                f"has a context of {limit} tokens, and a prompt with its draft takes {longest}: lower max_tokens",
                url=self.url,
                status=400,
            )

    async def _named_alone(self, prompt: TokenIds, token_ids: TokenIds, temperature: float) -> np.ndarray:
        async with self._gate.alone():
            return await self._named(prompt, token_ids, temperature)

    async def _named(self, prompt: TokenIds, token_ids: TokenIds, temperature: float) -> np.ndarray:
        known = self._capabilities is not None and self._capabilities.named_logprobs
        return await self._requests.named(prompt, token_ids, temperature, known=known)
