"""HTTP routes of the embedded server, with vLLM's paths, JSON and status codes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import orjson
from aiohttp import web

from dual_rollout.server import SERVER_VERSION
from dual_rollout.server.access import Access
from dual_rollout.server.metrics import metrics_text
from dual_rollout.server.protocol import (
    APIError,
    Limits,
    SamplingParams,
    check_prompt,
    invalid,
    parse_completion_sampling,
    parse_generate_sampling,
    parse_prompts,
    parse_token_ids,
)
from dual_rollout.server.responses import Responses, json_response
from dual_rollout.server.scheduler import Scheduler, Sequence, ServerClosing
from dual_rollout.server.served_models import ServedModels

logger = logging.getLogger("dual_rollout.server")

MAX_BODY_BYTES = 64 * 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A request to the model: what to run, and how its answer is made of what comes out."""

    prompts: list[list[int]]
    params: SamplingParams
    adapter: str | None
    render: Callable[[list[Sequence]], web.Response]


Ask = Callable[[dict[str, Any]], Asked]


class EmbeddedApp:
    """Turns HTTP requests into scheduler groups, and finished sequences into answers."""

    def __init__(
        self, scheduler: Scheduler, models: ServedModels, tokenizer: Any, limits: Limits, access: Access, *, lora: bool
    ) -> None:
        self.scheduler = scheduler
        self.models = models
        self.tokenizer = tokenizer
        self.limits = limits
        self.started = time.time()
        self._access = access
        self._lora = lora
        self._responses = Responses(tokenizer, limits.vocab_size)
        self._turns = asyncio.Semaphore(limits.max_num_requests)
        self._worker = ThreadPoolExecutor(1, "worker")

    def routes(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_answer_errors, self._access.check])
        app.router.add_get("/health", self.health)
        app.router.add_get("/version", self.version)
        app.router.add_get("/v1/models", self.list_models)
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
        if self._lora:
            app.router.add_post("/v1/load_lora_adapter", self.load_lora_adapter)
            app.router.add_post("/v1/unload_lora_adapter", self.unload_lora_adapter)
        return app

    async def _close(self, app: web.Application) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.scheduler.alive else 503)

    async def version(self, request: web.Request) -> web.Response:
        return json_response({"version": SERVER_VERSION})

    async def server_info(self, request: web.Request) -> web.Response:
        """Of vLLM's what a client asks for."""
        return json_response(
            {"vllm_config": {"model_config": {"dtype": str(self.models.runner.dtype), "quantization": None}}}
        )

    async def weight_info(self, request: web.Request) -> web.Response:
        return json_response({"weight_version": self.models.weight_version})

    async def update_weight_version(self, request: web.Request) -> web.Response:
        version = (await _body(request)).get("new_version")
        if not isinstance(version, str):
            raise invalid("new_version", "Input should be a valid string")
        self.models.weight_version = version
        return json_response({"success": True, "new_version": version})

    async def list_models(self, request: web.Request) -> web.Response:
        cards = self.models.cards(int(self.started), self.limits.max_model_len)
        return json_response({"object": "list", "data": cards})

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
        name, adapter = self.models.find(body.get("model"))
        ids = [self._encode(p, body) if isinstance(p, str) else p for p in prompts]
        for prompt in ids:
            check_prompt(prompt, self.limits, params.max_tokens)
        return Asked(ids, params, adapter, lambda sequences: self._responses.completions(body, name, sequences))

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
        name, adapter = self.models.find(body.get("model"))
        check_prompt(token_ids, self.limits, None)
        return Asked([token_ids], params, adapter, lambda sequences: self._responses.generate(body, name, sequences[0]))

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return await self._work(lambda: self._tokenize(body))

    def _tokenize(self, body: dict[str, Any]) -> web.Response:
        self.models.find(body.get("model"))
        if not isinstance(body.get("prompt"), str):
            raise invalid("prompt", "Field required: a text")
        ids = self._encode(body["prompt"], body)
        return json_response({"count": len(ids), "max_model_len": self.limits.max_model_len, "tokens": ids})

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return await self._work(lambda: self._detokenize(body))

    def _detokenize(self, body: dict[str, Any]) -> web.Response:
        self.models.find(body.get("model"))
        ids = parse_token_ids(body, "tokens")
        if ids and max(ids) >= self.limits.vocab_size:
            raise APIError(f"Token id {max(ids)} is out of vocabulary")
        return json_response({"prompt": self.tokenizer.decode(ids)})

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        """Forget unused rows. False, as in vLLM, while requests hold some: call again when they are done."""

        def reset() -> bool:
            if request.query.get("reset_running_requests", "").lower() in ("1", "true"):
                self.scheduler.recompute_running()
            return self.scheduler.cache.clear()

        return json_response({"success": await asyncio.wrap_future(self.scheduler.between_steps(reset))})

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
            self._access.check_folder(path)
            await asyncio.wrap_future(self.scheduler.between_steps(lambda: self.models.reload(path, partial)))
        except (ValueError, OSError) as error:
            raise APIError(
                f"Call to collective_rpc method failed: {error}", status=500, type="InternalServerError"
            ) from error
        logger.info("reloaded weights from %s in %.2f s", path, time.perf_counter() - started)
        return json_response({"results": [None]})

    async def load_lora_adapter(self, request: web.Request) -> web.Response:
        body = await _body(request)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not (isinstance(name, str) and name and isinstance(path, str) and path):
            raise APIError("Both 'lora_name' and 'lora_path' must be provided.", type="InvalidUserInput")
        if name in self.models.names:
            raise APIError(f"The lora adapter '{name}' conflicts with a served base model.", type="InvalidUserInput")
        if name in self.models.adapters and not body.get("load_inplace"):
            raise APIError(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                "place, set "
                "'load_inplace' to True.",
                type="InvalidUserInput",
            )
        try:
            self._access.check_folder(path)
            await asyncio.wrap_future(self.scheduler.between_steps(lambda: self.models.load_adapter(name, path)))
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
        if name not in self.models.adapters:
            raise APIError(f"The lora adapter '{name}' cannot be found.", status=404, type="NotFoundError")
        await asyncio.wrap_future(self.scheduler.between_steps(lambda: self.models.unload_adapter(name)))
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def metrics(self, request: web.Request) -> web.Response:
        text = metrics_text(self.scheduler, self.models.names[0], self.started)
        return web.Response(text=text, content_type="text/plain")

    async def _run(self, prompts: list[list[int]], params: SamplingParams, adapter: str | None) -> list[Sequence]:
        group = self.scheduler.submit(prompts, params, adapter)
        try:
            return await asyncio.wrap_future(group.future)
        except asyncio.CancelledError:
            self.scheduler.abort(group)
            raise

    def _encode(self, text: str, body: dict[str, Any]) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=body.get("add_special_tokens") is not False)


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


@web.middleware
async def _answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except APIError as error:
        return json_response(error.body, error.status)
    except web.HTTPException as error:
        return json_response({"detail": HTTPStatus(error.status).phrase}, error.status)
    except ServerClosing as error:
        return json_response(APIError(str(error), status=503, type="Service Unavailable").body, 503)
    except Exception as error:
        logger.exception("%s %s failed", request.method, request.path)
        return json_response(APIError(str(error), status=500, type="InternalServerError").body, 500)
