"""How far a run of `dual-rollout generate` is."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

from dual_rollout.coordinator import DualVLLMCoordinator
from dual_rollout.production.shards import Share
from dual_rollout.types import GenerationOutput

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 30.0


class Progress:
    """A bar on a terminal, a line of the log now and then elsewhere."""

    def __init__(self, coordinator: DualVLLMCoordinator, total: int | None, done: int, share: Share, *, show: bool):
        self._decoding = coordinator.stats.decoding
        self._total, self._done, self._made, self._failed = total, done, 0, 0
        self._started = self._logged = time.monotonic()
        self._name = "q*" if share.count == 1 else f"q* {share.index}/{share.count}"
        # tqdm disables itself where there is no terminal.
        self._bar = tqdm(total=total, initial=done, desc=self._name, unit="row", disable=None if show else True)
        self._logs = show and self._bar.disable
        if total is None:
            logger.info("%s: the length of the input is not known, so neither is the time left", self._name)

    def restore(self, rows: int) -> None:
        """Rows that an earlier run had made; they say nothing of the speed."""
        self._done += rows
        if not self._bar.disable:
            self._bar.initial += rows
            self._bar.update(rows)

    def add(self, output: GenerationOutput) -> None:
        self._done += 1
        self._made += 1
        self._failed += output.error is not None
        self._bar.set_postfix_str(f"{self._tokens_per_second():.0f} tokens/s, {self._failed} failed", refresh=False)
        self._bar.update()
        if time.monotonic() - self._logged > _LOG_EVERY_S:
            self._log()

    def close(self) -> None:
        self._bar.close()
        self._log()

    def _tokens_per_second(self) -> float:
        return self._decoding.tokens / (time.monotonic() - self._started)

    def _log(self) -> None:
        self._logged = time.monotonic()
        if not self._logs:
            return
        of, left = "", ""
        if self._total is not None:
            of = f" of {self._total}"
            seconds = (self._total - self._done) * (self._logged - self._started) / max(self._made, 1)
            left = f", {tqdm.format_interval(seconds)} left" if self._made else ""
        speed = self._tokens_per_second()
        logger.info("%s: %d%s rows, %d failed, %.0f tokens/s%s", self._name, self._done, of, self._failed, speed, left)
