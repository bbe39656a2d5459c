"""The PPO example: its advantages by hand, and that it learns."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator

from dual_rollout import RolloutBatch
from tests.hang import HANG
from tests.integration.conftest import TinyPair

EXAMPLE = Path(__file__).parents[2] / "recipes/examples/ppo_loop.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    spec = importlib.util.spec_from_file_location("ppo_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.9, 0.0)])
def test_advantages_by_their_definition(example: ModuleType, gamma: float, lam: float) -> None:
    """A_t = Σ_l (γλ)^l·δ_{t+l} with δ_t = r_t + γ·V_{t+1} − V_t, of completions that end at different places."""
    torch.manual_seed(0)
    lengths, rewards, values = [4, 1, 3], torch.tensor([1.0, -2.0, 0.5]), torch.randn(3, 4)
    mask = torch.tensor([[1.0] * n + [0.0] * (4 - n) for n in lengths])
    expected = torch.zeros(3, 4)
    for i, length in enumerate(lengths):
        v = [*values[i, :length].tolist(), 0.0]
        r = [0.0] * (length - 1) + [float(rewards[i])]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[i, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
    advantages, returns = example.advantages_and_returns(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values) * mask)


def test_alpha_is_bounded_where_the_weights_are_worth_too_little(example: ModuleType) -> None:
    """(Σw)²/(nΣw²) of the weights 1 and 3 is 0.8."""
    rows = {name: torch.zeros(1, 3) for name in ("prompt_ids", "prompt_mask", "completion_ids", "weight_version")}
    mask, alpha = torch.tensor([[1, 1, 0]]), torch.tensor([[0.4, 0.6, 0.0]])
    columns = {"alpha": alpha, "importance_weights": torch.tensor([[1.0, 3.0, 0.0]])}
    batch = RolloutBatch(**rows, completion_mask=mask, columns=columns)
    assert example.means(Accelerator(cpu=True), batch) == pytest.approx((0.5, 0.8))
    assert example.next_alpha_max(1.0, 0.5, 0.8, min_ess=0.9) == pytest.approx(0.45)
    assert example.next_alpha_max(0.45, 0.4, 0.95, min_ess=0.9) == pytest.approx(0.5)
    assert example.next_alpha_max(0.95, 0.4, 0.95, min_ess=0.9) == 1.0


def test_it_learns_and_the_policy_itself_gets_better(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Of 64 completions each with a deviation of about 0.17, a mean errs by 0.02: a gain of 0.2 is no chance."""
    flags = {
        "--model": tiny_pair.theta_model,
        "--theta-url": tiny_pair.theta_url,
        "--t-url": tiny_pair.t_url,
        "--letters": "abcdefghijklmnopqrstuvwxyz",
        "--max-tokens": 8,
        "--num-generations": 16,
        "--iterations": 10,
        "--learning-rate": 5e-3,
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--cpu", *(str(part) for flag in flags.items() for part in flag)],
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(float, re.findall(r"by itself: ([0-9.]+)", done.stdout))
    assert after > before + 0.2, done.stdout
    rows = re.findall(r"α ([0-9.]+)  weight ([0-9.]+)", done.stdout)
    assert len(rows) == len(re.findall(r"ESS [01]\.[0-9]+  next α ≤ [0-9.]+", done.stdout)) == 10
    assert all(0.3 < float(alpha) < 0.7 and 0.5 < float(weight) < 1.5 for alpha, weight in rows)


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 200
