"""The README's Python runs as it stands there, with tiny models in the place of large ones."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import trl

from dual_rollout.training.console import heading_line
from tests.integration.conftest import TinyPair

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALL = {
    "max_steps": 1,
    "logging_steps": 1,
    "max_completion_length": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}
ON_A_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: re.findall(r"\w+\.train|generate_batch", text)[0])
def test_a_snippet_runs(
    snippet: str,
    tiny_pair: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl, "GRPOConfig", functools.partial(trl.GRPOConfig, **SMALL, **ON_A_CPU))
    for written, here in (
        ("http://127.0.0.1:8000", tiny_pair.theta_url),
        ("http://127.0.0.1:8001", tiny_pair.t_url),
        ("Qwen/Qwen2.5-1.5B-Instruct", str(tiny_pair.theta_model)),
    ):
        snippet = snippet.replace(written, here)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
    shown = capsys.readouterr().out
    if "trainer" in snippet:
        assert heading_line() in shown and "{'" not in shown, "lines of steps, and no dictionaries"
        assert (tmp_path / "outputs/rollouts/rollouts_00001.parquet").exists(), "which dual-rollout report shows"
    else:
        assert "[0." in shown, "α of the tokens"


def test_there_are_two() -> None:
    assert len(SNIPPETS) == 2
