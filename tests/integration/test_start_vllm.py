"""recipes/serving/start_vllm.sh, with a server that does next to nothing in vLLM's place."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from dual_rollout.server.launch import _free_port
from tests.hang import HANG

SCRIPT = Path(__file__).parents[2] / "recipes/serving/start_vllm.sh"

# Stands for an interpreter with vLLM: what it runs answers /health, all that the script asks of a server.
INTERPRETER = """#!/usr/bin/env bash
if [[ ${{1-}} != -m ]]; then exec {python} "$@"; fi
shift 2
while (($#)); do
    case $1 in
        --help=all) echo "usage: api_server.py [-h] {flags}"; exit ;;
        --model) model=$2; shift 2 ;;
        --port) port=$2; shift 2 ;;
        *) shift ;;
    esac
done
exec {python} -c '{server}' "$model" "$port"
"""
SERVER = """
import pathlib, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

if not pathlib.Path(sys.argv[1]).is_dir():
    sys.exit(f"{sys.argv[1]} is not a folder with a model")
HTTPServer(("127.0.0.1", int(sys.argv[2])), Health).serve_forever()
"""


FLAGS = (
    *("--enable-scale-out", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log", "--logprobs-mode"),
    *("--lora-target-modules", "--weight-transfer-config", "--middleware", "--scheduler-cls"),
)


def write_interpreter(path: Path, without: str = "") -> Path:
    """One whose vLLM has all flags that the script asks for, but for one."""
    flags = " ".join(f"[{flag} | --no-{flag[2:]}]" for flag in FLAGS if flag != without)
    path.write_text(INTERPRETER.format(python=sys.executable, server=SERVER, flags=flags))
    path.chmod(0o755)
    return path


def dry_run(*arguments: str, environment: dict[str, str] | None = None) -> tuple[list[str], list[str]]:
    """The words of the two commands."""
    answer = subprocess.run(
        [str(SCRIPT), "--dry-run", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG,
        env={**os.environ, **(environment or {})},
    )
    theta, t = answer.stdout.splitlines()
    return shlex.split(theta), shlex.split(t)


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_two_models_on_one_gpu_share_its_memory() -> None:
    theta, t = dry_run("policy", "teacher", "--lora", "16", "--nccl", "--t-quantization", "fp8", "--", "--seed", "1")
    assert (value(theta, "--model"), value(t, "--model")) == ("policy", "teacher")
    assert (value(theta, "--port"), value(t, "--port")) == ("8000", "8001")
    assert float(value(theta, "--gpu-memory-utilization")) + float(value(t, "--gpu-memory-utilization")) < 1
    assert value(theta, "--max-lora-rank") == "16" and "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in theta
    assert value(theta, "--weight-transfer-config") == '{"backend": "nccl"}'
    assert value(t, "--quantization") == "fp8"
    assert not {"--enable-lora", "--weight-transfer-config"} & set(t), "π_t's weights never change"
    assert "--quantization" not in theta
    for words in (theta, t):
        assert {"VLLM_SERVER_DEV_MODE=1", "CUDA_VISIBLE_DEVICES=0", "--enable-scale-out"} <= set(words)
        assert value(words, "--max-logprobs") == "200" and value(words, "--seed") == "1"


def test_devices_of_their_own() -> None:
    theta, t = dry_run("policy", "teacher", "--theta-devices", "0", "--t-devices", "1,2", "--t-memory", "0.8")
    assert "CUDA_VISIBLE_DEVICES=0" in theta and "CUDA_VISIBLE_DEVICES=1,2" in t
    assert (value(theta, "--tensor-parallel-size"), value(t, "--tensor-parallel-size")) == ("1", "2")
    assert value(theta, "--gpu-memory-utilization") == "0.9" and value(t, "--gpu-memory-utilization") == "0.8"


def test_cpu() -> None:
    theta, t = dry_run("--cpu", "--theta-cores", "0", "--t-cores", "1", "--lora", "8", "policy")
    assert value(t, "--model") == "policy"
    assert "VLLM_CPU_OMP_THREADS_BIND=0" in theta and "VLLM_CPU_OMP_THREADS_BIND=1" in t
    for words in (theta, t):
        assert value(words, "--dtype") == "float32" and value(words, "--block-size") == "32"
        assert "--enforce-eager" in words and "--gpu-memory-utilization" not in words
    assert "q_proj" in theta[theta.index("--lora-target-modules") :]


MIDDLEWARE = "dual_rollout.sessions.route.SessionMiddleware"
SCHEDULER = "dual_rollout.sessions.scheduler.session_scheduler"


def has_sessions(words: list[str]) -> bool:
    return MIDDLEWARE in words and SCHEDULER in words


def test_both_servers_have_sessions_where_they_can(tmp_path: Path) -> None:
    python = ("--python", str(write_interpreter(tmp_path / "python")))
    for options in ((), ("--sessions",)):
        for words in dry_run("policy", *python, *options):
            assert value(words, "--middleware") == MIDDLEWARE and value(words, "--scheduler-cls") == SCHEDULER
            assert value(words, "--max-num-seqs") == "128"
    for words in dry_run("policy", *python, "--no-sessions"):
        assert not has_sessions(words) and value(words, "--max-num-seqs") == "64"
    assert value(dry_run("policy", *python, "--max-num-seqs", "32")[0], "--max-num-seqs") == "32"


@pytest.mark.parametrize(
    ("lack", "reason"),
    [
        ("--scheduler-cls", "no --scheduler-cls"),
        ("dual_rollout", "pip install --no-deps dual_rollout"),
        (("--api-server-count", "2"), "another process"),
        (("--data-parallel-size=2",), "another process"),
        (("--scheduler-cls", "mine"), "names another"),
        (("--speculative-config", "{}"), "never run with --speculative-config"),
    ],
    ids=str,
)
def test_why_there_are_no_sessions_is_said(tmp_path: Path, lack: str | tuple[str, ...], reason: str) -> None:
    python = write_interpreter(tmp_path / "python", lack if isinstance(lack, str) else "")
    if lack == "dual_rollout":
        python.write_text(
            python.read_text().replace("if [[ ${1-} != -m ]]; then", "[[ ${1-} != -c ]] || exit 1\nif false; then")
        )
    extra = ["--", *lack] if isinstance(lack, tuple) else []
    command = [str(SCRIPT), "--dry-run", "--python", str(python), "policy"]
    answer = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=HANG)
    assert answer.returncode == 0 and "Without sessions" in answer.stderr and reason in answer.stderr
    assert "dual_rollout.sessions" not in answer.stdout
    answer = subprocess.run([*command, "--sessions", *extra], capture_output=True, text=True, timeout=HANG)
    assert answer.returncode == 2 and reason in answer.stderr, "who asks for them is told, before anything starts"


@pytest.mark.parametrize(
    "flag", ["--enable-scale-out", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
)
def test_a_flag_that_this_vllm_lacks_is_left_out(tmp_path: Path, flag: str) -> None:
    older, newer = write_interpreter(tmp_path / "older", flag), write_interpreter(tmp_path / "newer")
    assert all(flag in words for words in dry_run("policy", "--python", str(newer)))
    assert not any(flag in words for words in dry_run("policy", "--python", str(older)))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (["--processed-logprobs"], "--logprobs-mode"),
        (["--lora", "8", "--cpu"], "--lora-target-modules"),
        (["--nccl"], "--weight-transfer-config"),
        (["--sessions"], "--scheduler-cls"),
    ],
)
def test_an_option_that_this_vllm_cannot_do_is_refused(tmp_path: Path, options: list[str], flag: str) -> None:
    older = write_interpreter(tmp_path / "older", flag)
    command = [str(SCRIPT), "--dry-run", "--python", str(older), *options, "policy"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert answer.returncode == 2 and f"no {flag}, which {options[0]} needs" in answer.stderr


def test_an_interpreter_without_vllm_is_named_before_anything_starts(tmp_path: Path) -> None:
    command = [str(SCRIPT), "--python", "/bin/false", "--log-dir", str(tmp_path / "logs"), "policy"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert answer.returncode == 2 and "/bin/false cannot run vLLM (--python" in answer.stderr


def test_a_key_is_never_on_a_command_line() -> None:
    for words in dry_run("policy", environment={"DUAL_ROLLOUT_API_KEY": "secret"}):
        assert not any("secret" in word for word in words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one or two models"),
        (["a", "b", "c"], "one or two models"),
        (["a", "--lorra", "8"], "--lorra"),
        (["a", "--lora"], "--lora needs a value"),
        (["a", "--cpu", "--nccl"], "--nccl needs GPUs"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    answer = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, timeout=HANG)
    assert answer.returncode == 2 and message in answer.stderr


class Servers:
    """The script at work on a tiny model."""

    def __init__(self, model: Path, folder: Path, t_model: Path | None = None):
        interpreter = folder / "python"
        write_interpreter(interpreter)
        self.ports = [_free_port(), _free_port()]
        command = [str(SCRIPT), "--cpu", "--no-check", "--python", str(interpreter), "--log-dir", str(folder)]
        command += ["--theta-port", str(self.ports[0]), "--t-port", str(self.ports[1]), "--timeout", "60"]
        self.output = folder / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, str(model), str(t_model or model)],
                stdout=output,
                stderr=subprocess.STDOUT,
                # No proxy reaches this machine's loopback address, and none is asked.
                env={**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""},
            )

    def healthy(self) -> list[bool]:
        return [_answers(f"http://127.0.0.1:{port}/health") for port in self.ports]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (OSError, urllib.error.URLError):
        return False


def until(condition: Callable[[], bool], seconds: float = HANG) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_both_servers_start_and_stop_with_the_script(
    tiny_models: tuple[Path, Path], tmp_path: Path, ending: signal.Signals
) -> None:
    servers = Servers(tiny_models[0], tmp_path, tiny_models[1])
    try:
        assert until(lambda: "Both servers are ready" in servers.output.read_text()), servers.output.read_text()
        assert servers.healthy() == [True, True]
        servers.process.send_signal(ending)
        assert servers.process.wait(HANG) == 128 + ending
        assert servers.healthy() == [False, False]
    finally:
        servers.process.terminate()
        servers.process.wait(HANG)


def test_a_server_that_dies_is_shown_and_the_other_stopped(tiny_models: tuple[Path, Path], tmp_path: Path) -> None:
    servers = Servers(tiny_models[0], tmp_path, tmp_path / "no such model")
    try:
        assert servers.process.wait(HANG) == 1
        output = servers.output.read_text()
        assert "t died while starting" in output and "no such model" in output
        assert servers.healthy() == [False, False]
    finally:
        servers.process.terminate()
        servers.process.wait(HANG)
