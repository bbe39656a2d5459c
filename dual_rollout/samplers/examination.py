"""What servers are and can do, as the rows of a report: what all ways to draw share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dual_rollout.engine import Engine
from dual_rollout.exceptions import DualRolloutError
from dual_rollout.preflight import fingerprint

T = TypeVar("T")

LORA = "training with dual_weight_sync=lora needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the report.

    Attributes:
        server: "π_θ", "π_t" or "both"; "q*" for a native one.
        status: "failed" when a rollout would fail; "optional" for what only some features need.
        detail: what was found.
        fix: what to do about it, or what it would be needed for.
    """

    server: str
    name: str
    status: Literal["ok", "failed", "optional"]
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """What each server said of itself, by its name, None where it did not answer; and all rows."""

    servers: dict[str, dict[str, Any] | None]
    checks: list[Check]


def ability(server: str, name: str, there: bool | None, use: str, detail: str = "yes") -> Check:
    """A row about what only some features need.

    Args:
        use: what it would be needed for, where it is not there.
        detail: what is there.
    """
    return Check(server, name, "ok", detail) if there else Check(server, name, "optional", "no", use)


async def answered(ask: Awaitable[T], deadline: float) -> T | Exception:
    """The answer, or what went wrong; `deadline` is of the event loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            return await ask
    except TimeoutError:
        return TimeoutError("no answer in time")
    except DualRolloutError as error:
        return error


async def weights_check(name: str, engine: Engine, root: str | None, deadline: float) -> Check:
    """Whether a server's weights are those that it was started with from `root`, where it tells."""
    found = await answered(_weights_of(engine), deadline)
    if isinstance(found, Exception):
        return Check(name, "weights", "optional", f"not known: {found}")
    version, logprob = found
    detail = (
        f"{version or 'not named'}; log-probability of a fixed text {logprob if logprob is not None else 'unknown'}"
    )
    if version in (None, "default"):
        return Check(name, "weights", "ok", detail)
    fix = f"they were given to it by a training run: restart the server to have those of {root or 'its own folder'}"
    return Check(name, "weights", "optional", detail, fix)


async def _weights_of(engine: Engine) -> tuple[str | None, float | None]:
    return await engine.weight_version(), await fingerprint(engine)
