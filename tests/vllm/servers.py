"""Start real vLLM servers for the tests, and always stop them.

vLLM lives in an environment of its own (``install.sh`` makes it), because it pins the versions of many of our
dependencies. Its interpreter is ``DUAL_ROLLOUT_VLLM_PYTHON``, or ``.venv-vllm/bin/python`` in the repository.
Run as a program, this file serves one model until it is interrupted::

    python -m tests.vllm.servers MODEL [vLLM flags]
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.documents import commands_with_settings
from tests.hang import HANG

REPOSITORY = Path(__file__).resolve().parents[2]
NATIVE_RECIPES = REPOSITORY / "recipes/native/README.md"

OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, /reset_prefix_cache, /pause, /server_info
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    # The model runs in the engine's own process, as it does on one GPU, on threads that the system may move: a worker
    # process would import vLLM once more, and spin while it waits. The CPU build needs this variable besides the flag.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    **OFFLINE,
}
# Blocks are of 32 tokens, the fewest that the CPU kernels take, so that short prompts are cached too.
CPU_FLAGS = (
    "--dtype=float32",
    "--max-model-len=512",
    "--max-num-seqs=16",
    "--max-logprobs=200",
    "--block-size=32",
    "--enforce-eager",
    "--distributed-executor-backend=uni",
    "--enable-scale-out",
    "--enable-prompt-tokens-details",
    "--disable-uvicorn-access-log",
)
ON_GPU = "DUAL_ROLLOUT_VLLM_DEVICES" in os.environ
# Without the list vLLM wraps lm_head too, and its CPU build dies of prompt_logprobs of several prompts at once. The
# kernels for GPUs take 16 bits and these tests compare in 32: there the flags are left out, and what needs them skips.
LORA_FLAGS = () if ON_GPU else ("--enable-lora", "--max-lora-rank=8", "--lora-target-modules", "q_proj", "down_proj")
FLAGS = tuple(shlex.split(os.environ.get("DUAL_ROLLOUT_VLLM_FLAGS", ""))) or CPU_FLAGS
if ON_GPU:
    ENVIRONMENT |= {
        "CUDA_VISIBLE_DEVICES": os.environ["DUAL_ROLLOUT_VLLM_DEVICES"],
        "TRITON_F32_DEFAULT": "ieee",  # or attention in float32 multiplies in TF32
    }
    del ENVIRONMENT["VLLM_ENABLE_V1_MULTIPROCESSING"]
STOP_TIMEOUT_S = 10.0
LOG_TAIL_LINES = 60


class VllmServerError(RuntimeError):
    """The server did not start; the message ends with the last lines of its log."""


def vllm_python() -> Path:
    """The interpreter that has vLLM. Raises ``FileNotFoundError`` that tells how to install it."""
    python = Path(os.environ.get("DUAL_ROLLOUT_VLLM_PYTHON") or REPOSITORY / ".venv-vllm/bin/python")
    if not python.exists():
        raise FileNotFoundError(
            f"no interpreter with vLLM at {python}: run tests/vllm/install.sh or set DUAL_ROLLOUT_VLLM_PYTHON"
        )
    return python


class VllmServer:
    """One vLLM OpenAI server as a subprocess, in a process group of its own.

    ``with VllmServer(model) as server`` is ready to be asked on entry and gone on exit; ``running(a, b)`` is
    the same for several servers that start side by side. It computes on ``threads`` threads. ``flags`` and
    ``environment`` are added to the common ones and override them. ``log`` is the file for the server's output, by
    default one in the temporary folder.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        name: str = "tiny",
        threads: int = 1,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.model = Path(model)
        self.name = name
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log or Path(tempfile.gettempdir()) / f"vllm-{os.getpid()}-{self.port}.log"
        self._environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads), **(environment or {})}
        self._flags = [*FLAGS, *flags]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and return at once; ``wait_until_ready`` follows."""
        command = [*self._program(), "--served-model-name", self.name]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port), *self._flags],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self, timeout: float = HANG) -> None:
        """Wait for ``/health``, then send one request: the first log-probabilities compile a kernel (10 s).

        Raises ``VllmServerError`` with the end of the log when the server dies or ``timeout`` seconds pass.
        """
        deadline = time.monotonic() + timeout
        while not self._healthy():
            if not self.is_alive():
                raise self._error("died while starting")
            if time.monotonic() > deadline:
                raise self._error(f"was not ready in {timeout:.0f} s")
            time.sleep(0.25)
        first = {"prompt": [[1, 2], [3]], "max_tokens": 2, "logprobs": 1, "temperature": 1.0}
        try:
            self.post("/v1/completions", {"model": self.name, **first})
        except OSError as error:
            raise self._error(f"did not answer its first request ({error})") from error

    def stop(self) -> None:
        """End the whole process group: first asked, after ``STOP_TIMEOUT_S`` seconds forced."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        # The engine and its worker are processes of the group and may outlive their parent.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def is_alive(self) -> bool:
        """Whether the server's own process runs; ``/health`` alone might be answered by another one."""
        return self._process is not None and self._process.poll() is None

    def post(self, path: str, body: Any, timeout: float = HANG) -> Any:
        """POST JSON and return the parsed answer. Raises ``urllib.error.HTTPError`` on an error status."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)

    def _program(self) -> list[str]:
        # Not the `vllm` command: it looks for a distribution "vllm", and the CPU build is called "vllm-cpu".
        return [str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/health", timeout=5.0):
            return True
        return False

    def _error(self, what: str) -> VllmServerError:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return VllmServerError("\n".join([f"vLLM for {self.model} {what}. End of {self.log}:", *lines]))

    def __enter__(self) -> VllmServer:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class NativeServer(VllmServer):
    """One server of q* between two models, or of one model's pairs; ``settings`` are for ``serve-native``."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        target: str | os.PathLike[str] | None = None,
        *,
        settings: Sequence[str] = (),
        threads: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(model, threads=threads, **options)
        self.target = None if target is None else Path(target)
        self._settings = list(settings)

    def _program(self) -> list[str]:
        command = [str(vllm_python()), "-P", "-m", "dual_rollout.cli", "serve-native"]
        models = [self.model] if self.target is None else [self.model, self.target]
        return [*command, *map(str, models), *self._settings]


class DocumentedServer(NativeServer):
    """A native server that is started as recipes/native/README.md says, by the only command there for so many models.

    The variables and flags are that page's, and `flags` follow them; nothing of this file's is added. Models, their
    name and the port are the test's. The page's flags are for a CPU: on a GPU the server is a ``NativeServer``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        target: str | os.PathLike[str] | None = None,
        *,
        flags: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(model, target, flags=flags, **options)
        if ON_GPU:
            return
        models = 1 if target is None else 2
        ((settings, words),) = [
            (settings, words)
            for settings, words in commands_with_settings(NATIVE_RECIPES)
            if words[:2] == ["dual-rollout", "serve-native"] and words[2 + models].startswith("--")
        ]
        words[words.index("--port") + 1] = str(self.port)
        self._environment = {**os.environ, **OFFLINE, **settings}
        self._flags = [*words[2 + models :], *flags]


@contextlib.contextmanager
def running(*servers: VllmServer) -> Iterator[None]:
    """Start the servers side by side and wait for them; stop every one at the end, whatever happens."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
        yield
    finally:
        for server in servers:
            server.stop()


def metric(server: VllmServer, name: str) -> float:
    """The sum of one of vLLM's own metrics, `name` without its prefix."""
    with urllib.request.urlopen(server.url + "/metrics", timeout=HANG) as response:
        found = re.findall(rf"^vllm:{name}{{.*}} (\S+)$", response.read().decode(), re.MULTILINE)
    assert found, f"no metric {name}"
    return sum(map(float, found))


def run_in_vllms_python(program: str) -> None:
    """Run it where vLLM is installed; it must end well."""
    command, environment = [str(vllm_python()), "-P", "-c", program], {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), VllmServer(sys.argv[1], flags=sys.argv[2:]) as served:
        print(f"{served.model} as {served.name!r} on {served.url}, log {served.log}", flush=True)
        signal.pause()
