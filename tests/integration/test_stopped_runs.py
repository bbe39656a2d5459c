"""A training run that Ctrl-C or an error stops: what it says, what it leaves, and that it can be begun again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dual_rollout.cli import main
from dual_rollout.training.arguments import parse_recipe
from dual_rollout.training.script import _server_flags
from tests.integration.conftest import TinyPair
from tests.runs import metrics, write_recipe


def stopping(completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
    """A reward that presses Ctrl-C, or fails, in the step that the environment names."""
    if str(trainer_state.global_step) == os.environ.get("PRESS_CTRL_C_AT"):
        signal.raise_signal(signal.SIGINT)
    if str(trainer_state.global_step) == os.environ.get("FAIL_AT"):
        raise OSError("the judge is away")
    return [float(len(ids)) for ids in columns["completion_ids"]]


def stopping_recipe(folder: Path, pair: TinyPair, **changes: Any) -> Path:
    urls = {"dual_theta_url": pair.theta_url, "dual_t_url": pair.t_url}
    reward = {"reward_funcs": ["tests.integration.test_stopped_runs.stopping"]}
    return write_recipe(folder, (pair.theta_model, pair.t_model), **{**urls, **reward, **changes})


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = stopping_recipe(tmp_path, tiny_pair, max_steps=4, save_strategy="steps", save_steps=2)
    monkeypatch.setenv("PRESS_CTRL_C_AT", "3")
    assert main(["train", str(recipe)]) == 130
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and "interrupted" in printed.err
    assert "ESS ratio" in printed.out, "the table of the steps that were done"
    assert (
        f"The run stopped after 3 of 4 steps. The last checkpoint is {tmp_path}/out/checkpoint-2. 1 step after it is "
        "lost. Go on from it with --resume_from_checkpoint true." in printed.out
    )
    monkeypatch.delenv("PRESS_CTRL_C_AT")
    assert main(["train", str(recipe), "--resume_from_checkpoint", "true"]) == 0
    assert [entry["step"] for entry in metrics(recipe)] == [1, 2, 3, 4]
    printed = capsys.readouterr()
    assert "metrics.jsonl." in printed.out and "logs" not in printed.out, "its servers are not the run's own"


def test_what_no_checkpoint_holds_is_lost(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = stopping_recipe(tmp_path, tiny_pair, max_steps=2)
    monkeypatch.setenv("FAIL_AT", "1")
    assert main(["train", str(recipe)]) == 2
    printed = capsys.readouterr()
    assert "error: the judge is away" in printed.err
    assert "after 1 of 2 steps. They are lost" in printed.out and "save_strategy is no" in printed.out
    assert main(["train", str(recipe)]) == 2
    assert "is not empty" in capsys.readouterr().err, "its metrics are of a step that was trained"


def test_when_the_target_is_gone_it_is_said_how_to_go_on_without(
    tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"dual_t_url": "http://127.0.0.1:9", "dual_max_retries": 0}
    assert main(["train", str(stopping_recipe(tmp_path, tiny_pair, **gone))]) == 1
    printed = capsys.readouterr()
    assert "127.0.0.1:9" in printed.err and "dual_on_target_failure: policy" in printed.out


def test_a_run_that_stopped_in_its_first_step_is_begun_again_by_the_same_command(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = stopping_recipe(tmp_path, tiny_pair, max_steps=1, report_to="tensorboard")
    monkeypatch.setenv("FAIL_AT", "0")
    assert main(["train", str(recipe)]) == 2
    assert "Nothing was trained; the same command begins anew." in capsys.readouterr().out
    assert any((tmp_path / "out").iterdir()), "the test needs that something is left"
    monkeypatch.delenv("FAIL_AT")
    assert main(["train", str(recipe)]) == 0
    assert [entry["step"] for entry in metrics(recipe)] == [1]


@pytest.mark.parametrize(("temperature", "mode"), [(1.0, []), (0.7, ["--logprobs-mode", "processed_logprobs"])])
def test_servers_of_the_run_report_what_its_temperature_needs(
    tmp_path: Path, temperature: float, mode: list[str]
) -> None:
    """As `dual_decoding: block` does, which a server with raw log-probabilities would be refused for."""
    changes = {"temperature": temperature, "dual_decoding": "block"}
    recipe = write_recipe(tmp_path, (tmp_path / "theta", tmp_path / "t"), **changes)
    flags = _server_flags(parse_recipe(["--config", str(recipe)]))
    assert [flag for flag in flags if "logprobs" in flag and flag != "--max-logprobs"] == mode
