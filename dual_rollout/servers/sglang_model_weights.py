"""New weights for an SGLang server over HTTP: full weights from a folder, or a LoRA adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError
from dual_rollout.servers.http import HttpTransport, shown
from dual_rollout.servers.identity import ServerIdentity
from dual_rollout.servers.model_weights import SHARE_THE_FOLDER, ModelWeights
from dual_rollout.servers.sglang_settings import MODEL_INFO, SETTINGS, told


class SGLangModelWeights(ModelWeights):
    """The weights of one SGLang server; implements `WeightReceiver`."""

    def __init__(self, transport: HttpTransport, identity: ServerIdentity):
        super().__init__(transport, identity)
        self._settings: Mapping[str, Any] = {}

    async def reset_prefix_cache(self) -> None:
        await self._http.post("/flush_cache")

    async def _reload_weights(self, path: str) -> None:
        # SGLang waits for running requests, and drops the prefix cache itself.
        try:
            answer = await self._http.post("/update_weights_from_disk", {"model_path": path, "flush_cache": True})
        except EngineRejectedError as error:
            if "weights iterator" not in str(error):
                raise
            raise EngineRejectedError(
                f"does not see the weights in {path}: {SHARE_THE_FOLDER} (it says: {error})",
                url=self.url,
                status=error.status,
            ) from error
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise EngineProtocolError(
                f"/update_weights_from_disk did not confirm the update: {shown(answer, 300)}", url=self.url
            )

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

    async def weight_version(self) -> str | None:
        version = (await told(self._http, *MODEL_INFO)).get("weight_version")
        return version if isinstance(version, str) else None

    async def dtype(self) -> str | None:
        settings = await self._server_settings()
        dtype = settings.get("quantization") or settings.get("dtype")
        return dtype if isinstance(dtype, str) and dtype != "auto" else None

    async def set_weight_version(self, version: str) -> None:
        with contextlib.suppress(EngineRejectedError):  # an older version
            await self._http.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    async def loads_lora(self) -> bool:
        return bool((await self._server_settings()).get("enable_lora"))

    async def check_sees(self, path: str) -> None:
        """Nothing to ask: SGLang refuses a folder it does not see before it touches a weight."""

    async def _server_settings(self) -> Mapping[str, Any]:
        """Asked once, here or when the server is described."""
        if not self._settings:
            self._settings = await told(self._http, *SETTINGS)
        return self._settings
