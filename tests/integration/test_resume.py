"""A run that was killed goes on from its last checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from trl import GRPOConfig, RLOOConfig

from dual_rollout import CoordinatorConfig, DualGRPOTrainer, DualRLOOTrainer
from dual_rollout.training.output_dir import checkpoint_to_resume
from tests.hang import HANG
from tests.integration.conftest import TinyPair
from tests.recording_reward import read_records
from tests.runs import finish, metrics, one_process, run_here, start, two_processes, wait_until, write_recipe

OPTIONS = {
    "dual_task_size": 2,  # an epoch has two steps, or one of two processes
    "seed": 2,  # with which the first two epochs have unlike orders
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "dual_alpha_schedule": "cosine",
    "dual_alpha_max_end": 0.3,
}


@dataclass(frozen=True)
class Runs:
    """A run left alone, and one that was killed in its third step and started again; folders and records."""

    undisturbed: Path
    resumed: Path
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    undisturbed, resumed = tmp_path_factory.mktemp("undisturbed"), tmp_path_factory.mktemp("resumed")
    tiny_models = (tiny_pair.theta_model, tiny_pair.t_model)
    run_here(write_recipe(undisturbed, tiny_models, **OPTIONS, **urls(tiny_pair)), undisturbed)

    recipe = write_recipe(resumed, tiny_models, **OPTIONS, resume_from_checkpoint=True)
    run = start(one_process(recipe), resumed, HOLD_AT_STEP="2")
    wait_until((resumed / "held-0").exists, run)
    run.kill()
    run.communicate()
    before = read_records(resumed, 0)
    for name in ("theta", "t"):
        wait_until_gone(resumed / f"out/server_{name}.log")

    leave_traces_of_a_kill_while_saving(resumed / "out")
    (resumed / "0.jsonl").unlink()
    finish(start(one_process(recipe), resumed))
    return Runs(undisturbed, resumed, before, read_records(resumed, 0))


def urls(pair: TinyPair) -> dict[str, str]:
    """What spares a run the start of servers of its own."""
    return {"dual_theta_url": pair.theta_url, "dual_t_url": pair.t_url}


def wait_until_gone(log: Path) -> None:
    """The embedded server of a killed run ends too."""
    (url,) = [word for word in log.read_text().split() if word.startswith("http://127.0.0.1:")]
    port = urlsplit(url).port

    def refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    wait_until(refused)


def leave_traces_of_a_kill_while_saving(folder: Path) -> None:
    """The third step was logged, its checkpoint is not whole, and a line is cut off."""
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-3")
    state = folder / "checkpoint-3/trainer_state.json"
    state.write_text(state.read_text()[:100])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "reward": -1.0}) + "\n" + '{"step": 4, "rew')


def test_it_goes_on_with_the_same_data_tokens_and_weights(runs: Runs) -> None:
    expected = read_records(runs.undisturbed, 0)
    assert [record["step"] for record in expected] == [0, 1, 2, 3]
    assert [record["step"] for record in runs.before] == [0, 1, 2]
    assert [record["step"] for record in runs.after] == [2, 3]
    for record in runs.before + runs.after:
        same = expected[record["step"]]
        assert record["questions"] == same["questions"]
        assert record["completion_ids"] == same["completion_ids"]
        assert record["weight_version"] == same["weight_version"] == [record["step"]] * 4
        for name in ("alpha", "importance_weights", "logprobs_theta"):
            for row, other in zip(record[name], same[name], strict=True):
                assert row == pytest.approx(other, abs=1e-4)
    assert expected[2]["completion_ids"] != expected[3]["completion_ids"]
    first, second = (expected[step]["questions"] for step in (0, 2))
    assert first != second, "the test needs epochs of unlike order: the killed run was in the second one"


def test_its_metrics_go_on_without_gap_or_repeat(runs: Runs) -> None:
    expected, entries = (metrics(folder / "recipe.yaml") for folder in (runs.undisturbed, runs.resumed))
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    for entry, same in zip(entries, expected, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "reward", "sampling/alpha_max", "num_tokens"):
            assert entry[name] == pytest.approx(same[name], rel=1e-3, abs=1e-5), name
        assert entry["sampling/policy_drift/max"] < 1e-3, "the server has the checkpoint's weights"
    assert len({entry["sampling/alpha_max"] for entry in entries}) == 4, "the schedule moved at every step"


def test_a_run_of_two_processes_goes_on_too(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Killed by its launcher's death and its own, in the second step. Its servers live on, with its weights."""
    tiny_models = (tiny_pair.theta_model, tiny_pair.t_model)
    options = {**OPTIONS, **urls(tiny_pair), "max_steps": 3}
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    finish(start(two_processes(write_recipe(undisturbed, tiny_models, **options)), undisturbed))
    recipe = write_recipe(resumed, tiny_models, **options, resume_from_checkpoint=True)
    run = start(two_processes(recipe), resumed, HOLD_AT_STEP="1")
    wait_until(lambda: all((resumed / f"held-{process}").exists() for process in (0, 1)), run)
    processes = psutil.Process(run.pid).children(recursive=True)
    for process in (run, *processes):
        process.kill()
    run.communicate()
    psutil.wait_procs(processes, timeout=HANG)
    for process in (0, 1):
        (resumed / f"{process}.jsonl").unlink()
    finish(start(two_processes(recipe), resumed))
    for process in (0, 1):
        expected, after = read_records(undisturbed, process), read_records(resumed, process)
        assert [record["step"] for record in after] == [1, 2]
        for record in after:
            same = expected[record["step"]]
            assert record["questions"] == same["questions"]
            assert record["completion_ids"] == same["completion_ids"]
            assert record["weight_version"] == [record["step"]] * 4
        assert len({str(record["questions"]) for record in expected}) > 1, "the test needs epochs of unlike order"
    assert [entry["step"] for entry in metrics(recipe)] == [1, 2, 3]


def grpo_config(folder: Path, resume: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(folder), resume_from_checkpoint=resume, use_cpu=True, bf16=False, report_to="none")


def test_the_last_whole_checkpoint_is_chosen(runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = runs.undisturbed / "out/checkpoint-1"
    assert checkpoint_to_resume(grpo_config(tmp_path, None)) is None
    assert checkpoint_to_resume(grpo_config(tmp_path, "false")) is None
    assert checkpoint_to_resume(grpo_config(tmp_path, str(checkpoint))) == str(checkpoint)
    assert checkpoint_to_resume(grpo_config(tmp_path, True)) is None
    assert "begins at step 0" in caplog.text
    for step in (9, 10, 11):
        shutil.copytree(checkpoint, tmp_path / f"checkpoint-{step}")
    assert checkpoint_to_resume(grpo_config(tmp_path, "true")) == str(tmp_path / "checkpoint-11")
    (tmp_path / "checkpoint-11/trainer_state.json").unlink()
    streams = tmp_path / "checkpoint-10/rng_state.pth"
    streams.write_bytes(streams.read_bytes()[:-50])
    assert checkpoint_to_resume(grpo_config(tmp_path, True)) == str(tmp_path / "checkpoint-9")
    assert "checkpoint-10 was not written to its end" in caplog.text


def test_weights_alone_are_no_checkpoint_to_resume(tmp_path: Path) -> None:
    config = grpo_config(tmp_path, True)
    config.save_only_model = True
    with pytest.raises(ValueError, match="save_only_model"):
        checkpoint_to_resume(config)


def test_another_number_of_processes_is_refused(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(runs.undisturbed / "out/checkpoint-1", folder)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    with pytest.raises(ValueError, match="written by 2 processes"):
        checkpoint_to_resume(grpo_config(tmp_path, True))


class Prompts:
    """Keeps the prompts of every batch, and trains on nothing: a step needs no server. Two steps make an epoch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, list[str]]] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.seen.append((self.state.global_step, [row["prompt"] for row in inputs]))
        return {"rows": torch.arange(len(inputs))}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return sum(0.0 * parameter.sum() for parameter in model.parameters())

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass


class GRPOPrompts(Prompts, DualGRPOTrainer):
    pass


class RLOOPrompts(Prompts, DualRLOOTrainer):
    pass


def prompts_of(kind: type, model: Path, folder: Path, checkpoint: Path | None, **options: Any) -> list[Any]:
    shape = {"per_device_train_batch_size": 4, "max_completion_length": 4, "save_strategy": "steps", "save_steps": 1}
    shape |= {"num_generations": 2, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    trainer = kind(
        model=str(model),
        args=(GRPOConfig if kind is GRPOPrompts else RLOOConfig)(output_dir=str(folder), **{**shape, **options}),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": f"p{i}"} for i in range(4)]),
        dual_config=CoordinatorConfig(theta_url="http://127.0.0.1:1", t_url="http://127.0.0.1:2"),
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer.seen


@pytest.mark.parametrize("kind", [GRPOPrompts, RLOOPrompts])
def test_later_epochs_are_resumed_in_their_own_order(
    kind: type, tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = prompts_of(kind, tiny_models[0], tmp_path, None, max_steps=7)
    assert [step for step, _ in whole] == list(range(7))
    epochs = [tuple(prompt for _, prompts in whole[i : i + 2] for prompt in prompts) for i in (0, 2, 4)]
    assert len({*epochs}) == 3, "the test needs epochs of unlike order"
    for step in (1, 2, 5):
        resumed = prompts_of(kind, tiny_models[0], tmp_path / str(step), tmp_path / f"checkpoint-{step}", max_steps=7)
        assert resumed == whole[step:]


@pytest.mark.parametrize("kind", [GRPOPrompts, RLOOPrompts])
def test_a_checkpoint_between_two_uses_of_a_rollout_is_resumed(
    kind: type, tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """A rollout serves three steps; the resumed run draws it anew, and the next ones when the other run did."""
    options = {"num_iterations": 3, "max_steps": 13}  # six steps make an epoch
    whole = dict(prompts_of(kind, tiny_models[0], tmp_path, None, **options))
    assert list(whole) == [0, 3, 6, 9, 12]
    for step in (4, 8):
        resumed = prompts_of(kind, tiny_models[0], tmp_path / str(step), tmp_path / f"checkpoint-{step}", **options)
        later = [(number, prompts) for number, prompts in whole.items() if number > step]
        assert resumed == [(step, whole[3 * (step // 3)]), *later]


def test_a_checkpoint_is_whole_only_when_every_process_has_written(
    tiny_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process waits before it writes the trainer's state, by which `checkpoint_to_resume` judges."""
    waited: list[bool] = []

    def wait(accelerator: Any) -> None:
        folder = tmp_path / "checkpoint-1"
        waited.append((folder / "rng_state.pth").exists() and not (folder / "trainer_state.json").exists())

    monkeypatch.setattr(Accelerator, "wait_for_everyone", wait)
    prompts_of(GRPOPrompts, tiny_models[0], tmp_path, None, max_steps=1)
    assert True in waited
