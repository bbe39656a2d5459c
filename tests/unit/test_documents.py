"""What the documents name is there: files, sections, commands with their flags, recipe keys."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml

import dual_rollout
from dual_rollout.cli import main
from dual_rollout.config import CoordinatorConfig
from tests.documents import PAGES, ROOT, arguments_of, blocks

FOLDERS = "dual_rollout|tests|recipes|docs|cli|decoding|functional|native|production|report|samplers|servers?|training"
SHORT = (ROOT, ROOT / "dual_rollout", ROOT / "recipes", ROOT / "tests")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = [re.sub(r"[`*\\]|\]\([^)]*\)|\[", "", line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@functools.cache
def recipe_keys() -> set[str]:
    """Ours, without the import of TRL."""
    arguments = (ROOT / "dual_rollout/training/arguments.py").read_text(encoding="utf-8")
    prefixed = {f"dual_{spec.name}" for spec in dataclasses.fields(CoordinatorConfig)}
    return prefixed | set(re.findall(r"^    (dual_\w+):", arguments, re.MULTILINE))


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), f"{target}: there are {sorted(anchors(other))}"


@each_page
def test_files_are_there(page: Path) -> None:
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8")):
        assert any((folder / name).exists() for folder in (*SHORT, page.parent)), name


@each_page
def test_recipe_keys_are_there(page: Path) -> None:
    named = set(re.findall(r"(?<![\w.*-])(dual_\w+\w)(?![\w*.(/]|\s*<)", page.read_text(encoding="utf-8")))
    assert named - {"dual_rollout", "dual_config", "dual_topk"} <= recipe_keys()  # the last is shown as a mistake


@each_page
def test_flags_are_there(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inline = re.findall(r"`dual-rollout ([a-z-]+[^`]*)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    for command, *words in [*arguments_of("dual-rollout", page), *map(str.split, inline)]:
        flags = {word.split("=")[0] for word in words if re.match(r"--\w", word)}
        if command == "train":  # which takes TRL's too
            assert {flag.removeprefix("--") for flag in flags if flag.startswith("--dual_")} <= recipe_keys()
        elif command != "serve-native" and not command.startswith("-"):  # which takes vLLM's too
            with pytest.raises(SystemExit):
                main([command, "--help"])
            assert flags <= set(re.findall(r"--[\w-]+", capsys.readouterr().out)), f"dual-rollout {command}"


@each_page
def test_snippets_of_python_name_what_is_there(page: Path) -> None:
    for snippet in blocks(page, "python"):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dual_rollout":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "CoordinatorConfig":
                names = {keyword.arg for keyword in node.keywords} - {None}
                assert names <= {spec.name for spec in dataclasses.fields(CoordinatorConfig)}, ast.unparse(node)


@each_page
def test_snippets_of_yaml_are_mappings(page: Path) -> None:
    assert all(isinstance(yaml.safe_load(snippet), dict) for snippet in blocks(page, "yaml"))


@each_page
def test_commands_can_be_read_by_a_shell_and_name_what_is_there(page: Path) -> None:
    for script in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        plain = re.sub(r"(^|\s)#.*", "", script)
        for name in re.findall(r"(?<![\w/.-])((?:recipes|tests|docs)/[\w./-]+\.(?:py|sh|yaml))", plain):
            assert (ROOT / name).exists(), name


def test_the_api_page_is_what_the_docstrings_say() -> None:
    made = runpy.run_path(str(ROOT / "docs/api.py"))
    assert sorted(name for names in made["GROUPS"].values() for name in names) == sorted(dual_rollout.__all__)
    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == made["page"](), "run python docs/api.py"


def without_numbers(text: str) -> str:
    return re.sub(r"\{[^{}]*\}|\d[\d.]*", "0", text)


def test_troubleshooting_quotes_what_is_said() -> None:
    """Each quotation stands in the code, as one message over any number of lines, but for its numbers."""
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dual_rollout").rglob("*.py"))
    messages = without_numbers(re.sub(r'"\s*f?"', "", code))
    quoted = re.findall(r'"([^"]+)"', (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quoted) > 15
    assert not [text for text in quoted if without_numbers(text) not in messages]


SHIPPED = [path for name in ("examples", "tools", "distillation") for path in ROOT.glob(f"recipes/{name}/*.py")]


def test_the_api_page_has_what_documents_and_examples_use() -> None:
    """Names of the package's modules; the evidence is of this project itself, and uses more."""
    texts = [snippet for page in PAGES for snippet in blocks(page, "python")]
    texts += [path.read_text(encoding="utf-8") for path in SHIPPED]
    used = {
        f"{node.module}.{alias.name}"
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dual_rollout.")
        for alias in node.names
    }
    described = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    raised = {f"dual_rollout.exceptions.{name}" for name in re.findall(r"^\| `(\w+Error)` \|", described, re.MULTILINE)}
    assert len(used) > 8
    assert not used - raised - {*re.findall(r"^### `(\S+)`$", described, re.MULTILINE)}


def test_the_pages_name_many() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(PAGES) > 20 and sum(len(arguments_of("dual-rollout", page)) for page in PAGES) > 15
    assert text.count("](") > 80 and len(re.findall(rf"`(?:{FOLDERS})/[\w./-]+\.\w+`", text)) > 80
