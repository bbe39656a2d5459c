"""Runs of two processes on a CPU: slices, seeds, weights, and faults that reach both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dual_rollout.functional.importance_weights import effective_sample_size
from dual_rollout.server.launch import EmbeddedServer
from dual_rollout.training.rollout_metrics import over_processes
from dual_rollout.training.script import check_processes
from tests.integration.conftest import TinyPair
from tests.recording_reward import read_records
from tests.runs import (
    communicate,
    finish,
    metrics,
    one_process,
    rank_environments,
    start,
    two_processes,
    wait_until,
    write_recipe,
)
from tests.warm_servers import WarmServer


@pytest.fixture(scope="module")
def run_of_two(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by `accelerate launch`, with servers that its main process starts."""
    folder = tmp_path_factory.mktemp("two")
    evaluation = {"dual_eval_rows": 5, "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    finish(start(two_processes(write_recipe(folder, tiny_models, **evaluation)), folder))
    return folder


def trained_on(folder: Path, process: int) -> list[dict[str, Any]]:
    """Its records but for those of evaluations, which are of the policy alone."""
    return [record for record in read_records(folder, process) if np.concatenate(record["alpha"]).any()]


def of_steps(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in metrics(folder / "recipe.yaml") if "reward" in entry]


def tokens(records: list[dict[str, Any]]) -> list[list[list[int]]]:
    return [record["completion_ids"] for record in records]


def test_each_process_rolls_out_its_own_slice_with_its_own_seed(run_of_two: Path) -> None:
    first, second = (trained_on(run_of_two, process) for process in (0, 1))
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        assert len(set(one["questions"])) == len(set(other["questions"])) == 1, "a group of 4 in each process"
        assert one["questions"] != other["questions"]
        assert one["completion_ids"] != other["completion_ids"]


def test_both_processes_sample_from_the_weights_of_the_step(run_of_two: Path) -> None:
    for process in (0, 1):
        versions = [record["weight_version"] for record in trained_on(run_of_two, process)]
        assert versions == [[0] * 4, [1] * 4, [2] * 4]
    for entry in of_steps(run_of_two):
        # Of both processes: log π_θ of the server against that of the trainer, whose weights are the step's own.
        assert entry["sampling/policy_drift/max"] < 1e-3


def test_metrics_are_those_of_both_processes(run_of_two: Path) -> None:
    entries = of_steps(run_of_two)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry, *records in zip(entries, trained_on(run_of_two, 0), trained_on(run_of_two, 1), strict=True):
        alpha, weights = (
            np.array([value for record in records for row in record[name] for value in row])
            for name in ("alpha", "importance_weights")
        )
        for name, values in (("alpha", alpha), ("rollout_weight", weights)):
            for reduce in ("min", "mean", "max"):
                expected = getattr(values, reduce)()
                assert entry[f"sampling/{name}/{reduce}"] == pytest.approx(expected, rel=1e-5)
        assert entry["sampling/effective_sample_size_ratio"] == pytest.approx(effective_sample_size(weights), rel=1e-5)
        rewards = [float(sum(ids) % 7) for record in records for ids in record["completion_ids"]]
        assert entry["rewards/recorded/mean"] == pytest.approx(sum(rewards) / 8)


def test_an_evaluation_counts_each_row_once(run_of_two: Path) -> None:
    """Ten completions make three batches of four, the last of which is filled up with the first row's."""
    entries = [entry for entry in metrics(run_of_two / "recipe.yaml") if "eval_reward" in entry]
    assert [(entry["step"], entry["eval_reward_rows"]) for entry in entries] == [(0, 5), (3, 5)]
    assert sum(len(record["questions"]) for process in (0, 1) for record in read_records(run_of_two, process)) == 48


class Gathering:
    """An accelerator of the last of several processes, which is given what the others gave before."""

    device = torch.device("cpu")

    def __init__(self, *others: torch.Tensor):
        self.given = list(others)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        self.given.append(values)
        return torch.cat(self.given)


def test_each_value_counts_once_however_many_a_process_has() -> None:
    first = Gathering()
    assert over_processes(first, []) == {}
    second = Gathering(*first.given)
    assert over_processes(second, [1.0, 7.0]) == {"count": 2, "min": 1, "mean": 4, "max": 7}
    third = Gathering(*second.given)
    assert over_processes(third, [math.nan, 0.5, 0.5, 1.0]) == {"count": 5, "min": 0.5, "mean": 2, "max": 7}


@pytest.fixture(scope="module")
def policy_server(tiny_models: tuple[Path, Path]) -> Iterator[EmbeddedServer]:
    flags = ["--max-logprobs", "-1", "--max-model-len", "256", "--threads", "1"]
    with WarmServer(tiny_models[0], flags) as server:
        yield server


def test_the_same_seed_repeats_a_run_and_a_lost_server_ends_both_processes(
    run_of_two: Path, policy_server: EmbeddedServer, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    """Here without the evaluations, which leave the training's streams and rows alone."""
    urls = {"dual_theta_url": policy_server.url, "dual_t_url": tiny_pair.t_url, "dual_max_retries": 0}
    recipe = write_recipe(tmp_path, (tiny_pair.theta_model, tiny_pair.t_model), **urls)
    runs = [start(one_process(recipe), tmp_path, HOLD_AT_STEP="1", **rank) for rank in rank_environments()]
    try:
        for process in (0, 1):
            wait_until((tmp_path / f"held-{process}").exists, *runs)
        policy_server.stop()  # the sync before the third step fails in the main process
        (tmp_path / "go").touch()
        errors = [communicate(run)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    for process in (0, 1):
        assert tokens(read_records(tmp_path, process)) == tokens(trained_on(run_of_two, process)[:2])
    assert [run.returncode for run in runs] == [1, 1]
    assert policy_server.url in errors[0].splitlines()[-1]
    assert f"process 0 of 2 failed with EngineUnavailableError: {policy_server.url}" in errors[1].splitlines()[-1]


def test_a_rollout_that_fails_in_one_process_ends_both(tiny_pair: TinyPair, tmp_path: Path) -> None:
    urls = {"dual_theta_url": tiny_pair.theta_url, "dual_t_url": tiny_pair.t_url, "dual_max_retries": 0}
    recipe = write_recipe(tmp_path, (tiny_pair.theta_model, tiny_pair.t_model), **urls)
    first, second = rank_environments()
    runs = [
        start(one_process(recipe), tmp_path, **first),
        start(one_process(recipe, "--dual_t_url", "http://127.0.0.1:1"), tmp_path, **second),
    ]
    errors = [communicate(run)[1] for run in runs]
    assert [run.returncode for run in runs] == [1, 1]
    assert "process 1 of 2 failed with" in errors[0].splitlines()[-1]
    assert "http://127.0.0.1:1" in errors[1].splitlines()[-1]


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what two are on a machine without a GPU, when the recipe does not say use_cpu: true."""
    check_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but each of them trains with 1"):
        check_processes()
