"""Whether π_t differs from π_θ at all: where it does not, every weight is 1 and nothing else would show it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from dual_rollout.config import did_you_mean
from dual_rollout.training.contexts import T_PROMPT_COLUMN, column_names
from dual_rollout.training.processes import process_index
from dual_rollout.types import GenerationOutput, Prompt

logger = logging.getLogger(__name__)

_SAME = 1e-3  # nats per token; the numerics of two servers stay below it
_ENOUGH = 16  # tokens; at fewer any two models may agree


class TargetCheck:
    """Warns once, from the first tokens that were drawn with a target, if the target adds nothing."""

    def __init__(self) -> None:
        self._kl: list[float] = []
        self._decided = False

    def look_at(
        self, outputs: Sequence[GenerationOutput], t_prompts: Sequence[Prompt | None] | None, dataset: Any = None
    ) -> None:
        """See a rollout, whose diagnostics were asked for.

        Args:
            t_prompts: what π_t saw instead of the prompts; None where it saw the same.
            dataset: whose columns the prompts are from.
        """
        if self._decided:
            return
        for record in (output.record for output in outputs):
            kl_theta, kl_t = (record.diagnostics.get(name, []) for name in ("kl_theta", "kl_t"))
            tokens = zip(record.without_target, kl_theta, kl_t, strict=True)
            self._kl += [max(own, other) for without_target, own, other in tokens if not without_target]
        if len(self._kl) < _ENOUGH:
            return
        self._decided = True
        divergence = float(np.mean(self._kl))
        self._kl.clear()
        if divergence < _SAME and process_index() == 0:
            logger.warning(
                "The target adds nothing: π_t gives the same probabilities as π_θ (%.1e nats apart per token), so that "
                "every weight is 1 and q* is the policy itself. Both are one model so far, and %s",
                divergence,
                _what_it_sees(t_prompts, dataset),
            )


def _what_it_sees(t_prompts: Sequence[Prompt | None] | None, dataset: Any) -> str:
    if t_prompts is not None:
        return "the prompts that π_t sees, t_prompts, make no difference"
    if dataset is None:
        return "π_t sees the policy's prompt, for no t_prompts were given"
    columns = [name for name in column_names(dataset) if name != "prompt"]
    return (
        f"π_t sees the policy's prompt, for the dataset has no column {T_PROMPT_COLUMN!r} that is not null"
        f"{did_you_mean(T_PROMPT_COLUMN, columns)}"
    )
