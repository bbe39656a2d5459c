"""One page of HTML that holds rollouts, the program that shows them, and nothing that is fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dual_rollout.report.read import SHOWN, ShownRollout, Source, finite, read
from dual_rollout.report.token_texts import TokenTexts
from dual_rollout.text import load_tokenizer

MAX_ROLLOUTS = 2000


def write_report(
    paths: Sequence[Path], output: Path, *, tokenizer: str | None = None, max_rollouts: int = MAX_ROLLOUTS
) -> Source:
    """Write the page of some runs, folders of shards, or shards.

    Args:
        tokenizer: name or folder of the policy's; when None, where the runs say that it is.
        max_rollouts: in the page at most; of more, ones at equal distances.

    Returns:
        What was read.

    Raises:
        ValueError: nothing to show, files that cannot be read, or no tokenizer.
        OSError: the page cannot be written.
    """
    if not output.parent.is_dir():
        raise ValueError(f"-o {output}: the folder {output.parent} does not exist")
    source = read(paths, max_rollouts)
    texts = TokenTexts(_tokenizer(source, tokenizer)) if source.rollouts else None
    data = page_data(source, texts, title=", ".join(map(str, paths)))
    output.write_text(render(data), encoding="utf-8")
    return source


def page_data(source: Source, texts: TokenTexts | None, title: str) -> dict[str, Any]:
    """What the page's program reads: plain JSON, with the numbers of all tokens in a row as base64.

    `tokens` are numbers of `texts` and `ids`, uint16 or uint32 as `token_bytes` says, and `numbers` are float32, all
    little-endian. A rollout has the `length` that follows the one before it. Prompts, which repeat, are numbers of
    `prompts`.
    """
    prompts: dict[str, int] = {}
    abouts = []
    for rollout in source.rollouts:
        about = {name: value for name, value in rollout.about.items() if name not in ("prompt", "t_prompt")}
        for name in ("prompt", "t_prompt"):
            if name in rollout.about:
                about[name] = prompts.setdefault(rollout.about[name], len(prompts))
        abouts.append({**about, "length": len(rollout.token_ids)})
    numbered = [texts.of(rollout.token_ids) for rollout in source.rollouts] if texts is not None else []
    known = [name for name in SHOWN if any(name in rollout.numbers for rollout in source.rollouts)]
    token_bytes = 2 if texts is not None and len(texts.texts) <= 2**16 else 4
    return {
        "title": title,
        "found": source.found,
        "rollouts": finite(abouts),
        "prompts": list(prompts),
        "texts": [] if texts is None else texts.texts,
        "ids": [] if texts is None else texts.ids,
        "tokens": _base64(numbered, f"<u{token_bytes}"),
        "token_bytes": token_bytes,
        "numbers": {name: _base64(_column(source.rollouts, name), "<f4") for name in known},
        "steps": finite(source.steps),
    }


def render(data: dict[str, Any]) -> str:
    """The page. Its Content-Security-Policy lets a browser load nothing from anywhere."""
    files = {name: resources.files("dual_rollout.report").joinpath(name).read_text("utf-8") for name in _FILES}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(files["page.html"]).render(files=files, data=data)


_FILES = ("page.html", "page.css", "page.js", "uplot/uPlot.iife.min.js", "uplot/uPlot.min.css", "uplot/LICENSE")


def _column(rollouts: Sequence[ShownRollout], name: str) -> list[np.ndarray]:
    return [rollout.numbers.get(name, np.full(len(rollout.token_ids), np.nan, np.float32)) for rollout in rollouts]


def _base64(parts: Sequence[np.ndarray], dtype: str) -> str:
    joined = np.concatenate(parts) if parts else np.array([])
    return base64.b64encode(joined.astype(dtype).tobytes()).decode("ascii")


def _tokenizer(source: Source, name: str | None) -> Any:
    """The first that can be loaded.

    Raises:
        ValueError: none can.
    """
    reasons = []
    for candidate in [name] if name is not None else source.tokenizers:
        try:
            return load_tokenizer(candidate)
        except (OSError, ValueError) as error:
            reasons.append(f"{candidate}: {str(error).splitlines()[0]}")
    tried = f" ({'; '.join(reasons)})" if reasons else ""
    raise ValueError(f"the tokenizer that tells the tokens' texts is not found{tried}: set --tokenizer to the policy's")
