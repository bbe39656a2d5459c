"""What `doctor` says of a server that draws from q* itself; `native.py` has its rollouts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict

from dual_rollout.config import CoordinatorConfig
from dual_rollout.engine import Engine, EngineInfo
from dual_rollout.exceptions import PreflightError
from dual_rollout.native.client import NativeEngine, NativeServerInfo
from dual_rollout.samplers.examination import LORA, Check, Examination, ability, answered, weights_check
from dual_rollout.types import Role, TargetModel

_WRONG_ROWS = 1.5  # nats; two kernels in bfloat16 differ by up to 0.4


class NativeServer:
    """A native server (`dual-rollout serve-native`); implements `Servers`."""

    policy_name = "q*"
    list_settings: tuple[str, ...] = ()

    def __init__(self, config: CoordinatorConfig, engine: NativeEngine):
        self.theta: Engine = engine
        self.t: Engine = engine
        self._config = config
        self._engine = engine

    def in_words(self, describe: Callable[[Role], EngineInfo | None]) -> str:
        """See `Servers`."""
        return "one native server"

    async def target(self) -> TargetModel:
        """See `Servers`."""
        if (second := (await self._engine.native_server()).target) is not None:
            return TargetModel(second, False)
        return TargetModel(self._config.t_model or (await self._engine.describe()).model, True)

    async def examine(self) -> Examination:
        """See `Servers`. A few tokens show whether it draws from the right rows."""
        engine, deadline = self._engine, asyncio.get_running_loop().time() + self._config.total_timeout
        server = await answered(engine.native_server(), deadline)
        if isinstance(server, Exception):
            return Examination({"native": None}, [_fault(server)])
        info = await answered(engine.describe(), deadline)
        difference = await answered(engine.compare_values(), deadline)
        for found in (info, difference):
            if isinstance(found, Exception):
                return Examination({"native": asdict(server)}, [_fault(found)])
        assert not isinstance(info, Exception) and not isinstance(difference, Exception)
        reloads = await answered(engine.reloads_weights(), deadline) is True
        loads_lora = await answered(engine.loads_lora(), deadline) is True
        checks = [
            *_server_checks(server, f"{info.model} at {engine.url}", self._config.concurrency),
            _values_check(server, difference),
            *_weight_sync_checks(server, reloads, loads_lora),
            await weights_check(self.policy_name, engine, info.model, deadline),
        ]
        return Examination({"native": asdict(server)}, checks)


def _server_checks(server: NativeServerInfo, name: str, max_concurrency: int) -> list[Check]:
    requests = server.max_requests
    places = (
        f"{requests} rollouts at once, or {requests // 2} with two prompts (--max-num-seqs); the KV cache holds "
        f"{server.cache_blocks * server.block_size} tokens of them"
    )
    fill = "" if max_concurrency >= requests else f"speed: raise max_concurrency, {max_concurrency}, to fill them"
    return [
        Check("q*", "server", "ok", name),
        Check("q*", "target", "ok", server.target or "the same model: give it a prompt of its own, or another adapter"),
        Check("q*", "vocabulary", "ok", f"{server.common_vocab_size} tokens"),
        Check("q*", "places", "optional" if fill else "ok", places, fill),
    ]


def _values_check(server: NativeServerInfo, difference: float) -> Check:
    sides = "log π_θ" if server.target else "both sides"
    if difference > _WRONG_ROWS:
        fix = "its numbers are of other rows, or rounded too far: report it, with vLLM's version and its flags"
        return Check("q*", "values", "failed", f"{sides}: {difference:.2g} nats from the server's own", fix)
    return Check("q*", "values", "ok", f"{sides} within {difference:.2g} nats of the server's own")


def _weight_sync_checks(server: NativeServerInfo, reloads: bool, loads_lora: bool) -> list[Check]:
    needed = "for training with dual_weight_sync=disk, start it with VLLM_SERVER_DEV_MODE=1"
    reloaded = "yes; π_θ's alone" if server.target else "yes; of both roles"
    lora = "two models take no adapters: train with dual_weight_sync=disk" if server.target else LORA
    return [
        ability("q*", "weight reload", reloads, needed, reloaded),
        ability("q*", "LoRA loading", loads_lora, lora),
    ]


def _fault(error: Exception) -> Check:
    if isinstance(error, PreflightError):
        fix = "serve the models with dual-rollout serve-native (docs/native.md), or check two servers (--engine dual)"
        return Check("q*", "native", "failed", str(error), fix)
    fix = (
        "start dual-rollout serve-native, or correct theta_url; one that has just started compiles at first "
        "(--timeout 300)"
    )
    return Check("q*", "server", "failed", str(error) or type(error).__name__, fix)
