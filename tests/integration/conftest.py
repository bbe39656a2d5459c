"""Two tiny models and two embedded servers on them, shared by the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dual_rollout.servers import retry
from tests.tiny_model import make_tiny_model, perturbed_copy
from tests.warm_servers import WarmServer


@dataclass(frozen=True)
class TinyPair:
    """A policy and a nearby target: their folders and the URLs that serve them."""

    theta_model: Path
    t_model: Path
    theta_url: str
    t_url: str


@pytest.fixture(scope="session", autouse=True)
def _one_thread_each() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    theta = make_tiny_model(folder / "theta", logit_scale=2.0)
    return theta, perturbed_copy(theta, folder / "t", noise=0.2)


@pytest.fixture(scope="session")
def tiny_pair(tiny_models: tuple[Path, Path]) -> Iterator[TinyPair]:
    """One pair for all: a training run begins by giving π_θ's server its own weights."""
    flags = ["--max-logprobs", "-1", "--max-model-len", "256", "--threads", "1"]
    with WarmServer(tiny_models[0], flags) as theta, WarmServer(tiny_models[1], flags) as t:
        yield TinyPair(*tiny_models, theta.url, t.url)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the usual ones before a request is sent again, for faults that are over at once or stay."""
    for name in ("_FIRST_PAUSE_S", "_LONGEST_PAUSE_S", "_JITTER_S"):
        monkeypatch.setattr(retry, name, 0.1 * getattr(retry, name))
