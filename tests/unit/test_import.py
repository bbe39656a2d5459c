"""What an import costs, measured in fresh processes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import dual_rollout
from tests.hang import HANG

HEAVY = {"torch", "transformers", "trl", "vllm", "datasets", "accelerate", "scipy", "pandas"}

# VmHWM, not getrusage: the latter counts the pages of the process that forked this one.
PROBE = """
import json, sys
import {module}
try:
    {then}
except SystemExit:
    pass
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps({{"modules": sorted(sys.modules), "peak_mb": int(peak[0]) / 1024}}))
"""


def probe(module: str, then: str = "pass") -> dict:
    """What a process that imports `module` and does `then` has loaded, its peak memory, and what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module, then=then)],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    )
    *printed, measured = result.stdout.splitlines()
    return {**json.loads(measured), "printed": "\n".join(printed)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_coordinates_stays_small():
    measured = probe("dual_rollout.coordinator")
    assert HEAVY.isdisjoint(measured["modules"])
    assert measured["peak_mb"] < 100


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_numerics_need_numpy_alone():
    measured = probe("dual_rollout.functional")
    assert HEAVY.isdisjoint(measured["modules"]) and "aiohttp" not in measured["modules"]
    assert measured["peak_mb"] < 60


def test_help_imports_nothing_that_takes_long():
    measured = probe("dual_rollout.cli", then="dual_rollout.cli.main(['--help'])")
    assert "serve" in measured["printed"] and "train" in measured["printed"]
    assert {*HEAVY, "numpy", "aiohttp"}.isdisjoint(measured["modules"])


@pytest.mark.parametrize("module", ["decoding.lockstep", "decoding.block", "decoding.scheduler"])
def test_the_decoding_loops_need_no_client(module):
    modules = probe(f"dual_rollout.{module}")["modules"]
    assert HEAVY.isdisjoint(modules) and "aiohttp" not in modules and "dual_rollout.servers" not in modules


def test_an_unknown_command_is_refused():
    result = subprocess.run(
        [sys.executable, "-m", "dual_rollout.cli", "surf"], capture_output=True, text=True, timeout=HANG, check=False
    )
    assert result.returncode == 2 and "surf" in result.stderr


def test_every_public_name_resolves():
    for name in dual_rollout.__all__:
        assert getattr(dual_rollout, name).__name__ == name
    assert set(dual_rollout.__all__) <= set(dir(dual_rollout))
    assert dual_rollout.__all__ == sorted(dual_rollout.__all__)


def test_the_promised_names_are_public():
    assert set(dual_rollout.__all__) >= {
        "CoordinatorConfig",
        "DualDistillationTrainer",
        "DualGRPOTrainer",
        "DualRollout",
        "DualVLLMCoordinator",
        "GenerationOutput",
        "RolloutBatch",
        "compute_diagnostics",
        "compute_q_star",
        "generate_with_optimal_sampling",
        "merge_top_k_candidates",
        "sample_from_distribution",
        "solve_kl_symmetry",
    }


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = dual_rollout.Nonsense


@pytest.mark.parametrize("module", ["functional", "servers", "decoding", "server"])
def test_what_a_package_exports_exists(module):
    package = importlib.import_module(f"dual_rollout.{module}")
    assert all(hasattr(package, name) for name in getattr(package, "__all__", []))
