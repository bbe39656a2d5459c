"""A synchronous loop's connections to its servers, and what it asks of them and tells them besides sequences."""

from __future__ import annotations

import asyncio
import logging
import secrets
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from accelerate.utils import broadcast_object_list

from dual_rollout.config import CoordinatorConfig
from dual_rollout.coordinator import CoordinatorStats, DualVLLMCoordinator
from dual_rollout.exceptions import EngineError
from dual_rollout.servers import Engine, EngineInfo
from dual_rollout.training.event_loop import LoopThread
from dual_rollout.training.processes import fail_together, process_index
from dual_rollout.types import Role, TargetModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAME_WITHIN_S = 5.0  # for a model card, which no run should wait for long

ADAPTER_NAME = "dual-rollout-policy"
"""The policy's adapter on its server."""


class ServerConnections:
    """Connections to both servers, opened when they are first needed.

    Synchronous outside; inside, one event loop in a background thread keeps them until `close()`, the end of a `with`
    block, or of the process. A forked process opens connections of its own.

    Args:
        config: the servers.
        tokenizer: the policy's; the one `config` names when None.
    """

    def __init__(self, config: CoordinatorConfig, tokenizer: Any = None):
        self.config = config
        self.tokenizer = tokenizer
        self._run_name = f"dual_rollout run {secrets.token_hex(4)}"
        self._given_version: str | None = None
        self._told: dict[str, Any] = {}
        self._loop: LoopThread | None = None
        self._coordinator: DualVLLMCoordinator | None = None
        self._close_at_exit: Any = None

    def close(self) -> None:
        """Close the connections and end the background thread; the next rollout would open them again."""
        if self._loop is not None and self._loop.is_of_this_process:
            self._close_at_exit()
        elif self._loop is not None:
            _OF_PARENT_PROCESSES.append((self._loop, self._coordinator))
        self._loop = self._coordinator = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reload_policy_weights(self, folder: str) -> None:
        """Make π_θ's server load the safetensors in `folder` and drop its prefix cache; π_t's is left alone."""
        coordinator = self._open()
        self._run(coordinator.theta.reload_weights(folder))

    def load_policy_adapter(self, folder: str) -> None:
        """Make π_θ's server load the LoRA adapter in `folder`; `use_policy_adapter` puts it to use."""
        self._run(self._open().theta.load_lora(ADAPTER_NAME, folder))

    def use_policy_adapter(self) -> None:
        """From now on π_θ is its server's model with the adapter that was loaded last."""
        self._open().theta.use_lora(ADAPTER_NAME)

    def policy_server_loads_lora(self) -> bool:
        """Whether π_θ's server takes LoRA adapters while it runs."""
        return self._run(self._open().theta.loads_lora())

    def check_policy_server_sees(self, folder: str) -> None:
        """Raise `EngineError` unless π_θ's server reads the safetensors in `folder`, which must hold no tensors."""
        self._run(self._open().theta.check_sees(folder))

    def share_policy_weights(self, version: int) -> None:
        """Tell all processes that π_θ's servers have the weights of `version`, which the main process gave them.

        Every process calls it. Those that did not give the weights learn which servers took them: they then use no
        other, and notice as well when one is restarted and so has lost them.
        """
        engine = self._open().theta
        given = [engine.weights_given()]
        broadcast_object_list(given)
        if process_index() != 0:
            engine.adopt_weights(given[0])
        self.weight_version = version
        self._given_version = f"{self._run_name}, step {version}"
        with fail_together():
            if process_index() == 0:
                self._run(engine.set_weight_version(self._given_version))

    def ask_policy_servers(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        """The answers of π_θ's server, or of each of its replicas that is in use."""
        return self._run(self._open().theta.each(ask))

    def served_model(self, which: Role) -> str:
        """The name of π_θ's or π_t's model on its server; asked once, "unknown" while the server does not answer."""
        found = self.target() if which == "t" else self._describe(which)
        return "unknown" if found is None else found.model

    def target(self) -> TargetModel | None:
        """The target that rows have which name none; asked once, None while its server does not answer."""
        return self._asked_once("the target", self._open().servers.target)

    def servers_in_words(self) -> str:
        """What serves π_θ and π_t, such as "vllm, sglang" or "one native server"; no names and addresses."""
        return self._open().servers.in_words(self._describe)

    def _describe(self, which: Role) -> EngineInfo | None:
        engine: Engine = getattr(self._open().servers, which)
        return self._asked_once(f"the model that serves as {which}", engine.describe)

    def _asked_once(self, what: str, ask: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        if what not in self._told:
            try:
                self._told[what] = self._run(asyncio.wait_for(ask(), _NAME_WITHIN_S))
            except (EngineError, TimeoutError) as error:
                logger.warning("the name of %s is not known: %s", what, error)
        return self._told.get(what)

    @property
    def stats(self) -> CoordinatorStats:
        """Counts and times over the life of the connections."""
        return self._open().stats

    @property
    def list_settings(self) -> dict[str, Any]:
        """The config's settings for top-k lists, by name; empty where a server that draws from q* itself gives none."""
        return {name: getattr(self.config, name) for name in self._open().servers.list_settings}

    @property
    def weight_version(self) -> int | None:
        """The version of π_θ's weights that the next outputs record."""
        return self._open().weight_version

    @weight_version.setter
    def weight_version(self, version: int | None) -> None:
        self._open().weight_version = version

    def _open(self) -> DualVLLMCoordinator:
        if self._loop is not None and not self._loop.is_of_this_process:
            self._leave_to_parent_process()
        if self._coordinator is None:
            self._coordinator = DualVLLMCoordinator(self.config, tokenizer=self.tokenizer)
            self._loop = LoopThread()
            self._close_at_exit = weakref.finalize(self, _close, self._loop, self._coordinator)
        return self._coordinator

    def _leave_to_parent_process(self) -> None:
        """In a forked process: forget the parent's connections, which are not to be touched here.

        Raises:
            ValueError: the parent has given π_θ's server weights, of which this process would not know.
        """
        assert self._coordinator is not None
        if self._coordinator.weight_version is not None:
            raise ValueError(
                "this process was forked from the one that sends π_θ's server its weights, and would not know of them: "
                "roll out in that one, or make a DualRollout here"
            )
        _OF_PARENT_PROCESSES.append((self._loop, self._coordinator))
        self._loop = self._coordinator = None

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return self._loop.run(coroutine)


_OF_PARENT_PROCESSES: list[Any] = []
"""Never collected: closing inherited sockets would unregister the parent's, whose epoll instance is the same."""


def _close(loop: LoopThread, coordinator: DualVLLMCoordinator) -> None:
    """Of a rollout that is closed, collected, or still open when Python ends."""
    if loop.is_of_this_process:
        loop.close(coordinator.aclose())
