"""What a run of training or of `dual-rollout generate` has left, as rollouts and the figures of its steps."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dual_rollout.prompts import as_text
from dual_rollout.record import COUNTS, output_name

NUMBERS = {
    name: output_name(name)
    for name in ("alpha", "logprobs_q", "logprobs_theta", "logprobs_t", "kl_theta", "coverage_theta", "coverage_t")
}
"""The numbers of each token, and their columns. Weights are π_θ/q*, which two of them give."""

SHOWN = (*(name for name in NUMBERS if not name.startswith("coverage")), "coverage")
"""Those that a `ShownRollout` has: the coverage is that of the list that holds less."""

REQUIRED = ("generated_tokens", *(NUMBERS[name] for name in ("alpha", "logprobs_q", "logprobs_theta", "logprobs_t")))
_PLAIN = ("step", "index", "generation", "prompt", "t_prompt", "t_target", "reward", "advantage", "error", *COUNTS)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass
class ShownRollout:
    """One sequence.

    Attributes:
        about: `step`, `prompt`, `t_prompt`, `t_target`, `reward`, `advantage`, `error`, `draft_tokens` and
            `accepted_tokens`, of those that are known.
        token_ids: `(T,)` int64.
        numbers: those of `SHOWN` that are known, `(T,)` float32 each; NaN where a token has none.
    """

    about: dict[str, Any]
    token_ids: np.ndarray
    numbers: dict[str, np.ndarray]


@dataclass
class Source:
    """What was read.

    Attributes:
        found: rollouts that there are, of which `rollouts` may be a part.
        steps: entries of metrics.jsonl, in order.
        tokenizers: names and folders where the tokenizer may be, the likeliest first.
    """

    rollouts: list[ShownRollout]
    found: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    tokenizers: list[str] = field(default_factory=list)


def read(paths: Sequence[Path], limit: int) -> Source:
    """Rollouts and figures of some runs, folders of shards, and single shards.

    Args:
        limit: rollouts at most; of more, ones at equal distances.

    Raises:
        ValueError: a path that is none of these, a file that cannot be read, or nothing to show.
    """
    if limit < 1:
        raise ValueError(f"--max-rollouts must be at least 1, got {limit}")
    files, steps, tokenizers = [], [], []
    for path in paths:
        files += _rollout_files(path)
        if path.is_dir():
            steps += _steps(path / "metrics.jsonl")
            tokenizers += _tokenizers(path)
    tokenizers += [name for path in files if (name := _named_in(path)) is not None]
    counts = [_count(path) for path in files]
    found = sum(counts)
    if not found and not steps:
        raise ValueError(f"{', '.join(map(str, paths))}: there are no rollouts in it yet")
    chosen = np.unique(np.linspace(0, found - 1, min(found, limit)).round().astype(int)) if found else np.array([], int)
    rollouts, start = [], 0
    for path, count in zip(files, counts, strict=True):
        own = chosen[(chosen >= start) & (chosen < start + count)] - start
        rollouts += [_rollout(row, path) for row in _rows(path, own)] if len(own) else []
        start += count
    return Source(rollouts, found, steps, list(dict.fromkeys(tokenizers)))


def _rollout_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in (".parquet", ".jsonl"):
            raise ValueError(f"{path} is no shard: name a .parquet or .jsonl file, or a run's folder")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: name a run's folder (output_dir), or shards of dual-rollout generate")
    kept = sorted(path.glob("rollouts/rollouts_*.parquet"))
    shards = sorted([*path.glob("train-*.parquet"), *path.glob("train-*.jsonl")])
    if not kept and not shards and not (path / "metrics.jsonl").exists():
        raise ValueError(
            f"{path} holds neither a training run (metrics.jsonl, rollouts/) nor shards of dual-rollout generate "
            "(train-*.parquet or .jsonl)"
        )
    return kept + shards


def _steps(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line of a run that was killed
            entries.append(json.loads(line))
    return entries


def _tokenizers(folder: Path) -> list[str]:
    """Where the tokenizer of a folder's rollouts may be: in it, or where shards say that their model is."""
    found = [str(folder)] if any((folder / name).exists() for name in _TOKENIZER_FILES) else []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        run = json.loads((folder / "run.json").read_text())
        named = (run["generation"].get("tokenizer"), run["models"]["theta"]["root"], run["models"]["theta"]["model"])
        found += [name for name in named if name]
    return found


def _named_in(path: Path) -> str | None:
    """The tokenizer that a file of a training run names."""
    if path.suffix != ".parquet":
        return None
    named = (_opened(path).schema_arrow.metadata or {}).get(b"tokenizer")
    return None if named is None else named.decode()


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable Parquet file: {error}") from error


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(_opened(path).metadata.num_rows)
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _rows(path: Path, numbers: np.ndarray) -> Iterator[Mapping[str, Any]]:
    """The rows of these numbers, which increase."""
    if path.suffix == ".jsonl":
        wanted = set(numbers.tolist())
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                if number in wanted:
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number + 1} is no JSON: {error}") from error
        return
    file, start = _opened(path), 0
    columns = [name for name in file.schema_arrow.names if name in (*_PLAIN, "generated_tokens", *NUMBERS.values())]
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        own = numbers[(numbers >= start) & (numbers < start + count)] - start
        if len(own):
            yield from file.read_row_group(group, columns).take(own).to_pylist()
        start += count


def _rollout(row: Mapping[str, Any], path: Path) -> ShownRollout:
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}: it is neither of a training run's rollouts/ nor a shard of "
            "dual-rollout generate"
        )
    ids = np.array(row["generated_tokens"], dtype=np.int64)
    known = {name: column for name, column in NUMBERS.items() if row.get(column) is not None}
    numbers = {name: np.array(row[column], dtype=np.float32) for name, column in known.items()}  # None becomes NaN
    for name, values in numbers.items():
        if values.shape != ids.shape:
            raise ValueError(f"{path}: a row has {len(ids)} tokens, but {len(values)} values of {NUMBERS[name]}")
    if "coverage_theta" in numbers and "coverage_t" in numbers:
        numbers["coverage"] = np.minimum(numbers.pop("coverage_theta"), numbers.pop("coverage_t"))
    about = {name: row[name] for name in _PLAIN if row.get(name) is not None}
    for name in ("prompt", "t_prompt"):
        if name in about:
            about[name] = as_text(about[name])
    return ShownRollout(about, ids, numbers)


def finite(values: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries without numbers that JSON has no word for."""
    return [
        {name: value for name, value in entry.items() if not isinstance(value, float) or math.isfinite(value)}
        for entry in values
    ]
