"""What the routes that this package adds to vLLM's API server share: `native.route` and `sessions.route`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from vllm.exceptions import VLLMClientError

_KINDS = {400: "BadRequestError", 404: "NotFoundError", 409: "ConflictError", 503: "ServiceUnavailableError"}


class RefusedError(Exception):
    """A request that is refused with a status of its own."""

    status: int


class UnknownModelError(RefusedError):
    """A model that is not served; vLLM's 404."""

    status = 404


async def answered(request: Request, work: Callable[[Any], Coroutine[Any, Any, Response]]) -> Response:
    """The response that `work` makes of the request's body, or, in the form of vLLM's own errors, why there is nothing.

    A `RefusedError` has its status, `ValueError` and vLLM's refusals are 400, `RuntimeError` is 503. The work is
    cancelled when the client goes away.
    """
    try:
        body = await request.json()
        return await _while_connected(request.receive, work(body))
    except RefusedError as error:
        return _refusal(error.status, str(error))
    except (ValueError, VLLMClientError) as error:
        return _refusal(400, str(error))
    except RuntimeError as error:
        return _refusal(503, str(error))


async def _while_connected(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Response]) -> Response:
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        return await task
    finally:
        watch.cancel()


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": _KINDS[status], "code": status}}, status_code=status)


def served_names(state: Any) -> tuple[frozenset[str], frozenset[str]]:
    """The names of the model of an API server, whose `app.state` it is given, and of the adapters that are loaded."""
    served = state.openai_serving_models
    return frozenset(path.name for path in served.base_model_paths), frozenset(served.lora_requests)


def check_served(model: Any, served: Collection[str]) -> None:
    """Raise `UnknownModelError` for a name that is not among them."""
    if model not in served:
        raise UnknownModelError(f"the model {model!r:.80} does not exist; served are {', '.join(sorted(served))}")


def adapter_of(state: Any, model: str | None) -> Any:
    """vLLM's own object for the adapter of that name, which must still be loaded; None for the model itself.

    Raises:
        UnknownModelError: it is not served, or not any more.
    """
    adapter = state.openai_serving_models.lora_requests.get(model)
    if adapter is None and model is not None:
        check_served(model, served_names(state)[0])
    return adapter


def check_token_ids(name: str, token_ids: Any, vocab_size: int, *, may_be_empty: bool) -> None:
    """Raise `ValueError` for what is no list of token ids of a vocabulary."""
    if not isinstance(token_ids, list) or not (token_ids or may_be_empty) or not all(map(is_int, token_ids)):
        raise ValueError(f"{name} must be a list of token ids{'' if may_be_empty else ', at least one'}")
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise ValueError(f"{name} has a token id outside [0, {vocab_size})")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def cache_tokens(vllm_config: Any) -> int:
    """What the KV cache holds. Models with several kinds of layers say it themselves."""
    cache = vllm_config.cache_config
    tokens: int | None = getattr(cache, "kv_cache_size_tokens", None)
    return cache.num_gpu_blocks * cache.block_size if tokens is None else tokens
