"""Real vLLM servers for the tests of this folder, started once per session."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dual_rollout.sessions.wire import MIDDLEWARE, SCHEDULER
from tests.tiny_model import make_tiny_model, perturbed_copy
from tests.vllm.pairs import Pairs
from tests.vllm.servers import (
    LORA_FLAGS,
    NATIVE_RECIPES,
    ON_GPU,
    REPOSITORY,
    DocumentedServer,
    NativeServer,
    VllmServer,
    running,
)

SESSION_FLAGS = ("--middleware", MIDDLEWARE)
TOGETHER_FLAGS = ("--scheduler-cls", SCHEDULER)
# Four pairs at most, whose 16 blocks of 32 tokens do not hold them, and steps that read prompts in pieces.
TIGHT = ("--max-num-seqs=9", "--max-num-batched-tokens=80", "--num-gpu-blocks-override=17")
# Of 32 tokens, for sixteen sequences of 512: 1.6 GiB less than by default, which the servers of later tests need too.
BLOCKS = () if ON_GPU else ("--num-gpu-blocks-override=260",)
AMPLE = ("--no-enable-prefix-caching", "--enable-log-requests", "--max-logprobs=200", *BLOCKS)
FAULT_FLAGS = ("--middleware", "tests.vllm.carrier_faults.CarrierFaults")


@dataclass(frozen=True)
class ServerPair:
    """The policy's and the target's server: two tiny models with one tokenizer and nearby distributions. The policy's
    has sessions, so that both ways to ask for lists are met."""

    theta: VllmServer
    t: VllmServer


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The hook sees the items of the whole session, and must run before `-m` deselects.
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session", autouse=True)
def stop_servers_when_terminated() -> None:
    """SIGTERM ends the session like Ctrl-C, so that fixtures are torn down and no server is left behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def vllm_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPair]:
    """Two servers on different cores. A test that changes their weights puts them back."""
    folder = tmp_path_factory.mktemp("vllm")
    # vLLM's CPU attention has no kernel for heads of 16, the tiny model's default; these are of 32.
    theta = make_tiny_model(folder / "theta", hidden_size=128, seed=0)
    t = perturbed_copy(theta, folder / "t", noise=0.2, seed=1)
    pair = ServerPair(
        theta=VllmServer(
            theta,
            flags=(*SESSION_FLAGS, *TOGETHER_FLAGS, *FAULT_FLAGS),
            environment={
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
                # The lists of a step's sessions come as one array, also where vLLM takes its outputs in several parts.
                "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "5",
            },
            log=folder / "theta.log",
        ),
        t=VllmServer(t, log=folder / "t.log"),
    )
    with running(pair.theta, pair.t):
        yield pair


@pytest.fixture(scope="session")
def lora_url(vllm_pair: ServerPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for the policy's model that loads adapters and has sessions."""
    if not LORA_FLAGS:
        pytest.skip("vLLM's LoRA kernels for GPUs take no float32")
    log = tmp_path_factory.mktemp("lora") / "server.log"
    with VllmServer(vllm_pair.theta.model, flags=(*LORA_FLAGS, *SESSION_FLAGS, *TOGETHER_FLAGS), log=log) as server:
        yield server.url


@pytest.fixture(scope="session")
def servers_of_pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pairs, Pairs]]:
    """Two servers of one model's pairs, started side by side."""
    folder = tmp_path_factory.mktemp("pairs")
    model = make_tiny_model(folder / "model", hidden_size=128, seed=0)
    tight = NativeServer(model, flags=TIGHT, log=folder / "tight.log")
    # That of recipes/native/README.md, with the flags that it has for adapters.
    (for_adapters,) = re.findall(r"add `(--enable-lora [^`]+)`", NATIVE_RECIPES.read_text(encoding="utf-8"))
    adapters = () if ON_GPU else for_adapters.split()
    ample = DocumentedServer(model, flags=(*adapters, *AMPLE), log=folder / "ample.log")
    with running(tight, ample):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        yield Pairs(tight, loaded), Pairs(ample, loaded)


@pytest.fixture
def tight(servers_of_pairs: tuple[Pairs, Pairs]) -> Pairs:
    """Too little memory for its pairs, steps too short for their prompts, prefixes cached."""
    return servers_of_pairs[0]


@pytest.fixture
def ample(servers_of_pairs: tuple[Pairs, Pairs]) -> Pairs:
    """Room for all; prefixes are not cached; adapters. A test that changes its weights puts them back."""
    return servers_of_pairs[1]
