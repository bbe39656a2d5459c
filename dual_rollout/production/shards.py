"""The output folder: shards that appear whole or not at all, a manifest with their checksums, journals of the rest.

run.json                          what was asked for; a later run must ask for the same
train-00000.parquet ...           shard s holds the sequences numbered s·R to (s + 1)·R − 1, in order
manifest-00000-of-00001.jsonl     a line per finished shard, by each process of a run
.train-00001.5e8f3a10.journal     the finished sequences of a shard that is not complete yet, of a run with this digest
README.md                         a dataset card: the types of the columns, for `datasets.load_dataset`

A run's first file is run.json, and its last to go: without one, nothing in the folder is ever taken for a run's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

Format = Literal["parquet", "jsonl"]
OutputRow = Mapping[str, Any]

_ROW_GROUP = 128  # rows in memory while a shard is written
_OURS = re.compile(
    r"run\.json|README\.md|manifest-\d+-of-\d+\.jsonl|train-\d+\.(parquet|jsonl)|\.train-\d+\.\w+\.journal|\..+\.tmp-.+"
)


@dataclass(frozen=True, slots=True)
class Share:
    """Which shards are a process's: those whose number leaves `index` when divided by `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"--shard-index must be at least 0 and below --num-shards, got {self.index} of {self.count}"
            )

    def __str__(self) -> str:
        return f"{self.index:05d}-of-{self.count:05d}"

    def has(self, shard: int) -> bool:
        return shard % self.count == self.index


class Journal:
    """Finished sequences of one shard, a line of JSON each, so that a process killed at any moment loses none.

    It is open only while it is read or written: a run may have as many journals as sequences in flight.
    """

    def __init__(self, path: Path):
        self.path = path
        self._offsets: dict[int, int] = {}
        if not path.exists():
            return
        with open(path, "r+b") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n"):  # the process died while it wrote this
                    file.truncate(end)
                    break
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the machine died
                    self._offsets[json.loads(line)["number"]] = end
                end += len(line)

    def __contains__(self, number: int) -> bool:
        return number in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, number: int, row: OutputRow) -> None:
        with open(self.path, "ab") as file:
            offset = file.tell()
            file.write(_journal_line(number, row))
        self._offsets[number] = offset

    def items(self) -> Iterator[tuple[int, OutputRow]]:
        """Numbers and rows, in the order of the numbers."""
        with open(self.path, "rb") as file:
            for number in sorted(self._offsets):
                file.seek(self._offsets[number])
                yield number, json.loads(file.readline())["row"]


class OutputFolder:
    """A folder of shards, with a lock on one process's share of them. Close it when done.

    Args:
        path: made if it does not exist.
        settings: all that determines the rows.
        schema: of the rows.
        rows_per_shard: R.
        overwrite: remove what an earlier run wrote.

    Attributes:
        finished: rows of each of the process's shards that is complete and undamaged.
        failed: those of them with an error.

    Raises:
        ValueError: the folder holds something else, or a run with other settings, or another process has this share.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        schema: pa.Schema,
        *,
        format: Format,
        rows_per_shard: int,
        share: Share,
        overwrite: bool = False,
    ):
        self.path, self.schema, self.format, self.rows_per_shard, self.share = (
            path,
            schema,
            format,
            rows_per_shard,
            share,
        )
        self.finished: dict[int, int] = {}
        self.failed: dict[int, int] = {}
        if overwrite and share.count > 1:
            raise ValueError("--overwrite is for a single process: remove the folder before several start")
        path.mkdir(parents=True, exist_ok=True)
        self._refuse_foreign()
        self._manifest = self._lock(path / f"manifest-{share}.jsonl")
        try:
            self._refuse_other_shares()
            if overwrite:
                self._remove_run()
            self._check_settings(settings)
            self._digest = _sha256(path / "run.json")[:8]
            self._remove_leftovers()
            self._read_manifests()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._manifest.close()

    def shard_path(self, shard: int) -> Path:
        return self.path / f"train-{shard:05d}.{self.format}"

    def journal(self, shard: int) -> Journal:
        return Journal(self._journal_path(shard))

    def write(self, shard: int, journal: Journal) -> None:
        """Turn a complete journal into a shard. Killed on the way, the journal is there, or the shard, or both."""
        path, failed = self.shard_path(shard), 0

        def rows() -> Iterator[OutputRow]:
            nonlocal failed
            for _, row in journal.items():
                failed += row["error"] is not None
                yield row

        with self._atomic(path) as file:
            if self.format == "parquet":
                _write_parquet(file, rows(), self.schema)
            else:  # NaN, which JSON has not, becomes null
                file.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows())
        self._note({"shard": shard, "file": path.name, "rows": len(journal), "failed": failed, "sha256": _sha256(path)})
        self.finished[shard], self.failed[shard] = len(journal), failed
        journal.path.unlink()

    def reopen_failed(self) -> int:
        """Make rows with an error count as not done; returns how many. Their shards stay until they are replaced.

        From here on a shard with failed rows and a journal is one whose rows are being generated again, and a later
        run goes on with the journal.
        """
        count = 0
        for shard in [shard for shard, failed in self.failed.items() if failed]:
            first = shard * self.rows_per_shard
            count += self._keep_good(shard, enumerate(self._read(shard), start=first))
            del self.finished[shard], self.failed[shard]
        for path in self.path.glob(f".train-*.{self._digest}.journal"):
            if self.share.has(shard := _shard_of(path)):
                count += self._keep_good(shard, self.journal(shard).items())
        return count

    def _refuse_foreign(self) -> None:
        """Asked in this order: another process that starts a run here makes run.json before any file but these."""
        foreign = [e.name for e in self.path.iterdir() if not e.name.startswith((".", "manifest-"))]
        if foreign and not (self.path / "run.json").exists():
            raise ValueError(
                f"--output {self.path} holds {foreign[0]}, but no run.json of an earlier run: choose another folder"
            )

    def _refuse_other_shares(self) -> None:
        """Processes that split the work in another way would write the same shards."""
        for path in self.path.glob("manifest-*.jsonl"):
            if not path.name.endswith(f"-of-{self.share.count:05d}.jsonl"):
                self._lock(path).close()

    def _lock(self, path: Path) -> IO[bytes]:
        file = open(path, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            index, count = map(int, re.findall(r"\d+", path.name))
            raise ValueError(
                f"another process is writing to {self.path} as --shard-index {index} of {count}: stop it, or give all "
                "processes one --num-shards and each an index of its own"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): see that no two processes have one --shard-index", path, error)
        return file

    def _remove_run(self) -> None:
        """Everything that a run writes, but for the manifest that is locked; run.json last, if this is killed."""
        self._manifest.truncate(0)
        entries = [
            e for e in self.path.iterdir() if _OURS.fullmatch(e.name) and e.name != f"manifest-{self.share}.jsonl"
        ]
        for entry in sorted(entries, key=lambda entry: entry.name == "run.json"):
            entry.unlink()

    def _remove_leftovers(self) -> None:
        """Unfinished files that nobody writes to, and journals of a run that was removed without its hidden files."""
        for entry in self.path.glob(".*.tmp-*"):
            if entry.name.endswith(f".tmp-{self.share}") or not entry.name.endswith(f"-of-{self.share.count:05d}"):
                entry.unlink()
        for entry in self.path.glob(".train-*.journal"):
            if self.share.has(_shard_of(entry)) and entry != self._journal_path(_shard_of(entry)):
                entry.unlink()

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Write run.json, or compare with the one that is there."""
        path, card = self.path / "run.json", self.path / "README.md"
        if not path.exists():
            with self._atomic(path) as file:
                file.write(json.dumps(settings, indent=2).encode())
        if not card.exists():
            with self._atomic(card) as file:
                file.write(_card(self.schema).encode())
        try:
            earlier, now = _flat(json.loads(path.read_bytes())), _flat(json.loads(json.dumps(settings)))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): --overwrite begins anew") from error
        # Of a target that was not there in one of both runs.
        not_known = [key for key in now if key.startswith("models.") and None in (earlier.get(key), now[key])]
        changes = [
            f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}"
            for key in {**earlier, **now}
            if not _same_setting(key, earlier.get(key), now.get(key)) and key not in not_known
        ]
        if changes:
            raise ValueError(
                f"--output {self.path} holds a run with other settings: {'; '.join(changes)}. Repeat the earlier ones "
                "to go on with it; choose another folder, or --overwrite, for a new run"
            )

    def _read_manifests(self) -> None:
        """Find out which shards of this process are whole, whoever wrote them; the others are made again."""
        entries: dict[int, list[list[Any]]] = {}
        for path in self.path.glob("manifest-*.jsonl"):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a process died while it wrote this
                    entry = orjson.loads(line)
                    shard, *facts = (entry[key] for key in ("shard", "sha256", "rows", "failed"))
                    if self.share.has(shard):
                        entries.setdefault(shard, []).append(facts)
        for shard, candidates in sorted(entries.items()):
            path, journal = self.shard_path(shard), self._journal_path(shard)
            checksum = _sha256(path) if path.exists() else None
            whole = [facts for facts in candidates if facts[0] == checksum]
            if whole:
                _, rows, failed = whole[0]
                if failed and journal.exists():
                    continue  # its failed rows were being generated again
                self.finished[shard], self.failed[shard] = rows, failed
                journal.unlink(missing_ok=True)
            else:
                what = "is missing" if checksum is None else "does not match its checksum in the manifest"
                logger.warning("%s %s: its rows are generated again", path, what)

    def _note(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the manifest; on a line of its own, whatever was left of the last one."""
        end = self._manifest.seek(0, os.SEEK_END)
        if end:
            self._manifest.seek(end - 1)
            if self._manifest.read(1) != b"\n":
                self._manifest.write(b"\n")
        self._manifest.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        self._manifest.flush()
        os.fsync(self._manifest.fileno())

    def _keep_good(self, shard: int, rows: Iterable[tuple[int, OutputRow]]) -> int:
        """Let the shard's journal hold the rows without an error; returns the number of the others."""
        failed = 0
        with self._atomic(self._journal_path(shard)) as file:
            for number, row in rows:
                if row["error"] is None:
                    file.write(_journal_line(number, row))
                else:
                    failed += 1
        return failed

    def _read(self, shard: int) -> Iterator[OutputRow]:
        path = self.shard_path(shard)
        if self.format == "parquet":
            for batch in pq.ParquetFile(path).iter_batches(_ROW_GROUP):
                yield from batch.to_pylist()
        else:
            with open(path, "rb") as file:
                yield from map(orjson.loads, file)

    def _journal_path(self, shard: int) -> Path:
        return self.path / f".train-{shard:05d}.{self._digest}.journal"

    @contextlib.contextmanager
    def _atomic(self, path: Path) -> Iterator[IO[bytes]]:
        """A file to write that becomes `path`, on disk, when all is written, and not before."""
        temporary = path.with_name(f".{path.name.removeprefix('.')}.tmp-{self.share}")
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write_parquet(file: IO[bytes], rows: Iterator[OutputRow], schema: pa.Schema) -> None:
    # Dictionaries only where rows repeat each other: of floats they are as long as the floats.
    repeated = ["finish_reason", "versions", "settings"]
    with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=repeated) as writer:
        while batch := list(itertools.islice(rows, _ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(batch, schema))


def _journal_line(number: int, row: OutputRow) -> bytes:
    # Not orjson, which writes NaN as null.
    return json.dumps({"number": number, "row": row}, ensure_ascii=False).encode() + b"\n"


def _shard_of(path: Path) -> int:
    return int(path.name.removeprefix(".").split("-")[1].split(".")[0])


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same_setting(key: str, earlier: Any, now: Any) -> bool:
    if key.startswith("models.") and key.endswith(".logprob") and earlier is not None and now is not None:
        return math.isclose(earlier, now, rel_tol=_SAME_WEIGHTS)
    return bool(earlier == now)


_SAME_WEIGHTS = 0.01  # of a fingerprint: other cards and batches change it by less, training soon by more


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    if isinstance(values, list) and values and isinstance(values[0], dict):
        values = dict(enumerate(values))
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        name: value
        for key, inner in values.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _card(schema: pa.Schema) -> str:
    """Without it a column of nothing but nulls in the first JSONL shard would be of no type.

    It does not name the files, which `load_dataset` finds by their names: of files that a card names it would go on
    using what it has cached when there are more of them.
    """
    from datasets import Features
    from datasets.info import DatasetInfo, DatasetInfosDict
    from huggingface_hub import DatasetCardData

    card, features = DatasetCardData(), Features.from_arrow_schema(schema)
    DatasetInfosDict({"default": DatasetInfo(features=features)}).to_dataset_card_data(card)
    text = "Sequences from q\\*, written by `dual-rollout generate`. The settings are in run.json."
    return f"---\n{card.to_yaml()}\n---\n\n{text}\n"
