"""Recipes that are scripts run one step with tiny models, everything else as shipped."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from dual_rollout.server import launch
from tests.tiny_model import make_tiny_model
from tests.warm_servers import WarmServer

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = {
    "tools/grpo_calculator_cpu.py": (["--model"], ["tools/call_frequency", "sampling/alpha/mean"]),
    "distillation/trb_cpu.py": (["--student", "--teacher"], ["sampling/kl_budget", "loss"]),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, names = SCRIPTS[script]
    model = make_tiny_model(tmp_path / "model", max_position_embeddings=4096)
    options = [text for name in models for text in (name, str(model))]
    options += ["--max-steps", "1", "--max-completion-length", "8", "--output-dir", str(tmp_path / "run")]
    monkeypatch.setattr(launch, "EmbeddedServer", WarmServer)
    monkeypatch.setattr(sys, "argv", [script, *options])
    runpy.run_path(str(RECIPES / script), run_name="__main__")
    entry: dict[str, Any] = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert set(names) <= entry.keys()


def test_every_script_is_run_and_described() -> None:
    found = {
        str(path.relative_to(RECIPES))
        for folder in ("tools", "distillation")
        for path in RECIPES.glob(f"{folder}/*.py")
    }
    assert found == set(SCRIPTS)
    for script in SCRIPTS:
        assert Path(script).name in (RECIPES / script).with_name("README.md").read_text()
