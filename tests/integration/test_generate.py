"""`dual-rollout generate`: what it writes, and that it goes on where it was killed."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from dual_rollout import CoordinatorConfig, DualRollout, DualVLLMCoordinator
from dual_rollout.cli import main
from dual_rollout.exceptions import EngineUnavailableError
from dual_rollout.production.rows import Columns, open_source
from dual_rollout.production.run import Job, Summary, _owned, produce
from dual_rollout.production.shard_columns import output_schema
from dual_rollout.production.shards import Journal, OutputFolder, Share
from dual_rollout.record import COUNTS, KEPT_DIAGNOSTICS, output_name
from dual_rollout.samplers.base import Sampler
from dual_rollout.samplers.two_servers import TwoServerSampler
from dual_rollout.types import GenerationOutput, GenerationRequest
from tests.fault_proxy import FaultProxy
from tests.hang import HANG
from tests.integration.conftest import TinyPair
from tests.report_page import read_page
from tests.runs import ROOT, finish, start
from tests.warm_servers import WarmServer

LISTS = ("alpha_history", "logprobs_q", "logprobs_theta", "logprobs_t", "importance_weights")
QUESTIONS = [f"what is {n} and {n + 1}?" for n in range(12)]


def flags(pair: TinyPair, *more: Any) -> list[str]:
    urls = ["--theta-url", pair.theta_url, "--t-url", pair.t_url]
    return ["generate", *urls, "--top-k", "20", "--max-tokens", "6", *map(str, more)]


def generate(pair: TinyPair, *more: Any, status: int = 0) -> None:
    assert main(flags(pair, *more)) == status


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [{"prompt": text, "answer": str(2 * n + 1), "n": n} for n, text in enumerate(QUESTIONS)]
    return write_jsonl(tmp_path / "questions.jsonl", rows)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache")).to_list()


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Row by row, in order. Floats may differ in the last digits: a server's sums depend on what else it computes."""
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - set(LISTS):
            assert row[name] == other[name], name
        for name in LISTS:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-3, atol=1e-3)


def batch(pair: TinyPair, prompts: list[Any], *, decoding: Any = "auto", **options: Any) -> list[GenerationOutput]:
    async def run() -> list[GenerationOutput]:
        config = CoordinatorConfig(theta_url=pair.theta_url, t_url=pair.t_url, top_k=20, seed=0, decoding=decoding)
        async with DualVLLMCoordinator(config) as coordinator:
            return await coordinator.generate_batch(prompts, max_tokens=6, **options)

    return asyncio.run(run())


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_rows_are_those_of_a_batch(tiny_pair, questions, tmp_path, format):
    out = tmp_path / "out"
    generate(
        tiny_pair, "--input", questions, "--output", out, "--format", format, "--rows-per-shard", 5,
        "--num-generations", 2, "--keep-columns", "answer", "n", "--max-concurrency", 4, "--diagnostics",
    )  # fmt: skip
    outputs = batch(tiny_pair, [text for text in QUESTIONS for _ in range(2)], return_diagnostics=True)
    rows = rows_of(out)
    assert [(row["index"], row["generation"]) for row in rows] == [(i, g) for i in range(12) for g in range(2)]
    for row, output in zip(rows, outputs, strict=True):
        assert row["generated_tokens"] == output.generated_tokens
        assert row["generated_text"] == output.generated_text
        assert row["finish_reason"] == output.finish_reason
        assert row["prompt"] == output.prompt and row["prompt_token_ids"] == output.prompt_token_ids
        assert row["error"] is None
        assert (row["answer"], row["n"]) == (str(2 * row["index"] + 1), row["index"])
        for name in LISTS:
            np.testing.assert_allclose(row[name], getattr(output, name), rtol=1e-3, atol=1e-3)
        for name in KEPT_DIAGNOSTICS:
            np.testing.assert_allclose(row[name], output.diagnostics[name], rtol=1e-3, atol=1e-3)
        settings, versions = json.loads(row["settings"]), json.loads(row["versions"])
        assert (settings["top_k"], settings["seed"], settings["max_tokens"]) == (20, 0, 6)
        assert versions["theta"]["root"] == str(tiny_pair.theta_model)
    assert len(list(out.glob(f"train-*.{format}"))) == 5
    assert not [path for path in out.iterdir() if path.name.startswith(".")], "nothing is left over"
    assert main(["report", str(out), "-o", str(tmp_path / "report.html")]) == 0, "which finds the tokenizer by itself"
    page = read_page(tmp_path / "report.html")
    assert page.ids == [row["generated_tokens"] for row in rows]
    for name in ("alpha", "logprobs_q", "logprobs_theta", "logprobs_t", "kl_theta"):
        column = output_name(name)
        for found, row in zip(page.numbers[name], rows, strict=True):
            np.testing.assert_array_equal(found, np.float32(row[column]))


def test_shards_and_their_report_have_what_was_accepted_of_drafts(tiny_pair, questions, tmp_path):
    out = tmp_path / "out"
    generate(tiny_pair, "--input", questions, "--output", out, "--limit", 6, "--decoding", "block")
    outputs, plain = (batch(tiny_pair, QUESTIONS[:6], decoding=name) for name in ("block", "lockstep"))
    assert main(["report", str(out), "-o", str(tmp_path / "report.html")]) == 0
    shown = read_page(tmp_path / "report.html").data["rollouts"]
    for row, output, rollout in zip(rows_of(out), outputs, shown, strict=True):
        assert row["draft_tokens"] > 0 and row["accepted_tokens"] <= row["draft_tokens"]
        for name in COUNTS:
            assert row[name] == getattr(output, name) == rollout[name]
    assert [getattr(plain[0], name) for name in COUNTS] == [0, 0]


def test_the_same_rows_from_jsonl_parquet_and_a_dataset(tiny_pair, questions, tmp_path):
    dataset = Dataset.from_json(str(questions), cache_dir=str(tmp_path / "cache"))
    dataset.to_parquet(tmp_path / "questions.parquet")
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder/train.parquet")
    found = []
    for n, source in enumerate((questions, tmp_path / "questions.parquet", tmp_path / "folder")):
        generate(tiny_pair, "--input", source, "--output", tmp_path / f"out{n}", "--limit", 7)
        found.append(rows_of(tmp_path / f"out{n}"))
    assert len(found[0]) == 7
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_chat_messages_and_what_the_target_sees(tiny_pair, tmp_path):
    messages = [[{"role": "user", "content": text}] for text in QUESTIONS[:5]]
    told = [[{"role": "user", "content": f"{text} the answer is {n}"}] for n, text in enumerate(QUESTIONS[:5])]
    rows = [
        {"messages": prompt, "hinted": hint, "question": text, "n": n}
        for n, (prompt, hint, text) in enumerate(zip(messages, told, QUESTIONS, strict=False))
    ]
    source = write_jsonl(tmp_path / "chats.jsonl", rows)
    common = ("--input", source, "--prompt-column", "messages")
    generate(tiny_pair, *common, "--output", tmp_path / "a", "--t-prompt-column", "hinted")
    template = "{question} the answer is {n}"
    generate(tiny_pair, *common, "--output", tmp_path / "b", "--t-prompt-template", template)
    rows = rows_of(tmp_path / "a")
    assert [row["t_prompt"] for row in rows] == told and [row["prompt"] for row in rows] == messages
    outputs = batch(tiny_pair, messages, t_prompts=told)
    assert [row["generated_tokens"] for row in rows] == [output.generated_tokens for output in outputs]
    assert_same(rows_of(tmp_path / "b"), rows)
    assert outputs[0].generated_tokens != batch(tiny_pair, messages)[0].generated_tokens or any(
        a.generated_tokens != b.generated_tokens for a, b in zip(outputs, batch(tiny_pair, messages), strict=True)
    ), "the target's prompt matters"


def test_a_bad_row_is_written_with_its_error_and_retried_only_when_asked(tiny_pair, tmp_path, capsys):
    rows = [{"prompt": text} for text in QUESTIONS]
    rows[4] = {"prompt": "the " * 300}  # longer than the servers' context
    rows[7] = {"prompt": None}
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"
    command = ("--input", source, "--output", out, "--rows-per-shard", 5)
    generate(tiny_pair, *command, status=3)
    assert "--retry-failed" in capsys.readouterr().out
    first = rows_of(out)
    assert [row["index"] for row in first if row["error"] is not None] == [4, 7]
    assert "max_tokens" in first[4]["error"] and first[4]["generated_tokens"] == []
    changed = {path.name: path.stat().st_mtime_ns for path in out.glob("train-*")}
    generate(tiny_pair, *command, status=3)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("train-*")} == changed, "nothing was repeated"
    generate(tiny_pair, *command, "--retry-failed", status=3)
    assert {path.name for path in out.glob("train-*") if path.stat().st_mtime_ns != changed[path.name]} == {
        "train-00000.parquet",
        "train-00001.parquet",
    }
    assert_same(rows_of(out), first)


def test_two_shares_are_one_run(tiny_pair, questions, tmp_path, monkeypatch):
    common = ("--input", questions, "--rows-per-shard", 2)
    generate(tiny_pair, *common, "--output", tmp_path / "one")
    generate(tiny_pair, *common, "--output", tmp_path / "two", "--num-shards", 2, "--shard-index", 1)
    assert [row["index"] for row in rows_of(tmp_path / "two")] == [2, 3, 6, 7, 10, 11]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    generate(tiny_pair, *common, "--output", tmp_path / "two")
    assert_same(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"))
    monkeypatch.undo()
    generate(tiny_pair, *common, "--output", tmp_path / "two")  # by one process, that finds all of it done
    assert {path.name for path in (tmp_path / "two").glob("train-*")} == {f"train-{n:05d}.parquet" for n in range(6)}


def test_accelerate_launch_spreads_it(tiny_pair, questions, tmp_path):
    common = flags(tiny_pair, "--input", questions, "--rows-per-shard", 2)
    config = ROOT / "recipes/accelerate_configs/two_cpu.yaml"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "-m",
        "dual_rollout.cli",
    ]
    run = start([*launch, *common, "--output", str(tmp_path / "two")], tmp_path)
    assert main([*common, "--output", str(tmp_path / "one")]) == 0
    out = finish(run)
    assert "6 rows in" in out and "the share 0 of 2" in out and "the share 1 of 2" in out
    assert_same(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"))


# ---- servers that are gone ------------------------------------------------------------------------------------------


def test_an_outage_ends_it_without_failed_rows_and_it_goes_on(tiny_pair, questions, tmp_path, capsys):
    async def run() -> None:
        async with FaultProxy(tiny_pair.t_url).running() as proxy:
            config = CoordinatorConfig(
                theta_url=tiny_pair.theta_url, t_url=proxy.url, top_k=20, seed=0, max_retries=0, max_concurrency=2
            )
            job = Job(inputs=[str(questions)], output=tmp_path / "out", max_tokens=6)
            task = asyncio.create_task(produce(job, config))
            while not finished_rows(tmp_path / "out"):
                await asyncio.sleep(0.005)
            await proxy.stop()
            with pytest.raises(EngineUnavailableError):
                await task
            with pytest.raises(EngineUnavailableError):
                await produce(job, config)
            kept = finished_rows(tmp_path / "out")
            await proxy.start()
            assert await produce(job, config) == Summary(rows=12, failed=0)
            assert 0 < len(kept) < 12 and kept.items() <= finished_rows(tmp_path / "out").items()

    asyncio.run(asyncio.wait_for(run(), HANG))
    generate(tiny_pair, "--input", questions, "--output", tmp_path / "undisturbed")
    assert_same(rows_of(tmp_path / "out"), rows_of(tmp_path / "undisturbed"))
    generate(tiny_pair, "--input", questions, "--output", tmp_path / "no", "--t-url", "http://127.0.0.1:1",
             "--max-retries", 0, status=1)  # fmt: skip
    assert "http://127.0.0.1:1" in capsys.readouterr().err


def test_a_target_that_is_gone_at_the_start_is_done_without(tiny_pair, questions, tmp_path, forkable):
    common = ("--input", questions, "--on-target-failure", "policy", "--max-retries", 0, "--max-concurrency", 2)
    out, gone = tmp_path / "out", ("--t-url", "http://127.0.0.1:1")
    started = flags(tiny_pair, *common, "--output", out)
    assert forkable.run_until(started, signal.SIGKILL, lambda rows, _: rows >= 4) == -signal.SIGKILL
    before = len(finished_rows(out))
    generate(tiny_pair, *common, *gone, "--output", out)
    without = [row for row in rows_of(out) if all(row["without_target"])]
    assert len(without) == 12 - before and all(row["error"] is None for row in rows_of(out))
    assert all(json.loads(row["versions"])["t"]["model"] is None for row in without)
    generate(tiny_pair, *common, *gone, "--output", tmp_path / "never")
    generate(tiny_pair, *common, "--output", tmp_path / "never")  # it is back, and nothing is left to do
    assert all(all(row["without_target"]) for row in rows_of(tmp_path / "never"))


def test_a_target_that_is_gone_at_the_start_is_waited_for(tiny_pair, questions, tmp_path):
    async def run() -> None:
        async with FaultProxy(tiny_pair.t_url).running() as proxy:
            await proxy.stop()
            config = CoordinatorConfig(
                theta_url=tiny_pair.theta_url,
                t_url=proxy.url,
                top_k=20,
                seed=0,
                max_retries=0,
                on_target_failure="wait",
            )
            job = Job(inputs=[str(questions)], output=tmp_path / "out", max_tokens=6, limit=3)
            task = asyncio.create_task(produce(job, config))
            await asyncio.sleep(0.2)
            assert not task.done()
            await proxy.start()
            assert await task == Summary(rows=3, failed=0)
        assert not any(any(row["without_target"]) for row in rows_of(tmp_path / "out"))

    asyncio.run(asyncio.wait_for(run(), HANG))


# ---- killed, damaged, changed ---------------------------------------------------------------------------------------


Moment = Callable[[int, float], bool]
"""Whether it has come, when so many rows were made so many seconds after the start."""


class Forkable:
    """A process that has imported everything and forks one to run a command, so that a kill hits the work itself."""

    SOURCE = """
import os, signal, sys
from dual_rollout.cli import main
from dual_rollout.production import run
from dual_rollout.production.progress import Progress
from dual_rollout.text import load_tokenizer
import datasets
load_tokenizer(sys.argv[1])
def tell(line):
    os.write(1, line.encode() + b"\\n")
add = Progress.add
def add_and_tell(self, output):
    add(self, output)
    tell("row")
Progress.add = add_and_tell
for command in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(main(command.split()))
    tell(f"pid {child}")
    tell(f"exit {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
"""

    def __init__(self, model: Path, log: Path) -> None:
        self._path, self._log = log, open(log, "wb")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SOURCE, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
        )

    def run_until(self, command: list[str], number: signal.Signals, moment: Moment) -> int:
        """Start a command, send it a signal when `moment` has come, and give its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(command).encode() + b"\n")
        pid, rows = int(self._read("pid")[1]), 0
        started = time.monotonic()
        while True:
            if (found := self._read("row", "exit", wait_s=0.001)) is not None and found[0] == "exit":
                return int(found[1])
            rows += found is not None
            if moment(rows, time.monotonic() - started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                return int(self._read("exit")[1])

    def close(self) -> str:
        """Its stderr."""
        self._process.communicate(timeout=HANG)
        self._log.close()
        return self._path.read_text()[-4000:]

    def errors(self) -> list[str]:
        return self._path.read_text().splitlines()

    def _read(self, *words: str, wait_s: float | None = None) -> Any:
        """The next line that begins with one of them; None if there is none for `wait_s`."""
        assert self._process.stdout is not None
        while True:
            if wait_s is not None and not select.select([self._process.stdout], [], [], wait_s)[0]:
                return None
            line = self._process.stdout.readline().decode().split()
            assert line, self.close()
            if line[0] in words:
                return line


@pytest.fixture(scope="module")
def forkable(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forkable]:
    process = Forkable(tiny_models[0], tmp_path_factory.mktemp("log") / "stderr")
    yield process
    process.close()


def some_moment(clock: random.Random, folder: Path) -> Moment:
    """While it starts, some rows later, or when a file of some kind has come or gone since now."""

    def names(pattern: str) -> set[str]:
        return {path.name for path in folder.glob(pattern)}

    kind = clock.choice(["start", "rows", "file"])
    if kind == "start":
        after = clock.uniform(0.0, 0.3)
        return lambda _, seconds: seconds > after
    if kind == "rows":
        count, delay, since = clock.randint(1, 12), clock.uniform(0.0, 0.02), list[float]()

        def seen(rows: int, seconds: float) -> bool:
            if rows >= count and not since:
                since.append(seconds)
            return bool(since) and seconds - since[0] > delay

        return seen
    pattern = clock.choice(["*run.json*", ".train-*.journal", ".train-*.tmp-*", "train-*", "manifest-*", "README.md"])
    before = names(pattern)
    return lambda rows, _: names(pattern) != before or rows > 15


def kill_until_done(
    forkable: Forkable, commands: list[list[str]], folder: Path, clock: random.Random, most: int
) -> list[dict[int, str]]:
    """Kill commands that share a run at up to `most` moments, then let them end; the finished rows after each."""
    made, left = [], list(commands)
    while left:
        command = clock.choice(left)
        moment: Moment = some_moment(clock, folder) if len(made) < most else lambda *_: False
        status = forkable.run_until(command, signal.SIGKILL, moment)
        assert status in (0, -signal.SIGKILL), forkable.close()
        if status == 0:
            left.remove(command)
        made.append(finished_rows(folder))
    for earlier, later in itertools.pairwise(made):
        assert earlier.items() <= later.items(), "a finished row was lost, or made again"
    return made


@pytest.mark.parametrize(("format", "shares"), [("parquet", 1), ("jsonl", 1), ("parquet", 2)])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(tiny_pair, tmp_path, forkable, format, shares):
    rows = [{"prompt": f"{n} and {n * n} is"} for n in range(40)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    common = ("--input", source, "--rows-per-shard", 7, "--max-concurrency", 4, "--max-tokens", 12, "--format", format)
    generate(tiny_pair, *common, "--output", tmp_path / "undisturbed")
    command = flags(tiny_pair, *common, "--output", tmp_path / "killed")
    commands = [[*command, "--num-shards", str(shares), "--shard-index", str(i)] for i in range(shares)]
    made = kill_until_done(forkable, commands, tmp_path / "killed", random.Random(shares), 8)
    assert len(made) >= 4 and len(made[-2]) < 40 + 7 * shares, "it was killed on its way"
    assert_same(rows_of(tmp_path / "killed"), rows_of(tmp_path / "undisturbed"))
    names = [{p.name for p in (tmp_path / name).glob("[!m]*")} for name in ("killed", "undisturbed")]
    assert names[0] == names[1]


def test_killed_while_failed_rows_are_generated_again(tiny_pair, tmp_path, forkable):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"{n} and {n * n} is"} for n in range(30)])
    command = ("--input", source, "--rows-per-shard", 10, "--max-concurrency", 2, "--max-tokens", 12)
    generate(tiny_pair, *command, "--output", tmp_path / "undisturbed")
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "killed")
    spoil(tmp_path / "killed", every=2)
    retry = flags(tiny_pair, *command, "--output", tmp_path / "killed", "--retry-failed")
    made = kill_until_done(forkable, [retry], tmp_path / "killed", random.Random(5), 6)
    assert len(made) >= 3
    assert_same(rows_of(tmp_path / "killed"), rows_of(tmp_path / "undisturbed"))
    spoil(tmp_path / "killed", every=2)
    assert forkable.run_until(retry, signal.SIGKILL, lambda rows, _: rows >= 4) == -signal.SIGKILL
    kept = finished_rows(tmp_path / "killed")
    assert len(kept) >= 15 + 3
    generate(tiny_pair, *command, "--output", tmp_path / "killed")  # without the flag it goes on, too
    assert kept.items() <= finished_rows(tmp_path / "killed").items(), "what was generated again is not lost"
    assert_same(rows_of(tmp_path / "killed"), rows_of(tmp_path / "undisturbed"))


def spoil(folder: Path, every: int) -> None:
    """Let every so many rows of a run have failed."""
    entries = []
    for path in sorted(folder.glob("train-*.parquet")):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows[::every]:
            row.update({name: [] for name in LISTS}, generated_tokens=[], finish_reason=None, error="spoilt")
        pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        failed = len(rows[::every])
        entries.append(
            {"shard": len(entries), "file": path.name, "rows": len(rows), "failed": failed, "sha256": digest}
        )
    write_jsonl(folder / "manifest-00000-of-00001.jsonl", entries)


def test_killed_while_a_run_is_overwritten(tiny_pair, tmp_path, forkable):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"{n} and {n * n} is"} for n in range(12)])
    command = ("--input", source, "--rows-per-shard", 2, "--max-concurrency", 2)
    out = tmp_path / "killed"
    generate(tiny_pair, *command, "--output", tmp_path / "undisturbed")
    overwrite = flags(tiny_pair, *command, "--output", out, "--overwrite")
    for left in (6, 0):  # files of the earlier run when the kill comes, hidden ones too
        generate(tiny_pair, *command, "--output", out, "--seed", 1, "--overwrite")
        forkable.run_until(overwrite, signal.SIGKILL, lambda rows, _, n=left: len(list(out.iterdir())) <= n or rows > 2)
        assert (out / "run.json").exists() or [p.name for p in out.iterdir() if not p.name.startswith(".")] in (
            ["manifest-00000-of-00001.jsonl"],
            [],
        ), "with nothing to tell whose the files are"
        assert forkable.run_until(overwrite, signal.SIGKILL, lambda *_: False) == 0
        assert_same(rows_of(out), rows_of(tmp_path / "undisturbed"))


def test_hidden_files_of_a_run_that_was_removed_are_not_taken_for_this_ones(tiny_pair, tmp_path, forkable):
    """As `rm out/*` leaves them."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": text} for text in QUESTIONS])
    command, out = ("--input", source, "--max-concurrency", 2), tmp_path / "out"
    earlier = flags(tiny_pair, *command, "--output", out, "--seed", 1)
    assert forkable.run_until(earlier, signal.SIGKILL, lambda rows, _: rows >= 4) == -signal.SIGKILL
    for path in out.glob("[!.]*"):
        path.unlink()
    assert len(finished_rows(out)) >= 4
    generate(tiny_pair, *command, "--output", out)
    generate(tiny_pair, *command, "--output", tmp_path / "undisturbed")
    assert_same(rows_of(out), rows_of(tmp_path / "undisturbed"))
    assert not list(out.glob(".*"))


def test_a_stop_keeps_what_is_finished_and_says_how_to_go_on(tiny_pair, tmp_path, forkable):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": text} for text in QUESTIONS * 40])
    command = flags(tiny_pair, "--input", source, "--output", tmp_path / "out")
    for more in ([], ["--overwrite"]):
        status = forkable.run_until([*command, *more], signal.SIGTERM, lambda rows, _: rows >= 1)
        assert status == 128 + signal.SIGTERM
        assert finished_rows(tmp_path / "out")
    assert [line for line in forkable.errors() if "stopped" in line] == [
        "stopped by SIGTERM; the same command goes on from here",
        "stopped by SIGTERM; without --overwrite it goes on from here",
    ]


def test_a_stop_while_a_shard_is_written_waits_for_it(tiny_pair, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": text} for text in QUESTIONS])
    columns, out, write = Columns(), tmp_path / "out", OutputFolder.write
    config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=20, seed=0)
    job = Job(inputs=[str(source)], output=out, columns=columns, max_tokens=3, rows_per_shard=4)

    async def run() -> None:
        writing = asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow_write(*args: Any) -> None:
            loop.call_soon_threadsafe(writing.set)
            time.sleep(0.2)
            write(*args)

        monkeypatch.setattr(OutputFolder, "write", slow_write)
        task = asyncio.create_task(produce(job, config))
        await writing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (shard,) = out.glob("train-*.parquet")
        (entry,) = map(json.loads, (out / "manifest-00000-of-00001.jsonl").read_text().splitlines())
        assert entry["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()

    asyncio.run(asyncio.wait_for(run(), HANG))


def finished_rows(folder: Path) -> dict[int, str]:
    """By number, of shards and journals, without the digits that depend on what a server computes at once."""
    rows = [row for path in folder.glob("train-*.parquet") for row in pq.read_table(path).to_pylist()]
    rows += [json.loads(line) for path in folder.glob("train-*.jsonl") for line in path.read_text().splitlines()]
    for path in folder.glob(".train-*.journal"):
        journal = Journal(Path(shutil.copy(path, folder.parent / "copy.journal")))
        rows += [row for _, row in journal.items()]
    good = [row for row in rows if row["error"] is None]
    return {row["index"]: repr([row["logprobs_q"], row["generated_tokens"]]) for row in good}


@pytest.mark.parametrize("damage", ["overwritten", "missing", "manifest"])
def test_damage_is_found_and_mended(tiny_pair, questions, tmp_path, damage, caplog):
    out, command = tmp_path / "out", ("--input", questions, "--output", tmp_path / "out", "--rows-per-shard", 4)
    generate(tiny_pair, *command)
    expected, shard = rows_of(out), out / "train-00001.parquet"
    manifest = out / "manifest-00000-of-00001.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    damaged = 1 if damage != "manifest" else json.loads(lines[-1])["shard"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("train-*")}
    if damage == "overwritten":
        content = bytearray(shard.read_bytes())
        content[100] ^= 1
        shard.write_bytes(content)
    elif damage == "missing":
        shard.unlink()
    else:
        manifest.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    generate(tiny_pair, *command)
    assert_same(rows_of(out), expected)
    after = {path: path.stat().st_mtime_ns for path in out.glob("train-*")}
    assert {path.name for path in after if after[path] != before[path]} == {f"train-{damaged:05d}.parquet"}
    if damage != "manifest":
        assert "train-00001.parquet" in caplog.text
    caplog.clear()
    generate(tiny_pair, *command)
    assert "train-" not in caplog.text, "mended for good"


def test_a_torn_journal_loses_the_torn_row_alone(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    for number in (3, 1, 2):
        journal.add(number, {"x": [number, float("nan")]})
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for kept in range(len(last)):
        path.write_bytes(whole[: len(whole) - len(last) + kept])
        torn = Journal(path)
        assert [number for number, _ in torn.items()] == [1, 3]
        torn.add(7, {"x": 7})
        again = Journal(path)
        assert [number for number, _ in again.items()] == [1, 3, 7]


def test_journals_hold_no_files_open(tmp_path):
    """With --rows-per-shard 1 there are as many as sequences in flight."""
    before = len(os.listdir("/proc/self/fd"))
    journals = [Journal(tmp_path / str(n)) for n in range(50)]
    for number, journal in enumerate(journals):
        journal.add(number, {"x": number})
    assert len(os.listdir("/proc/self/fd")) == before
    assert [list(Journal(tmp_path / str(n)).items()) for n in range(50)] == [[(n, {"x": n})] for n in range(50)]


def test_files_that_another_process_makes_meanwhile_are_not_foreign(tmp_path, monkeypatch):
    list_folder = Path.iterdir

    def make_and_list(path: Path) -> Iterator[Path]:
        for name in ("run.json", "README.md"):
            (path / name).touch()
        return list_folder(path)

    monkeypatch.setattr(Path, "iterdir", make_and_list)
    folder: Any = SimpleNamespace(path=tmp_path)
    OutputFolder._refuse_foreign(folder)
    (tmp_path / "run.json").unlink()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"holds README.md, but no run.json"):
        OutputFolder._refuse_foreign(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--top-k", "10"], "generation.top_k was 20 and is 10"),
        (["--max-tokens", "7"], "generation.max_tokens was 6 and is 7"),
        (["--seed", "1"], "generation.seed was 0 and is 1"),
        (["--rows-per-shard", "3"], "output.rows_per_shard"),
        (["--t-prompt-template", "{prompt} {answer}"], "columns.t_prompt_template"),
    ],
)
def test_changed_settings_are_refused_by_name(tiny_pair, questions, tmp_path, capsys, change, named):
    command = ("--input", questions, "--output", tmp_path / "out", "--limit", 3)
    generate(tiny_pair, *command)
    generate(tiny_pair, *command, *change, status=2)
    assert named in capsys.readouterr().err
    generate(tiny_pair, *command, *change, "--overwrite")
    assert len(rows_of(tmp_path / "out")) == 3


def test_rows_say_which_weights_made_them_and_others_are_refused(tiny_models, tiny_pair, questions, tmp_path, capsys):
    """A folder names what a server was started from; a training run may have given it something else."""
    command = ("--input", questions, "--output", tmp_path / "out")
    with WarmServer(tiny_models[0], ["--max-logprobs", "-1", "--max-model-len", "256", "--threads", "1"]) as server:
        pair = TinyPair(*tiny_models, server.url, tiny_pair.t_url)
        generate(pair, *command)
        (versions,) = {row["versions"] for row in rows_of(tmp_path / "out")}
        before = json.loads(versions)["theta"]
        assert before["weights"] == "default" and before["logprob"] < 0
        models = json.loads((tmp_path / "out" / "run.json").read_text())["models"]
        assert models["theta"]["weights"] == "default" and models["theta"]["logprob"] == before["logprob"]
        with DualRollout(CoordinatorConfig(theta_url=server.url, t_url=tiny_pair.t_url)) as rollout:
            rollout.reload_policy_weights(str(tiny_models[1]))
            rollout.share_policy_weights(3)
            generate(pair, *command, status=2)
            said = capsys.readouterr().err
            assert "models.theta.weights was 'default' and is 'dual_rollout run" in said
            assert "models.theta.logprob" in said
            rollout._run(rollout._open().theta.set_weight_version("default"))  # as of a server that keeps no names
        generate(pair, *command, status=2)
        said = capsys.readouterr().err
        assert "models.theta.logprob" in said and "models.theta.weights" not in said


def test_a_changed_input_or_model_is_refused(tiny_pair, questions, tmp_path, capsys):
    command = ("--input", questions, "--output", tmp_path / "out")
    generate(tiny_pair, *command)
    other = TinyPair(tiny_pair.t_model, tiny_pair.theta_model, tiny_pair.t_url, tiny_pair.theta_url)
    generate(other, *command, status=2)
    assert "models.theta.root" in capsys.readouterr().err
    questions.write_text(questions.read_text() + '{"prompt": "one more", "answer": "", "n": 0}\n')
    generate(tiny_pair, *command, status=2)
    assert "input.files.0.sha256" in capsys.readouterr().err


def test_speed_may_change(tiny_pair, questions, tmp_path):
    command = ("--input", questions, "--output", tmp_path / "out")
    generate(tiny_pair, *command)
    generate(tiny_pair, *command, "--max-concurrency", 3, "--request-timeout", 9, "--no-show-progress")


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt-column", "promt"], "line 1 has no column 'promt'.*did you mean 'prompt'"),
        (["--keep-columns", "prompt_token_ids"], "no column 'prompt_token_ids'"),
        (["--keep-columns", "prompt"], "--keep-columns prompt: the output has a column of that name"),
        (["--t-prompt-template", "{answer"], "--t-prompt-template is not valid"),
        (["--t-prompt-template", "{solution}"], "no column 'solution'"),
        (["--t-prompt-template", "{n:03d}"], "braces that are text are written twice"),
        (["--t-prompt-column", "n", "--t-prompt-template", "x"], "not both"),
        (["--num-shards", "2"], "--shard-index"),
        (["--num-shards", "2", "--shard-index", "2"], "below --num-shards"),
        (["--rows-per-shard", "0"], "--rows-per-shard must be at least 1"),
        (["--stream"], "--stream"),
        (["--prompt", "x"], "go with --stream"),
        (["--top-k", "0"], "top_k must be"),
    ],
)
def test_mistakes_are_named(tiny_pair, questions, tmp_path, capsys, more, message):
    generate(tiny_pair, "--input", questions, "--output", tmp_path / "out", *more, status=2)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_bad_lines_are_found_before_anything_is_generated(tiny_pair, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    for line, message in (("{", "line 2 is not JSON"), ("[1]", "line 2 must be"), ('{"prompt": 7}', "of one type")):
        source.write_text(f'{{"prompt": "a"}}\n{line}\n')
        generate(tiny_pair, "--input", source, "--output", tmp_path / "out", status=2)
        assert message in capsys.readouterr().err
    generate(tiny_pair, "--input", tmp_path / "no.jsonl", "--output", tmp_path / "out", status=2)
    assert "no file" in capsys.readouterr().err


def test_a_folder_with_something_else_is_left_alone(tiny_pair, questions, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-00000.parquet").write_text("precious")
    for more in ((), ("--overwrite",)):
        generate(tiny_pair, "--input", questions, "--output", out, *more, status=2)
        assert "run.json" in capsys.readouterr().err
        assert [path.read_text() for path in out.iterdir()] == ["precious"]


def test_two_processes_with_one_share_are_refused(tiny_pair, questions, tmp_path, capsys):
    import fcntl

    command = ("--input", questions, "--output", tmp_path / "out")
    generate(tiny_pair, *command)
    for share in ("00000-of-00001", "00001-of-00003"):  # the same, and one that would write the same shards
        with open(tmp_path / f"out/manifest-{share}.jsonl", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for more in ((), ("--overwrite",)):
                generate(tiny_pair, *command, *more, status=2)
                assert f"as --shard-index {int(share[:5])} of {int(share[-5:])}" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "out")) == 12


def test_a_config_file_and_flags(tiny_pair, questions, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"theta_url: {tiny_pair.theta_url}\nt_url: {tiny_pair.t_url}\ntop_k: 15\nsupport: tail\n")
    common = ["generate", "--config", str(config), "--input", str(questions), "--max-tokens", "4", "--limit", "2"]
    assert main([*common, "--output", str(tmp_path / "a")]) == 0
    assert main([*common, "--output", str(tmp_path / "b"), "--top-k", "12", "--ignore-eos"]) == 0
    settings = [json.loads(rows_of(tmp_path / name)[0]["settings"]) for name in ("a", "b")]
    assert [(s["top_k"], s["support"], s["ignore_eos"]) for s in settings] == [(15, "tail", False), (12, "tail", True)]
    config.write_text("topk: 5\n")
    assert main([*common, "--output", str(tmp_path / "c")]) == 2
    assert "did you mean 'top_k'" in capsys.readouterr().err


# ---- one prompt -----------------------------------------------------------------------------------------------------


def test_a_stream_prints_the_batchs_text(tiny_pair, capsys):
    assert main([*flags(tiny_pair), "--stream", "--prompt", "the answer", "--seed", "0"]) == 0
    shown = capsys.readouterr()
    (output,) = batch(tiny_pair, ["the answer"])
    assert shown.out == f"{output.generated_text}\n"
    assert f"{len(output.generated_tokens)} tokens" in shown.err


# ---- generate_iter --------------------------------------------------------------------------------------------------


def collect(pair: TinyPair, requests: Any, *, stop_after: int | None = None, **config: Any) -> dict[int, Any]:
    async def run() -> dict[int, Any]:
        values = {"theta_url": pair.theta_url, "t_url": pair.t_url, "top_k": 20, "seed": 0, **config}
        async with DualVLLMCoordinator(CoordinatorConfig(**values)) as coordinator:
            found: dict[int, Any] = {}
            async for index, output in coordinator.generate_iter(requests, max_tokens=6):
                assert index not in found
                found[index] = output
                if len(found) == stop_after:
                    break
            return found

    return asyncio.run(asyncio.wait_for(run(), HANG))


def test_an_iterator_gives_what_a_batch_gives_and_is_read_as_needed(tiny_pair):
    taken = []

    def requests() -> Iterator[GenerationRequest]:
        for i, text in enumerate(QUESTIONS * 4):
            taken.append(i)
            yield GenerationRequest(i, text)

    found = collect(tiny_pair, requests(), max_concurrency=4)
    expected = batch(tiny_pair, QUESTIONS * 4)
    assert [found[i].generated_tokens for i in range(48)] == [output.generated_tokens for output in expected]

    taken.clear()
    collect(tiny_pair, requests(), max_concurrency=4, stop_after=1)
    assert len(taken) <= 16, "no more than what is in flight or waits to be taken"


def test_bad_requests_come_back_with_their_error(tiny_pair):
    prompts: list[Any] = [[], "the", [10**6], "and", [-1]]
    found = collect(tiny_pair, [GenerationRequest(i, prompt) for i, prompt in enumerate(prompts)])
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert [found[i].error is None for i in range(5)] == [False, True, False, True, False]
    assert collect(tiny_pair, []) == {}


def test_a_bad_prompt_of_the_first_ones_does_not_wait_for_the_end_of_the_input(tiny_pair):
    """As it would keep its shard from being written."""
    prompts: list[Any] = [[], *["the"] * 12]

    async def run() -> list[int]:
        config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=20, max_concurrency=2)
        requests = (GenerationRequest(i, prompt) for i, prompt in enumerate(prompts))
        async with DualVLLMCoordinator(config) as coordinator:
            return [index async for index, _ in coordinator.generate_iter(requests, max_tokens=2)]

    order = asyncio.run(asyncio.wait_for(run(), HANG))
    assert order[0] == 0 and sorted(order) == list(range(13))


def test_a_server_that_is_gone_ends_the_iteration(tiny_pair, tmp_path, monkeypatch):
    real = TwoServerSampler.ready

    async def then_lose_the_target(self: TwoServerSampler, *args: Any) -> Sampler:
        sampler = await real(self, *args)

        async def gone(*_: Any, **__: Any) -> Any:
            raise EngineUnavailableError("gone", url=self._t.url)

        monkeypatch.setattr(self._t, "next_top_k", gone)
        return sampler

    monkeypatch.setattr(TwoServerSampler, "ready", then_lose_the_target)
    with pytest.raises(EngineUnavailableError, match="gone"):
        collect(tiny_pair, [GenerationRequest(i, "the") for i in range(1000)])


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_reading_an_input_takes_memory_of_its_own_whatever_its_length(tmp_path, kind):
    grown = []
    for count in (2_000, 60_000):
        path = tmp_path / f"{count}.{kind}"
        rows = [{"prompt": f"{n} " * 100, "answer": n} for n in range(count)]
        if kind == "jsonl":
            write_jsonl(path, rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2000)
        done = subprocess.run(
            [sys.executable, "-c", READER, str(path)], capture_output=True, text=True, timeout=HANG, check=True
        )
        seen, kib = map(int, done.stdout.split())
        assert seen == count
        grown.append(kib)
    assert grown[1] < grown[0] + 60 * 1024, "60,000 rows are 35 MB as text and twice that as objects"


READER = """
import sys
from dual_rollout.production.rows import Columns, open_source
source = open_source([sys.argv[1]], Columns(keep=("answer",)))
seen = sum(1 for _ in source)
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seen, peak)
"""


@pytest.mark.parametrize("total", [0, 3, 10, 23, 40])
def test_shares_are_disjoint_and_their_sizes_are_known(total):
    for count in (1, 2, 5):
        shares = [Share(index, count) for index in range(count)]
        jobs = [Job(inputs=[], output=Path(), rows_per_shard=4, share=share) for share in shares]
        owners = [[share.has(number // 4) for share in shares] for number in range(total)]
        assert all(sum(row) == 1 for row in owners)
        assert [_owned(total, job) for job in jobs] == [sum(row[i] for row in owners) for i in range(count)]


def test_a_system_turn_for_the_target_alone(tiny_pair, tmp_path):
    """A row whose column is null says so, and the others are what they are without it."""
    prompts = [[{"role": "user", "content": text}] for text in QUESTIONS[:3]]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, ("a", None, "c"), strict=True)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flag = ("--t-system-prompt", "It is {answer}.")
    generate(tiny_pair, "--input", source, "--output", tmp_path / "out", *flag, status=3)
    found = rows_of(tmp_path / "out")
    assert "'answer' is null in a row" in found[1]["error"] and found[1]["generated_tokens"] == []
    told = [[{"role": "system", "content": f"It is {row['answer']}."}, *row["prompt"]] for row in rows]
    assert [row["t_prompt"] for row in (found[0], found[2])] == [told[0], told[2]]
    outputs = batch(tiny_pair, prompts, t_prompts=told)
    for i in (0, 2):
        assert found[i]["generated_tokens"] == outputs[i].generated_tokens and found[i]["error"] is None


@pytest.mark.parametrize(
    "kind",
    [
        pa.dictionary(pa.int32(), pa.string()),
        pa.string_view(),
        pa.large_string(),
        pa.list_(pa.int64(), 2),
        pa.list_view(pa.int64()),
        pa.list_(pa.struct([("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.large_string())])),
    ],
    ids=str,
)
def test_columns_of_any_way_to_store_them(tmp_path, kind):
    if "struct" in str(kind):
        values: list[Any] = [[{"role": "user", "content": text}] for text in "aba"]
    else:
        values = [[1, 2], [3, 4], [5, 6]] if "list" in str(kind) else ["a", "b", "a"]
    pq.write_table(pa.table({"prompt": pa.array(values, kind), "n": [1, 2, 3]}), tmp_path / "in.parquet")
    source = open_source([str(tmp_path / "in.parquet")], Columns(keep=("n",)))
    schema = output_schema(source.schema, Columns(keep=("n",)))
    rows = list(source)
    assert [row["prompt"] for row in rows] == values
    written = pa.Table.from_pylist([{"prompt": row["prompt"]} for row in rows], pa.schema([schema.field("prompt")]))
    assert written["prompt"].to_pylist() == values


def test_compressed_lines(tmp_path):
    rows = [{"prompt": f"{n} is"} for n in range(50)]
    content = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    assert list(open_source([str(path)], Columns())) == rows
    for damaged in (gzip.compress(content)[:-20], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"in\.jsonl\.gz: "):
            open_source([str(path)], Columns())


def test_empty_keys_that_arrow_adds_to_messages_are_dropped(tmp_path):
    messages = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": None, "name": "b"}]
    pq.write_table(pa.Table.from_pylist([{"prompt": messages}]), tmp_path / "in.parquet")
    (row,) = open_source([str(tmp_path / "in.parquet")], Columns())
    assert Columns().prompt_of(row) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "name": "b"},
    ]
