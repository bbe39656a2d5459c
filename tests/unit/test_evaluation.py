"""The interval of an evaluation, and what is said of two of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset

from dual_rollout.training.evaluation import before_and_after, interval, rewards_of_rows
from dual_rollout.training.tasks import hold_out


def test_the_interval_of_shares_is_wilsons() -> None:
    low, high = interval([1.0] * 8 + [0.0] * 24)
    for edge in (low, high):  # the shares that 8 of 32 are 1.96 standard deviations from
        assert abs(0.25 - edge) == pytest.approx(1.96 * math.sqrt(edge * (1 - edge) / 32), rel=1e-6)
    assert interval([0.0] * 10)[0] == 0.0 and 0.2 < interval([0.0] * 10)[1] < 0.35, "not empty at the edge"
    assert interval([1.0] * 10)[1] == 1.0


def test_the_interval_of_other_rewards_is_of_their_mean() -> None:
    rewards = [0.5, 1.0, 0.0, 2.0]
    low, high = interval(rewards)
    assert (low + high) / 2 == pytest.approx(np.mean(rewards))
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(rewards, ddof=1) / 2)
    assert interval([0.5]) == (0.5, 0.5)


def test_completions_of_one_row_count_as_one() -> None:
    nan = math.nan
    assert rewards_of_rows([1.0, 0.0, nan, 0.5, nan, nan], 2) == [0.5, 0.5]
    assert rewards_of_rows([1.0, 0.0], 1) == [1.0, 0.0] and rewards_of_rows([], 4) == []
    copies = rewards_of_rows([reward for reward in (1.0, 0.0, 0.0) for _ in range(8)], 8)
    assert interval(copies) == interval([1.0, 0.0, 0.0]), "eight copies of a row tell no more than one"


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_an_interval_holds_the_truth_about_as_often_as_it_says(share: float) -> None:
    """The sum over all outcomes of 32 rows; with so few, its level moves by some percent with the share."""
    level = 0.0
    for right in range(33):
        low, high = interval([1.0] * right + [0.0] * (32 - right))
        if low <= share <= high:
            level += math.comb(32, right) * share**right * (1 - share) ** (32 - right)
    assert 0.92 < level < 0.985


def entry(step: int, reward: float, low: float, high: float) -> dict[str, float]:
    return {
        "step": step,
        "eval_reward": reward,
        "eval_reward_rows": 32,
        "eval_reward_low": low,
        "eval_reward_high": high,
    }


def test_before_and_after_in_words() -> None:
    start = entry(0, 0.25, 0.13, 0.42)
    assert before_and_after([]) == before_and_after([start]) == before_and_after([{"step": 1, "reward": 1.0}]) == ""
    for last, words in (
        (entry(20, 0.4, 0.25, 0.57), "show no difference"),
        (entry(20, 0.9, 0.75, 0.97), "got better"),
        (entry(20, 0.0, 0.0, 0.11), "got worse"),
    ):
        said = before_and_after([start, {"step": 5, "reward": 0.5}, last])
        assert words in said and "on 32 held-out rows" in said
        assert "0 steps  reward 0.250  (0.130 to 0.420)" in said and "20 steps" in said
        assert max(map(len, said.splitlines())) <= 80


def test_held_out_questions_are_not_trained_on() -> None:
    rows = Dataset.from_dict({"question": ["a", "b", "a", "c", "c", "d", "e"]})
    train, test = hold_out(rows, 3, 2)
    assert (train["question"][:], test["question"][:]) == (["a", "b", "a"], ["c", "d"])
    with pytest.raises(ValueError, match="dual_eval_rows=4: the task has 3 questions beside those of dual_task_size=3"):
        hold_out(rows, 3, 4)
