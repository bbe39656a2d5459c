"""What `dual-rollout train` shows while it works, and at its end."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from dual_rollout import DualGRPOTrainer
from dual_rollout.cli import main
from dual_rollout.training.alarms import alarms
from dual_rollout.training.console import (
    COLUMNS,
    STEP_WIDTH,
    WITHOUT_REWARDS,
    evaluation_lines,
    heading_line,
    step_line,
)
from dual_rollout.training.display import RichDisplay
from tests.integration.conftest import TinyPair
from tests.integration.test_stopped_runs import stopping_recipe
from tests.integration.test_training import chat_dataset, dual_config, grpo_config

STEP = {
    "reward": 0.512,
    "sampling/alpha/mean": 0.487,
    "sampling/effective_sample_size_ratio": 0.87,
    "sampling/importance_sampling_ratio/max": 2.134,
    "sampling/policy_drift/mean": 0.0021,
    "rollout/tokens_per_second": 35.1,
    "rollout/seconds": 12.34,
    "perf/weight_sync_s": 1.2,
    "perf/update_s": 9.8,
}


def test_a_step_is_one_line_under_its_heading() -> None:
    line = step_line(12, STEP)
    assert line.split() == ["12", "0.512", "0.49", "0.87", "2.13", "0.0021", "35", "12.3", "s", "1.2", "s", "9.8", "s"]
    assert len(line) == len(heading_line()) == STEP_WIDTH + sum(width for _, width, _, _ in COLUMNS) <= 80
    assert step_line(13, {"reward": 1.0}).split() == ["13", "1.000", *["–"] * 8], "what a step does not have"
    assert step_line(14, {"loss": 0.1234}, WITHOUT_REWARDS).split() == ["14", "0.123", *["–"] * 8]
    assert (
        heading_line(WITHOUT_REWARDS).split()[:3] == ["step", "loss", "α"] and len(heading_line(WITHOUT_REWARDS)) <= 80
    )
    large = dict.fromkeys(STEP, 123456.7)
    assert len(step_line(1234567, large).split()) == len(line.split()), "no two cells touch"


def test_an_evaluation_is_of_the_policy_and_names_its_dataset() -> None:
    assert evaluation_lines(4, STEP) == []
    (plain,) = evaluation_lines(4, {"eval_reward": 0.25, "eval_loss": 1.0})
    (named,) = evaluation_lines(4, {"eval_hard_reward": 0.5})
    assert "0.250" in plain and plain.endswith("policy alone, evaluated")
    assert "0.500" in named and named.endswith("evaluated hard") and len(named) <= 80


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"sampling/policy_drift/mean": 0.3}, "drift", ("0.3 nats", "bfloat16", "dropout")),
        ({"sampling/effective_sample_size_ratio": 0.04}, "ess", ("4.0%", "kl_budget")),
        ({"frac_reward_zero_std": 1.0}, "no signal", ("rewards are equal",)),
    ],
)
def test_what_is_wrong_is_said_in_words(changes: dict[str, float], name: str, words: tuple[str, ...]) -> None:
    well = {**STEP, "frac_reward_zero_std": 0.5}
    assert alarms(well) == alarms({}) == {}
    found = alarms({**well, **changes})
    assert set(found) == {name} and all(word in found[name] for word in words)


def run(recipe: Path, capfd: pytest.CaptureFixture[str], *flags: str) -> tuple[str, str]:
    assert main(["train", str(recipe), *flags]) == 0
    return capfd.readouterr()


def test_a_run_shows_its_steps_and_each_alarm_once(
    tiny_pair: TinyPair, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Both models are one, with one prompt; the reward is the length, which is the same for all."""
    same = {"dual_t_url": tiny_pair.theta_url, "dual_t_prompt_template": None, "disable_tqdm": False}
    recipe = stopping_recipe(tmp_path, tiny_pair, **same, save_strategy="steps", save_steps=1)
    out, err = run(recipe, capfd)
    lines = out.splitlines()
    assert lines.count(heading_line()) == 1 and out.count("! Within each group") == 1
    assert caplog.text.count("The target adds nothing") == 1 and "adds nothing" not in out, "in one place"
    steps = [line for line in lines if line[:STEP_WIDTH].strip() in ("1", "2", "3") and "policy" not in line]
    assert len(steps) == 3 and all(len(line) <= 80 for line in steps)
    ours = out + "\n".join(line for line in err.splitlines() if not line.startswith("[transformers]"))
    assert "{'" not in ours, "no dictionaries"
    assert max(len(line) for line in lines if line.startswith(("! ", "  "))) <= 80
    assert "training:" in err and "model shards" not in err, "one bar, and none for what is saved"


def test_an_error_leaves_no_bar_and_the_cursor_is_back(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """In a script of one's own, too."""

    def failing(completions: list[Any], **_: Any) -> list[float]:
        raise OSError("the judge is away")

    trainer = DualGRPOTrainer(
        model=str(tiny_pair.theta_model),
        reward_funcs=failing,
        args=grpo_config(tmp_path, disable_tqdm=False),
        train_dataset=chat_dataset(),
        dual_config=dual_config(tiny_pair),
    )
    file = io.StringIO()
    trainer.console.display = RichDisplay(RichConsole(file=file, width=80, force_terminal=True))
    with trainer.rollout, pytest.raises(OSError, match="judge"):
        trainer.train()
    shown = file.getvalue()
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert "0/2" in shown and shown.rindex(hide) < shown.rindex(show)


def test_a_run_shorter_than_its_logging_steps_has_a_table(
    tiny_pair: TinyPair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(stopping_recipe(tmp_path, tiny_pair, max_steps=2, logging_steps=100), capfd)
    table = out[out.index("first") :]
    for figure in ("reward", "α mean", "ESS ratio", "update, s"):
        assert figure in table
    assert max(columns(line) for line in table.splitlines() if str(tmp_path) not in line) <= 80


def columns(line: str) -> int:
    return sum(not unicodedata.combining(character) for character in line)
