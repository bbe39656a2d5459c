"""`accelerate launch` with the GPU configs, on as many GPUs as there are."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.runs import ROOT, finish, start, write_recipe


def recipe(folder: Path, tiny_models: tuple[Path, Path], **changes: Any) -> Path:
    """As on the CPU, but for the device; the questions are local, since GPU machines may lack reasoning-gym."""
    data = folder / "data"
    data.mkdir(parents=True)
    rows = [
        {"prompt": [{"role": "user", "content": f"{i} + 2 = ?"}], "question": f"{i} + 2 = ?", "answer": f"{i + 2}"}
        for i in range(12)
    ]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_recipe(folder, tiny_models, dataset_name=str(data), use_cpu=False, **changes)
    values = yaml.safe_load(path.read_text())
    for key in ("dual_task", "dual_task_options", "dual_task_size"):
        del values[key]
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("config", ["one_gpu", "multi_gpu", "fsdp2"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_three_steps(tiny_models: tuple[Path, Path], tmp_path: Path, config: str, adapter: bool) -> None:
    peft = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "down_proj"]} if adapter else {}
    path = recipe(tmp_path, tiny_models, **peft)
    processes = 1 if config == "one_gpu" else torch.cuda.device_count()
    seen = {"CUDA_VISIBLE_DEVICES": "0"} if config == "one_gpu" else {}
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate_configs/{config}.yaml"]
    script = ["--num_processes", str(processes), "-m", "dual_rollout.training.script", "--config", str(path)]
    packages = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    finish(start([sys.executable, *launcher, *script], tmp_path, PYTHONPATH=packages, **seen))
    entries = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "reward" in entry] == [1, 2, 3]
    # bfloat16 against the server's float32; weights that did not arrive would be off by more with each step.
    assert max(entry["sampling/policy_drift/mean"] for entry in entries if "reward" in entry) < 0.1
    rollouts = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert {version for rollout in rollouts for version in rollout["weight_version"]} == {0, 1, 2}
