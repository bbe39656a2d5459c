"""The quickstart's commands with real vLLM whose compile caches are empty, as on a new machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dual_rollout.cli import main
from tests.documents import arguments_of, subcommands
from tests.hang import HANG
from tests.vllm.servers import REPOSITORY, _free_port, vllm_python

MODEL = "outputs/models/SmolLM2-135M-Instruct"
SMALL = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "max_completion_length": 4,
    "disable_tqdm": True,
}


@pytest.mark.skipif(not (REPOSITORY / MODEL).exists(), reason="make test-vllm puts the model there")
def test_servers_start_are_checked_and_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own check waits while the first requests compile."""
    monkeypatch.chdir(REPOSITORY)
    (start,) = arguments_of("recipes/serving/start_vllm.sh", REPOSITORY / "recipes/quickstart/README.md")
    assert {"--cpu", "--lora", ".venv-vllm/bin/python", MODEL} < set(start)
    ports = [str(_free_port()), str(_free_port())]
    command = ["recipes/serving/start_vllm.sh", "--theta-port", ports[0], "--t-port", ports[1], "--kv-cache-gib", "1"]
    command += ["--log-dir", str(tmp_path / "logs")]
    command += [str(vllm_python()) if word == ".venv-vllm/bin/python" else word for word in start]
    caches = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where dual-rollout is
    output = tmp_path / "output"
    with output.open("w") as file:
        run = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **caches, "PATH": path},
        )
    try:
        while run.poll() is None and "Both servers are ready" not in output.read_text():
            time.sleep(0.5)
        assert run.poll() is None and "A rollout would work." in output.read_text(), output.read_text()
        assert "With sessions" in output.read_text()
        assert "SessionMiddleware" not in output.read_text(), "the check found no sessions"
        assert any((tmp_path / "inductor").rglob("*.so")), "the test needs that something was compiled"
        check_and_train(*(f"http://127.0.0.1:{port}" for port in ports), tmp_path / "run")
        run.send_signal(signal.SIGINT)
        assert run.wait(HANG) == 128 + signal.SIGINT
    finally:
        run.terminate()
        run.wait(HANG)


def check_and_train(theta_url: str, t_url: str, folder: Path) -> None:
    """README's check before a training run, and a small step of the quickstart's recipe, whose adapter is sent."""
    folder.mkdir()
    here = {"http://127.0.0.1:8000": theta_url, "http://127.0.0.1:8001": t_url, "outputs": str(folder)}
    (doctor,) = (words for words in subcommands("README.md", "doctor") if "--train" in words)
    assert main([here.get(word, word) for word in doctor]) == 0
    (train,) = subcommands("recipes/quickstart/README.md", "train")
    changes = {**SMALL, "dual_theta_url": theta_url, "dual_t_url": t_url, "output_dir": folder}
    assert main([*train, *(str(word) for key, value in changes.items() for word in (f"--{key}", value))]) == 0
    (step,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < step["sampling/alpha/mean"] < 1 and step["sampling/policy_check"] < 0.01
