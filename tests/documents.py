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
    return [words for block in blocks(page, "bash") for words in commands_of(block)]


def arguments_of(program: str, page: Path) -> list[list[str]]:
    """What follows the program in those of a page's commands that run it."""
    return [words[1:] for words in commands(page) if words[0] == program]


def commands_of(script: str) -> list[list[str]]:
    """The commands of a script of the documents, as bash would run them.

    Variables that the script sets are put in where it names them; others stay. Comments, settings of the environment,
    keywords and redirections are left out. Of `bash -c` the commands are those of its script.
    """
    reader = shlex.shlex(_with_variables(script), posix=True, punctuation_chars="();<>|&\n")
    reader.whitespace, reader.commenters, reader.whitespace_split = " \t", "", True
    lines: list[list[str]] = [[]]
    for word in reader:
        if set(word) <= set("();|&\n"):
            lines.append([])
        else:
            lines[-1].append(word)
    found = []
    for words in map(_command_in, lines):
        if words[:2] == ["bash", "-c"]:
            found += commands_of(words[2])
        elif words:
            found.append(words)
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


def _command_in(words: list[str]) -> list[str]:
    """The program and its arguments in what stands between two separators; nothing where there is no program."""
    while words and (words[0] in _BEFORE_A_PROGRAM or re.match(r"\w+=", words[0])):
        words = words[1:]
    for i, word in enumerate(words):
        if set(word) <= set("<>"):
            words = words[:i]
            break
    return [_ENVIRONMENT.sub("", words[0]), *words[1:]] if words else []
