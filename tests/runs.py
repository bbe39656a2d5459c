"""Training runs in processes of their own: recipes for tiny models, and ways to launch them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dual_rollout.training.script import main
from tests.hang import HANG

ROOT = Path(__file__).parents[1]


def write_recipe(folder: Path, tiny_models: tuple[Path, Path], **changes: Any) -> Path:
    """A recipe in `folder` for three short steps, rewarded and recorded by `tests.recording_reward`."""
    recipe = {
        "model_name_or_path": str(tiny_models[0]),
        "dual_t_model_name_or_path": str(tiny_models[1]),
        "dtype": "float32",
        "dual_task": "chain_sum",
        "dual_task_options": '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}',
        "dual_task_size": 12,
        "dual_t_prompt_template": "{question} (The correct answer is {answer}.)",
        "reward_funcs": ["tests.recording_reward.recorded"],
        "dual_top_k": 20,
        "dual_seed": 5,
        # "auto" chooses by measured times, which differ from run to run.
        "dual_decoding": "lockstep",
        "dual_server_threads": 1,
        "dual_max_model_len": 256,
        "output_dir": str(folder / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1.0e-2,
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(command: list[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    """Start a run at the project's root; it records to `folder`."""
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RECORD_DIR": str(folder), **env}
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_here(recipe: Path, folder: Path) -> None:
    """A run in this process, which has imported everything; it records to `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECORD_DIR", str(folder))
        main(["--config", str(recipe)])


def finish(run: subprocess.Popen[str], timeout: float = HANG) -> str:
    """The standard output of a run that succeeds."""
    out, err = communicate(run, timeout)
    assert run.returncode == 0, err[-4000:]
    return out


def communicate(run: subprocess.Popen[str], timeout: float = HANG) -> tuple[str, str]:
    try:
        return run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for process in (*psutil.Process(run.pid).children(recursive=True), run):
            process.kill()  # the launcher's children hold its pipes open
        raise AssertionError(f"still running after {timeout:g} s:\n{run.communicate()[1][-4000:]}") from None


def one_process(recipe: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "dual_rollout.cli", "train", str(recipe), *flags]


def two_processes(recipe: Path, *flags: str) -> list[str]:
    """The command that `recipes/accelerate_configs/two_cpu.yaml` is for."""
    return two_processes_of("dual_rollout.training.script", "--config", str(recipe), *flags)


def two_processes_of(module: str, *arguments: str) -> list[str]:
    config = str(ROOT / "recipes/accelerate_configs/two_cpu.yaml")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "-m", module, *arguments]


def wait_until(done: Callable[[], bool], *runs: subprocess.Popen[str], timeout: float = HANG) -> None:
    """Wait for something that happens while `runs` go on."""
    deadline = time.monotonic() + timeout
    while not done():
        for run in runs:
            assert run.poll() is None, f"ended early:\n{run.communicate()[1][-4000:]}"
        assert time.monotonic() < deadline, f"nothing after {timeout:g} s"
        time.sleep(0.05)


def rank_environments() -> list[dict[str, str]]:
    """What a launcher tells two processes of one run. Started by hand, none is stopped because the other one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def metrics(recipe: Path) -> list[dict[str, Any]]:
    """The entries of the run's metrics.jsonl."""
    folder = Path(yaml.safe_load(recipe.read_text())["output_dir"])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
