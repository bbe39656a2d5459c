"""HTTP routes of the embedded server, with vLLM's paths, JSON and status codes."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import ipaddress
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
from aiohttp import web

from dual_rollout.server import SERVER_VERSION
from dual_rollout.server.model_runner import ModelRunner
from dual_rollout.server.model_weights import read_weights, write_weights
from dual_rollout.server.protocol import (
    APIError,
    Limits,
    SamplingParams,
    check_prompt,
    invalid,
    not_found,
    parse_completion_sampling,
    parse_generate_sampling,
    parse_prompts,
    parse_token_ids,
)
from dual_rollout.server.sampler import TokenLogprobs
from dual_rollout.server.scheduler import Scheduler, Sequence, ServerClosing

logger = logging.getLogger("dual_rollout.server")

MAX_BODY_BYTES = 64 * 2**20
LOWEST_LOGPROB = -9999.0

CHANGING_ROUTES = {
    "/collective_rpc",
    "/reset_prefix_cache",
    "/update_weight_version",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
}
OPEN_ROUTES = {"/health"}

T = TypeVar("T")


@dataclass
class Adapter:
    """A served LoRA adapter; ``internal_name`` differs at every load, so old rows are never reused."""

    path: str
    internal_name: str


@dataclass(frozen=True)
class Asked:
    """A request to the model: what to run, and how its answer is made of what comes out."""

    prompts: list[list[int]]
    params: SamplingParams
    adapter: str | None
    render: Callable[[list[Sequence]], web.Response]


Ask = Callable[[dict[str, Any]], Asked]


class EmbeddedApp:
    """Turns HTTP requests into scheduler groups and finished sequences into vLLM's JSON.

    With an `api_key` every request but `/health` must bring it. Without, the routes that change what is served answer
    to programs of this machine alone, and never to a web page. New weights are read from inside `weights_dir`, if set.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        tokenizer: Any,
        limits: Limits,
        *,
        model_path: str,
        model_names: list[str],
        enable_lora: bool,
        api_key: str | None = None,
        weights_dir: str | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.limits = limits
        self.model_path = model_path
        self.model_names = model_names
        self.enable_lora = enable_lora
        self.api_key = api_key
        self.weights_dir = weights_dir
        self.adapters: dict[str, Adapter] = {}
        self.weight_version = "default"
        self.started = time.time()
        self._adapter_numbers = itertools.count(1)
        self._id_keys = [f"token_id:{token_id}" for token_id in range(limits.vocab_size)]
        self._decoded: dict[int, str] = {}
        self._turns = asyncio.Semaphore(limits.max_num_requests)
        self._worker = ThreadPoolExecutor(1, "worker")

    def routes(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_answer_errors, self._check_access])
        app.router.add_get("/health", self.health)
        app.router.add_get("/version", self.version)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/server_info", self.server_info)
        app.router.add_get("/weight_info", self.weight_info)
        app.router.add_post("/update_weight_version", self.update_weight_version)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/inference/v1/generate", self.generate)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/detokenize", self.detokenize)
        app.router.add_post("/reset_prefix_cache", self.reset_prefix_cache)
        app.router.add_post("/collective_rpc", self.collective_rpc)
        app.on_cleanup.append(self._close)
        if self.enable_lora:
            app.router.add_post("/v1/load_lora_adapter", self.load_lora_adapter)
            app.router.add_post("/v1/unload_lora_adapter", self.unload_lora_adapter)
        return app

    async def _close(self, app: web.Application) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    @web.middleware
    async def _check_access(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else ""
        if self.api_key is not None:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if route not in OPEN_ROUTES and not _same(given, self.api_key):
                raise APIError(
                    "Unauthorized: the server's VLLM_API_KEY must come as a bearer token",
                    status=401,
                    type="Unauthorized",
                )
        elif route in CHANGING_ROUTES and not (_is_local(request.remote) and "Origin" not in request.headers):
            raise APIError(
                f"{route} changes what is served, and answers to programs of the server's own machine alone unless it "
                "was started with VLLM_API_KEY in its environment and the request brings that key",
                status=403,
                type="Forbidden",
            )
        return await handler(request)

    def _check_folder(self, path: str) -> None:
        """Refuse weights from outside `weights_dir`, symbolic links resolved."""
        if self.weights_dir is None:
            return
        root = Path(self.weights_dir).resolve()
        for place in (Path(path), *Path(path).glob("*")):
            if not place.resolve().is_relative_to(root):
                raise APIError(f"{path} is not inside --weights-dir {self.weights_dir}", status=403, type="Forbidden")

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.scheduler.alive else 503)

    async def version(self, request: web.Request) -> web.Response:
        return _json({"version": SERVER_VERSION})

    async def server_info(self, request: web.Request) -> web.Response:
        """Of vLLM's what a client asks for."""
        return _json({"vllm_config": {"model_config": {"dtype": str(self.runner.dtype), "quantization": None}}})

    async def weight_info(self, request: web.Request) -> web.Response:
        return _json({"weight_version": self.weight_version})

    async def update_weight_version(self, request: web.Request) -> web.Response:
        version = (await _body(request)).get("new_version")
        if not isinstance(version, str):
            raise invalid("new_version", "Input should be a valid string")
        self.weight_version = version
        return _json({"success": True, "new_version": version})

    async def models(self, request: web.Request) -> web.Response:
        cards = [
            self._model_card(name, root=self.model_path, max_model_len=self.limits.max_model_len)
            for name in self.model_names
        ]
        for name, adapter in self.adapters.items():
            cards.append(self._model_card(name, root=adapter.path, parent=self.model_names[0]))
        return _json({"object": "list", "data": cards})

    def _model_card(
        self, name: str, *, root: str, parent: str | None = None, max_model_len: int | None = None
    ) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(self.started),
            "owned_by": "dual_rollout",
            "root": root,
            "parent": parent,
            "max_model_len": max_model_len,
            "permission": [],
        }

    async def _in_turn(self, request: web.Request, ask: Ask) -> web.Response:
        """Answer one of the requests that run the model. Beyond `max_num_requests` they wait here, their bodies unread.

        Parsing and rendering, which may take long, happen in a thread of their own, so that everything else is answered
        meanwhile.
        """
        async with self._turns:
            self.scheduler.check_open()
            raw = await request.read()
            asked = await self._work(lambda: self._ask(ask, request.content_type, raw))
            sequences = await self._run(asked.prompts, asked.params, asked.adapter)
            return await self._work(lambda: asked.render(sequences))

    def _ask(self, ask: Ask, content_type: str, raw: bytes) -> Asked:
        self.scheduler.check_open()
        return ask(_parsed(content_type, raw))

    async def _work(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    async def completions(self, request: web.Request) -> web.Response:
        return await self._in_turn(request, self._completions)

    def _completions(self, body: dict[str, Any]) -> Asked:
        prompts = parse_prompts(body.get("prompt"))
        params = parse_completion_sampling(body, self.limits)
        name, adapter = self._served(body)
        ids = [self._encode(p, body) if isinstance(p, str) else p for p in prompts]
        for prompt in ids:
            check_prompt(prompt, self.limits, params.max_tokens)
        return Asked(ids, params, adapter, lambda sequences: self._completions_answer(body, name, sequences))

    def _completions_answer(self, body: dict[str, Any], name: str, sequences: list[Sequence]) -> web.Response:
        as_ids = bool(body.get("return_tokens_as_token_ids"))
        return_ids = bool(body.get("return_token_ids"))
        choices = [
            {
                "index": index,
                "text": self._text(sequence),
                "logprobs": self._completion_logprobs(sequence, as_ids),
                "finish_reason": sequence.finish_reason,
                "token_ids": sequence.output_ids if return_ids else None,
                "prompt_logprobs": self._prompt_logprobs(sequence),
                "prompt_token_ids": sequence.tokens[: sequence.num_prompt] if return_ids else None,
            }
            for index, sequence in enumerate(sequences)
        ]
        return _json(
            {
                "id": f"cmpl-{body.get('request_id') or uuid.uuid4().hex}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": name,
                "choices": choices,
                "usage": _usage(sequences),
            }
        )

    async def generate(self, request: web.Request) -> web.Response:
        return await self._in_turn(request, self._generate)

    def _generate(self, body: dict[str, Any]) -> Asked:
        token_ids = parse_token_ids(body, "token_ids")
        if not token_ids:
            raise invalid("token_ids", "List should have at least 1 item after validation, not 0")
        if body.get("stream"):
            raise APIError("stream=true is not supported by the embedded server.", param="stream")
        sampling: Any = body.get("sampling_params")
        params = parse_generate_sampling(sampling, self.limits, len(token_ids))
        name, adapter = self._served(body)
        check_prompt(token_ids, self.limits, None)
        return Asked([token_ids], params, adapter, lambda sequences: self._generate_answer(body, name, sequences[0]))

    def _generate_answer(self, body: dict[str, Any], name: str, sequence: Sequence) -> web.Response:
        choice = {"index": 0, "finish_reason": sequence.finish_reason, "token_ids": sequence.output_ids}
        return _json(
            {
                "request_id": f"generate-tokens-{body.get('request_id') or uuid.uuid4().hex}",
                "model": name,
                "created": int(time.time()),
                "choices": [choice],
                "usage": _usage([sequence]),
                "prompt_logprobs": self._prompt_logprobs(sequence),
                "prompt_token_id_logprobs": _prompt_scores(sequence),
            }
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return await self._work(lambda: self._tokenize(body))

    def _tokenize(self, body: dict[str, Any]) -> web.Response:
        self._served(body)
        if not isinstance(body.get("prompt"), str):
            raise invalid("prompt", "Field required: a text")
        ids = self._encode(body["prompt"], body)
        return _json({"count": len(ids), "max_model_len": self.limits.max_model_len, "tokens": ids})

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return await self._work(lambda: self._detokenize(body))

    def _detokenize(self, body: dict[str, Any]) -> web.Response:
        self._served(body)
        ids = parse_token_ids(body, "tokens")
        if ids and max(ids) >= self.limits.vocab_size:
            raise APIError(f"Token id {max(ids)} is out of vocabulary")
        return _json({"prompt": self.tokenizer.decode(ids)})

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        """Forget unused rows. False, as in vLLM, while requests hold some: call again when they are done."""

        def reset() -> bool:
            if request.query.get("reset_running_requests", "").lower() in ("1", "true"):
                self.scheduler.recompute_running()
            return self.scheduler.cache.clear()

        return _json({"success": await asyncio.wrap_future(self.scheduler.between_steps(reset))})

    async def collective_rpc(self, request: web.Request) -> web.Response:
        body = await _body(request, any_content_type=True)
        method = body.get("method")
        if method is None:
            raise APIError("Missing 'method' in request body", type="Bad Request")
        kwargs = body.get("kwargs") or {}
        if not isinstance(kwargs, dict):
            raise invalid("kwargs", "Input should be a valid dictionary")
        path = kwargs.get("weights_path")
        # vLLM then copies what tensors there are; clients use it to find out whether the server sees a folder.
        partial = kwargs.get("is_checkpoint_format") is False
        if method != "reload_weights" or not isinstance(path, str):
            raise APIError(
                f"Call to collective_rpc method failed: the embedded server has only reload_weights with a "
                f"weights_path (got {method!r})",
                status=500,
                type="InternalServerError",
            )
        started = time.perf_counter()
        try:
            self._check_folder(path)
            await asyncio.wrap_future(self.scheduler.between_steps(lambda: self._reload(path, partial)))
        except (ValueError, OSError) as error:
            raise APIError(
                f"Call to collective_rpc method failed: {error}", status=500, type="InternalServerError"
            ) from error
        logger.info("reloaded weights from %s in %.2f s", path, time.perf_counter() - started)
        return _json({"results": [None]})

    def _reload(self, path: str, partial: bool) -> None:
        """In the model's thread. All rows were computed with the old weights: none may be used again."""
        weights = read_weights(self.runner.model, path, partial=partial)
        self.scheduler.recompute_running()
        self.scheduler.cache.clear()
        write_weights(self.runner.model, weights)
        if weights:
            self.weight_version = path  # until it is given a name; vLLM would go on with the last one

    async def load_lora_adapter(self, request: web.Request) -> web.Response:
        body = await _body(request)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not (isinstance(name, str) and name and isinstance(path, str) and path):
            raise APIError("Both 'lora_name' and 'lora_path' must be provided.", type="InvalidUserInput")
        if name in self.model_names:
            raise APIError(f"The lora adapter '{name}' conflicts with a served base model.", type="InvalidUserInput")
        if name in self.adapters and not body.get("load_inplace"):
            raise APIError(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                "place, set "
                "'load_inplace' to True.",
                type="InvalidUserInput",
            )
        try:
            self._check_folder(path)
            await asyncio.wrap_future(self.scheduler.between_steps(lambda: self._load_adapter(name, path)))
        except FileNotFoundError as error:
            raise APIError(f"Loading lora {name} failed: {error}", status=404, type="NotFoundError") from error
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise APIError(str(error), status=500, type="InternalServerError") from error
        logger.info("loaded LoRA adapter %s from %s", name, path)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_lora_adapter(self, request: web.Request) -> web.Response:
        name = (await _body(request)).get("lora_name")
        if not isinstance(name, str):
            raise APIError("'lora_name' must be provided.", type="InvalidUserInput")
        if name not in self.adapters:
            raise APIError(f"The lora adapter '{name}' cannot be found.", status=404, type="NotFoundError")
        await asyncio.wrap_future(self.scheduler.between_steps(lambda: self._unload_adapter(name)))
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    def _load_adapter(self, name: str, path: str) -> None:
        """In the model's thread. The new adapter replaces the old one only once it is loaded."""
        internal = f"lora_{next(self._adapter_numbers)}"
        self.runner.load_adapter(internal, path)
        old = self.adapters.get(name)
        self.adapters[name] = Adapter(path, internal)
        if old is not None:
            self.scheduler.move_adapter(old.internal_name, internal)
            self.runner.unload_adapter(old.internal_name)

    def _unload_adapter(self, name: str) -> None:
        internal = self.adapters.pop(name).internal_name
        self.scheduler.fail_adapter(internal, not_found(name))
        self.runner.unload_adapter(internal)

    async def metrics(self, request: web.Request) -> web.Response:
        counters = self.scheduler.metrics
        labels = f'engine="0",model_name="{self.model_names[0]}"'
        lines = []
        for kind, name, value in (
            ("gauge", "num_requests_running", self.scheduler.num_running),
            ("gauge", "num_requests_waiting", self.scheduler.num_waiting),
            ("counter", "prompt_tokens_total", counters.prompt_tokens),
            ("counter", "generation_tokens_total", counters.generation_tokens),
            ("counter", "prefix_cache_queries_total", counters.prefix_cache_queries),
            ("counter", "prefix_cache_hits_total", counters.prefix_cache_hits),
        ):
            lines += [f"# TYPE vllm:{name.removesuffix('_total')} {kind}", f"vllm:{name}{{{labels}}} {value}"]
        lines.append("# TYPE vllm:iteration_tokens_total histogram")
        lines.append(f'vllm:iteration_tokens_total_bucket{{{labels},le="+Inf"}} {counters.steps}')
        lines.append(f"vllm:iteration_tokens_total_count{{{labels}}} {counters.steps}")
        lines.append(f"vllm:iteration_tokens_total_sum{{{labels}}} {counters.computed_tokens}")
        lines.append("# TYPE vllm:request_success counter")
        for reason, count in counters.finished.items():
            lines.append(f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}')
        lines += ["# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {self.started}"]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")

    async def _run(self, prompts: list[list[int]], params: SamplingParams, adapter: str | None) -> list[Sequence]:
        group = self.scheduler.submit(prompts, params, adapter)
        try:
            return await asyncio.wrap_future(group.future)
        except asyncio.CancelledError:
            self.scheduler.abort(group)
            raise

    def _served(self, body: dict[str, Any]) -> tuple[str, str | None]:
        """The served name to answer with, and the adapter's internal name."""
        name = body.get("model")
        if name is not None and not isinstance(name, str):
            raise invalid("model", "Input should be a valid string")
        if not name or name in self.model_names:
            return self.model_names[0], None
        if name in self.adapters:
            return name, self.adapters[name].internal_name
        raise not_found(name)

    def _encode(self, text: str, body: dict[str, Any]) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=body.get("add_special_tokens") is not False)

    def _decode(self, token_id: int) -> str:
        text = self._decoded.get(token_id)
        if text is None:
            text = self._decoded[token_id] = self.tokenizer.decode([token_id])
        return text

    def _text(self, sequence: Sequence) -> str:
        """The output without the token that stopped it, and without special tokens."""
        ids = sequence.output_ids
        return self.tokenizer.decode(ids[:-1] if sequence.finish_reason == "stop" else ids, skip_special_tokens=True)

    def _completion_logprobs(self, sequence: Sequence, as_ids: bool) -> dict[str, Any] | None:
        if not sequence.params.wants_logprobs:
            return None
        name = self._id_keys.__getitem__ if as_ids else self._decode
        # With logprobs=-1 vLLM's completions list nothing beside the sampled token's own value.
        listed = [] if sequence.params.logprobs == -1 else sequence.logprobs
        tokens = [name(int(entry.token_ids[0])) for entry in sequence.logprobs]
        return {
            "text_offset": list(itertools.accumulate(map(len, tokens[:-1]), initial=0)) if tokens else [],
            "token_logprobs": [max(float(entry.logprobs[0]), LOWEST_LOGPROB) for entry in sequence.logprobs],
            "tokens": tokens,
            "top_logprobs": [_as_dict(entry, name) for entry in listed] or [{} for _ in tokens],
        }

    def _prompt_logprobs(self, sequence: Sequence) -> list[dict[str, Any] | None] | None:
        """None for the first token, then one row per prompt token computed in this request."""
        if sequence.params.prompt_logprobs is None:
            return None
        rows = [_as_dict(entry, str) for entry in sequence.prompt_rows]
        return [None, *({token: {"logprob": value} for token, value in row.items()} for row in rows)]


def _as_dict(entry: TokenLogprobs, name: Callable[[int], str]) -> dict[str, float]:
    values = np.maximum(entry.logprobs, np.float32(LOWEST_LOGPROB)).tolist()
    return dict(zip(map(name, entry.token_ids.tolist()), values, strict=True))


def _prompt_scores(sequence: Sequence) -> str | None:
    """Scores of named tokens as base64 ``.npy``; None when they begin before the first computed row."""
    params = sequence.params
    if params.prompt_logprob_token_ids is None or sequence.prompt_scores_missed:
        return None
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(sequence.prompt_scores), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _usage(sequences: list[Sequence]) -> dict[str, Any]:
    """Counts over all prompts; like vLLM, ``cached_tokens`` is that of the last prompt."""
    prompt_tokens = sum(sequence.num_prompt for sequence in sequences)
    completion_tokens = sum(len(sequence.tokens) - sequence.num_prompt for sequence in sequences)
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sequences[-1].cached_tokens,
        },
    }


async def _body(request: web.Request, *, any_content_type: bool = False) -> dict[str, Any]:
    return _parsed("application/json" if any_content_type else request.content_type, await request.read())


def _parsed(content_type: str, raw: bytes) -> dict[str, Any]:
    if content_type != "application/json":
        raise APIError(
            "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
            type="Bad Request",
        )
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise APIError(
            f"1 validation error:\n  {{'type': 'json_invalid', 'loc': 'body', 'msg': 'JSON decode error: {error}'}}",
            type="Bad Request",
            param="body",
        ) from error
    if not isinstance(body, dict):
        raise APIError(
            "1 validation error:\n  {'loc': 'body', 'msg': 'Input should be a valid dictionary'}",
            type="Bad Request",
            param="body",
        )
    return body


def _same(given: str, key: str) -> bool:
    """Whether a header holds the key, in a time that does not say how much of it is right."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), key.encode())


def _is_local(address: str | None) -> bool:
    """Whether a peer's address is a loopback one; an IPv4 address may come inside an IPv6 one."""
    try:
        peer = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return False
    return (getattr(peer, "ipv4_mapped", None) or peer).is_loopback


def _json(content: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")


@web.middleware
async def _answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except APIError as error:
        return _json(error.body, error.status)
    except web.HTTPException as error:
        return _json({"detail": HTTPStatus(error.status).phrase}, error.status)
    except ServerClosing as error:
        return _json(APIError(str(error), status=503, type="Service Unavailable").body, 503)
    except Exception as error:
        logger.exception("%s %s failed", request.method, request.path)
        return _json(APIError(str(error), status=500, type="InternalServerError").body, 500)
