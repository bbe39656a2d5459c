"""The two tasks, their prompts, and the worked solutions that the teacher is taught."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from dual_rollout.training.tasks import TaskReward, first_new, load_task

_TRAINING_ROWS, _HELD_OUT_ROWS = 2048, 512
_HELD_OUT_SEED = 10_000_000  # reasoning-gym's item i of seed s is drawn from the seed s + i
_TEACHER_SEED = 20_000_000


@dataclass(frozen=True)
class Task:
    """A reasoning-gym task.

    Attributes:
        options: the task's own.
        solution: a question's worked solution, whose last number is the answer.
        max_tokens: of a completion.
        teacher_success: the teacher is trained until this share of held-out questions is answered.
        policy_success: a policy that is trained from scratch stops there.
    """

    name: str
    options: dict[str, Any]
    solution: Callable[[str], str]
    max_tokens: int
    teacher_success: float = 0.6
    policy_success: float = 0.01

    def training_rows(self) -> tuple[Dataset, Success]:
        rows, reward = load_task(self.name, size=_TRAINING_ROWS, seed=0, options=self.options)
        return rows, Success(reward)

    def held_out_rows(self) -> tuple[Dataset, Success]:
        """Questions that are neither among the training rows nor twice among these."""
        known = self.training_rows()[0]["question"]
        rows, reward = load_task(self.name, size=4 * _HELD_OUT_ROWS, seed=_HELD_OUT_SEED, options=self.options)
        return rows.select(first_new(rows["question"], known, _HELD_OUT_ROWS)), Success(reward)

    def worked(self, size: int) -> list[tuple[str, str]]:
        """Questions and solutions for the teacher, without those that are held out."""
        held_out = {row["question"] for row in self.held_out_rows()[0]}
        rows, _ = load_task(self.name, size=size, seed=_TEACHER_SEED, options=self.options)
        questions = [row["question"] for row in rows if row["question"] not in held_out]
        return [(question, self.solution(question)) for question in questions]


class Success:
    """1 for a completion whose answer is right and 0 for any other: no credit for an answer that can be read."""

    __name__ = "success"

    def __init__(self, reward: TaskReward):
        self._reward = reward

    def __call__(self, completions: list[Any], task_index: list[int], **_: Any) -> list[float]:
        return [float(score >= 1.0) for score in self._reward(completions, task_index)]


def running_sum(question: str) -> str:
    """One operation a line: `36 + 29 = 65`, `65 - 12 = 53`, and the answer."""
    total, *terms = re.findall(r"[+-]? ?\d+", question)
    lines, result = [], int(total)
    for term in terms:
        sign, number = term[0], int(term[1:])
        new = result + number if sign == "+" else result - number
        lines.append(f"{result} {sign} {number} = {new}")
        result = new
    return "\n".join([*lines, f"The answer is {result}."])


def sum_by_parts(question: str) -> str:
    """Tens, then ones, then both: `40 + 30 = 70`, `7 + 8 = 15`, `70 + 15 = 85`, and the answer."""
    first, sign, second = re.findall(r"(\d+) ([+-]) (\d+)", question)[0]
    factor = 1 if sign == "+" else -1
    tens = int(first) // 10 * 10, int(second) // 10 * 10
    ones = int(first) % 10, int(second) % 10
    parts = [a + factor * b for a, b in (tens, ones)]
    joined = f"{parts[0]} {'-' if parts[1] < 0 else '+'} {abs(parts[1])}"
    lines = [f"{a} {sign} {b} = {part}" for (a, b), part in zip((tens, ones), parts, strict=True)]
    return "\n".join([*lines, f"{joined} = {sum(parts)}", f"The answer is {sum(parts)}."])


def partial_products(question: str) -> str:
    """The first factor times the tens and the ones of the second, and their sum."""
    first, second = map(int, re.findall(r"\d+", question))
    tens, ones = second // 10 * 10, second % 10
    return "\n".join(
        [
            f"{first} * {tens} = {first * tens}",
            f"{first} * {ones} = {first * ones}",
            f"{first * tens} + {first * ones} = {first * second}",
            f"The answer is {first * second}.",
        ]
    )


TASKS = {
    "products": Task(
        "products", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, partial_products, 64
    ),
    "long_sums": Task("chain_sum", {"min_terms": 5, "max_terms": 5, "min_digits": 2, "max_digits": 2}, running_sum, 72),
    "sums": Task(
        "chain_sum",
        {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        sum_by_parts,
        48,
    ),
    "easier_sums": Task(
        "chain_sum",
        {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        sum_by_parts,
        48,
        policy_success=0.15,
    ),
    "short_sums": Task(
        "chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}, running_sum, 48
    ),
}
