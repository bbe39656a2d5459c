"""The messages that docs/troubleshooting.md quotes are the ones that the code prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = sorted({words for row in PAGE.splitlines() if row.startswith("|") for words in re.findall('"([^"]+)"', row)})


def source() -> str:
    """All string literals in one piece, as they read when adjacent ones are joined."""
    text = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "dual_rollout").rglob("*.py"))
    return re.sub(r"""["']\s+f?["']""", "", text)


SOURCE = source()


@pytest.mark.parametrize("words", [words for words in QUOTED if words != "clipped ratio"])
def test_a_quoted_message_is_in_the_source(words: str) -> None:
    parts = re.split(r"\b\d+\b", words)  # numbers are filled in
    assert all(part.strip() in SOURCE for part in parts)


def test_the_page_quotes_many() -> None:
    assert len(QUOTED) > 15
