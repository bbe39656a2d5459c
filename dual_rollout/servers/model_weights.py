"""New weights for a server over HTTP: what is the same for every kind of server."""

from __future__ import annotations

from dual_rollout.servers.http import HttpTransport
from dual_rollout.servers.identity import ServerIdentity

SHARE_THE_FOLDER = "set dual_weight_sync_dir to a folder that trainer and server share under the same path"


class ModelWeights:
    """The weights of one server. A kind of server says how they are loaded, and so becomes a `WeightReceiver`.

    Args:
        identity: knows whether the server still has the weights that it was given.
    """

    def __init__(self, transport: HttpTransport, identity: ServerIdentity):
        self.url = transport.url
        self._http = transport
        self._identity = identity
        self._lora: str | None = None

    async def reload_weights(self, path: str) -> None:
        await self._identity.took_weights(lambda: self._reload_weights(path))

    async def _reload_weights(self, path: str) -> None:
        raise NotImplementedError

    async def load_lora(self, name: str, path: str) -> None:
        await self._identity.took_weights(lambda: self._load_lora(name, path))

    async def _load_lora(self, name: str, path: str) -> None:
        raise NotImplementedError

    def use_lora(self, name: str) -> None:
        self._lora = name

    def weights_given(self) -> float | None:
        return self._identity.given_to

    def adopt_weights(self, given: float | None) -> None:
        self._identity.adopt(given)
