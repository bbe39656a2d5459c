"""Servers that are gone: when to ask them again, and waiting for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from dual_rollout.exceptions import EngineUnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RESPITE = 10.0  # a lost target is left alone for this many times as long as it took to find it lost
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(slots=True)
class Outage:
    """Until when a target that was found to be gone is not asked again; `time.monotonic` seconds."""

    until: float = 0.0

    @property
    def lasts(self) -> bool:
        return time.monotonic() < self.until

    def begin(self, found_in: float) -> None:
        """It took `found_in` seconds to find out."""
        self.until = time.monotonic() + min(max(_RESPITE * found_in, _PAUSE_S), _LONGEST_PAUSE_S)


async def until_back(ask: Callable[[], Awaitable[T]], url: str) -> T:
    """What `ask` gives, asked for as long as the server at `url` is gone."""
    while True:
        try:
            return await ask()
        except EngineUnavailableError as error:
            if error.url != url:
                raise
            logger.warning("waiting for the target (on_target_failure is wait): %s", error)
        await asyncio.sleep(_PAUSE_S)


async def ask_target(ask: Callable[[], Awaitable[T]], url: str, on_target_failure: str) -> T | None:
    """What π_t's server at `url` says to `ask`; None where it is gone and the sequences go on without."""
    if on_target_failure == "wait":
        return await until_back(ask, url)
    try:
        return await ask()
    except EngineUnavailableError as error:
        if on_target_failure != "policy":
            raise
        logger.warning("%s: the target is not there (on_target_failure is policy)", error)
        return None
