"""What the embedded server serves under which name: a model, whose weights may change, and adapters of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from dual_rollout.server.model_runner import ModelRunner
from dual_rollout.server.model_weights import read_weights, write_weights
from dual_rollout.server.protocol import invalid, not_found
from dual_rollout.server.scheduler import Scheduler


@dataclass
class Adapter:
    """A served LoRA adapter; ``internal_name`` differs at every load, so old rows are never reused."""

    path: str
    internal_name: str


class ServedModels:
    """The model at `path` under its `names`, and the adapters that were loaded.

    Attributes:
        runner: has the model.
        adapters: by the name that requests give.
        weight_version: the name of the weights that the model has now.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, *, path: str, names: list[str]):
        self.runner = runner
        self.names = names
        self.adapters: dict[str, Adapter] = {}
        self.weight_version = "default"
        self._scheduler = scheduler
        self._path = path
        self._adapter_numbers = itertools.count(1)

    def find(self, name: Any) -> tuple[str, str | None]:
        """The served name to answer with, and the adapter's internal name, for a request's `model`.

        Raises:
            APIError: there is none of that name.
        """
        if name is not None and not isinstance(name, str):
            raise invalid("model", "Input should be a valid string")
        if not name or name in self.names:
            return self.names[0], None
        if name in self.adapters:
            return name, self.adapters[name].internal_name
        raise not_found(name)

    def cards(self, created: int, max_model_len: int) -> list[dict[str, Any]]:
        """The entries of `/v1/models`."""
        cards = [self._card(name, created, root=self._path, max_model_len=max_model_len) for name in self.names]
        for name, adapter in self.adapters.items():
            cards.append(self._card(name, created, root=adapter.path, parent=self.names[0]))
        return cards

    def _card(
        self, name: str, created: int, *, root: str, parent: str | None = None, max_model_len: int | None = None
    ) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "dual_rollout",
            "root": root,
            "parent": parent,
            "max_model_len": max_model_len,
            "permission": [],
        }

    def reload(self, path: str, partial: bool) -> None:
        """In the model's thread. All rows were computed with the old weights: none may be used again."""
        weights = read_weights(self.runner.model, path, partial=partial)
        self._scheduler.recompute_running()
        self._scheduler.cache.clear()
        write_weights(self.runner.model, weights)
        if weights:
            self.weight_version = path  # until it is given a name; vLLM would go on with the last one

    def load_adapter(self, name: str, path: str) -> None:
        """In the model's thread. The new adapter replaces the old one only once it is loaded."""
        internal = f"lora_{next(self._adapter_numbers)}"
        self.runner.adapters.load(internal, path)
        old = self.adapters.get(name)
        self.adapters[name] = Adapter(path, internal)
        if old is not None:
            self._scheduler.move_adapter(old.internal_name, internal)
            self.runner.adapters.unload(old.internal_name)

    def unload_adapter(self, name: str) -> None:
        """In the model's thread. Requests that use it fail."""
        internal = self.adapters.pop(name).internal_name
        self._scheduler.fail_adapter(internal, not_found(name))
        self.runner.adapters.unload(internal)
