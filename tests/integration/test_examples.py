"""The examples run as they are shipped, on tiny models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "recipes/examples"
SHOWN = {
    "basic.py": ["α 0.50", "weight"],  # one model on both sides
    "advanced_diagnostics.py": ["streamed:", "tokens/s", "largest |KL"],
    "batch_to_disk.py": ["num_rows: 12"],
    "error_handling.py": ["one prompt fails alone", "a server is down", "--max-logprobs", "did you mean 'top_k'"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_runs(name: str, tiny_models: tuple[Path, Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--model", str(tiny_models[0]), "--max-tokens", "6"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for text in SHOWN[name]:
        assert text in done.stdout


def test_every_example_is_run() -> None:
    elsewhere = {"servers.py", "ppo_loop.py"}  # test_ppo_loop.py
    assert {path.name for path in EXAMPLES.glob("*.py")} - elsewhere == set(SHOWN)
