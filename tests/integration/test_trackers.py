"""What wandb and trackio have stored of a run: histograms and tables of the tokens that the reward function was given.

Nothing leaves the machine. `make test-trackers` installs both in an environment of their own and runs these tests.
Elsewhere they skip.
"""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dual_rollout.training.trackers import BINS
from tests.integration.conftest import TinyPair
from tests.recording_reward import read_records
from tests.runs import finish, one_process, start, write_recipe

STEPS = 2
ALPHA, LOG_WEIGHT = BINS


def is_installed(tracker: str) -> bool:
    spec = importlib.util.find_spec(tracker)
    return spec is not None and spec.origin is not None  # a folder of wandb's runs looks like a package, too


def needs(tracker: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_installed(tracker), reason=f"{tracker} is not installed")


@dataclass
class Run:
    folder: Path
    records: list[dict[str, Any]]  # what the reward function of each step was given


@pytest.fixture(scope="module")
def run(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run for all trackers that are installed, in a process of its own, for they are set up at import."""
    folder = tmp_path_factory.mktemp("trackers")
    recipe = write_recipe(
        folder,
        (tiny_pair.theta_model, tiny_pair.t_model),
        dual_theta_url=tiny_pair.theta_url,
        dual_t_url=tiny_pair.t_url,
        report_to=[tracker for tracker in ("wandb", "trackio") if is_installed(tracker)],
        log_completions=True,
        max_steps=STEPS,
        project="a-project",
    )
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    finish(start(one_process(recipe), folder, **places))
    records = read_records(folder, 0)
    assert [record["step"] for record in records] == list(range(STEPS))
    return Run(folder, records)


def check_histograms(stored: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    """Of what was logged, one call of the tracker after the other: every token of each step is counted once."""
    logged = [entry for entry in stored if f"train/{ALPHA}" in entry]
    assert [entry["train/global_step"] for entry in logged] == [1, 2]
    for entry, given in zip(logged, records, strict=True):
        alpha, theta, q = (np.concatenate(given[name]) for name in ("alpha", "logprobs_theta", "logprobs_q"))
        for name, values in ((ALPHA, alpha), (LOG_WEIGHT, theta - q)):
            histogram = entry[f"train/{name}"]
            assert histogram["values"] == np.histogram(values, BINS[name])[0].tolist(), name
            assert histogram["bins"] == pytest.approx(BINS[name].tolist())
            assert sum(histogram["values"]) == sum(map(len, given["completion_ids"])) > 0


def check_tables(tables: list[list[dict[str, Any]]], records: list[dict[str, Any]]) -> None:
    """TRL's tables of completions, the last of which it sends again when the run ends."""
    assert len(tables) >= STEPS
    for step, (rows, given) in enumerate(zip(tables, records, strict=False), start=1):
        assert [row["step"] for row in rows] == [step] * len(given["questions"])
        assert [row["recorded"] for row in rows] == [sum(ids) % 7 for ids in given["completion_ids"]]
        for column, name in (("alpha", "alpha"), ("importance_weight", "importance_weights")):
            means = [np.mean(values) for values in given[name]]
            assert [row[column] for row in rows] == pytest.approx(means, abs=1e-3)
        for row, question in zip(rows, given["questions"], strict=True):
            assert question in json.dumps(row["prompt"])


@needs("wandb")
def test_wandb_has_them(run: Run) -> None:
    (log,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    stored = list(wandb_history(log.read_bytes()))
    check_histograms(stored, run.records)
    paths = [entry["completions"]["path"] for entry in stored if "completions" in entry]
    tables = [json.loads((log.parent / "files" / path).read_text()) for path in paths]
    rows = [[dict(zip(table["columns"], row, strict=True)) for row in table["data"]] for table in tables]
    check_tables(rows, run.records)


def wandb_history(log: bytes) -> Iterator[dict[str, Any]]:
    """What each call of `wandb.log` has left in the file of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in leveldb_records(log):
        record = Record.FromString(data)
        if record.HasField("history"):
            entry: dict[str, Any] = {}
            for item in record.history.item:
                *outer, name = item.nested_key or [item.key]
                place = entry
                for key in outer:
                    place = place.setdefault(key, {})
                place[name] = json.loads(item.value_json)
            yield entry


def leveldb_records(log: bytes, header: int = 7, block: int = 1 << 15) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after a header of wandb's.

    A record is one piece or several, and no piece crosses the end of a block:
    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    place, record, last_kinds = header, b"", (1, 4)
    while place + 7 <= len(log):
        if block - place % block < 7:  # too little for a piece: zeros
            place += block - place % block
            continue
        _, size, kind = struct.unpack_from("<IHB", log, place)
        record += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in last_kinds:
            yield record
            record = b""


@needs("trackio")
def test_trackio_has_them(run: Run) -> None:
    with sqlite3.connect(run.folder / "trackio/a-project.db") as database:
        stored = [json.loads(entry) for (entry,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    check_histograms(stored, run.records)
    check_tables([entry["completions"]["_value"] for entry in stored if "completions" in entry], run.records)
