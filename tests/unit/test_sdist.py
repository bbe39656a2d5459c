"""What an sdist has: packagers and readers need the documents, the recipes and the tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.hang import HANG

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("dual_rollout", "docs", "recipes", "tests", ".ci")
BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist')"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of an sdist, built from a copy: setuptools writes beside what it packs."""
    copy = tmp_path_factory.mktemp("sdist") / "project"
    copy.mkdir()
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix != ".log":
            shutil.copy(path, copy)
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, check=True, capture_output=True, timeout=HANG)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        return {name.partition("/")[2] for name in files.getnames()}


@pytest.mark.parametrize("part", PARTS)
def test_an_sdist_has_every_file_of(part: str, names: set[str]) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / part).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.suffix in ("", ".css", ".html", ".js", ".md", ".png", ".py", ".sh", ".yaml")
    }
    assert wanted and not wanted - names


def test_an_sdist_can_be_installed_checked_and_read(names: set[str]) -> None:
    assert {"setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile"} <= names
    assert {"constraints.txt", "dual_rollout/py.typed", "dual_rollout/report/page.html"} <= names
