"""What π_t sees, and which π_t it is: the dataset's columns `t_prompt` and `t_target`, and how they reach a rollout.

`t_prompt` is a prompt like `prompt`; where a row has none (null), π_t sees `prompt`. `t_target` is a name in
`CoordinatorConfig.targets`, "none" for no target (α = 0, weight 1), or null for the one at `t_url`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from dual_rollout.prompts import target_prompt
from dual_rollout.types import Prompt

T_PROMPT_COLUMN = "t_prompt"
T_TARGET_COLUMN = "t_target"
CONTEXT_COLUMNS = (T_PROMPT_COLUMN, T_TARGET_COLUMN)


@dataclass(frozen=True)
class TargetContexts:
    """One entry per row; None where no row has the column.

    Attributes:
        t_prompts: what π_t sees; None in rows where it is what π_θ sees.
        targets: names of targets.
    """

    t_prompts: Sequence[Prompt | None] | None = None
    targets: Sequence[str | None] | None = None

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> TargetContexts:
        """The contexts of dataset rows."""
        found = {name: [row.get(name) for row in rows] for name in CONTEXT_COLUMNS}
        t_prompts, targets = (None if all(entry is None for entry in found[name]) else found[name] for name in found)
        return cls(t_prompts, targets)

    def with_observations(self, prompts: Sequence[Prompt | None], shown: Sequence[Prompt]) -> TargetContexts:
        """π_t's prompts with what TRL has added to the policy's: the first observations of environments.

        Args:
            prompts: of the dataset's rows.
            shown: what the policy sees of them.
        """
        if self.t_prompts is None:
            return self
        rows = zip(self.t_prompts, prompts, shown, strict=True)
        return replace(self, t_prompts=[None if row[0] is None else _with_observation(*row) for row in rows])


class TargetContextsByPrompt:
    """Finds the contexts of prompts in a trainer's dataset, for a rollout function, which is given prompts alone."""

    def __init__(self) -> None:
        self._known: tuple[Any, dict[bytes, dict[str, Any]]] = (None, {})

    def find(self, prompts: Sequence[Prompt], trainer: Any) -> TargetContexts:
        """The contexts of `prompts`, rows of the training dataset.

        Raises:
            ValueError: the dataset cannot be looked up, or has two contexts for one prompt, or a prompt is not in it.
        """
        if self._known[0] is not trainer.train_dataset:
            self._known = (trainer.train_dataset, _by_prompt(trainer.train_dataset))
        by_prompt = self._known[1]
        if not by_prompt:
            return TargetContexts()
        rows = []
        for prompt in prompts:
            context = by_prompt.get(_key(prompt))
            if context is None:
                raise ValueError(
                    f"a prompt is not in the trainer's train_dataset, where its {' and '.join(CONTEXT_COLUMNS)} would "
                    f"be looked up: use DualGRPOTrainer, which sees the rows themselves. It begins {str(prompt)[:80]!r}"
                )
            rows.append({"prompt": prompt, **context})
        return TargetContexts.from_rows(rows)


def same_turns(prompt: list[int], t_prompt: list[int], context: list[int]) -> list[int]:
    """What π_t sees in a later turn: its own first prompt, and then the same tokens as π_θ.

    Args:
        prompt: what π_θ saw in the first turn, up to and with what the template puts before an answer.
        t_prompt: what π_t saw then.
        context: what π_θ sees now. A template may put something else before an answer that has been given than before
            one to come; that is then so for π_t as well.

    Raises:
        ValueError: the template has changed more than that.
    """
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, context, strict=False)))
    rewritten = prompt[common:]
    if rewritten and t_prompt[-len(rewritten) :] != rewritten:
        raise ValueError(
            "the chat template rewrites the first prompt in a later turn, so that π_t's cannot be continued as π_θ's "
            "is: use a template that only appends, or leave t_prompt out"
        )
    return t_prompt[: len(t_prompt) - len(rewritten)] + context[common:]


def with_t_prompts(rows: Any, *, template: str | None = None, system_prompt: str | None = None) -> Any:
    """A dataset with a column `t_prompt`, what π_t sees; without template and system prompt as it is.

    Args:
        rows: a dataset or a stream.
        template, system_prompt: as for `dual_rollout.prompts.target_prompt`.

    Raises:
        ValueError: as `target_prompt`, of a stream when it is read.
    """
    if template is None and system_prompt is None:
        return rows
    return rows.map(lambda row: {T_PROMPT_COLUMN: target_prompt(row, template=template, system_prompt=system_prompt)})


def column_names(dataset: Any) -> list[str]:
    """The columns of a dataset; of a stream that does not say, those of its first row."""
    return list(dataset.column_names or next(iter(dataset), {}))


def _by_prompt(dataset: Any) -> dict[bytes, dict[str, Any]]:
    """The context of every prompt; empty where the dataset has none of the columns."""
    named = {*column_names(dataset)} & {*CONTEXT_COLUMNS}
    if not named:
        return {}
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{' and '.join(sorted(named))} cannot be looked up in a streamed dataset: use DualGRPOTrainer, which sees "
            "the rows themselves"
        )
    found: dict[bytes, dict[str, Any]] = {}
    for row in dataset.select_columns(["prompt", *sorted(named)]):
        context = {name: row.get(name) for name in CONTEXT_COLUMNS}
        if found.setdefault(_key(row["prompt"]), context) != context:
            raise ValueError(
                "two rows have one prompt, but not one t_prompt and t_target, and a rollout function is given the "
                "prompt alone: use DualGRPOTrainer, which sees the rows themselves. The prompt begins "
                f"{str(row['prompt'])[:80]!r}"
            )
    return found


def _key(prompt: Prompt) -> bytes:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()


def _with_observation(t_prompt: Any, prompt: Any, shown: Any) -> Prompt:
    """`t_prompt` with what `shown` has at its end and `prompt` does not, in the last message's content."""
    if prompt == shown:
        return t_prompt
    before, content = [] if prompt is None else prompt[-1]["content"], shown[-1]["content"]
    if isinstance(content, str):
        observation = content[len(before) :]
    else:  # parts; TRL makes one of a string
        observation = content[1 if isinstance(before, str) else len(before) :]
    if isinstance(t_prompt, str):
        return t_prompt + _text(observation)
    last = t_prompt[-1]
    if isinstance(last["content"], str):
        return [*t_prompt[:-1], {**last, "content": last["content"] + _text(observation)}]
    parts = [{"type": "text", "text": observation}] if isinstance(observation, str) else observation
    return [*t_prompt[:-1], {**last, "content": [*last["content"], *parts]}]


def _text(observation: Any) -> str:
    return observation if isinstance(observation, str) else "".join(part.get("text", "") for part in observation)
