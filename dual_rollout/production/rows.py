"""The input: rows of JSONL or Parquet files, or of a dataset by name, one at a time."""

from __future__ import annotations

import hashlib
import itertools
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dual_rollout.config import did_you_mean
from dual_rollout.types import Prompt

Row = Mapping[str, Any]

_BATCH = 1000  # rows read, checked and typed at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of the input mean what.

    Attributes:
        prompt: what π_θ sees: strings, chat messages or token ids.
        t_prompt: what π_t sees instead, if anything.
        t_prompt_template: the user turn that π_t sees instead, with columns in braces.
        keep: columns to copy to the output.
    """

    prompt: str = "prompt"
    t_prompt: str | None = None
    t_prompt_template: str | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.t_prompt is not None and self.t_prompt_template is not None:
            raise ValueError("set --t-prompt-column or --t-prompt-template, not both")
        for name in self._in_template():
            if not name.isidentifier():
                raise ValueError(
                    f"--t-prompt-template: {name!r} in braces is no column; braces that are text are written twice"
                )

    @property
    def needed(self) -> tuple[str, ...]:
        """All columns that the input must have."""
        named = (self.prompt, self.t_prompt, *self._in_template(), *self.keep)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def shows_t_prompt(self) -> bool:
        return self.t_prompt is not None or self.t_prompt_template is not None

    def prompt_of(self, row: Row) -> Prompt:
        return _without_nulls(row[self.prompt])

    def t_prompt_of(self, row: Row) -> Prompt | None:
        """What π_t sees; None for the same as π_θ. In chat messages the template replaces the last turn."""
        if self.t_prompt is not None:
            return _without_nulls(row[self.t_prompt])
        prompt: Any = self.prompt_of(row)
        if self.t_prompt_template is None or not prompt:
            return None
        if any(row[name] is None for name in self._in_template()):
            return type(prompt)()  # of nothing: it is refused, and the row has an error
        content = self.t_prompt_template.format(**row)
        return content if isinstance(prompt, str) else [*prompt[:-1], {"role": "user", "content": content}]

    def _in_template(self) -> list[str]:
        if self.t_prompt_template is None:
            return []
        try:
            parts = list(string.Formatter().parse(self.t_prompt_template))
        except ValueError as error:
            raise ValueError(f"--t-prompt-template is not valid: {error}") from error
        return [f"{name}:{spec}" if spec else name for _, name, spec, _ in parts if name is not None]


@dataclass(frozen=True, slots=True)
class Source:
    """An input that has been checked. Iterating reads it anew; rows hold the needed columns at least.

    Attributes:
        identity: what a later run must find unchanged.
        total: rows, where that is known before reading them.
        schema: Arrow types of the columns.
    """

    identity: dict[str, Any]
    total: int | None
    schema: pa.Schema
    _read: Any = field(repr=False)

    def __iter__(self) -> Iterator[Row]:
        return self._read()


def open_source(
    inputs: Sequence[str],
    columns: Columns,
    *,
    config_name: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> Source:
    """Check the whole input, where it is files, before anything expensive.

    Args:
        inputs: JSONL or Parquet files, or the name (or folder) of one dataset.
        config_name, split: of a dataset.
        limit: use the first rows only.

    Raises:
        ValueError: a missing file or column, or a line that is no JSON object; says which.
    """
    kinds = {_kind(name) for name in inputs}
    if len(kinds) != 1 or (kinds == {"dataset"} and len(inputs) > 1):
        raise ValueError("--input must be files of one kind (.jsonl or .parquet), or the name of one dataset")
    source = {"jsonl": _json_source, "parquet": _parquet_source}.get(kinds.pop())
    found = source(inputs, columns) if source else _dataset_source(inputs[0], config_name, split, columns)
    total = found.total if limit is None or found.total is None else min(limit, found.total)
    return Source(found.identity, total, found.schema, lambda: itertools.islice(found, limit))


def _kind(name: str) -> str:
    kind = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}.get(Path(name).suffix, "dataset")
    if kind != "dataset" and not Path(name).is_file():
        raise ValueError(f"--input: there is no file {name}")
    return kind


def _json_source(paths: Sequence[str], columns: Columns) -> Source:
    """Read everything once: the checksum, the number of rows, and types that all of them fit."""
    schema, total, files = pa.schema([]), 0, []
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            rows = _parse_lines(path, _hashed(file, digest), columns)
            while batch := list(itertools.islice(rows, _BATCH)):
                schema = _widen(schema, batch, columns, path)
                total += len(batch)
        files.append(_file_identity(path, digest))

    def read() -> Iterator[Row]:
        for path in paths:
            with open(path, "rb") as file:
                yield from _parse_lines(path, file, columns)

    return Source({"files": files}, total, schema, read)


def _hashed(lines: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for line in lines:
        digest.update(line)
        yield line


def _parse_lines(path: str, lines: Iterable[bytes], columns: Columns) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}")
        _check_columns(list(row), columns, f"{path}, line {number}")
        yield row


def _widen(schema: pa.Schema, rows: list[Row], columns: Columns, path: str) -> pa.Schema:
    """The narrowest types that hold what the schema's do and these rows too."""
    try:
        found = [(name, pa.array([row[name] for row in rows]).type) for name in columns.needed]
        return pa.unify_schemas([schema, pa.schema(found)], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"{path}: the rows of a column must be of one type: {error}") from error


def _parquet_source(paths: Sequence[str], columns: Columns) -> Source:
    schema, total, files = pa.schema([]), 0, []
    for path in paths:
        with open(path, "rb") as file:
            files.append(_file_identity(path, hashlib.file_digest(file, "sha256")))
        try:
            stored = pq.ParquetFile(path)
            found = stored.schema_arrow.remove_metadata()
            _check_columns(found.names, columns, path)
            wanted = pa.schema([found.field(name) for name in columns.needed])
            schema = pa.unify_schemas([schema, wanted], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        total += stored.metadata.num_rows

    def read() -> Iterator[Row]:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(_BATCH, columns=list(columns.needed)):
                yield from batch.to_pylist()

    return Source({"files": files}, total, schema, read)


def _dataset_source(name: str, config_name: str | None, split: str, columns: Columns) -> Source:
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config_name)
        dataset = builder.as_streaming_dataset(split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--input {name}: no dataset of that name could be opened ({error})") from error
    if dataset.features is None:
        dataset = dataset._resolve_features()
    _check_columns(list(dataset.features), columns, f"{name}, split {split}")
    schema = dataset.features.arrow_schema.remove_metadata()
    known = (builder.info.splits or {}).get(split)
    identity = {"dataset": name, "config": config_name, "split": split, "hash": builder.hash}
    dataset = dataset.select_columns(list(columns.needed))
    return Source(identity, known and known.num_examples, schema, lambda: iter(dataset))


def _file_identity(path: str, digest: Any) -> dict[str, Any]:
    return {"name": Path(path).name, "bytes": Path(path).stat().st_size, "sha256": digest.hexdigest()}


def _check_columns(found: list[str], columns: Columns, where: str) -> None:
    for name in columns.needed:
        if name not in found:
            raise ValueError(f"{where} has no column {name!r}, but {', '.join(found)}{did_you_mean(name, found)}")


def _without_nulls(prompt: Any) -> Any:
    """Chat messages without the empty keys that Arrow adds where messages differ: templates ask for their presence."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        return [
            {key: value for key, value in message.items() if value is not None or key == "content"}
            for message in prompt
        ]
    return prompt
