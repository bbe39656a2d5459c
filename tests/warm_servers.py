"""Embedded servers in no time: forked from a process that has imported everything, where a start is mostly imports.

How a server starts by its command is for tests/integration/test_server.py, the command line and training runs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from typing import IO, Any

from dual_rollout.server.launch import EmbeddedServer

_COMMAND = [sys.executable, "-m", "dual_rollout.cli"]


class WarmServer(EmbeddedServer):
    """An `EmbeddedServer` whose process is forked from one that is shared by all of them. It computes on one thread."""

    def _spawn(self, log: IO[bytes]) -> Any:
        assert self.command[: len(_COMMAND)] == _COMMAND
        return ForkedProcess(_source(), self.command[len(_COMMAND) :], self._env, log)


class ForkedProcess:
    """What `EmbeddedServer` and its tests use of a `subprocess.Popen`."""

    def __init__(self, source: socket.socket, arguments: list[str], env: dict[str, str], log: IO[bytes]) -> None:
        stdin, stdin_writer = os.pipe()
        self._status, status_writer = os.pipe()
        self.stdin = os.fdopen(stdin_writer, "wb")
        self.returncode: int | None = None
        given = json.dumps({"arguments": arguments, "env": env, "cwd": os.getcwd()}).encode()
        socket.send_fds(source, [len(given).to_bytes(4, "big")], [stdin, log.fileno(), status_writer])
        source.sendall(given)
        for number in (stdin, status_writer):
            os.close(number)
        self.pid = self._read()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked server", timeout or 0.0)
            self.returncode = self._read()
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self) -> int:
        return int.from_bytes(os.read(self._status, 4), "big", signed=True)


@functools.cache
def _source() -> socket.socket:
    """The way to this session's process that forks; it ends with the session."""
    ours, theirs = socket.socketpair()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.Popen([sys.executable, "-m", "tests.warm_servers"], stdin=theirs, env=env)
    theirs.close()
    return ours


# ---- in the process that forks --------------------------------------------------------------------------------------


def _fork_as_told(channel: socket.socket) -> None:
    """Fork a server for everything that `channel` brings, and a process that waits for it and tells how it ended."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from aiohttp import web  # noqa: F401
    from transformers import AutoTokenizer, GenerationConfig  # noqa: F401

    import dual_rollout.server.app
    import dual_rollout.server.model_runner
    import dual_rollout.server.scheduler  # noqa: F401
    from dual_rollout.cli import main

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the session, which ends this one
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that nobody need wait for those who wait
    while True:
        size, given, _, _ = socket.recv_fds(channel, 4, 3)
        if not size:  # the session has ended
            return
        stdin, log, status = given
        told = json.loads(channel.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        if os.fork() == 0:
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server = os.fork()
            if server:
                os.close(stdin)
                os.write(status, server.to_bytes(4, "big", signed=True))
                ended = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
                with contextlib.suppress(BrokenPipeError):  # nobody asks any more
                    os.write(status, ended.to_bytes(4, "big", signed=True))
                os._exit(0)
            os.close(status)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, standard in ((stdin, 0), (log, 1), (log, 2)):
                os.dup2(number, standard)
            for number in (stdin, log):
                os.close(number)
            os.environ.clear()
            os.environ.update(told["env"])
            os.chdir(told["cwd"])
            code = 1
            try:
                code = main(told["arguments"])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        for number in (stdin, log, status):
            os.close(number)


if __name__ == "__main__":
    with socket.socket(fileno=0) as way:
        _fork_as_told(way)
