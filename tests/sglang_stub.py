"""A stand-in for an SGLang server: the shapes of its native API, recorded from its source, over a known distribution.

What it pins: `[log-probability, token id, text]` triples with null texts; a null first row at `logprob_start_len`,
whatever that is; top lists that never hold a sampled token beyond the k most likely; log-probabilities of the next
token that follow the temperature (unless `original_logprobs`, for SGLANG_RETURN_ORIGINAL_LOGPROB=1) and logit_bias,
those of the prompt that do neither; seeds that count only with --enable-deterministic-inference; log 0 as the least
finite float32; the last id of the vocabulary written as 0 in `input_token_logprobs`; lists as base64; refusals and
aborts.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
from aiohttp import web

NextTokenDistribution = Callable[[Sequence[int]], np.ndarray]
"""The probabilities `(V,)` of the token after a prompt."""

LOG_ZERO = float(np.finfo(np.float32).min)
_SAMPLING_FIELDS = {
    "max_new_tokens": 128,
    "min_new_tokens": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "stop_token_ids": None,
    "logit_bias": None,
    "sampling_seed": None,
}


def markov(transitions: np.ndarray) -> NextTokenDistribution:
    """The next-token distribution of a Markov chain: row `prompt[-1]` of a `(V, V)` matrix."""
    return lambda prompt: transitions[prompt[-1]]


class SGLangStub:
    """One model behind SGLang's routes.

    Args:
        distribution: the model.
        max_req_input_len: prompts of this length and longer are refused.
        original_logprobs, deterministic, enable_lora: as the server's settings of these names.
        eos: ends a generation that does not ignore it.
        old_routes: an older version, with /get_model_info and /get_server_info alone.
        binary_lists: a newer version, which sends lists as base64 where it is asked to. All its log-probabilities are
            of float32, as a real server's, so that both forms say the same.
        load: the model in a folder, for weight updates and adapters; raises OSError where there is none.

    For tests: `requests` keeps every /generate payload, `calls` every other (path, payload); `alter` may change the
    list of answers before it is sent; `failures` holds (status, body) to answer with, one per request.
    """

    def __init__(
        self,
        distribution: NextTokenDistribution,
        *,
        max_req_input_len: int = 4096,
        original_logprobs: bool = False,
        deterministic: bool = True,
        enable_lora: bool = False,
        eos: int | None = None,
        old_routes: bool = False,
        binary_lists: bool = False,
        load: Callable[[str], NextTokenDistribution] | None = None,
    ):
        self.distribution = distribution
        self.max_req_input_len = max_req_input_len
        self.original_logprobs = original_logprobs
        self.deterministic = deterministic
        self.enable_lora = enable_lora
        self.requests: list[dict[str, Any]] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.alter: Callable[[list[dict[str, Any]]], Any] = lambda answers: answers
        self.failures: list[tuple[int, Any]] = []
        self.adapters: dict[str, NextTokenDistribution] = {}
        self.model_path = "models/chain"
        self.url = ""
        self._vocabulary = len(distribution([0]))
        self._eos = eos
        self._old_routes = old_routes
        self._binary_lists = binary_lists
        self._load = load or _no_folder
        self._rng = np.random.default_rng(0)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[SGLangStub]:
        app = web.Application(client_max_size=2**26)
        prefix = "/get_" if self._old_routes else "/"
        app.router.add_get(f"{prefix}model_info", self._model_info)
        app.router.add_get(f"{prefix}server_info", self._server_info)
        app.router.add_get("/health", self._health)
        app.router.add_get("/health_generate", self._health)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/flush_cache", self._flush_cache)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_post("/update_weights_from_disk", self._update_weights)
        app.router.add_post("/load_lora_adapter", self._load_adapter)
        app.router.add_post("/unload_lora_adapter", self._unload_adapter)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200)

    async def _model_info(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "model_path": self.model_path,
                "tokenizer_path": "models/tokenizer",
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": "default",
            }
        )

    async def _server_info(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "model_path": self.model_path,
                "served_model_name": self.model_path,
                "context_length": None,
                "enable_lora": self.enable_lora,
                "enable_deterministic_inference": self.deterministic,
                "status": "ready",
                "max_total_num_tokens": 65536,
                "max_req_input_len": self.max_req_input_len,
                "internal_states": [{}],
                "version": "0.5.9",
            }
        )

    async def _flush_cache(self, request: web.Request) -> web.Response:
        self.calls.append((request.path, {}))
        return web.Response(text="Cache flushed.\nPlease check backend logs for more details.\n")

    async def _detokenize(self, request: web.Request) -> web.Response:
        payload = await request.json()
        return web.json_response({"text": " ".join(f"<{token}>" for token in payload["tokens"])})

    async def _update_weights(self, request: web.Request) -> web.Response:
        payload = await request.json()
        self.calls.append((request.path, payload))
        try:
            self.distribution = self._load(payload["model_path"])
        except OSError as error:
            message = f"Failed to get weights iterator: {error}."
            return web.json_response({"success": False, "message": message, "num_paused_requests": 0}, status=400)
        self.model_path = payload["model_path"]  # SGLang renames what it serves
        message = "Succeeded to update model weights."
        return web.json_response({"success": True, "message": message, "num_paused_requests": 0})

    async def _load_adapter(self, request: web.Request) -> web.Response:
        payload = await request.json()
        self.calls.append((request.path, payload))
        name = payload["lora_name"]
        if not self.enable_lora:
            return self._adapter_answer("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")
        if name in self.adapters:
            return self._adapter_answer(f"Failed to load LoRA adapter {name} because it is already loaded")
        try:
            self.adapters[name] = self._load(payload["lora_path"])
        except OSError as error:
            return self._adapter_answer(str(error))
        return self._adapter_answer(None)

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        payload = await request.json()
        self.calls.append((request.path, payload))
        if self.adapters.pop(payload["lora_name"], None) is None:
            return self._adapter_answer(f"LoRA adapter {payload['lora_name']} does not exist")
        return self._adapter_answer(None)

    def _adapter_answer(self, error: str | None) -> web.Response:
        body = {
            "rid": None,
            "http_worker_ipc": None,
            "success": error is None,
            "error_message": error,
            "loaded_adapters": {name: name for name in self.adapters},
        }
        return web.json_response(body, status=200 if error is None else 400)

    async def _generate(self, request: web.Request) -> web.Response:
        payload = await request.json()
        self.requests.append(payload)
        if self.failures:
            status, body = self.failures.pop(0)
            return web.json_response(body, status=status)
        sampling = payload["sampling_params"]
        if any(
            fields.keys() - _SAMPLING_FIELDS.keys() for fields in (sampling if _is_list(sampling) else [sampling])
        ):  # a TypeError in SGLang, which it does not catch
            return web.Response(status=500, text="Internal Server Error")
        batch = _is_list(payload["input_ids"][0])
        prompts = payload["input_ids"] if batch else [payload["input_ids"]]
        try:
            answers = [self._answer(prompt, _of_one(payload, i)) for i, prompt in enumerate(prompts)]
        except ValueError as error:  # one bad prompt fails them all
            return web.json_response({"error": {"message": str(error)}}, status=400)
        answers = self.alter(answers)
        return web.json_response(answers if batch else answers[0])

    def _answer(self, prompt: list[int], payload: dict[str, Any]) -> dict[str, Any]:
        sampling = {**_SAMPLING_FIELDS, **payload["sampling_params"]}
        if len(prompt) >= self.max_req_input_len:
            raise ValueError(
                f"Input length ({len(prompt)} tokens) exceeds the maximum allowed length "
                f"({self.max_req_input_len} tokens). Use a shorter input or enable --allow-auto-truncate."
            )
        if max(prompt) >= self._vocabulary:
            raise ValueError(
                f"The input_ids {prompt} contains values greater than the vocab size ({self._vocabulary})."
            )
        for token in payload.get("token_ids_logprob") or []:
            if not 0 <= token < self._vocabulary:
                raise ValueError(
                    f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range is "
                    f"[0, {self._vocabulary})."
                )
        for token in sampling["logit_bias"] or {}:
            if not 0 <= int(token) < self._vocabulary:
                raise ValueError(f"logit_bias must has keys in [0, {self._vocabulary - 1}], got {token}.")
        distribution = self._distribution_for(payload.get("lora_path"))
        top, named = payload.get("top_logprobs_num", 0), payload.get("token_ids_logprob")
        output_ids, output_rows = self._sample(distribution, prompt, sampling)
        stopped = output_ids[-1] in self._ends(sampling)
        meta: dict[str, Any] = {
            "id": payload["rid"],
            "finish_reason": {"type": "stop", "matched": output_ids[-1]}
            if stopped
            else {"type": "length", "length": len(output_ids)},
            "prompt_tokens": len(prompt),
            "weight_version": "default",
            "completion_tokens": len(output_ids),
            "cached_tokens": 0,
        }
        if payload.get("return_logprob"):
            own = zip(output_ids, output_rows, strict=True)
            meta["input_token_logprobs"] = self._input_rows(distribution, prompt, payload)
            meta["output_token_logprobs"] = [_triple(row, token) for token, row in own]
            if top:
                start = self._start(prompt, payload)
                distributions = [self._reported(_log(distribution(prompt[:i]))) for i in range(start + 1, len(prompt))]
                meta["input_top_logprobs"] = [None, *(_top_triples(row, top) for row in distributions)]
                meta["output_top_logprobs"] = [_top_triples(row, top) for row in output_rows]
                if self._binary_lists:
                    _make_binary(meta, payload)
            if named is not None:
                meta["input_token_ids_logprobs"] = [None]
                meta["output_token_ids_logprobs"] = [[_triple(row, i) for i in named] for row in output_rows]
        return {"text": "", "output_ids": output_ids, "meta_info": meta}

    def _distribution_for(self, adapter: str | None) -> NextTokenDistribution:
        if adapter is None:
            return self.distribution
        if not self.enable_lora:
            raise ValueError(f"LoRA adapter '{adapter}' was requested, but LoRA is not enabled.")
        if adapter not in self.adapters:
            raise ValueError(f"The following requested LoRA adapters are not loaded: {adapter}")
        return self.adapters[adapter]

    def _sample(
        self, distribution: NextTokenDistribution, prompt: list[int], sampling: dict[str, Any]
    ) -> tuple[list[int], list[np.ndarray]]:
        """The tokens generated, and the log-probabilities `(V,)` reported at each of them."""
        rng = self._rng
        if self.deterministic and sampling["sampling_seed"] is not None:
            rng = np.random.default_rng(sampling["sampling_seed"])
        tokens: list[int] = []
        rows = []
        while len(tokens) < sampling["max_new_tokens"]:
            logits = _log(distribution([*prompt, *tokens]))
            for token, bias in (sampling["logit_bias"] or {}).items():
                logits[int(token)] += bias
            greedy = sampling["temperature"] < 1e-6 or sampling["top_k"] == 1
            scaled = logits if greedy else logits / sampling["temperature"]
            p = np.exp(scaled - scaled.max())
            p /= p.sum()
            tokens.append(int(np.argmax(p)) if greedy else int(rng.choice(len(p), p=p)))
            rows.append(self._reported(_normalised(logits if self.original_logprobs else scaled)))
            if tokens[-1] in self._ends(sampling):
                break
        return tokens, rows

    def _reported(self, logprobs: np.ndarray) -> np.ndarray:
        return logprobs.astype(np.float32).astype(np.float64) if self._binary_lists else logprobs

    def _ends(self, sampling: dict[str, Any]) -> set[int | None]:
        """Tokens that end a generation; as in SGLang, `ignore_eos` is about all of them."""
        return set() if sampling["ignore_eos"] else {self._eos, *(sampling["stop_token_ids"] or ())}

    def _start(self, prompt: list[int], payload: dict[str, Any]) -> int:
        start = payload.get("logprob_start_len", -1)
        return len(prompt) - 1 if start == -1 else start

    def _input_rows(self, distribution: NextTokenDistribution, prompt: list[int], payload: dict[str, Any]) -> list[Any]:
        start = self._start(prompt, payload)
        if start >= len(prompt):
            raise ValueError(f"logprob_start_len={start} is higher than the number of input tokens {len(prompt)}.")
        vocabulary = len(distribution(prompt))
        rows: list[Any] = [[None, prompt[start], None]]
        for i in range(start + 1, len(prompt)):
            rows.append(_triple(self._reported(_log(distribution(prompt[:i]))), prompt[i]))
        return [[value, token if token < vocabulary - 1 else 0, text] for value, token, text in rows]


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _of_one(payload: dict[str, Any], index: int) -> dict[str, Any]:
    """The payload of one request of a list: any field may have a value for each."""
    fields = ("sampling_params", "logprob_start_len", "top_logprobs_num", "return_logprob", "lora_path", "rid")
    own = {name: payload[name][index] for name in fields if _is_list(payload.get(name))}
    named = payload.get("token_ids_logprob")
    if named and _is_list(named[0]):
        own["token_ids_logprob"] = named[index]
    return {**payload, **own}


def _log(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(p)


def _normalised(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def _triple(logprobs: np.ndarray, token: int) -> list[Any]:
    return [max(float(logprobs[token]), LOG_ZERO), int(token), None]


def _top_triples(logprobs: np.ndarray, k: int) -> list[list[Any]]:
    if k > len(logprobs):
        raise RuntimeError("selected index k out of range")  # this ends a real server's scheduler
    return [_triple(logprobs, token) for token in np.argsort(-logprobs, kind="stable")[:k]]


def _make_binary(meta: dict[str, Any], payload: dict[str, Any]) -> None:
    """Lists as the arrays that were asked for; `null_prefix` positions before them have none."""
    for side, asked in (("input", "return_flat_raw_top_logprobs"), ("output", "return_flat_raw_output_top_logprobs")):
        if not payload.get(asked):
            continue
        rows = meta.pop(f"{side}_top_logprobs")
        lists = [row for row in rows if row is not None]
        shape = [len(lists), payload["top_logprobs_num"]]
        field = f"{side}_top_logprobs"
        meta |= {f"{field}_shape": shape, f"{field}_null_prefix": len(rows) - len(lists)}
        for name, column, dtype in (("val", 0, "float32"), ("idx", 1, "int32")):
            values = np.array([[triple[column] for triple in row] for row in lists], dtype=dtype).reshape(shape)
            if payload.get("return_flat_raw_top_logprobs_b64"):
                meta[f"{field}_{name}_flat_b64"] = base64.b64encode(values.tobytes()).decode()
                meta[f"{field}_{name}_flat_b64_dtype"] = dtype
            else:
                meta[f"{field}_{name}_flat"] = values.ravel().tolist()


def _no_folder(path: str) -> NextTokenDistribution:
    raise FileNotFoundError(f"Cannot find any model weights with `{path}`")
