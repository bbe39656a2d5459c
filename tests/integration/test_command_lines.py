"""Every command line in the documents and in docstrings of scripts is one that its program takes.

The program itself parses it, and nothing is run.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from dual_rollout.cli import main
from dual_rollout.native.refusals import refuse_flags
from dual_rollout.training.arguments import parse_recipe
from tests.documents import PAGES, ROOT, commands, commands_of
from tests.hang import HANG

SHELL = {"mkdir", "printf", "sleep", "done", "kill", "exit"}
SCRIPTS = {".ci/run", "tests/vllm/install.sh"}
WITHOUT_ARGUMENTS = {ROOT / "docs/api.py", ROOT / "tests/bench_report.py"}
NOT_INSTALLED = {"vllm", "sglang"}  # the flags of vLLM: tests/vllm
RECIPE = "recipes/quickstart/grpo_cpu.yaml"  # where a document names no recipe of ours


def usages() -> list[list[str]]:
    """The commands in the docstrings of scripts, with what is optional in them."""
    scripts = [*ROOT.glob("recipes/*/*.py"), *ROOT.glob("tests/bench_*.py"), ROOT / "tests/report_pictures.py"]
    texts = [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in scripts]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("    python ")]
    return [words for line in lines for words in commands_of(re.sub(r"[\[\]]|\.\.\.", "", line))]


LINES = sorted({tuple(words) for words in [*usages(), *(words for page in PAGES for words in commands(page))]})


class Parsed(BaseException):
    """Raised in place of what a program does once it has read its arguments."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments


def parse_only(run: Callable[[], object]) -> argparse.Namespace:
    """The arguments as the program has parsed them, before it does anything else.

    Raises:
        SystemExit: the program does not take them; it has said why on stderr.
    """
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser: argparse.ArgumentParser, args: object = None, namespace: object = None) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(argparse.ArgumentParser, "parse_known_args", parse)  # which a parser of subcommands calls
            found, rest = parser.parse_known_args(args, namespace)
        if rest and not getattr(found, "accepts_rest", False):
            parser.error(f"unrecognized arguments: {rest}")
        found.rest = rest
        raise Parsed(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        try:
            run()
        except Parsed as parsed:
            return parsed.arguments
    raise AssertionError("it has run without parsing its arguments")


def check_dual_rollout(*words: str) -> None:
    parsed = parse_only(lambda: main(words))
    if parsed.command == "train":
        check_recipe("--config", parsed.recipe, *parsed.rest)
    if parsed.command == "serve-native":
        refuse_flags(parsed.rest, two_models=parsed.t is not None)


def check_recipe(*words: str) -> None:
    ours = [RECIPE if word.lower() == "recipe.yaml" else word for word in words]
    parse_recipe([*ours, "--use_cpu", "true"])  # here is no GPU


def check_python(*words: str) -> None:
    if words[0] == "-c":
        ast.parse(words[1])
    elif words[0] == "-m":
        check_module(*words[1:])
    else:
        check_script(*words)


def check_module(name: str, *words: str) -> None:
    if name == "dual_rollout.training.script":
        check_recipe(*words)
    elif name == "dual_rollout.cli":
        check_dual_rollout(*words)
    elif name.split(".")[0] not in NOT_INSTALLED:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None, name
        check_script(found.origin, *words)


def check_script(path: str, *words: str) -> None:
    if Path(path).resolve() in WITHOUT_ARGUMENTS:
        assert not words
        return
    assert "parse_args(" in Path(path).read_text(encoding="utf-8"), f"{path} would be run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *words])
        patch.syspath_prepend(str(Path(path).parent))  # as Python does
        parse_only(lambda: runpy.run_path(path, run_name="__main__"))


def check_launched(parsed: argparse.Namespace, words: list[str]) -> None:
    """What a launcher starts."""
    check_python(*(["-m"] if parsed.module else []), parsed.training_script, *words)


def check_accelerate(command: str, *words: str) -> None:
    assert command == "launch"
    parsed = launch_command_parser().parse_args(words)
    if parsed.config_file is not None:
        load_config_from_file(parsed.config_file)
    check_launched(parsed, parsed.training_script_args)


def check_torchrun(*words: str) -> None:
    parsed = get_args_parser().parse_args(words)
    check_launched(parsed, parsed.training_script_args)


def check_make(*words: str) -> None:
    subprocess.run(["make", "--dry-run", *words], check=True, capture_output=True, timeout=HANG)


def check_pip(command: str, *words: str) -> None:
    """The packages are ours, and their extras are there."""
    setup = configparser.ConfigParser()
    setup.read("setup.cfg")
    extras = [name for word in words for name in re.findall(r"\[([\w,]+)\]", word)]
    assert command == "install" and any(word.startswith((".", "dual_rollout")) for word in words)
    assert set(",".join(extras).split(",")) <= {"", *setup["options.extras_require"]}


def check_start_vllm(*words: str) -> None:
    """In a folder without any vLLM, where the commands that it would run have all their flags."""
    command = [str(ROOT / "recipes/serving/start_vllm.sh"), "--dry-run", *words]
    with tempfile.TemporaryDirectory() as folder:
        shown = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=HANG)
    theta, t = map(shlex.split, shown.stdout.splitlines())
    assert "--model" in theta and "--model" in t


CHECKS: dict[str, Callable[..., None]] = {
    "dual-rollout": check_dual_rollout,
    "python": check_python,
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
    "recipes/serving/start_vllm.sh": check_start_vllm,
}


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_its_program_takes_a_command_line(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = words
    if program in SCRIPTS:
        assert os.access(program, os.X_OK)
    elif program not in SHELL:
        CHECKS[program](*arguments)


@pytest.mark.parametrize(
    "line",
    [
        "dual-rollout doctor --theta-ur http://a --no-such-flag",
        "dual-rollout train recipes/quickstart/grpo_cpu.yaml --dual_no_such_key 1",
        "dual-rollout serve-native THETA T --data-parallel-size 2",
        "python recipes/bench/deepen.py FROM TO --times many",
        "python -m recipes.evidence.run --no-such-flag",
        "python -m recipes.evidence.nothing",
        "accelerate launch --config_file recipes/nothing.yaml -m dual_rollout.cli generate",
        "accelerate launch -m dual_rollout.training.script --config recipes/nothing.yaml",
        "torchrun --nproc-per-node 2 -m dual_rollout.cli generate --no-such-flag",
        "make nothing",
        "pip install -e '.[nothing]'",
        "recipes/serving/start_vllm.sh --no-such-flag MODEL",
    ],
)
def test_what_a_program_does_not_take_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ((program, *arguments),) = commands_of(line)
    with pytest.raises((SystemExit, ValueError, OSError, AssertionError, subprocess.CalledProcessError)):
        CHECKS[program](*arguments)


def test_a_script_is_read_as_bash_reads_it() -> None:
    script = """
    # a comment
    S=outputs/model  # set here
    FLAGS="--a 1"
    FLAGS="$FLAGS --b"
    serve="python -m server $FLAGS"
    OMP_NUM_THREADS=1 $serve --model $S/x &
    until .venv/bin/check "$URL"; do sleep 1; done && srun bash -c '
        first "two words" > file
        second \\
            --third'
    """
    script = "\n".join(line.strip() for line in script.splitlines())
    assert commands_of(script) == [
        ["python", "-m", "server", "--a", "1", "--b", "--model", "outputs/model/x"],
        ["check", "$URL"],
        ["sleep", "1"],
        ["done"],
        ["first", "two words"],
        ["second", "--third"],
    ]
