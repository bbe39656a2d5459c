"""What a page of `dual-rollout report` holds, read as its program reads it."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Page:
    """The page's rollouts: what is said about each, its tokens' texts and ids, and their numbers."""

    html: str
    data: dict[str, Any]
    texts: list[list[str]]
    ids: list[list[int]]
    numbers: dict[str, list[np.ndarray]]


def read_page(path: Path) -> Page:
    html = path.read_text(encoding="utf-8")
    (written,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    data = json.loads(written)
    ends = np.cumsum([rollout["length"] for rollout in data["rollouts"]])[:-1]

    def split(text: str, dtype: str) -> list[np.ndarray]:
        return np.split(np.frombuffer(base64.b64decode(text), dtype), ends)

    tokens = split(data["tokens"], f"<u{data['token_bytes']}")
    return Page(
        html,
        data,
        [[data["texts"][number] for number in row] for row in tokens],
        [[data["ids"][number] for number in row] for row in tokens],
        {name: split(text, "<f4") for name, text in data["numbers"].items()},
    )
