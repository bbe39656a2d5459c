"""The examples run as they are shipped, on tiny models."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hang import HANG
from tests.warm_servers import WarmServer

EXAMPLES = Path(__file__).parents[2] / "recipes/examples"
SHOWN = {
    "basic.py": ["α 0.50", "weight"],  # one model on both sides
    "advanced_diagnostics.py": ["streamed:", "tokens/s; the lists", "   token ", "largest |KL"],
    "between_two_prompts.py": ["α 0.", "policy", "target", "the product of their weights is"],
    "batch_to_disk.py": ["num_rows: 12"],
    "error_handling.py": ["one prompt fails alone", "a server is down", "--max-logprobs", "did you mean 'top_k'"],
}


@pytest.fixture(scope="module")
def server_flags(tiny_models: tuple[Path, Path]) -> Iterator[list[str]]:
    """Of two servers like those that an example starts for itself."""
    flags = ["--max-logprobs", "100", "--threads", "1"]
    with WarmServer(tiny_models[0], flags) as theta, WarmServer(tiny_models[1], flags) as t:
        yield ["--theta-url", theta.url, "--t-url", t.url]


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_runs(name: str, tiny_models: tuple[Path, Path], server_flags: list[str], tmp_path: Path) -> None:
    """The first starts servers of its own, by what they all share."""
    servers = ["--model", str(tiny_models[0])] if name == "basic.py" else server_flags
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *servers, "--max-tokens", "6"],
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for text in SHOWN[name]:
        assert text in done.stdout


def test_the_sequence_by_hand_is_weighted_by_what_it_prints(
    tiny_models: tuple[Path, Path], server_flags: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, str(EXAMPLES / "between_two_prompts.py"), *server_flags, "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, cwd=tmp_path)
    weights = [float(found) for found in re.findall(r"weight π_θ/q\* ([\d.]+)", done.stdout)]
    product = float(re.findall(r"product of their weights is (\S+)", done.stdout)[0])
    assert len(weights) in range(1, 5) and math.prod(weights) == pytest.approx(product, rel=0.05)  # three digits each


def test_every_example_is_run() -> None:
    elsewhere = {"servers.py", "ppo_loop.py"}  # test_ppo_loop.py
    assert {path.name for path in EXAMPLES.glob("*.py")} - elsewhere == set(SHOWN)
