"""The turns of one rollout of a trainer: after a tool's result the policy goes on, and so does q*.

TRL's tool loop asks for the first turn of all rows at once, runs the tools that were called, and asks for the next turn
of the rows that called one, with all tokens so far. π_t sees its own first prompt and then the same tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dual_rollout.config import NO_TARGET
from dual_rollout.record import COUNTS, FLOAT_COLUMNS, KEPT_DIAGNOSTICS, SequenceRecord, oldest_version
from dual_rollout.training.contexts import TargetContexts, same_turns
from dual_rollout.training.rollout_metrics import (
    log_completion_columns,
    log_rollout,
    log_token_counts,
    mode_of,
    token_counts,
)
from dual_rollout.training.schedules import training_progress
from dual_rollout.types import GenerationOutput, Prompt

if TYPE_CHECKING:
    from dual_rollout.training.rollout import DualRollout

ROLLOUT_COLUMNS = (*FLOAT_COLUMNS, "weight_version")
"""What a rollout gives the reward functions, by these names: a float per token of each row, and the version of π_θ's
weights that the row was drawn from."""


class RolloutInProgress:
    """One rollout of a trainer, from the check of π_θ's servers before its first token to that after its last.

    All processes make one together and finish it together. Between these each may draw as often as it has to, for no
    drawing waits for other processes.
    """

    def __init__(self, rollout: DualRollout, trainer: Any):
        state = trainer.state
        self._rollout, self._trainer = rollout, trainer
        self._config = rollout.schedule.at(rollout.config, training_progress(state.global_step, state.max_steps))
        checked = getattr(trainer, "rollout", None) is rollout or trainer.use_vllm
        self._check = rollout.policy_check(trainer) if checked else None
        self._stats = rollout.stats
        self._counts = token_counts(self._stats.decoding)
        self._seconds = 0.0
        self.of_policy = mode_of(trainer) == "eval"
        """Whether it is drawn from π_θ alone, as an evaluation is."""

    def draw(
        self, prompts: Sequence[Prompt], contexts: TargetContexts, max_tokens: Sequence[int] | None = None
    ) -> list[GenerationOutput]:
        """One sequence per prompt.

        Args:
            max_tokens: of each; the trainer's `max_completion_length` when None.

        Raises:
            RolloutError: a sequence failed.
            ValueError: a prompt, or what it is to be drawn with, is wrong.
        """
        started, trainer = time.perf_counter(), self._trainer
        if self.of_policy:
            contexts = TargetContexts(targets=[NO_TARGET] * len(prompts))
        outputs = self._rollout.draw_for(
            trainer,
            prompts,
            contexts,
            trainer.max_completion_length if max_tokens is None else max_tokens,
            self._config,
        )
        self._seconds += time.perf_counter() - started
        return outputs

    def finish(self, rows: Sequence[Sequence[GenerationOutput]]) -> None:
        """Compare π_θ's servers with the policy once more, and log the rollout.

        Args:
            rows: what was drawn for each row of the trainer's batch, turn by turn.

        Raises:
            WeightSyncError: a server does not serve the trainer's policy.
        """
        trainer, outputs = self._trainer, [output for row in rows for output in row]
        log_rollout(trainer, outputs, self._stats.retries, self._seconds)
        log_token_counts(trainer, token_counts(self._stats.decoding) - self._counts)
        metrics = trainer._metrics[mode_of(trainer)]
        if self._check is not None:
            self._check.run(self._rollout.ask_policy_servers, "after the rollout")
            self._check.log(metrics)
        for name in self._rollout.schedule.ends:
            metrics[f"sampling/{name}"].append(getattr(self._config, name))
        log_completion_columns(trainer, rows)


@dataclass(slots=True)
class _Turn:
    """What was drawn for a row, after `start` tokens of its completion."""

    start: int
    output: GenerationOutput


class Turns:
    """The rows of a trainer's rollout, turn by turn.

    Args:
        prompts: token ids, as π_θ sees them.
        contexts: for each, with π_t's prompts as token ids.
        limit: tokens of a completion, other people's among them.
    """

    def __init__(self, rollout: RolloutInProgress, prompts: list[list[int]], contexts: TargetContexts, limit: int):
        self._rollout, self._prompts, self._contexts, self._limit = rollout, prompts, contexts, limit
        self._turns: list[list[_Turn]] = [[] for _ in prompts]

    def first(self) -> list[SequenceRecord]:
        """Draw the first turn of every row. `prompts` then are what π_θ saw of them (`long_prompts`)."""
        outputs = self._rollout.draw(self._prompts, self._contexts)
        for turns, output in zip(self._turns, outputs, strict=True):
            turns.append(_Turn(0, output))
        self._prompts[:] = [output.prompt_token_ids for output in outputs]
        return [output.record for output in outputs]

    def following(self, rows: Sequence[int], contexts: Sequence[list[int]]) -> list[SequenceRecord]:
        """Draw the next turn of some rows, up to what is left of `limit`; nothing where nothing is left.

        Args:
            contexts: all tokens of each so far, the prompt's among them.
        """
        drawn = {row: context for row, context in zip(rows, contexts, strict=True) if self._left(row, context) > 0}
        if not drawn:
            return [SequenceRecord() for _ in rows]
        targets = self._contexts.targets
        seen = TargetContexts(
            [self._seen_by_target(*item) for item in drawn.items()],
            None if targets is None else [targets[row] for row in drawn],
        )
        outputs = self._rollout.draw(list(drawn.values()), seen, [self._left(*item) for item in drawn.items()])
        for (row, context), output in zip(drawn.items(), outputs, strict=True):
            self._turns[row].append(_Turn(len(context) - len(self._prompts[row]), output))
        return [self._turns[row][-1].output.record if row in drawn else SequenceRecord() for row in rows]

    def finish(self, completions: Sequence[list[int]]) -> dict[str, list[Any]]:
        """End the rollout.

        Args:
            completions: the tokens of each row as the trainer has them, drawn or not.

        Returns:
            `ROLLOUT_COLUMNS`, `KEPT_DIAGNOSTICS` and `COUNTS`, one entry per row. Of tokens that were not drawn the
            floats are NaN.
        """
        self._rollout.finish([[turn.output for turn in turns] for turns in self._turns])
        both = list(zip(self._turns, completions, strict=True))
        counts = {
            name: [sum(getattr(turn.output.record, name) for turn in turns) for turns in self._turns] for name in COUNTS
        }
        return {name: [_column(name, *row) for row in both] for name in (*FLOAT_COLUMNS, *KEPT_DIAGNOSTICS)} | {
            "weight_version": [oldest_version([turn.output.weight_version for turn in turns]) for turns in self._turns],
            **counts,
        }

    def _left(self, row: int, context: list[int]) -> int:
        return self._limit - (len(context) - len(self._prompts[row]))

    def _seen_by_target(self, row: int, context: list[int]) -> list[int] | None:
        first: Any = None if self._contexts.t_prompts is None else self._contexts.t_prompts[row]
        return None if first is None else same_turns(self._prompts[row], first, context)


def rows_with_results(
    messages: Sequence[Sequence[Mapping[str, Any]]], completions: Sequence[list[int]], limit: int
) -> list[int]:
    """The rows that TRL's tool loop asks the next turn of: those that end with a tool's result.

    Args:
        messages: of each row's completion, as the loop has them at that moment.
        completions: its tokens, without the result.
        limit: tokens of a completion. A row that has reached it may end with a result, but is asked no more.
    """
    rows = enumerate(zip(messages, completions, strict=True))
    return [row for row, (said, ids) in rows if said[-1]["role"] == "tool" and len(ids) < limit]


def _column(name: str, turns: list[_Turn], completion: list[int]) -> list[float]:
    """A row's numbers, one for each token of its completion."""
    column = [math.nan] * len(completion)
    for turn in turns:
        record = turn.output.record
        own = slice(turn.start, turn.start + len(record.token_ids))
        if completion[own] != record.token_ids:
            raise RuntimeError("the trainer's completion is not what was drawn: this version of TRL is not known")
        column[own] = record.diagnostics[name] if name in KEPT_DIAGNOSTICS else getattr(record, name)
    return column
