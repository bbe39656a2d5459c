"""The client of an unmodified SGLang server, by its native API.

What is known of it comes from SGLang's source and documentation; see docs/sglang.md.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
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
from dual_rollout.functional.top_k import TopK, at_temperature
from dual_rollout.servers.http import HttpTransport
from dual_rollout.servers.identity import NextTokens, ServerIdentity, listed
from dual_rollout.servers.probe import follow_temperature, warn_of_refusals
from dual_rollout.servers.sglang_answers import BINARY_LISTS, BINARY_PROMPT_LISTS, SGLangParser
from dual_rollout.servers.sglang_model_weights import SGLangModelWeights
from dual_rollout.servers.sglang_requests import SGLangRequests, sampling
from dual_rollout.servers.sglang_settings import described

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PROBED_LENGTH = 16
_PROBED_TOKENS = 4
_NO_VOCABULARY_HAS = 10**9
_SAME_DISTRIBUTION = 0.05  # probabilities of one distribution differ by less, whatever the kernels' rounding


class SGLangEngine(SGLangModelWeights):
    """One model behind an SGLang server's native HTTP API; implements `Engine`.

    Args:
        model: the served name, checked only, or that of a LoRA adapter the server has.
    """

    def __init__(self, transport: HttpTransport, model: str | None = None):
        identity = ServerIdentity(
            transport, started=_not_told, describe_again=self._describe_again, next_tokens=self._next_tokens
        )
        super().__init__(transport, identity)
        self._parser = SGLangParser(transport.url)
        self._requests = SGLangRequests(transport, identity, self._parser)
        self._wanted = model
        self._info: EngineInfo | None = None
        self._capabilities: Capabilities | None = None
        self._probing = asyncio.Lock()
        self._processed: bool | None = None
        self._binary = False
        self._warned = False

    async def describe(self) -> EngineInfo:
        if self._info is None:
            self._info, self._settings = await described(self._http, self._wanted)
            if self._wanted not in (None, self._info.model):
                self._lora, self._info = self._wanted, replace(self._info, model=self._wanted)
        return self._info

    async def _describe_again(self) -> None:
        """The server may have been restarted: is it the same model?"""
        before = await self.describe()
        now, self._settings = await described(self._http, self._wanted)
        if now.root != before.root:
            raise EngineReplacedError(
                f"was replaced by a server of {now.root}, and served {before.root} before. Start it with the model "
                "that this run began with, or begin a new run",
                url=self.url,
            )

    async def _next_tokens(self, texts: Sequence[TokenIds]) -> NextTokens:
        return listed(await self._lists(texts, _PROBED_TOKENS, 1.0, watched=False))

    async def software_version(self) -> str | None:
        version = (await self._server_settings()).get("version")
        return version if isinstance(version, str) else None

    async def probe(self, prompt: TokenIds) -> Capabilities:
        async with self._probing:
            if self._capabilities is None:
                self._capabilities = await self._probed(prompt)
        return self._capabilities

    async def _probed(self, prompt: TokenIds) -> Capabilities:
        info = await self.describe()
        text = ([*prompt] * 3)[: min(_PROBED_LENGTH, info.max_model_len or _PROBED_LENGTH)]
        self._parser.vocab_size = await self._vocab_size(prompt)
        refused: list[str] = []
        aligned = await self._rows_are_aligned(text[:-2], text[-2:], refused)
        self._binary = await self._gives_binary_lists(text, refused)
        warn_of_refusals(self.url, refused)
        await self._identity.remember_model(text)
        return Capabilities(
            model=info.model,
            root=info.root,
            max_model_len=info.max_model_len,
            version=await self.software_version(),
            vocab_size=self._parser.vocab_size,
            logprobs_mode="processed" if await self._reports_processed(prompt) else "raw",
            named_logprobs=True,
            prefix_caching=not self._settings.get("disable_radix_cache"),
            generate_endpoint=True,
            cached_rows=aligned,
            detokenizes=not self._settings.get("skip_tokenizer_init"),
            reloads_weights=True,
            resets_prefix_cache=True,
            pauses=True,
            loads_lora=await self.loads_lora(),
            scoring=("token_ids", "prefixes") if aligned else ("prefixes",),
            refused=tuple(refused),
        )

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
        await self.describe()
        # With ignore_eos SGLang ignores stop ids too.
        ends = {"ignore_eos": False, "stop_token_ids": sorted(stop_ids)}
        options = [
            sampling(max_new_tokens=length, temperature=temperature, **ends, **self._seed(seed))
            for length, seed in zip(lengths, seeds, strict=True)
        ]

        drafts = await self._generate(
            prompts, options, lambda metas: self._parser.drafts(metas, lengths, k), top_logprobs_num=k
        )
        return Drafts(drafts.token_ids, at_temperature(drafts.lists, temperature)) if raw else drafts

    async def score_drafts(
        self,
        prompts: Sequence[TokenIds],
        drafts: Sequence[np.ndarray],
        k: int,
        temperature: float,
        method: ScoringMethod,
    ) -> TopK:
        texts = [[*prompt, *draft.tolist()] for prompt, draft in zip(prompts, drafts, strict=True)]
        starts = [len(prompt) for prompt in prompts]
        # Log-probabilities of a prompt's tokens do not follow the temperature, those of the next token do.
        if temperature != 1.0 or method == "prefixes":
            return await self.next_top_k(prefixes(prompts, drafts), k, temperature)
        return await self._rows(texts, starts, k)

    async def named_logprobs(
        self, prompts: Sequence[TokenIds], token_ids: Sequence[TokenIds], temperature: float = 1.0
    ) -> list[np.ndarray]:
        if temperature != 1.0 and not await self._reports_processed(prompts[0]):
            raise self._needs_processed('missing="exact"')
        values = [np.empty(0) for _ in prompts]
        rows = [row for row, ids in enumerate(token_ids) if len(ids)]
        if not rows:
            return values
        names = [list(token_ids[row]) for row in rows]

        def read(metas: list[Mapping[str, Any]]) -> list[np.ndarray]:
            return [self._parser.named_values(meta, asked) for meta, asked in zip(metas, names, strict=True)]

        found = await self._generate(
            [prompts[row] for row in rows], sampling(temperature=temperature), read, token_ids_logprob=names
        )
        for row, logprobs in zip(rows, found, strict=True):
            values[row] = logprobs
        return values

    async def score_named(
        self,
        prompts: Sequence[TokenIds],
        drafts: Sequence[np.ndarray],
        token_ids: Sequence[TokenIds],
        temperature: float = 1.0,
    ) -> list[np.ndarray]:
        return await self.named_logprobs(prefixes(prompts, drafts), token_ids, temperature)

    async def score(self, token_ids: TokenIds, start: int) -> tuple[np.ndarray, np.ndarray]:
        if not 1 <= start < len(token_ids):
            raise ValueError(f"start must be in 1..{len(token_ids) - 1}, got {start}")

        # Rows of a prompt are at temperature 1 whatever the request's.
        def read(metas: list[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
            return self._parser.scored_text(metas[0], token_ids, start)

        return await self._parser.scores_twice(
            lambda: self._generate([token_ids], sampling(), read, logprob_start_len=start - 1, top_logprobs_num=1)
        )

    async def draw_excluding(
        self, prompts: Sequence[TokenIds], excluded: Sequence[TokenIds], temperature: float, seeds: Sequence[int]
    ) -> list[int]:
        await self.describe()

        def draw(prompt: TokenIds, ids: TokenIds, seed: int) -> Awaitable[int]:
            bias = {str(token): -100.0 for token in ids}
            options = sampling(temperature=temperature, logit_bias=bias, **self._seed(seed))
            return self._generate([prompt], options, lambda metas: int(self._parser.sampled(metas[0], 1)[0][0]))

        return await asyncio.gather(*map(draw, prompts, excluded, seeds))

    async def detokenize(self, token_ids: TokenIds) -> str:
        answer = await self._http.post("/detokenize", {"tokens": list(token_ids), "skip_special_tokens": False})
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise EngineProtocolError("/detokenize answered no text", url=self.url)
        return answer["text"]

    async def health(self) -> None:
        await self._http.get("/health")
        await self._identity.confirm()

    async def each(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        return [await ask(self)]

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _lists(self, prompts: Sequence[TokenIds], k: int, temperature: float, *, watched: bool = True) -> TopK:
        return await self._generate(
            prompts,
            sampling(temperature=temperature),
            lambda metas: self._parser.next_lists(metas, k),
            watched=watched,
            top_logprobs_num=k,
        )

    async def _rows(self, texts: Sequence[TokenIds], starts: Sequence[int], k: int) -> TopK:
        """The lists at positions `starts[i]` to the last of each text, at temperature 1, in one request.

        The last position is that of the next token after a text without its own last.
        """
        return await self._generate(
            [text[:-1] for text in texts],
            sampling(),
            lambda metas: self._parser.scored_lists(metas, texts, starts, k),
            top_logprobs_num=k,
            logprob_start_len=[start - 1 for start in starts],
        )

    async def _rows_are_aligned(self, prompt: list[int], draft: list[int], refused: list[str]) -> bool:
        """Whether the rows of a prompt's tokens are those of the same prefixes asked one by one."""
        asked = await self._lists([[*prompt, *draft[:end]] for end in range(len(draft))], _PROBED_TOKENS, 1.0)
        try:
            if _alike(asked, await self._rows([[*prompt, *draft]], [len(prompt)], _PROBED_TOKENS)):
                return True
            refused.append("rows of a scored text: they are not those of its prefixes; drafts are scored by prefix")
        except EngineProtocolError as error:
            refused.append(f"rows of a scored text: {error}")
        return False

    async def _gives_binary_lists(self, text: list[int], refused: list[str]) -> bool:
        """Whether lists come as arrays where that is asked for, and are those of the nested form. Older versions
        ignore what asks for it."""
        starts, k = [len(text) - 2], _PROBED_TOKENS

        def read(metas: list[Mapping[str, Any]]) -> TopK | None:
            return self._parser.scored_lists(metas, [text], starts, k) if self._parser.is_binary(metas[0]) else None

        options = {"top_logprobs_num": k, "logprob_start_len": [starts[0] - 1]}
        try:
            lists = await self._generate([text[:-1]], sampling(), read, **options, **BINARY_PROMPT_LISTS)
            if lists is None:
                return False
            if _alike(await self._rows([text], starts, k), lists):
                return True
            refused.append("lists as base64: they are not those of the nested form")
        except (EngineRejectedError, EngineProtocolError) as error:
            refused.append(f"lists as base64: {error}")
        return False

    async def _vocab_size(self, prompt: TokenIds) -> int | None:
        """The size of the vocabulary, which SGLang tells only where it refuses a bias on a token that no model has."""
        try:
            await self._generate([prompt], sampling(logit_bias={str(_NO_VOCABULARY_HAS): 1.0}), len)
        except EngineRejectedError as error:
            if found := re.search(r"keys in \[0, (\d+)\]", str(error)):
                return int(found[1]) + 1
        except EngineProtocolError:
            pass
        return None

    async def _reports_processed(self, prompt: TokenIds) -> bool:
        """Whether log-probabilities follow the temperature; measured on `prompt`, once."""
        if self._processed is None:
            lists = await asyncio.gather(*(self._lists([prompt], _PROBED_TOKENS, t) for t in (1.0, 2.0)))
            self._processed = follow_temperature(*lists)
            if not self._processed:
                logger.warning(
                    "%s reports raw log-probabilities; at temperature != 1 the mass outside the top-k list is "
                    "approximated. Start it without SGLANG_RETURN_ORIGINAL_LOGPROB to have them exact.",
                    self.url,
                )
        return self._processed

    def _needs_processed(self, what: str) -> EngineRejectedError:
        return EngineRejectedError(
            f"{what} at temperature != 1 needs log-probabilities that follow it: start SGLang without "
            "SGLANG_RETURN_ORIGINAL_LOGPROB",
            url=self.url,
            status=400,
        )

    def _seed(self, seed: int) -> dict[str, int]:
        """The option that makes a draw repeatable, on a server that looks at it."""
        if self._settings.get("enable_deterministic_inference"):
            return {"sampling_seed": seed}
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s ignores seeds: what it draws differs from run to run. Start it with "
                "--enable-deterministic-inference.",
                self.url,
            )
        return {}

    async def _generate(
        self,
        prompts: Sequence[TokenIds],
        options: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        read: Callable[[list[Mapping[str, Any]]], T],
        **more: Any,
    ) -> T:
        """As `SGLangRequests.generate`, of the adapter in use and with lists in the quickest form there is."""
        await self.describe()
        if self._lora is not None:
            more["lora_path"] = self._lora
        if self._binary and "top_logprobs_num" in more:
            more |= BINARY_PROMPT_LISTS if "logprob_start_len" in more else BINARY_LISTS
        return await self._requests.generate(prompts, options, read, **more)


def _alike(asked: TopK, others: TopK) -> bool:
    """Whether two requests gave the lists of one distribution at each position."""
    p, q = (np.sort(np.exp(top.logprobs), axis=1) for top in (asked, others))
    return p.shape == q.shape and bool(np.abs(p - q).max() < _SAME_DISTRIBUTION)


async def _not_told() -> None:
    """SGLang does not say when it was started."""
