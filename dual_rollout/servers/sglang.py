"""The client of an unmodified SGLang server: its native API, token ids in and triples out.

`/generate` answers `[log-probability, token id, text or null]` triples, in lists of one per candidate. What is known of
it comes from SGLang's source and documentation; see docs/sglang.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
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
from dual_rollout.servers.http import HttpTransport, longest_answer, shown
from dual_rollout.servers.identity import NextTokens, ServerIdentity, listed
from dual_rollout.servers.parsing import AnswerParser, RequestIds, read_as
from dual_rollout.servers.probe import follow_temperature

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ROUNDING = 1e-3  # nats
_PROBED_LENGTH = 16
_PROBED_TOKENS = 4
_NO_VOCABULARY_HAS = 10**9
_SAME_DISTRIBUTION = 0.05  # probabilities of one distribution differ by less, whatever the kernels' rounding

# SGLang fills what is not said from --preferred-sampling-params, so everything is said. Temperature 0 is not used: it
# means top_k=1, and in some versions another request's min_p in the same step then cuts our lists to one token.
_PLAIN_SAMPLING = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
}


class SGLangEngine:
    """One model behind an SGLang server's native HTTP API; implements `Engine`.

    Args:
        model: the served name, checked only, or that of a LoRA adapter the server has.
    """

    def __init__(self, transport: HttpTransport, model: str | None = None):
        self.url = transport.url
        self._http = transport
        self._parser = AnswerParser(transport.url)
        self._ids = RequestIds()
        self._identity = ServerIdentity(
            transport, birth=_not_told, describe_again=self._describe_again, next_tokens=self._next_tokens
        )
        self._wanted = model
        self._lora: str | None = None
        self._info: EngineInfo | None = None
        self._server: Mapping[str, Any] = {}
        self._capabilities: Capabilities | None = None
        self._probing = asyncio.Lock()
        self._processed: bool | None = None
        self._rows_fit = True
        self._warned = False

    async def describe(self) -> EngineInfo:
        if self._info is None:
            self._info, self._server = await self._described()
            if self._wanted not in (None, self._info.model):
                self._lora, self._info = self._wanted, replace(self._info, model=self._wanted)
        return self._info

    async def _described(self) -> tuple[EngineInfo, Mapping[str, Any]]:
        """What is served, and the server's settings."""
        model, server = await asyncio.gather(
            self._get("/model_info", "/get_model_info"), self._get("/server_info", "/get_server_info")
        )
        served = str(server.get("served_model_name") or model.get("model_path"))
        if self._wanted not in (None, served) and not server.get("enable_lora"):
            raise EngineRejectedError(
                f"serves {served!r}, not {self._wanted!r}, and has no LoRA adapters: leave theta_model/t_model "
                "unset (a weight update renames the served model)",
                url=self.url,
                status=404,
            )
        longest = server.get("max_req_input_len")  # SGLang refuses prompts from this length on
        root = model.get("tokenizer_path") or model.get("model_path")
        if not isinstance(root, str | None) or not (longest is None or (type(longest) is int and longest > 1)):
            raise EngineProtocolError(
                f"describes itself with model_path {shown(root)} and max_req_input_len {shown(longest)}",
                url=self.url,
            )
        return EngineInfo(served, root, None if longest is None else longest - 1), server

    async def _describe_again(self) -> None:
        """The server may have been restarted: is it the same model?"""
        before = await self.describe()
        now, self._server = await self._described()
        if now.root != before.root:
            raise EngineReplacedError(
                f"was replaced by a server of {now.root}, and served {before.root} before. Start it with the model "
                "that this run began with, or begin a new run",
                url=self.url,
            )

    async def _next_tokens(self, texts: Sequence[TokenIds]) -> NextTokens:
        return listed(await self._lists(texts, _PROBED_TOKENS, 1.0, watched=False))

    async def probe(self, prompt: TokenIds) -> Capabilities:
        async with self._probing:
            if self._capabilities is None:
                self._capabilities = await self._probed(prompt)
        return self._capabilities

    async def _probed(self, prompt: TokenIds) -> Capabilities:
        info = await self.describe()
        text = ([*prompt] * 3)[: min(_PROBED_LENGTH, info.max_model_len or _PROBED_LENGTH)]
        self._parser.vocab_size = await self._vocab_size(prompt)
        self._rows_fit = await self._rows_are_aligned(text[:-2], np.array(text[-2:]))
        await self._identity.remember_model(text)
        return Capabilities(
            model=info.model,
            root=info.root,
            max_model_len=info.max_model_len,
            version=self._server.get("version"),
            vocab_size=self._parser.vocab_size,
            logprobs_mode="processed" if await self._reports_processed(prompt) else "raw",
            named_logprobs=True,
            prefix_caching=not self._server.get("disable_radix_cache"),
            generate_endpoint=True,
            cached_rows=self._rows_fit,
            detokenizes=not self._server.get("skip_tokenizer_init"),
            reloads_weights=True,
            resets_prefix_cache=True,
            pauses=True,
            loads_lora=await self.loads_lora(),
            scoring=("token_ids", "prefixes") if self._rows_fit else ("prefixes",),
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
        sampling = [
            _sampling(max_new_tokens=length, temperature=temperature, **ends, **self._seed(seed))
            for length, seed in zip(lengths, seeds, strict=True)
        ]

        def read(metas: list[Mapping[str, Any]]) -> Drafts:
            drafts, rows = [], []
            for meta, length in zip(metas, lengths, strict=True):
                ids, own = self._sampled(meta, length)
                lists = self._output_rows(meta, "output_top_logprobs", length)
                for token, logprob, row in zip(ids.tolist(), own.tolist(), lists, strict=True):
                    listed = {name: value for value, name, _ in row}
                    if abs(listed.get(token, logprob) - logprob) > _ROUNDING:
                        raise self._parser.invalid(f"a list that disagrees with the token sampled from it, {token}")
                drafts.append(ids)
                rows += lists
            return Drafts(drafts, self._top_k(rows, k))

        drafts = await self._generate(prompts, sampling, read, top_logprobs_num=k)
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
            return [self._named(meta, asked) for meta, asked in zip(metas, names, strict=True)]

        found = await self._generate(
            [prompts[row] for row in rows], _sampling(temperature=temperature), read, token_ids_logprob=names
        )
        for row, logprobs in zip(rows, found, strict=True):
            values[row] = logprobs
        return values

    def _named(self, meta: Mapping[str, Any], asked: list[int]) -> np.ndarray:
        ids, logprobs = self._triples(self._output_rows(meta, "output_token_ids_logprobs", 1))
        if ids[0].tolist() != asked:
            raise self._parser.invalid("output_token_ids_logprobs that are not those of the named tokens")
        return self._parser.named(logprobs[0])

    async def score_named(
        self,
        prompts: Sequence[TokenIds],
        drafts: Sequence[np.ndarray],
        token_ids: Sequence[TokenIds],
        temperature: float = 1.0,
    ) -> list[np.ndarray]:
        return await self.named_logprobs(prefixes(prompts, drafts), token_ids, temperature)

    async def score(self, token_ids: TokenIds, start: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(token_ids) - start
        if start < 1 or count < 1:
            raise ValueError(f"start must be in 1..{len(token_ids) - 1}, got {start}")

        # The row at logprob_start_len itself is always null. Older versions leave it out unless it is row 0, so rows
        # are counted from the end. They are at temperature 1 whatever the request's.
        def read(metas: list[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
            ids, own = self._triples([self._input_rows(metas[0], "input_token_logprobs", count)])
            _, top = self._triples(self._input_rows(metas[0], "input_top_logprobs", count))
            # SGLang writes the last id of the vocabulary as 0 here.
            if any(got not in (asked, 0) for got, asked in zip(ids[0].tolist(), token_ids[start:], strict=True)):
                raise self._parser.invalid("input_token_logprobs that are not those of the prompt's tokens")
            return self._parser.scores(own[0], top[:, 0])

        return await self._parser.scores_twice(
            lambda: self._generate([token_ids], _sampling(), read, logprob_start_len=start - 1, top_logprobs_num=1)
        )

    async def draw_excluding(self, prompt: TokenIds, excluded: TokenIds, temperature: float, seed: int) -> int:
        await self.describe()
        bias = {str(token): -100.0 for token in excluded}
        sampling = _sampling(temperature=temperature, logit_bias=bias, **self._seed(seed))
        return await self._generate([prompt], sampling, lambda metas: int(self._sampled(metas[0], 1)[0][0]))

    async def detokenize(self, token_ids: TokenIds) -> str:
        answer = await self._http.post("/detokenize", {"tokens": list(token_ids), "skip_special_tokens": False})
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise EngineProtocolError("/detokenize answered no text", url=self.url)
        return answer["text"]

    async def health(self) -> None:
        await self._http.get("/health")
        await self._identity.confirm()

    async def reset_prefix_cache(self) -> None:
        await self._http.post("/flush_cache")

    async def reload_weights(self, path: str) -> None:
        await self._identity.took_weights(lambda: self._reload_weights(path))

    async def _reload_weights(self, path: str) -> None:
        # SGLang waits for running requests, and drops the prefix cache itself.
        try:
            answer = await self._http.post("/update_weights_from_disk", {"model_path": path, "flush_cache": True})
        except EngineRejectedError as error:
            if "weights iterator" not in str(error):
                raise
            raise EngineRejectedError(
                f"does not see the weights in {path}: set dual_weight_sync_dir to a folder that trainer and server "
                f"share under the same path (it says: {error})",
                url=self.url,
                status=error.status,
            ) from error
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise EngineProtocolError(
                f"/update_weights_from_disk did not confirm the update: {shown(answer, 300)}", url=self.url
            )

    async def load_lora(self, name: str, path: str) -> None:
        await self._identity.took_weights(lambda: self._load_lora(name, path))

    async def _load_lora(self, name: str, path: str) -> None:
        # A name that is taken is refused, so the old adapter goes first; there may be none. The prefix cache is keyed
        # by load, so nothing of the old adapter is found in it.
        with contextlib.suppress(EngineRejectedError):
            await self._http.post("/unload_lora_adapter", {"lora_name": name})
        answer = await self._http.post("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise EngineProtocolError(
                f"/load_lora_adapter did not confirm the load: {shown(answer, 300)}", url=self.url
            )

    def use_lora(self, name: str) -> None:
        self._lora = name

    def weights_given(self) -> float | None:
        return self._identity.born

    def adopt_weights(self, given: float | None) -> None:
        self._identity.adopt(given)

    async def each(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        return [await ask(self)]

    async def weight_version(self) -> str | None:
        version = (await self._get("/model_info", "/get_model_info")).get("weight_version")
        return version if isinstance(version, str) else None

    async def dtype(self) -> str | None:
        await self.describe()
        dtype = self._server.get("quantization") or self._server.get("dtype")
        return dtype if isinstance(dtype, str) and dtype != "auto" else None

    async def set_weight_version(self, version: str) -> None:
        with contextlib.suppress(EngineRejectedError):  # an older version
            await self._http.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    async def loads_lora(self) -> bool:
        await self.describe()
        return bool(self._server.get("enable_lora"))

    async def check_sees(self, path: str) -> None:
        """Nothing to ask: SGLang refuses a folder it does not see before it touches a weight."""

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _get(self, path: str, old_path: str) -> Mapping[str, Any]:
        """What a server tells of itself, at the path of newer versions or else that of older ones."""
        for candidate in (path, old_path):
            try:
                answer = await self._http.get(candidate)
            except EngineRejectedError as error:
                if error.status != 404:
                    raise
                continue
            if not isinstance(answer, dict):
                raise EngineProtocolError(f"{candidate} answered no JSON object", url=self.url)
            return answer
        raise EngineRejectedError(
            f"has neither {path} nor {old_path}; is it an SGLang server? (theta_engine/t_engine say which kind it is)",
            url=self.url,
            status=404,
        )

    async def _lists(self, prompts: Sequence[TokenIds], k: int, temperature: float, *, watched: bool = True) -> TopK:
        def read(metas: list[Mapping[str, Any]]) -> TopK:
            return self._top_k([self._output_rows(meta, "output_top_logprobs", 1)[0] for meta in metas], k)

        sampling = _sampling(temperature=temperature)
        return await self._generate(prompts, sampling, read, watched=watched, top_logprobs_num=k)

    async def _rows(self, texts: Sequence[Sequence[int]], starts: Sequence[int], k: int) -> TopK:
        """The lists at positions `starts[i]` to the last of each text, at temperature 1, in one request.

        The last position is that of the next token after a text without its own last.
        """

        def read(metas: list[Mapping[str, Any]]) -> TopK:
            rows = []
            for meta, text, start in zip(metas, texts, starts, strict=True):
                rows += self._input_rows(meta, "input_top_logprobs", len(text) - start - 1)
                rows += self._output_rows(meta, "output_top_logprobs", 1)
            return self._top_k(rows, k)

        return await self._generate(
            [text[:-1] for text in texts],
            _sampling(),
            read,
            top_logprobs_num=k,
            logprob_start_len=[start - 1 for start in starts],
        )

    async def _rows_are_aligned(self, prompt: list[int], draft: np.ndarray) -> bool:
        """Whether the rows of a prompt's tokens are those of the same prefixes asked one by one."""
        prefixes = [[*prompt, *draft[:end].tolist()] for end in range(len(draft))]
        asked = await self._lists(prefixes, _PROBED_TOKENS, 1.0)
        with contextlib.suppress(EngineProtocolError):
            scored = await self._rows([[*prompt, *draft.tolist()]], [len(prompt)], _PROBED_TOKENS)
            p, q = (np.sort(np.exp(top.logprobs), axis=1) for top in (scored, asked))
            if np.abs(p - q).max() < _SAME_DISTRIBUTION:
                return True
        logger.warning("%s: rows of a scored text are not those of its prefixes; drafts are scored by prefix", self.url)
        return False

    async def _vocab_size(self, prompt: TokenIds) -> int | None:
        """The size of the vocabulary, which SGLang tells only where it refuses a bias on a token that no model has."""
        try:
            await self._generate([prompt], _sampling(logit_bias={str(_NO_VOCABULARY_HAS): 1.0}), len)
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
        if self._server.get("enable_deterministic_inference"):
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
        sampling: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        read: Callable[[list[Mapping[str, Any]]], T],
        *,
        watched: bool = True,
        **options: Any,
    ) -> T:
        """What `read` makes of the `meta_info` of what is generated after each prompt, in order.

        `sampling` is for all or one for each. `watched`: the answer must be of the server that was there at first.
        """
        await self.describe()
        if watched:
            await self._identity.before_request()
        payload: dict[str, Any] = {
            "input_ids": prompts,
            "sampling_params": sampling,
            "return_logprob": True,
            "return_text_in_logprobs": False,
            **options,
        }
        if self._lora is not None:
            payload["lora_path"] = self._lora
        max_bytes = longest_answer(len(prompts), _listed(prompts, payload))

        async def once() -> T:
            numbers = [self._ids.next() for _ in prompts]
            answers = await self._http.post("/generate", {**payload, "rid": numbers}, max_bytes=max_bytes)
            if watched:
                await self._identity.after_answer()
            if not isinstance(answers, list) or len(answers) != len(prompts):
                raise EngineProtocolError(f"expected a list of {len(prompts)} answers", url=self.url)
            metas = [self._meta_info(*item) for item in zip(answers, prompts, numbers, strict=True)]
            return read_as(read, metas, self.url)

        return await self._http.retries.query(once)

    def _meta_info(self, answer: Any, prompt: TokenIds, number: str) -> Mapping[str, Any]:
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(meta, dict):
            raise EngineProtocolError("an answer has no meta_info", url=self.url)
        if not self._ids.fit("/generate", meta.get("id"), number):
            raise self._parser.invalid(f"an answer to another request ({shown(meta.get('id'))})")
        counted = meta.get("prompt_tokens")
        if isinstance(counted, int) and counted != len(prompt):
            raise self._parser.invalid(f"an answer to {counted} prompt tokens instead of {len(prompt)}")
        finish = meta.get("finish_reason")
        if isinstance(finish, dict) and finish.get("type") == "abort":
            raise EngineProtocolError(f"the server aborted a request: {shown(finish.get('message'))}", url=self.url)
        return meta

    def _sampled(self, meta: Mapping[str, Any], at_most: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that were generated, and their log-probabilities."""
        ids, logprobs = self._triples([self._output_rows(meta, "output_token_logprobs", at_most)])
        finish = meta.get("finish_reason")
        if len(ids[0]) < at_most and not (isinstance(finish, dict) and finish.get("type") == "stop"):
            raise self._parser.invalid(f"{len(ids[0])} tokens instead of {at_most}")
        return ids[0], logprobs[0]

    def _output_rows(self, meta: Mapping[str, Any], name: str, at_most: int) -> list[Any]:
        """What `name` holds for the tokens generated."""
        rows = meta.get(name)
        if not isinstance(rows, list) or not 1 <= len(rows) <= at_most:
            raise EngineProtocolError(f"meta_info has no {name} for {at_most} generated tokens", url=self.url)
        return rows

    def _input_rows(self, meta: Mapping[str, Any], name: str, count: int) -> list[Any]:
        """What `name` holds for the last `count` tokens of the prompt."""
        rows = meta.get(name)
        if not isinstance(rows, list) or len(rows) < count:
            raise EngineProtocolError(f"meta_info has no {name} for {count} prompt tokens", url=self.url)
        return rows[len(rows) - count :]

    def _top_k(self, rows: Sequence[Any], k: int) -> TopK:
        ids, logprobs = self._triples(rows)
        if ids.shape[1] != k:
            raise self._parser.invalid(f"a list of {ids.shape[1]} tokens, not {k}")
        return self._parser.lists(ids.ravel(), logprobs.ravel(), np.full(len(rows), k), k)

    def _triples(self, rows: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Lists of K triples as token ids and log-probabilities, both `(len(rows), K)`; parsed in bulk."""
        (width,) = {len(row) for row in rows}
        values, tokens, _ = zip(*chain.from_iterable(rows), strict=True)
        return self._parser.ids(tokens).reshape(-1, width), self._parser.logprobs(values).reshape(-1, width)


def _listed(prompts: Sequence[TokenIds], payload: Mapping[str, Any]) -> int:
    """Log-probabilities that an answer to this request has at most."""
    sampling = payload["sampling_params"]
    each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    names = payload.get("token_ids_logprob", [()] * len(prompts))
    starts = payload.get("logprob_start_len", map(len, prompts))
    starts = [starts] * len(prompts) if isinstance(starts, int) else starts
    width = 1 + payload.get("top_logprobs_num", 0)
    return sum(
        (len(prompt) - start + options["max_new_tokens"]) * (width + len(named))
        for prompt, start, options, named in zip(prompts, starts, each, names, strict=True)
    )


async def _not_told() -> None:
    """SGLang does not say when it was started."""


def _sampling(**changes: Any) -> dict[str, Any]:
    return {**_PLAIN_SAMPLING, **changes}
