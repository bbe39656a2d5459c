"""What to train on: tasks with verifiable rewards from reasoning-gym, made offline, or a dataset, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from dual_rollout.training.contexts import column_names

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class TaskReward:
    """Scores completions with the task's own scorer, on the answer found in them; in [0, 1]."""

    def __init__(self, task: Any):
        self.__name__ = "task_reward"
        self._task = task

    def __call__(self, completions: list[Any], task_index: list[int], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [
            float(self._task.score_answer(final_answer(text), self._task[index]))
            for text, index in zip(texts, task_index, strict=True)
        ]


def load_task(name: str, *, size: int, seed: int, options: dict[str, Any]) -> tuple[Dataset, TaskReward]:
    """A dataset with columns `prompt` (chat messages), `question`, `answer`, `task_index`, and its reward.

    Raises:
        ValueError: reasoning-gym is missing, or has no such task or option.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError("dual_task needs reasoning-gym: pip install 'dual_rollout[demo]'") from error
    try:
        task = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"dual_task={name!r} with dual_task_options={options}: {error}") from error
    rows = [
        {
            "prompt": [{"role": "user", "content": entry["question"]}],
            "question": entry["question"],
            "answer": str(entry["answer"]),
            "task_index": index,
        }
        for index, entry in enumerate(task)
    ]
    return Dataset.from_list(rows), TaskReward(task)


def first_new(questions: Iterable[str], known: Iterable[str], count: int) -> list[int]:
    """Where the first `count` questions stand, or fewer, that are neither among `known` nor were there before."""
    seen, found = set(known), list[int]()
    for index, question in enumerate(questions):
        if question not in seen and len(found) < count:
            seen.add(question)
            found.append(index)
    return found


def hold_out(rows: Dataset, size: int, held_out: int) -> tuple[Dataset, Dataset]:
    """The first `size` rows to train on, and of the others the first `held_out` whose questions are new.

    Raises:
        ValueError: there are not so many.
    """
    questions = rows["question"]
    kept = [size + index for index in first_new(questions[size:], questions[:size], held_out)]
    if len(kept) < held_out:
        raise ValueError(
            f"dual_eval_rows={held_out}: the task has {len(kept)} questions beside those of dual_task_size={size} that "
            "it trains on: make one of them smaller, or let dual_task_options make more questions"
        )
    return rows.select(range(size)), rows.select(kept)


def task_options(text: str) -> dict[str, Any]:
    """`dual_task_options` parsed.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"dual_task_options is not valid JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f'dual_task_options must be a JSON object such as {{"max_terms": 3}}, got {text!r}')
    return options


def load_rows(
    name: str, config: str | None, splits: Sequence[str], *, streaming: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """The splits that a run uses of a dataset by name or folder, each with rows and a column `prompt`.

    Raises:
        ValueError: it cannot be read, or lacks a split or the column.
    """
    try:
        dataset = load_dataset(name, name=config, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"dataset_name={name!r} cannot be loaded: {error}") from error
    for split in splits:
        if split not in dataset:
            raise ValueError(
                f"{name} has no split {split!r} but {', '.join(dataset)}: set dataset_train_split, dataset_test_split"
            )
        columns = column_names(dataset[split])
        if next(iter(dataset[split]), None) is None:
            raise ValueError(f"the split {split!r} of {name} has no rows")
        if "prompt" not in columns:
            raise ValueError(f"{name} has no column 'prompt' but {', '.join(columns)}: rename the one with the prompts")
    return {split: dataset[split] for split in splits}


def final_answer(text: str) -> str:
    """What a completion answers: the last <answer> tag's content, else its last number, else all of it."""
    if tagged := _TAGGED.findall(text):
        return tagged[-1].strip()
    if numbers := _NUMBER.findall(text):
        return numbers[-1]
    return text.strip()
