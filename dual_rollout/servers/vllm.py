"""The client of an unmodified vLLM server (and of the embedded one, which speaks the same)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from dual_rollout.servers.http import HttpTransport, longest_answer, shown
from dual_rollout.servers.identity import KNOWN_BY, NextTokens, ServerIdentity, listed
from dual_rollout.servers.named_rows import NamesSent, requests_for, values_of, width
from dual_rollout.servers.npy import decoded_floats
from dual_rollout.servers.parsing import MALFORMED
from dual_rollout.servers.probe import Probe, summary, warn_of_refusals
from dual_rollout.servers.requests import BirthInMetrics, CheckedRequests
from dual_rollout.servers.sessions import SessionLists
from dual_rollout.servers.shared_lock import SharedLock
from dual_rollout.servers.vllm_answers import CompletionParser, token_ids_of
from dual_rollout.servers.vllm_model_weights import VLLMModelWeights

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_NAMED_TOKENS = 128  # vLLM's own cap on logprob_token_ids
_MAX_BIASED_TOKENS = 1024  # on logit_bias: newer model runners fail on more, for everybody
_MAX_PROMPTS = 1024  # vLLM's own cap on a list of prompts
_LOWEST_TEMPERATURE = 0.01  # vLLM takes anything lower, but for 0, as this

# vLLM fills what is not said from the model's generation_config.json, so everything is said.
_PLAIN_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class VLLMEngine(VLLMModelWeights):
    """One model behind a vLLM server's HTTP API; implements `Engine`.

    Args:
        model: the served name; the first one listed when None.
    """

    def __init__(self, transport: HttpTransport, model: str | None = None):
        identity = ServerIdentity(
            transport,
            birth=BirthInMetrics(transport),
            describe_again=self._describe_again,
            next_tokens=self._next_tokens,
        )
        super().__init__(transport, identity)
        self._requests = CheckedRequests(transport, self._identity)
        self._parser = CompletionParser(transport.url)
        self._sessions = SessionLists(self._requests, self._parser, model=self._asked_for, models=self._answering)
        self._wanted = model
        self._names: set[str] = set()
        self._info: EngineInfo | None = None
        self._capabilities: Capabilities | None = None
        self._probing = asyncio.Lock()
        self._warned = False
        self._gate = SharedLock()

    async def describe(self) -> EngineInfo:
        if self._info is None:
            info, self._names = await self._http.retries.query(self._described)
            self._info = info
        return self._info

    async def _describe_again(self) -> None:
        """The server was restarted: is it the same model, perhaps under another name?"""
        before = await self.describe()
        try:
            now, names = await self._http.retries.query(self._described)
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
        return listed(await self._lists_of(texts, min(cap or KNOWN_BY, KNOWN_BY), 1.0, watched=False))

    async def _described(self) -> tuple[EngineInfo, set[str]]:
        """The model, and the names that answers may give for it."""
        answer = await self._http.get("/v1/models")
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not cards:
            raise EngineProtocolError("/v1/models lists no model", url=self.url)
        if not isinstance(cards, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards):
            raise EngineProtocolError("/v1/models lists what are no models", url=self.url)
        served = [card["id"] for card in cards]
        name = self._wanted or served[0]
        if name not in served:
            raise EngineRejectedError(
                f"serves {served}, not {name!r}: set theta_model/t_model to one of these",
                url=self.url,
                status=404,
            )
        card = cards[served.index(name)]
        root, longest = card.get("root"), card.get("max_model_len")
        if not isinstance(root, str | None) or not (longest is None or (type(longest) is int and longest > 0)):
            raise EngineProtocolError(
                f"/v1/models describes {name!r} with root {shown(root)} and max_model_len {shown(longest)}",
                url=self.url,
            )
        # vLLM answers in the first name, whichever was asked for.
        return EngineInfo(name, root, longest, str(card.get("owned_by"))), {name, served[0]}

    async def probe(self, prompt: TokenIds) -> Capabilities:
        async with self._probing:
            if self._capabilities is None:
                probe = Probe(
                    self._http,
                    await self.describe(),
                    prompt,
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
            return self._ask(
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
        score = self._score_after_cache if method == "token_ids" else self._score_prompt
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
        # A server applies one list of names to a whole request, hence one request per prompt. In some vLLM versions
        # such a request garbles the lists of ordinary ones that share its step, hence the gate.
        async with self._gate.alone():
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

        return await self._parser.scores_twice(lambda: self._ask([token_ids], read, temperature=0.0, prompt_logprobs=1))

    async def draw_excluding(self, prompt: TokenIds, excluded: TokenIds, temperature: float, seed: int) -> int:
        self._check_draws_at(temperature)
        bias = {str(token): -100.0 for token in excluded[:_MAX_BIASED_TOKENS]}

        def read(choices: list[dict[str, Any]]) -> int:
            keys, _ = self._parser.sampled(choices[0], 1)
            return int(self._parser.ids(token_ids_of(keys))[0])

        return await self._ask([prompt], read, logprobs=0, temperature=temperature, logit_bias=bias, seed=seed)

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
            if self._capabilities is not None and self._capabilities.sessions:
                try:
                    return await self._sessions.lists(prompts, k, _on_wire(temperature))
                except EngineRejectedError as error:
                    if error.status != 404:
                        raise
                    self._capabilities = replace(self._capabilities, sessions=False)
                    logger.warning("%s has no sessions any more; whole texts are sent instead (%s)", self.url, error)
            parts = await asyncio.gather(
                *(
                    self._lists_of(prompts[i : i + _MAX_PROMPTS], k, temperature)
                    for i in range(0, len(prompts), _MAX_PROMPTS)
                )
            )
        return joined(parts)

    async def _lists_of(self, prompts: Sequence[TokenIds], k: int, temperature: float, *, watched: bool = True) -> TopK:
        on_wire = _on_wire(temperature)
        return await self._ask(
            prompts,
            lambda choices: self._parser.drafts(choices, 1, k, greedy=on_wire == 0.0).lists,
            watched=watched,
            logprobs=k,
            temperature=on_wire,
        )

    async def _score_after_cache(self, text: TokenIds, count: int, k: int) -> TopK:
        """Lists for the last `count` tokens of a text, whose beginning the prefix cache may have."""
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, "detokenize": False}

        def whole(answer: Mapping[str, Any]) -> TopK:
            rows = answer["prompt_logprobs"]
            if not isinstance(rows, list) or len(rows) < count:
                raise self._parser.invalid(f"prompt_logprobs without rows for the last {count} tokens")
            return self._parser.scored(rows[-count:], text[-count:], k)

        def uncached(answer: Mapping[str, Any]) -> TopK | None:
            # Rows are missing at the beginning: those of cached tokens, and in a text seen before, some of the last.
            rows = answer["prompt_logprobs"]
            return whole(answer) if len(rows) >= count and all(rows[-count:]) else None

        top = await self._generate(text, {**sampling, "skip_reading_prefix_cache": False}, uncached)
        if top is None:
            top = await self._generate(text, {**sampling, "skip_reading_prefix_cache": True}, whole)
        return top

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
            *(self._named_rows(text[: start + end], end - first, request) for request in requests)
        )
        rows = values_of(found.named_rows, names, answers)
        nothing = np.empty(0)
        return [*[nothing] * first, *rows, *[nothing] * (len(token_ids) - end)]

    async def _named_rows(self, text: TokenIds, count: int, names: NamesSent) -> np.ndarray:
        """`(count, width)` log-probabilities of named tokens at the last `count` tokens of a text."""
        shape = (count, width(names))
        sampling = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprob_token_ids": names,
            "prompt_logprob_start": len(text) - 1 - count,  # row i is about token i + 1
            "detokenize": False,
        }

        def whole(answer: Mapping[str, Any]) -> np.ndarray:
            return self._parser.named(decoded_floats(answer["prompt_token_id_logprobs"], shape))

        def uncached(answer: Mapping[str, Any]) -> np.ndarray | None:
            # Rows are missing where the prefix cache has the first of them.
            try:
                return None if answer["prompt_token_id_logprobs"] is None else whole(answer)
            except ValueError:
                return None

        values = await self._generate(text, {**sampling, "skip_reading_prefix_cache": False}, uncached)
        if values is None:
            values = await self._generate(text, {**sampling, "skip_reading_prefix_cache": True}, whole)
        return values

    async def _score_prompt(self, text: TokenIds, count: int, k: int) -> TopK:
        """Lists for the last `count` tokens of a text, computed anew."""
        return await self._ask(
            [text],
            lambda choices: self._parser.scored(self._parser.prompt_rows(choices[0], text)[-count:], text[-count:], k),
            temperature=0.0,
            prompt_logprobs=k,
        )

    async def _generate(self, text: TokenIds, sampling: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]) -> T:
        """What `read` makes of the answer of the token-in/token-out endpoint."""
        await self.describe()
        payload = {"token_ids": text, "sampling_params": sampling}
        return await self._requests.ask(
            "/inference/v1/generate",
            payload,
            read,
            model=self._asked_for,
            models=self._answering,
            prompt_tokens=len(text),
            max_bytes=longest_answer(1, _listed(1, len(text), sampling)),
        )

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
        parts = [np.empty(0)]
        known = self._capabilities is not None and self._capabilities.named_logprobs
        for first in range(0, len(token_ids), _MAX_NAMED_TOKENS):
            names = list(token_ids[first : first + _MAX_NAMED_TOKENS])
            parts.append(
                await self._ask(
                    [prompt],
                    partial(self._parser.named_values, names, known=known),
                    logprobs=0,
                    logprob_token_ids=names,
                    temperature=_on_wire(temperature),
                )
            )
        return self._parser.named(np.concatenate(parts))

    async def _ask(
        self,
        prompts: Sequence[TokenIds],
        read: Callable[[list[dict[str, Any]]], T],
        *,
        watched: bool = True,
        **options: Any,
    ) -> T:
        """What `read` makes of the choices of a completion. `watched` as in `CheckedRequests.ask`."""
        await self.describe()
        payload = {
            "prompt": prompts,
            "max_tokens": 1,
            "return_tokens_as_token_ids": True,
            **_PLAIN_SAMPLING,
            **options,
        }
        return await self._requests.ask(
            "/v1/completions",
            payload,
            lambda answer: read(self._parser.choices(answer, len(prompts))),
            model=self._asked_for,
            models=self._answering,
            prompt_tokens=(prompt_tokens := sum(map(len, prompts))),
            max_bytes=longest_answer(len(prompts), _listed(len(prompts), prompt_tokens, payload)),
            watched=watched,
        )


def _listed(prompts: int, prompt_tokens: int, options: Mapping[str, Any]) -> int:
    """Log-probabilities that an answer to a request with these options has at most."""
    named = len(options.get("logprob_token_ids", ()))
    listed = prompts * options["max_tokens"] * (1 + max(options.get("logprobs", 0), named))
    if (k := options.get("prompt_logprobs")) is not None:
        listed += prompt_tokens * (1 + k)
    if names := options.get("prompt_logprob_token_ids"):
        listed += (prompt_tokens - options["prompt_logprob_start"]) * width(names)
    return listed


def _on_wire(temperature: float) -> float:
    """At temperature 0 vLLM reports log_softmax(logits) in both log-probability modes, like at 1, and the list never
    holds a sampled token beyond the k most likely."""
    return 0.0 if temperature == 1.0 else temperature
