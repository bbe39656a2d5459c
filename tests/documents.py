"""The documents, their blocks of code, and the commands in those of a shell."""

from __future__ import annotations

import ast
import asyncio
import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")]

_ENVIRONMENT = re.compile(r"^(?:[\w.-]+/)?(?:\.venv|\.venv-vllm|VLLM_ENV)/bin/")
_ASSIGNMENT = re.compile(r"^(?:export )?(\w+)=(\"[^\"]*\"|\S*)")
_BEFORE_A_PROGRAM = ("until", "while", "if", "then", "do", "else", "export", "srun")


def blocks(page: Path, language: str) -> list[str]:
    """Its blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def snippet(page: str, name: str) -> str:
    """The only block of Python of a page, as `docs/native.md`, that names something."""
    (found,) = [text for text in blocks(ROOT / page, "python") if name in text]
    return found


def run_snippet(source: str, **names: Any) -> dict[str, Any]:
    """Run Python of a page, which may await, with what its page takes for granted; returns its names."""
    code = compile(source, "a document", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    running = eval(code, names)
    if running is not None:
        asyncio.run(running)
    return names


def commands(page: Path) -> list[list[str]]:
    """The commands in its blocks of code, as words: the program, without its environment's folder, and arguments."""
    return [words for _, words in commands_with_settings(page)]


def commands_with_settings(page: Path) -> list[tuple[dict[str, str], list[str]]]:
    """The same commands, each after the variables of the environment that are set before it on its line."""
    return [command for block in blocks(page, "bash") for command in _commands_with_settings_of(block)]


def arguments_of(program: str, page: Path) -> list[list[str]]:
    """What follows the program in those of a page's commands that run it."""
    return [words[1:] for words in commands(page) if words[0] == program]


def subcommands(page: str, name: str) -> list[list[str]]:
    """The commands `dual-rollout NAME ...` of a page, as `docs/native.md`: NAME and what follows it."""
    return [words for words in arguments_of("dual-rollout", ROOT / page) if words[0] == name]


def commands_of(script: str) -> list[list[str]]:
    """The commands of a script of the documents, as bash would run them.

    Variables that the script sets are put in where it names them; others stay. Comments, settings of the environment,
    keywords and redirections are left out. Of `bash -c` the commands are those of its script.
    """
    return [words for _, words in _commands_with_settings_of(script)]


def _commands_with_settings_of(script: str) -> list[tuple[dict[str, str], list[str]]]:
    reader = shlex.shlex(_with_variables(script), posix=True, punctuation_chars="();<>|&\n")
    reader.whitespace, reader.commenters, reader.whitespace_split = " \t", "", True
    lines: list[list[str]] = [[]]
    for word in reader:
        if set(word) <= set("();|&\n"):
            lines.append([])
        else:
            lines[-1].append(word)
    found = []
    for settings, words in map(_command_in, lines):
        if words[:2] == ["bash", "-c"]:
            found += _commands_with_settings_of(words[2])
        elif words:
            found.append((settings, words))
    return found


def _with_variables(script: str) -> str:
    """Without comments and continued lines, and with the values of its own variables."""
    known: dict[str, str] = {}
    lines = []
    for line in re.sub(r"(^|\s)#.*", r"\1", script.replace("\\\n", " "), flags=re.MULTILINE).splitlines():
        line = re.sub(r"\$(\w+)", lambda match: known.get(match[1], match[0]), line)
        if match := _ASSIGNMENT.match(line):
            known[match[1]] = match[2].strip('"')
        lines.append(line)
    return "\n".join(lines)


def _command_in(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Variables set for it, the program and its arguments in what stands between two separators; no words where there
    is no program."""
    settings = {}
    while words and (words[0] in _BEFORE_A_PROGRAM or re.match(r"\w+=", words[0])):
        name, sets, value = words[0].partition("=")
        if sets:
            settings[name] = value
        words = words[1:]
    for i, word in enumerate(words):
        if set(word) <= set("<>"):
            words = words[:i]
            break
    return settings, [_ENVIRONMENT.sub("", words[0]), *words[1:]] if words else []
