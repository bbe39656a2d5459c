"""What the documents name is there: files, sections, commands with their flags, recipe keys."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from pathlib import Path

import pytest

from dual_rollout.cli import main
from dual_rollout.config import CoordinatorConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")]
FOLDERS = "dual_rollout|tests|recipes|docs|cli|decoding|functional|native|production|report|samplers|servers?|training"
SHORT = (ROOT, ROOT / "dual_rollout", ROOT / "recipes", ROOT / "tests")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = [re.sub(r"[`*\\]|\]\([^)]*\)|\[", "", line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """The `dual-rollout` commands in its blocks of code, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split(" # ")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"\bdual-rollout (.*)", line) for line in lines if not line.startswith("#")]
    return [shlex.split(re.split(r"\s[&|>;]", match[1])[0]) for match in found if match]


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
    for command, *words in commands(page):
        flags = {word.split("=")[0] for word in words if re.match(r"--\w", word)}
        if command == "train":  # which takes TRL's too
            assert {flag.removeprefix("--") for flag in flags if flag.startswith("--dual_")} <= recipe_keys()
        elif command != "serve-native" and not command.startswith("-"):  # which takes vLLM's too
            with pytest.raises(SystemExit):
                main([command, "--help"])
            assert flags <= set(re.findall(r"--[\w-]+", capsys.readouterr().out)), f"dual-rollout {command}"


def test_the_pages_name_many() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(PAGES) > 20 and sum(len(commands(page)) for page in PAGES) > 15
    assert text.count("](") > 80 and len(re.findall(rf"`(?:{FOLDERS})/[\w./-]+\.\w+`", text)) > 80
