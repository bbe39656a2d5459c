"""Start an embedded server as a subprocess. Imports neither torch nor transformers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from dual_rollout.exceptions import EngineUnavailableError


class EmbeddedServer:
    """`dual-rollout serve MODEL ...` as a context manager; the server ends with this process, however that ends.

    Args:
        model: folder of a transformers model.
        args: further flags, as `["--max-logprobs", "200"]`.
        port: a free loopback port when None.
        log_path: where stdout and stderr go; a temporary file when None.
        start_timeout: seconds until `/health` must answer.
        env: variables added to the environment of the server.

    Attributes:
        url: its base address.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        args: Sequence[str] = (),
        *,
        port: int | None = None,
        log_path: str | os.PathLike[str] | None = None,
        start_timeout: float = 120.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port = _free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.start_timeout = start_timeout
        self.process: subprocess.Popen[bytes] | None = None
        if log_path is None:
            handle, name = tempfile.mkstemp(prefix="dual-rollout-serve-", suffix=".log")
            os.close(handle)
            log_path = name
        self.log_path = Path(log_path)
        command = [sys.executable, "-m", "dual_rollout.cli", "serve", os.fspath(model)]
        # Its standard input is a pipe that ends with this process, even when that is killed.
        self.command = [*command, "--host", "127.0.0.1", "--port", str(self.port), "--until-stdin-ends", *args]
        # Its key is the one that this process's requests bring.
        self._env = {**os.environ, "VLLM_API_KEY": os.environ.get("DUAL_ROLLOUT_API_KEY", "").strip(), **(env or {})}

    def start(self) -> EmbeddedServer:
        """Start the process and wait until it serves.

        Raises:
            EngineUnavailableError: it exited, or did not answer in time; with the end of its log.
        """
        with self.log_path.open("wb") as log:
            self.process = self._spawn(log)
        deadline = time.monotonic() + self.start_timeout
        try:
            while not self._healthy():
                if self.process.poll() is not None:
                    raise EngineUnavailableError(
                        f"the server exited with status {self.process.returncode}:\n{self.log_tail()}", url=self.url
                    )
                if time.monotonic() > deadline:
                    raise EngineUnavailableError(
                        f"no answer in {self.start_timeout:g} s:\n{self.log_tail()}", url=self.url
                    )
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, timeout: float = 5.0) -> int | None:
        """Stop the process (SIGTERM, after `timeout` seconds SIGKILL) and return its exit status."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        return self.process.returncode

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=self._env
        )

    def __enter__(self) -> EmbeddedServer:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _healthy(self) -> bool:
        try:
            with _no_proxy.open(f"{self.url}/health", timeout=1.0) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False


_no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Whatever `http_proxy` says: a proxy cannot reach this machine's loopback address."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
