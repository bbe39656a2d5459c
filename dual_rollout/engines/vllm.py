"""The client of an unmodified vLLM server (and of the embedded one, which speaks the same)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from itertools import accumulate, chain, count
from typing import Any, TypeVar

import numpy as np

from dual_rollout.engines.base import Capabilities, Drafts, EngineInfo, ScoringMethod, TokenIds, prefixes
from dual_rollout.engines.http import HttpTransport
from dual_rollout.engines.npy import decoded_floats
from dual_rollout.engines.probe import Probe, summary
from dual_rollout.engines.questions import MALFORMED, Questions
from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError
from dual_rollout.functional.candidates import at_temperature
from dual_rollout.types import NO_TOKEN, TopK

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KEY_PREFIX = "token_id:"
_MAX_NAMED_TOKENS = 128  # vLLM's own cap on logprob_token_ids
_MAX_BIASED_TOKENS = 1024  # on logit_bias: newer model runners fail on more, for everybody
_MAX_PROMPTS = 1024  # vLLM's own cap on a list of prompts
_SPOILT_REPEATS = 2
_LARGEST_ID = 2**31 - 1
_MASS_TOLERANCE = 1e-2
_NEEDS_DEV_MODE = "cannot take new weights: start vLLM with VLLM_SERVER_DEV_MODE=1"
_NEEDS_LORA = "loads no adapters: start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
_SHARE_THE_FOLDER = "set dual_weight_sync_dir to a folder that trainer and server share under the same path"
_NEVER = -9999.0  # vLLM writes -inf as -9999

# vLLM fills what is not said from the model's generation_config.json, so everything is said.
_PLAIN_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class _SpoiltAnswerError(EngineProtocolError):
    """An answer that others' requests or a pause spoilt; the next one may be whole."""


class VLLMEngine:
    """One model behind a vLLM server's HTTP API; implements `Engine`.

    Args:
        model: the served name; the first one listed when None.
    """

    def __init__(self, transport: HttpTransport, model: str | None = None):
        self.url = transport.url
        self._http = transport
        self._questions = Questions(transport)
        self._wanted = model
        self._names: set[str] = set()
        self._info: EngineInfo | None = None
        self._capabilities: Capabilities | None = None
        self._probing = asyncio.Lock()
        self._warned = False
        self._lora: str | None = None
        self._gate = _Gate()

    async def describe(self) -> EngineInfo:
        if self._info is None:
            answer = await self._http.get("/v1/models")
            cards = answer.get("data") if isinstance(answer, dict) else None
            if not cards:
                raise EngineProtocolError("/v1/models lists no model", url=self.url)
            if not isinstance(cards, list) or not all(
                isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards
            ):
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
            self._names = {name, served[0]}  # vLLM answers in the first name, whichever was asked for
            self._info = EngineInfo(name, card.get("root"), card.get("max_model_len"))
        return self._info

    async def probe(self, prompt: TokenIds) -> Capabilities:
        async with self._probing:
            if self._capabilities is None:
                questions = Probe(
                    self._http,
                    await self.describe(),
                    prompt,
                    lists=self._lists,
                    named=self._named_alone,
                    loads_lora=self.loads_lora,
                )
                try:
                    self._capabilities = await questions.run()
                except MALFORMED as error:
                    raise EngineProtocolError(
                        f"answers to the probe have another shape ({type(error).__name__}: {error})", url=self.url
                    ) from error
                logger.info("%s: %s", self.url, summary(self._capabilities))
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
    ) -> Drafts:
        raw = temperature != 1.0 and not await self._reports_processed(prompts[0])

        async def ask() -> Drafts:
            # One request each: in a list with one seed all sequences would get the same noise.
            async with self._gate.shared():
                answers = await asyncio.gather(
                    *(
                        self._complete([prompt], max_tokens=length, logprobs=k, temperature=temperature, seed=seed)
                        for prompt, length, seed in zip(prompts, lengths, seeds, strict=True)
                    )
                )
            keys = [choice["logprobs"]["tokens"] for (choice,) in answers]
            for (choice,), tokens, length in zip(answers, keys, lengths, strict=True):
                cut = choice.get("finish_reason") == "length" and len(tokens) < length
                if cut or not 1 <= len(tokens) <= length:
                    raise _SpoiltAnswerError(f"a draft of {length} tokens has {len(tokens)}", url=self.url)
            rows = [
                _without_sampled(row, key, k)
                for (choice,), tokens in zip(answers, keys, strict=True)
                for row, key in zip(choice["logprobs"]["top_logprobs"], tokens, strict=True)
            ]
            lists = self._pack(rows, k)
            return Drafts([_token_ids(tokens) for tokens in keys], at_temperature(lists, temperature) if raw else lists)

        return await self._until_whole(ask)

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
        texts = [[*prompt, *draft.tolist()] for prompt, draft in zip(prompts, drafts, strict=True)]

        async def ask() -> TopK:
            rows = await asyncio.gather(
                *(score(text, len(draft), k) for text, draft in zip(texts, drafts, strict=True))
            )
            return self._pack(list(chain.from_iterable(rows)), k)

        top = await self._until_whole(ask)
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
        async def ask() -> tuple[np.ndarray, np.ndarray]:
            (choice,) = await self._complete([token_ids], temperature=0.0, prompt_logprobs=1)
            own, top = [], []
            for token, row in zip(token_ids[start:], self._prompt_rows(choice, token_ids)[start:], strict=True):
                values = {int(key): entry["logprob"] for key, entry in row.items()}
                own.append(values[token])
                top.append(max(values.values()))
            return self._as_logprobs(own), self._as_logprobs(top)

        return await self._until_whole(ask)

    async def draw_excluding(self, prompt: TokenIds, excluded: TokenIds, temperature: float, seed: int) -> int:
        bias = {str(token): -100.0 for token in excluded[:_MAX_BIASED_TOKENS]}

        async def ask() -> int:
            (choice,) = await self._complete([prompt], logprobs=0, temperature=temperature, logit_bias=bias, seed=seed)
            return int(self._checked_ids(_token_ids(choice["logprobs"]["tokens"]))[0])

        return await self._until_whole(ask)

    async def detokenize(self, token_ids: TokenIds) -> str:
        info = await self.describe()
        answer = await self._http.post("/detokenize", {"model": info.model, "tokens": list(token_ids)})
        if not isinstance(answer, dict) or not isinstance(answer.get("prompt"), str):
            raise EngineProtocolError("/detokenize answered without a text", url=self.url)
        return answer["prompt"]

    async def health(self) -> None:
        await self._http.get("/health")
        await self._questions.confirm()

    async def reset_prefix_cache(self) -> None:
        try:
            # Without the flag, vLLM does nothing while requests are running.
            answer = await self._http.post("/reset_prefix_cache?reset_running_requests=true")
        except EngineRejectedError as error:
            raise _explained(error, "cannot drop its prefix cache: start vLLM with VLLM_SERVER_DEV_MODE=1") from error
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineProtocolError("the prefix cache was not dropped, because requests are using it", url=self.url)

    async def reload_weights(self, path: str) -> None:
        await self._questions.took_weights(lambda: self._reload_weights(path))

    async def _reload_weights(self, path: str) -> None:
        async with self._paused():
            try:
                await self._http.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
            except EngineRejectedError as error:
                raise _explained(error, _NEEDS_DEV_MODE) from error
            await self.reset_prefix_cache()

    async def load_lora(self, name: str, path: str) -> None:
        await self._questions.took_weights(lambda: self._load_lora(name, path))

    async def _load_lora(self, name: str, path: str) -> None:
        async with self._paused():
            # Not with load_inplace: vLLM (0.31) then reads the adapter from disk again at every step, and dies when
            # the folder is gone.
            with contextlib.suppress(EngineRejectedError):  # there was none, or the next request says what is wrong
                await self._http.post("/v1/unload_lora_adapter", {"lora_name": name})
            try:
                await self._http.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
            except EngineRejectedError as error:
                hidden = f"does not see the adapter in {path}: {_SHARE_THE_FOLDER}"
                raise _explained(error, hidden if "No adapter found" in str(error) else _NEEDS_LORA) from error
            try:
                await self.reset_prefix_cache()
            except EngineRejectedError as error:
                if error.status != 404:
                    raise
                # vLLM caches per load of an adapter; only one loaded again from the same path needs the reset.

    def use_lora(self, name: str) -> None:
        self._lora = name

    def weights_given(self) -> float | None:
        return self._questions.born

    def adopt_weights(self, given: float | None) -> None:
        self._questions.adopt(given)

    async def loads_lora(self) -> bool:
        # An adapter that cannot exist is refused for that reason only by a server that could load one.
        try:
            await self._http.post("/v1/load_lora_adapter", {"lora_name": "probe", "lora_path": "/nonexistent/probe"})
        except EngineRejectedError as error:
            return "No adapter found" in str(error)
        except EngineProtocolError as error:
            if "LoRA is not enabled" not in str(error):
                raise
        return False

    async def check_sees(self, path: str) -> None:
        # As vLLM takes this, every tensor in the folder is copied into its parameter, and there is none. A folder that
        # is not there is an error before anything is touched; in a normal reload it comes after the model is taken
        # apart, and the server dies of it.
        kwargs = {"weights_path": path, "is_checkpoint_format": False}
        try:
            await self._http.post("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
        except EngineRejectedError as error:
            if error.status != 404:
                raise
            raise EngineRejectedError(_NEEDS_DEV_MODE, url=self.url, status=404) from error
        except EngineProtocolError as error:
            if "unexpected keyword argument" in str(error):
                return  # an older vLLM: it cannot be told
            raise EngineProtocolError(
                f"does not see the folder {path}: {_SHARE_THE_FOLDER} (it says: {error})", url=self.url
            ) from error

    async def aclose(self) -> None:
        await self._http.aclose()

    @contextlib.asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Requests in flight are done, and new ones wait, where the server can pause (in vLLM's development mode).

        Without it, vLLM finishes what is in flight with the new weights on top of the old ones' keys and values.
        """
        can_pause = True
        try:
            try:
                await self._http.post("/pause?mode=wait")
            except EngineRejectedError as error:
                if error.status != 404:
                    raise
                can_pause = False
            yield
        finally:
            if can_pause:
                await self._http.post("/resume")

    async def _lists(self, prompts: Sequence[TokenIds], k: int, temperature: float) -> TopK:
        async def ask() -> TopK:
            async with self._gate.shared():
                answers = await asyncio.gather(
                    *(
                        self._complete(prompts[i : i + _MAX_PROMPTS], logprobs=k, temperature=_on_wire(temperature))
                        for i in range(0, len(prompts), _MAX_PROMPTS)
                    )
                )
            rows = [
                _without_sampled(self._top_logprobs(choice), choice["logprobs"]["tokens"][0], k)
                for choice in chain.from_iterable(answers)
            ]
            return self._pack(rows, k)

        return await self._until_whole(ask)

    async def _until_whole(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` makes of an answer, asked again if that was spoilt or could not be read."""
        for repeat in count():
            try:
                return await ask()
            except _SpoiltAnswerError as error:
                spoilt = error
            except MALFORMED as error:
                spoilt = _SpoiltAnswerError(
                    f"an answer of another shape ({type(error).__name__}: {error})", url=self.url
                )
            if repeat == _SPOILT_REPEATS:
                raise spoilt
            self._http.stats.retries += 1
            logger.warning("%s; asking again", spoilt)
        raise AssertionError("the loop returns or raises")

    async def _score_after_cache(self, text: TokenIds, count: int, k: int) -> list[dict[str, float]]:
        """Lists for the last `count` tokens of a text, whose beginning the prefix cache may have."""
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, "detokenize": False}
        for skip in (False, True):
            rows = await self._generate(text, {**sampling, "skip_reading_prefix_cache": skip}, "prompt_logprobs")
            # Rows are missing at the beginning: those of cached tokens, and in a text seen before, some of the last.
            if isinstance(rows, list) and len(rows) >= count and all(rows[-count:]):
                return self._rows_of(rows[-count:], text[-count:], k)
        raise _SpoiltAnswerError(f"prompt_logprobs lack rows for the last {count} tokens", url=self.url)

    async def _score_named_rows(self, text: TokenIds, start: int, token_ids: Sequence[TokenIds]) -> list[np.ndarray]:
        """Log-probabilities of the named tokens at each position of a text from `start` on, one list of names each.

        The endpoint takes one list of names for all rows, so each gets those of all and gives back its own.
        """
        named = [position for position, ids in enumerate(token_ids) if ids]
        if not named:
            return [np.empty(0) for _ in token_ids]
        first, last = start + named[0], start + named[-1]
        names = sorted(set(chain.from_iterable(token_ids)))
        width = (await self.probe(text)).max_logprobs or len(names)
        parts = await asyncio.gather(
            *(
                self._named_rows(text[: last + 1], last + 1 - first, names[i : i + width])
                for i in range(0, len(names), width)
            )
        )
        values = np.hstack(parts)
        column = {token: i for i, token in enumerate(names)}
        return [
            values[start + position - first, [column[token] for token in ids]] if ids else np.empty(0)
            for position, ids in enumerate(token_ids)
        ]

    async def _named_rows(self, text: TokenIds, count: int, names: Sequence[int]) -> np.ndarray:
        """`(count, len(names))` log-probabilities of named tokens at the last `count` tokens of a text."""
        sampling = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprob_token_ids": names,
            "prompt_logprob_start": len(text) - 1 - count,  # row i is about token i + 1
            "detokenize": False,
        }
        for skip in (False, True):
            encoded = await self._generate(
                text, {**sampling, "skip_reading_prefix_cache": skip}, "prompt_token_id_logprobs"
            )
            # There are none where the prefix cache has the first of them.
            if encoded is not None:
                try:
                    return self._as_logprobs(decoded_floats(encoded, (count, len(names))))
                except ValueError as error:
                    raise EngineProtocolError(f"prompt_token_id_logprobs are {error}", url=self.url) from error
        raise EngineProtocolError("the answer has no prompt_token_id_logprobs", url=self.url)

    async def _score_prompt(self, text: TokenIds, count: int, k: int) -> list[dict[str, float]]:
        """Lists for the last `count` tokens of a text, computed anew."""
        (choice,) = await self._complete([text], temperature=0.0, prompt_logprobs=k)
        return self._rows_of(self._prompt_rows(choice, text)[-count:], text[-count:], k)

    async def _generate(self, text: TokenIds, sampling: Mapping[str, Any], field: str) -> Any:
        """One field of the answer of the token-in/token-out endpoint."""
        payload = {
            "model": self._lora or (await self.describe()).model,
            "token_ids": text,
            "sampling_params": sampling,
        }
        return await self._questions.ask(
            "/inference/v1/generate",
            payload,
            lambda answer: answer.get(field),
            models=self._answering,
            prompt_tokens=len(text),
        )

    def _prompt_rows(self, choice: Mapping[str, Any], text: TokenIds) -> list[Any]:
        rows = choice.get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(text):
            raise _SpoiltAnswerError("the answer has no prompt_logprobs, one row per prompt token", url=self.url)
        return rows

    def _rows_of(self, rows: Sequence[Any], tokens: TokenIds, k: int) -> list[dict[str, float]]:
        """Rows of prompt_logprobs as k-lists; each must hold the prompt's own token."""
        for row, token in zip(rows, tokens, strict=True):
            if str(token) not in row:
                raise _SpoiltAnswerError(f"prompt_logprobs lack the prompt's own token {token}", url=self.url)
        return [_prompt_row(row, k) for row in rows]

    @property
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

    async def _named_alone(self, prompt: TokenIds, token_ids: TokenIds, temperature: float) -> np.ndarray:
        async with self._gate.alone():
            return await self._named(prompt, token_ids, temperature)

    async def _named(self, prompt: TokenIds, token_ids: TokenIds, temperature: float) -> np.ndarray:
        values: list[float] = []
        for first in range(0, len(token_ids), _MAX_NAMED_TOKENS):
            names = list(token_ids[first : first + _MAX_NAMED_TOKENS])
            (choice,) = await self._complete(
                [prompt], logprobs=0, logprob_token_ids=names, temperature=_on_wire(temperature)
            )
            row = self._top_logprobs(choice)
            try:
                values += [row[f"{_KEY_PREFIX}{token}"] for token in names]
            except KeyError as error:
                raise EngineProtocolError(
                    'does not report named tokens (logprob_token_ids): set missing="floor" or use a newer vLLM',
                    url=self.url,
                ) from error
        return self._as_logprobs(values)

    async def _complete(self, prompts: Sequence[TokenIds], **options: Any) -> list[dict[str, Any]]:
        """The choices of a completion, of one token unless said otherwise, one per prompt, in order."""
        info = await self.describe()
        payload = {
            "model": self._lora or info.model,
            "prompt": prompts,
            "max_tokens": 1,
            "return_tokens_as_token_ids": True,
            **_PLAIN_SAMPLING,
            **options,
        }
        return await self._questions.ask(
            "/v1/completions",
            payload,
            lambda answer: self._choices(answer, len(prompts)),
            models=self._answering,
            prompt_tokens=sum(map(len, prompts)),
        )

    def _choices(self, answer: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != count:
            raise EngineProtocolError(f"expected {count} choices in the answer", url=self.url)
        choices.sort(key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(count)):
            raise EngineProtocolError("the choices in the answer are not numbered 0, 1, 2, ...", url=self.url)
        if any(choice.get("finish_reason") == "abort" for choice in choices):
            raise _SpoiltAnswerError("the server aborted a request, as it does on /pause", url=self.url)
        return choices

    def _top_logprobs(self, choice: Mapping[str, Any]) -> dict[str, float]:
        try:
            return choice["logprobs"]["top_logprobs"][0]
        except (KeyError, TypeError, IndexError) as error:
            raise _SpoiltAnswerError("a choice has no logprobs.top_logprobs", url=self.url) from error

    def _pack(self, rows: list[dict[str, float]], k: int) -> TopK:
        """Rows of `{"token_id:7": -0.3}` as arrays; parsed in bulk, the hot spot of the client."""
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        if not len(rows) or lengths.min() == 0:
            raise _SpoiltAnswerError("an empty list of log-probabilities", url=self.url)
        keys = " ".join(chain.from_iterable(rows))
        values = self._as_logprobs(list(chain.from_iterable(row.values() for row in rows)))
        if keys.count(_KEY_PREFIX) != len(values):
            raise EngineProtocolError(
                "tokens are not written as token_id:N; the server does not honour return_tokens_as_token_ids",
                url=self.url,
            )
        ids = np.fromstring(keys.replace(_KEY_PREFIX, ""), dtype=np.int64, sep=" ")
        width = int(lengths.max())
        token_ids = np.full((len(rows), width), NO_TOKEN, dtype=np.int64)
        logprobs = np.full((len(rows), width), -np.inf)
        filled = np.arange(width) < lengths[:, None]
        token_ids[filled], logprobs[filled] = ids, values
        # Impossible tokens are no candidates; some versions also pad rows with them.
        token_ids[logprobs == -np.inf] = NO_TOKEN
        self._check_complete(token_ids, logprobs, k)
        if width > k:
            order = np.lexsort((token_ids, -logprobs), axis=1)[:, :k]
            token_ids, logprobs = (np.take_along_axis(array, order, axis=1) for array in (token_ids, logprobs))
        return TopK(token_ids, logprobs)

    def _checked_ids(self, ids: np.ndarray) -> np.ndarray:
        size = self._capabilities.vocab_size if self._capabilities is not None else None
        if len(ids) and not (ids.min() >= 0 and ids.max() <= (_LARGEST_ID if size is None else size - 1)):
            raise _SpoiltAnswerError(f"token ids from {ids.min()} to {ids.max()}, vocabulary {size}", url=self.url)
        return ids

    def _check_complete(self, token_ids: np.ndarray, logprobs: np.ndarray, k: int) -> None:
        """No list names a token twice or has more mass than 1, and one of fewer than k tokens holds all there is."""
        self._checked_ids(token_ids[logprobs > -np.inf])
        ordered = np.sort(token_ids, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_TOKEN)).any():
            raise _SpoiltAnswerError("a list names a token twice", url=self.url)
        if (np.exp(logprobs).sum(axis=1) > 1 + _MASS_TOLERANCE).any():
            raise _SpoiltAnswerError("the probabilities of a list add up to more than 1", url=self.url)
        short = (token_ids != NO_TOKEN).sum(axis=1) < k
        if short.any() and (np.exp(logprobs[short]).sum(axis=1) < 1 - _MASS_TOLERANCE).any():
            raise _SpoiltAnswerError(
                f"a list holds fewer than {k} tokens, yet not all the mass. Is another client using "
                "logprob_token_ids on this server? That garbles the lists of requests in the same step.",
                url=self.url,
            )

    def _as_logprobs(self, values: list[Any] | np.ndarray) -> np.ndarray:
        logprobs = np.array(values, dtype=np.float64)
        if np.isnan(logprobs).any() or (logprobs > 1e-3).any():
            raise _SpoiltAnswerError("log-probabilities are NaN or positive", url=self.url)
        return np.where(logprobs <= _NEVER, -np.inf, np.minimum(logprobs, 0.0))


def _without_sampled(row: dict[str, float], sampled: str, k: int) -> dict[str, float]:
    """A list without the token that happened to be sampled, where that is not one of the k: S must not depend on it."""
    return row if len(row) <= k else {key: value for key, value in row.items() if key != sampled}


def _prompt_row(row: Mapping[str, Mapping[str, Any]], k: int) -> dict[str, float]:
    """A row of prompt_logprobs as a k-list; the prompt's own token comes first, whether one of them or not."""
    entries = {f"{_KEY_PREFIX}{token}": entry["logprob"] for token, entry in row.items()}
    return _without_sampled(entries, next(iter(entries)), k)


def _token_ids(keys: Sequence[str]) -> np.ndarray:
    return np.array([int(key.removeprefix(_KEY_PREFIX)) for key in keys], dtype=np.int64)


def _explained(error: EngineRejectedError, advice: str) -> EngineRejectedError:
    """The same refusal, with what to do when it comes of a missing route or file."""
    if error.status != 404:
        return error
    return EngineRejectedError(advice, url=error.url, status=404)


def _on_wire(temperature: float) -> float:
    """At temperature 0 vLLM reports log_softmax(logits) in both log-probability modes, like at 1, and the list never
    holds a sampled token beyond the k most likely."""
    return 0.0 if temperature == 1.0 else temperature


class _Gate:
    """Keeps two kinds of requests apart in time: shared ones, any number at once, and those that must be alone.

    Whoever comes first goes first, so neither kind waits forever.
    """

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._door:
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._door:
            await self._empty.wait()
            yield
