"""The input: rows of JSONL or Parquet files, or of a dataset by name, one at a time."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dual_rollout.config import did_you_mean
from dual_rollout.prompts import target_prompt, template_columns, without_nulls
from dual_rollout.types import Prompt

Row = Mapping[str, Any]

_BATCH = 1000  # rows read, checked and typed at once
_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".jsonl.gz": "jsonl", ".json.gz": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of the input mean what.

    Attributes:
        prompt: what π_θ sees: strings, chat messages or token ids.
        t_prompt: what π_t sees instead, if anything.
        t_prompt_template: the user turn that π_t sees instead, with columns in braces.
        t_system_prompt: a system turn that π_t alone sees, with columns in braces.
        keep: columns to copy to the output.
    """

    prompt: str = "prompt"
    t_prompt: str | None = None
    t_prompt_template: str | None = None
    t_system_prompt: str | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.t_prompt is not None and self.t_prompt_template is not None:
            raise ValueError("set --t-prompt-column or --t-prompt-template, not both")
        self._in_templates()

    @property
    def needed(self) -> tuple[str, ...]:
        """All columns that the input must have."""
        named = (self.prompt, self.t_prompt, *self._in_templates(), *self.keep)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def has_template(self) -> bool:
        return self.t_prompt_template is not None or self.t_system_prompt is not None

    @property
    def shows_t_prompt(self) -> bool:
        return self.t_prompt is not None or self.has_template

    def prompt_of(self, row: Row) -> Prompt:
        return without_nulls(row[self.prompt])

    def t_prompt_of(self, row: Row) -> Prompt | None:
        """What π_t sees; None for the same as π_θ; empty, and so refused, where `t_prompt_error` says why."""
        if not self.has_template:
            return None if self.t_prompt is None else without_nulls(row[self.t_prompt])
        try:
            return self._target_prompt(row)
        except ValueError:
            prompt = row[self.prompt]
            return None if prompt is None else type(prompt)()

    def t_prompt_error(self, row: Row) -> str | None:
        """Why there is nothing that π_t could see of a row; None where there is."""
        if self.has_template:
            try:
                self._target_prompt(row)
            except ValueError as error:
                return str(error)
        return None

    def _target_prompt(self, row: Row) -> Prompt:
        return target_prompt(
            row,
            template=self.t_prompt_template,
            system_prompt=self.t_system_prompt,
            prompt_column=self.prompt,
            t_prompt_column=self.t_prompt,
        )

    def _in_templates(self) -> list[str]:
        named = []
        for flag, template in (
            ("--t-prompt-template", self.t_prompt_template),
            ("--t-system-prompt", self.t_system_prompt),
        ):
            try:
                named += template_columns(template or "")
            except ValueError as error:
                raise ValueError(f"{flag} is not valid: {error}; braces that are text are written twice") from error
        return named


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
        inputs: JSONL (also compressed, .jsonl.gz) or Parquet files, or the name (or folder) of one dataset.
        config_name, split: of a dataset.
        limit: use the first rows only.

    Raises:
        ValueError: a missing file or column, no rows, a line that is no JSON object, or types that do not go together;
            says where. Iterating raises it too, for what a Parquet file or a dataset shows only then.
    """
    kinds = {_kind(name) for name in inputs}
    if len(kinds) != 1 or (kinds == {"dataset"} and len(inputs) > 1):
        raise ValueError(
            "--input must be files of one kind (.jsonl, .jsonl.gz or .parquet), or the name of one dataset"
        )
    source = {"jsonl": _json_source, "parquet": _parquet_source}.get(kinds.pop())
    found = source(inputs, columns) if source else _dataset_source(inputs[0], config_name, split, columns)
    if found.total == 0:
        raise ValueError(f"--input {', '.join(inputs)} has no rows")
    total = found.total if limit is None or found.total is None else min(limit, found.total)
    return Source(found.identity, total, found.schema, lambda: itertools.islice(found, limit))


def _kind(name: str) -> str:
    path = Path(name)
    kind = _KINDS.get("".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix, "dataset")
    if kind != "dataset" and not Path(name).is_file():
        raise ValueError(f"--input: there is no file {name}")
    return kind


def _json_source(paths: Sequence[str], columns: Columns) -> Source:
    """Read everything once: the checksum, the number of rows, and types that all of them fit."""
    types, total, files = _Types(), 0, []
    for path in paths:
        digest = hashlib.sha256()
        with _named(path), _open_lines(path) as file:
            rows = _parse_lines(path, _hashed(file, digest), columns)
            while batch := list(itertools.islice(rows, _BATCH)):
                with _of_one_type(path):
                    types.add(
                        pa.schema([(name, pa.array([row[name] for row in batch]).type) for name in columns.needed])
                    )
                total += len(batch)
        files.append(_file_identity(path, digest))

    def read(path: str) -> Iterator[Row]:
        with _named(path), _open_lines(path) as file:
            yield from _parse_lines(path, file, columns)

    return _checked_files(paths, files, total, types, read)


def _checked_files(
    paths: Sequence[str],
    files: list[dict[str, Any]],
    total: int,
    types: _Types,
    read: Callable[[str], Iterator[Row]],
) -> Source:
    """A source of files; where their parts differ in type all rows are tried, for not every integer is a float."""
    for path in paths if types.differ else ():
        rows = read(path)
        while batch := list(itertools.islice(rows, _BATCH)):
            _check_fit(batch, types.widest, path)
    return Source({"files": files}, total, types.widest, lambda: itertools.chain.from_iterable(map(read, paths)))


def _check_fit(rows: list[Row], schema: pa.Schema, where: str) -> None:
    with _of_one_type(where):
        pa.Table.from_pylist(rows, schema)


class _Types:
    """The narrowest types that hold those of all parts of an input, and whether these differ."""

    def __init__(self) -> None:
        self.widest, self.differ, self._first = pa.schema([]), False, None

    def add(self, part: pa.Schema) -> None:
        self._first = self._first or part
        self.differ |= part != self._first
        self.widest = pa.unify_schemas([self.widest, part], promote_options="permissive")


@contextlib.contextmanager
def _of_one_type(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"{where}: the rows of a column must be of one type: {error}") from error


def _open_lines(path: str) -> Any:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


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


def _parquet_source(paths: Sequence[str], columns: Columns) -> Source:
    types, total, files = _Types(), 0, []
    for path in paths:
        with open(path, "rb") as file:
            files.append(_file_identity(path, hashlib.file_digest(file, "sha256")))
        with _named(path):
            stored = pq.ParquetFile(path)
            found = stored.schema_arrow.remove_metadata()
            _check_columns(found.names, columns, path)
            types.add(pa.schema([(name, _plain_type(found.field(name).type)) for name in columns.needed]))
        total += stored.metadata.num_rows

    def read(path: str) -> Iterator[Row]:
        with _named(path):
            for batch in pq.ParquetFile(path).iter_batches(_BATCH, columns=list(columns.needed)):
                yield from batch.to_pylist()

    return _checked_files(paths, files, total, types, read)


def _dataset_source(name: str, config_name: str | None, split: str, columns: Columns) -> Source:
    import datasets

    where = f"{name}, split {split}"
    with _named(f"--input {name}: no dataset of that name could be opened"):
        builder = datasets.load_dataset_builder(name, config_name)
        dataset = builder.as_streaming_dataset(split=split)
        if dataset.features is None:
            dataset = dataset._resolve_features()
    _check_columns(list(dataset.features or ()), columns, where)
    wanted = list(columns.needed)
    stored = dataset.features.arrow_schema
    schema = pa.schema([(column, _plain_type(stored.field(column).type)) for column in wanted])
    known = (builder.info.splits or {}).get(split)
    identity = {"dataset": name, "config": config_name, "split": split, "hash": builder.hash}

    def read() -> Iterator[Row]:
        with _named(where):
            for number, row in enumerate(dataset.select_columns(wanted)):
                _check_fit([row], schema, f"{where}, row {number}")  # its types are a promise that nobody has checked
                yield row

    return Source(identity, known and known.num_examples, schema, read)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the same values without the ways to store them: dictionaries, views, lists of a fixed length."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(_plain_type(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_list_view(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _plain_type(field.type)) for field in kind])
    return kind


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Say where reading failed, whatever it was that a damaged file or a dataset's own reader raised."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {str(error) or type(error).__name__}") from error


def _file_identity(path: str, digest: Any) -> dict[str, Any]:
    return {"name": Path(path).name, "bytes": Path(path).stat().st_size, "sha256": digest.hexdigest()}


def _check_columns(found: list[str], columns: Columns, where: str) -> None:
    for name in columns.needed:
        if name not in found:
            raise ValueError(f"{where} has no column {name!r}, but {', '.join(found)}{did_you_mean(name, found)}")
        if found.count(name) > 1:
            raise ValueError(f"{where} has {found.count(name)} columns {name!r}: rename all but one")
