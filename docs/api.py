"""Writes docs/api.md, the page of every public name, from signatures and docstrings: `python docs/api.py`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, is_typeddict

import dual_rollout
from dual_rollout import exceptions
from dual_rollout.config import field_hints
from dual_rollout.prompts import target_prompt
from dual_rollout.server.launch import EmbeddedServer
from dual_rollout.text import load_tokenizer
from dual_rollout.training.async_grpo import DualRolloutWorker
from dual_rollout.training.async_policy_check import AsyncPolicyCheck
from dual_rollout.training.connections import ServerConnections
from dual_rollout.training.contexts import with_t_prompts
from dual_rollout.training.correction import corrected_weights
from dual_rollout.training.processes import fail_together
from dual_rollout.training.rollout_mixin import RolloutTrainerMixin
from dual_rollout.training.schedules import AlphaSchedule
from dual_rollout.training.trainer import DualTrainerMixin
from dual_rollout.types import CallOptions, GenerationRequest, StreamChunk

PAGE = Path(__file__).with_name("api.md")
GROUPS = {
    "Sampling": (
        "CoordinatorConfig",
        "DualVLLMCoordinator",
        "generate_with_optimal_sampling",
        "GenerationOutput",
    ),
    "Training": (
        "DualGRPOTrainer",
        "DualRLOOTrainer",
        "DualDistillationTrainer",
        "DualAsyncGRPOTrainer",
        "DualRollout",
        "RolloutBatch",
    ),
    "The numerics of one position": (
        "solve_kl_symmetry",
        "compute_q_star",
        "merge_top_k_candidates",
        "sample_from_distribution",
        "compute_diagnostics",
    ),
}
FURTHER = (
    CallOptions,
    GenerationRequest,
    StreamChunk,
    EmbeddedServer,
    load_tokenizer,
    target_prompt,
    with_t_prompts,
    ServerConnections,
    DualTrainerMixin,
    RolloutTrainerMixin,
    AlphaSchedule,
    DualRolloutWorker,
    AsyncPolicyCheck,
    corrected_weights,
    fail_together,
)
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")

HEAD = """# API

Every public name, from its docstring; `python docs/api.py` writes this page. Names without a module come from
`dual_rollout` itself, and are loaded when they are first used: the numerics need numpy alone, sampling needs no torch.
B, K, S and other letters of shapes are those of [CONTRIBUTING.md](../CONTRIBUTING.md#shapes).
"""


def page() -> str:
    parts = [HEAD]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [entry(name, getattr(dual_rollout, name)) for name in names]
    parts.append("## What they are made of, for code of one's own\n")
    parts += [entry(f"{kind.__module__}.{kind.__name__}", kind) for kind in FURTHER]
    parts += ["## What is raised\n", described(exceptions), *exceptions_table()]
    return "\n".join(parts)


def entry(name: str, thing: Any) -> str:
    """A public class with its public methods, or a function."""
    short = name.rpartition(".")[2]
    lines = [f"### `{name}`\n"]
    if dataclasses.is_dataclass(thing) and name == "CoordinatorConfig":
        lines += [described(thing), *config_table(thing)]
    elif is_typeddict(thing):
        lines += [described(thing)]
    else:
        lines += [f"```\n{signature(short, thing)}\n```\n", described(thing)]
    for method_name, method in methods(thing):
        lines += [f"#### `{short}.{method_name}`\n"]
        if not isinstance(method, property):
            lines += [f"```\n{signature(method_name, method)}\n```\n"]
        lines += [described(method)]
    return "\n".join(lines)


def methods(thing: Any) -> Iterator[tuple[str, Any]]:
    """Of a class, the methods and properties that it defines itself and describes."""
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(member, functools.cached_property):
            function = property(member.func)
        is_method = inspect.isfunction(function) or isinstance(function, property)
        if is_method and not name.startswith("_") and inspect.getdoc(function):
            yield name, function


class Written(str):
    """An annotation as it is written, without quotes around it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def written(annotation: Any) -> Any:
    return Written(annotation) if isinstance(annotation, str) else annotation


def signature(name: str, thing: Any) -> str:
    """As it is written, an argument a line where it is long."""
    found = inspect.signature(thing)
    arguments = [
        argument.replace(annotation=written(argument.annotation))
        for argument in found.parameters.values()
        if argument.name not in ("self", "cls")
    ]
    whole = found.replace(parameters=arguments, return_annotation=written(found.return_annotation))
    text = f"{name}{whole}".removesuffix(" -> None")
    if len(text) <= 100:
        return text
    returns = str(whole.replace(parameters=[])).removeprefix("()").removesuffix(" -> None")
    listed = re.split(r", (?![^\[(]*[\])])", str(whole.replace(return_annotation=found.empty))[1:-1])
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in listed) + f"){returns}"


def config_table(kind: Any) -> list[str]:
    lines = ["| field | type | default | what it is |", "|---|---|---|---|"]
    for spec in dataclasses.fields(kind):
        hint = re.sub(r"\b(typing|dual_rollout\.\w+|collections\.abc)\.", "", str(readable(field_hints()[spec.name])))
        cells = (f"`{spec.name}`", f"`{hint}`", f"`{spec.default!r}`", " ".join(spec.metadata["help"].split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def exceptions_table() -> list[str]:
    lines = ["| `dual_rollout.exceptions.` | is a | what has happened |", "|---|---|---|"]
    for name, kind in vars(exceptions).items():
        if inspect.isclass(kind):
            lines.append(
                f"| `{name}` | `{kind.__base__.__name__}` | {' '.join((inspect.getdoc(kind) or '').split())} |"
            )
    return [*lines, ""]


def readable(hint: Any) -> Any:
    return hint.__name__ if inspect.isclass(hint) else hint


def described(thing: Any) -> str:
    """The docstring as Markdown: its sections as lists."""
    out, section = [], None
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = line.rstrip(":")
            out += [f"**{section}**", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            head = re.match(r"    ((?:[A-Z]\w+|[*\w]+)(?:, [*\w]+)*): (.*)", line)
            out.append(f"- `{head[1]}`: {escaped(head[2])}" if head else f"- {escaped(line.strip())}")
        elif section and line.strip():
            out.append(f"  {escaped(line.strip())}")
        else:
            section = None if line.strip() else section
            out.append(escaped(line))
    return "\n".join(joined(out)) + "\n"


def joined(lines: list[str]) -> Iterator[str]:
    """Lines of a section that has no names, as one item."""
    previous = ""
    for line in lines:
        continues = line.startswith("- ") and not line.startswith("- `") and previous.startswith("- ")
        yield f"  {line[2:]}" if continues else line
        previous = "- " if continues else line


def escaped(text: str) -> str:
    """Outside of code, asterisks are themselves."""
    return re.sub(r"(`[^`]*`)|\*", lambda match: match[1] or r"\*", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
