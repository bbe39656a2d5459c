"""Find out what a vLLM server is and can do: a few short requests, and none that could harm it or other clients."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from itertools import cycle, islice
from typing import Any, Literal

import numpy as np

from dual_rollout.engine import Capabilities, EngineInfo, GrowingText, NamedRowsForm, ScoringMethod, TokenIds
from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError
from dual_rollout.functional.top_k import TopK
from dual_rollout.servers.http import HttpTransport
from dual_rollout.servers.parsing import MALFORMED
from dual_rollout.servers.probe import SAME_LOGPROB, follow_temperature
from dual_rollout.servers.vllm_named_rows import requests_for, values_of, width
from dual_rollout.servers.vllm_npy import decoded_floats
from dual_rollout.sessions.wire import DRAW_PATH

logger = logging.getLogger(__name__)

_PROMPT_LENGTH = 65  # two blocks of the largest usual size and one token to compute
_TAIL_LENGTH = 4
_LIST_LENGTH = 5
_ABSURDLY_MANY = 2**31 - 1
_NO_VOCABULARY_HAS = 10**9
_CHEAP_TO_LIST = 4096  # a server that lists as many log-probabilities is not asked for all of its vocabulary
_ROUTES = (
    "/inference/v1/generate",
    "/detokenize",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/pause",
    "/v1/load_lora_adapter",
    DRAW_PATH,
)


class Probe:
    """What is asked of one server to find out what it can do.

    Args:
        prompt: token ids the model surely has; made longer by repetition.
        version: of the server's software.
        lists: the most likely next tokens: `(prompts, k, temperature) -> TopK`.
        named: log-probabilities of named tokens: `(prompt, ids, temperature) -> array`.
        loads_lora: whether the server takes adapters.
        sessions: lists from its sessions, if it has any, as `lists`.
    """

    def __init__(
        self,
        http: HttpTransport,
        info: EngineInfo,
        prompt: TokenIds,
        *,
        version: Callable[[], Awaitable[str | None]],
        lists: Callable[[Sequence[TokenIds], int, float], Awaitable[TopK]],
        named: Callable[[TokenIds, TokenIds, float], Awaitable[np.ndarray]],
        loads_lora: Callable[[], Awaitable[bool]],
        sessions: Callable[[Sequence[TokenIds], int, float], Awaitable[TopK]],
    ):
        self._http = http
        self._info = info
        length = min(_PROMPT_LENGTH, (info.max_model_len or 4096) - _TAIL_LENGTH - 1)
        self.prompt = list(islice(cycle(prompt), max(length, 1)))
        self._version = version
        self._lists = lists
        self._named = named
        self._loads_lora = loads_lora
        self._sessions = sessions
        self._refused: list[str] = []

    async def run(self) -> Capabilities:
        """Ask everything.

        Raises:
            EngineRejectedError: the server refuses even an ordinary request with this prompt.
            EngineError: it cannot be reached, or its answers are not usable.
        """
        version, schema, metrics = await asyncio.gather(
            self._version(),
            self._optional(lambda: self._http.get("/openapi.json")),
            self._optional(lambda: self._http.get_text("/metrics")),
        )
        routes = await self._routes(schema)
        max_logprobs, vocab_size = await self._limits()
        mode = await self._logprobs_mode(min(_LIST_LENGTH, max_logprobs or _LIST_LENGTH))
        prefix_caching = await self._prefix_caching(metrics)  # the prompt has been seen by now
        named_rows, cached_rows = None, False
        if "/inference/v1/generate" in routes:
            named_rows, cached_rows = await self._prompt_rows(schema)
        loads_lora = "/v1/load_lora_adapter" in routes and await self._loads_lora()
        return Capabilities(
            model=self._info.model,
            root=self._info.root,
            max_model_len=self._info.max_model_len,
            version=version,
            vocab_size=vocab_size,
            max_logprobs=max_logprobs,
            prompt_lists=await self._takes_prompt_lists(),
            logprobs_mode=mode,
            named_logprobs=await self._names_tokens(schema),
            prefix_caching=prefix_caching,
            generate_endpoint="/inference/v1/generate" in routes,
            cached_rows=cached_rows,
            named_rows=named_rows,
            sessions=DRAW_PATH in routes and await self._has_sessions(min(_LIST_LENGTH, max_logprobs or _LIST_LENGTH)),
            detokenizes="/detokenize" in routes,
            reloads_weights="/collective_rpc" in routes,
            resets_prefix_cache="/reset_prefix_cache" in routes,
            pauses="/pause" in routes,
            loads_lora=loads_lora,
            scoring=_scoring(cached_rows, prefix_caching, loads_lora),
            refused=tuple(self._refused),
        )

    async def _routes(self, schema: Any) -> set[str]:
        """Those of `_ROUTES` that are there."""
        if isinstance(schema, dict) and schema.get("paths"):
            return set(_ROUTES) & set(schema["paths"])
        # Without a schema (--disable-fastapi-docs): each takes POST, so a GET is "not allowed" where it exists.
        exist = await asyncio.gather(*(self._refuses_get(route) for route in _ROUTES))
        return {route for route, exists in zip(_ROUTES, exist, strict=True) if exists}

    async def _refuses_get(self, route: str) -> bool:
        try:
            await self._http.get(route)
        except EngineRejectedError as error:
            return error.status == 405
        except EngineProtocolError:
            return False
        return False

    async def _limits(self) -> tuple[int | None, int | None]:
        """The longest list of log-probabilities, and the size of the vocabulary, as refusals tell them."""
        longest, _ = await self._refused_logprobs(_ABSURDLY_MANY)
        try:
            await self._complete(logit_bias={str(_NO_VOCABULARY_HAS): 1.0})
        except EngineRejectedError as error:
            if found := re.search(r"Vocabulary size: (\d+)", str(error)):
                return longest, int(found[1])
        except EngineProtocolError:
            pass
        if longest is None or longest > _CHEAP_TO_LIST:
            return longest, None
        _, vocabulary = await self._refused_logprobs(-1)  # that is, all
        return longest, vocabulary

    async def _refused_logprobs(self, count: int) -> tuple[int | None, int | None]:
        """The most that are allowed and the number asked for, from the server's refusal; Nones where it gave any."""
        try:
            await self._complete(logprobs=count)
        except EngineRejectedError as error:
            if found := re.search(r"logprobs of (-?\d+), which is greater than max allowed: (\d+)", str(error)):
                return int(found[2]), int(found[1])
            self._note("a list of all log-probabilities, without saying how many it gives", error)
        except EngineProtocolError:
            pass
        return None, None

    async def _takes_prompt_lists(self) -> bool:
        """vLLM's Rust front end (0.32) does not."""
        try:
            await self._complete(prompt=[self.prompt, self.prompt])
        except EngineRejectedError as error:
            self._note("several prompts in one request", error)
            return False
        return True

    async def _logprobs_mode(self, k: int) -> Literal["raw", "processed"]:
        one, two = [await self._lists([self.prompt], k, temperature) for temperature in (1.0, 2.0)]
        return "processed" if follow_temperature(one, two) else "raw"

    async def _has_sessions(self, k: int) -> bool:
        """Whether the lists of a text that grows in a session are those of the same text sent whole."""
        text = GrowingText(self.prompt[:-_TAIL_LENGTH])
        try:
            for token in self.prompt[-_TAIL_LENGTH:]:
                kept = await self._sessions([text], k, 0.0)
                whole = await self._lists([list(text)], k, 1.0)
                if np.abs(np.subtract(*(np.sort(top.logprobs[0]) for top in (kept, whole)))).max() > SAME_LOGPROB:
                    self._note("sessions", "their lists are not those of the same texts sent whole")
                    return False
                text.append(token)
        except (EngineRejectedError, EngineProtocolError) as error:
            self._note("sessions", error)
            return False
        return True

    async def _prefix_caching(self, metrics: str | None) -> bool | None:
        if found := re.search(r'vllm:cache_config_info\{[^}]*enable_prefix_caching="(\w+)"', metrics or ""):
            return found[1] == "True"
        answer = await self._complete()
        details = (answer.get("usage") or {}).get("prompt_tokens_details") if isinstance(answer, dict) else None
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return None if cached is None else cached > 0

    async def _names_tokens(self, schema: Any) -> bool:
        try:
            return "logprob_token_ids" in schema["components"]["schemas"]["CompletionRequest"]["properties"]
        except (KeyError, TypeError):
            pass
        # Not asked where it can be read: in some versions it garbles what other clients ask for in the same step.
        try:
            await self._named(self.prompt, (0, 1), 1.0)  # one of them is not the likeliest, which is listed anyway
        except (EngineRejectedError, EngineProtocolError) as error:
            self._note("logprob_token_ids", error)
            return False
        return True

    async def _prompt_rows(self, schema: Any) -> tuple[NamedRowsForm | None, bool]:
        """How tokens are named whose log-probabilities along the prompt are right, and whether the prompt's own are
        after a prefix-cache hit.

        Older model runners answer the request for the latter with uninitialised memory, or die of it. They also refuse
        prompt_logprob_token_ids, so that is asked first.
        """
        longer = [*self.prompt, *self.prompt[:_TAIL_LENGTH]]  # the cache has the first part of it
        form, named = await self._named_rows(longer, schema)
        if form is None:
            return None, False
        try:
            uncached = await self._generate(longer, prompt_logprobs=0, skip_reading_prefix_cache=False)
            every = await self._generate(longer, prompt_logprobs=0)
            rows, expected = (_own_logprobs(longer, answer["prompt_logprobs"]) for answer in (uncached, every))
        except (EngineRejectedError, EngineProtocolError, *MALFORMED) as error:
            self._note("prompt_logprobs after a prefix-cache hit", error)
            return None, False
        if len(expected) != len(longer) - 1:
            self._note("prompt_logprobs", f"{len(expected)} of {len(longer) - 1} rows")
            return None, False
        if not _agree(named, expected):
            self._note("prompt_logprob_token_ids", "its values are not those of prompt_logprobs")
            form = None
        if not _agree(rows, expected):
            self._note("prompt_logprobs after a prefix-cache hit", "its values are not those without the cache")
            return form, False
        return form, True

    async def _named_rows(self, text: TokenIds, schema: Any) -> tuple[NamedRowsForm | None, list[float]]:
        """The form that a server takes names in, and log-probabilities of the last tokens of `text`, asked for so."""
        refusals = []
        for form in _forms(schema):
            try:
                if (values := await self._named_tail(text, form)) is not None:
                    return form, values
            except (EngineRejectedError, EngineProtocolError, *MALFORMED) as error:
                refusals.append(error)
        if refusals:  # or it has no such field, and ignored it
            self._note("prompt_logprob_token_ids", refusals[0])
        return None, []

    async def _named_tail(self, text: TokenIds, form: NamedRowsForm) -> list[float] | None:
        """Log-probabilities of the last tokens of `text`, asked for by name; None from a server that gives none."""
        names = [[token] for token in text[-_TAIL_LENGTH:]]
        (request,) = requests_for(form, names, None)
        for skip in (False, True):  # rows that the prefix cache has are not given
            answer = await self._generate(
                text,
                prompt_logprob_token_ids=request,
                prompt_logprob_start=len(text) - 1 - _TAIL_LENGTH,
                skip_reading_prefix_cache=skip,
            )
            if (encoded := answer.get("prompt_token_id_logprobs")) is not None:
                values = values_of(form, names, [decoded_floats(encoded, (_TAIL_LENGTH, width(request)))])
                return [float(value[0]) for value in values]
        return None

    def _note(self, feature: str, refusal: Exception | str) -> None:
        """Keep that the server seemed to have `feature`, and what it did when asked."""
        self._refused.append(f"{feature}: {str(refusal).removeprefix(f'{self._http.url}: ')[:300]}")

    async def _complete(self, **options: Any) -> Any:
        payload = {"model": self._info.model, "prompt": self.prompt, "max_tokens": 1, "temperature": 0.0, **options}
        return await self._http.retries.query(lambda: self._http.post("/v1/completions", payload))

    async def _generate(self, prompt: TokenIds, **sampling: Any) -> Any:
        sampling = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, **sampling}
        payload = {"model": self._info.model, "token_ids": prompt, "sampling_params": sampling}
        return await self._http.retries.query(lambda: self._http.post("/inference/v1/generate", payload))

    async def _optional(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """The answer, or None from a server that refuses, or whose answer is invalid."""
        try:
            return await self._http.retries.query(ask)
        except (EngineRejectedError, EngineProtocolError):
            return None


def _forms(schema: Any) -> tuple[NamedRowsForm, ...]:
    """In which forms prompt_logprob_token_ids may be taken, by the server's description of itself where it has one."""
    try:
        sampling = schema["components"]["schemas"]["GenerateRequest"]["properties"]["sampling_params"]["properties"]
    except (KeyError, TypeError):
        return "per row", "shared"
    if (field := sampling.get("prompt_logprob_token_ids")) is None:
        return ()
    nested = any(kind.get("items", {}).get("type") == "array" for kind in field.get("anyOf", ()))
    return ("per row",) if nested else ("shared",)


def summary(capabilities: Capabilities) -> str:
    """One line for the log."""
    c = capabilities
    caching = {True: "prefix caching", False: "no prefix caching", None: "prefix caching unknown"}[c.prefix_caching]
    abilities = {
        "named tokens": c.named_logprobs,
        "token-in/token-out": c.generate_endpoint,
        "named tokens along a text": bool(c.named_rows),
        "sessions": c.sessions,
        "weight reload": c.reloads_weights,
        "pause": c.pauses,
        "LoRA": c.loads_lora,
    }
    return (
        f"{c.model!r} on version {c.version or 'unknown'}, context {c.max_model_len or 'unknown'}, "
        f"vocabulary {c.vocab_size or 'unknown'}, max_logprobs {c.max_logprobs or 'unlimited'}, "
        f"{c.logprobs_mode} log-probabilities, {caching}, drafts scored by {' or '.join(c.scoring)}; "
        f"offers {', '.join(name for name, there in abilities.items() if there) or 'nothing else'}"
    )


def _scoring(cached_rows: bool, prefix_caching: bool | None, loads_lora: bool) -> tuple[ScoringMethod, ...]:
    """The ways to score drafts, the most promising first."""
    if cached_rows and prefix_caching is not False:
        return "token_ids", "prefixes"
    # To compute a context anew pays only where it would be computed anew in any case. vLLM's CPU build with
    # --enable-lora dies of prompt_logprobs of several prompts at once.
    if prefix_caching is not True and not loads_lora:
        return ("prefixes", "prompt_logprobs") if prefix_caching is None else ("prompt_logprobs", "prefixes")
    return ("prefixes",)


def _own_logprobs(prompt: TokenIds, rows: list[Any]) -> list[float]:
    """Log-probabilities of the prompt's last tokens. Rows are counted from the end, for a cache hit drops the first."""
    tokens = prompt[len(prompt) - len(rows) :]
    return [row[str(token)]["logprob"] for token, row in zip(tokens, rows, strict=True) if row]


def _agree(rows: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether `rows` are the last of `expected`, but for what kernels round."""
    if not 0 < len(rows) <= len(expected):
        return False
    return float(np.abs(np.subtract(rows, expected[-len(rows) :])).max()) < SAME_LOGPROB
