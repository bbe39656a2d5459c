"""`recipes/serving/start_vllm.sh --cpu` with real vLLM whose compile caches are empty, as on a new machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.tiny_model import make_tiny_model
from tests.vllm.servers import REPOSITORY, _free_port, vllm_python


def test_the_check_waits_while_the_first_requests_compile(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", hidden_size=128, seed=0)
    ports = ["--theta-port", str(_free_port()), "--t-port", str(_free_port())]
    command = [str(REPOSITORY / "recipes/serving/start_vllm.sh"), "--cpu", "--kv-cache-gib", "1", *ports]
    command += ["--python", str(vllm_python()), "--log-dir", str(tmp_path / "logs"), str(model)]
    caches = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where dual-rollout is
    output = tmp_path / "output"
    with output.open("w") as file:
        run = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **caches, "PATH": path},
            # A shell ignores SIGINT in what it starts in the background, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        while run.poll() is None and "Both servers are ready" not in output.read_text():
            time.sleep(0.5)
        assert run.poll() is None and "A rollout would work." in output.read_text(), output.read_text()
        assert "With sessions" in output.read_text()
        assert "SessionMiddleware" not in output.read_text(), "the check found no sessions"
        assert any((tmp_path / "inductor").rglob("*.so")), "the test needs that something was compiled"
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 128 + signal.SIGINT
    finally:
        run.terminate()
        run.wait(60)
