"""New weights for a vLLM server over HTTP: full weights from a folder, or a LoRA adapter."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError
from dual_rollout.servers.http import HttpTransport
from dual_rollout.servers.identity import ServerIdentity
from dual_rollout.servers.model_weights import SHARE_THE_FOLDER, ModelWeights

_NEEDS_DEV_MODE = "cannot take new weights: start vLLM with VLLM_SERVER_DEV_MODE=1"
_NEEDS_LORA = "loads no adapters: start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


class VLLMModelWeights(ModelWeights):
    """The weights of one vLLM server; implements `WeightReceiver`."""

    def __init__(self, transport: HttpTransport, identity: ServerIdentity):
        super().__init__(transport, identity)
        self._config: Mapping[str, Any] | None = None

    async def reset_prefix_cache(self) -> None:
        try:
            # Without the flag, vLLM does nothing while requests are running.
            answer = await self._http.post("/reset_prefix_cache?reset_running_requests=true")
        except EngineRejectedError as error:
            raise _explained(error, "cannot drop its prefix cache: start vLLM with VLLM_SERVER_DEV_MODE=1") from error
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineProtocolError("the prefix cache was not dropped, because requests are using it", url=self.url)

    async def _reload_weights(self, path: str) -> None:
        async with self._paused():
            try:
                await self._http.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
            except EngineRejectedError as error:
                raise _explained(error, _NEEDS_DEV_MODE) from error
            await self.reset_prefix_cache()

    async def _load_lora(self, name: str, path: str) -> None:
        async with self._paused():
            # Not with load_inplace: vLLM (0.31) then reads the adapter from disk again at every step, and dies when
            # the folder is gone.
            with contextlib.suppress(EngineRejectedError):  # there was none, or the next request says what is wrong
                await self._http.post("/v1/unload_lora_adapter", {"lora_name": name})
            try:
                await self._http.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
            except EngineRejectedError as error:
                hidden = f"does not see the adapter in {path}: {SHARE_THE_FOLDER}"
                raise _explained(error, hidden if "No adapter found" in str(error) else _NEEDS_LORA) from error
            try:
                await self.reset_prefix_cache()
            except EngineRejectedError as error:
                if error.status != 404:
                    raise
                # vLLM caches per load of an adapter; only one loaded again from the same path needs the reset.

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
                f"does not see the folder {path}: {SHARE_THE_FOLDER} (it says: {error})", url=self.url
            ) from error

    async def weight_version(self) -> str | None:
        version = (await self._told("/weight_info")).get("weight_version")
        return version if isinstance(version, str) else None

    async def set_weight_version(self, version: str) -> None:
        with contextlib.suppress(EngineRejectedError):  # an older vLLM, or not in development mode
            await self._http.post("/update_weight_version", {"new_version": version})

    async def dtype(self) -> str | None:
        config = await self._model_config()
        dtype = config.get("quantization") or config.get("dtype")
        return dtype.removeprefix("torch.") if isinstance(dtype, str) else None

    async def _model_config(self) -> Mapping[str, Any]:
        """vLLM's own, where it is in development mode; asked once."""
        if self._config is None:
            told = (await self._told("/server_info?config_format=json")).get("vllm_config")
            config = told.get("model_config") if isinstance(told, dict) else None
            self._config = config if isinstance(config, dict) else {}
        return self._config

    async def _told(self, path: str) -> dict[str, Any]:
        """The answer of a server that has that route; empty otherwise."""
        try:
            answer = await self._http.get(path)
        except (EngineRejectedError, EngineProtocolError):
            return {}
        return answer if isinstance(answer, dict) else {}

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


def _explained(error: EngineRejectedError, advice: str) -> EngineRejectedError:
    """The same refusal, with what to do when it comes of a missing route or file."""
    if error.status != 404:
        return error
    return EngineRejectedError(advice, url=error.url, status=404)
