"""Tasks with verifiable rewards from reasoning-gym: questions, answers and scorers, made offline."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset

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


def final_answer(text: str) -> str:
    """What a completion answers: the last <answer> tag's content, else its last number, else all of it."""
    if tagged := _TAGGED.findall(text):
        return tagged[-1].strip()
    if numbers := _NUMBER.findall(text):
        return numbers[-1]
    return text.strip()
