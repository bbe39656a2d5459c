"""`dual-rollout generate`: what it writes, and that it goes on where it was killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from dual_rollout.cli import main
from dual_rollout.exceptions import EngineUnavailableError
from dual_rollout.production.rows import Columns, open_source
from dual_rollout.production.run import Job, _owned
from dual_rollout.production.shards import Journal, Share
from dual_rollout.types import GenerationOutput, GenerationRequest
from tests.integration.conftest import TinyPair

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


def batch(pair: TinyPair, prompts: list[Any], **options: Any) -> list[GenerationOutput]:
    async def run() -> list[GenerationOutput]:
        config = CoordinatorConfig(theta_url=pair.theta_url, t_url=pair.t_url, top_k=20, seed=0)
        async with DualVLLMCoordinator(config) as coordinator:
            return await coordinator.generate_batch(prompts, max_tokens=6, **options)

    return asyncio.run(run())


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_rows_are_those_of_a_batch(tiny_pair, questions, tmp_path, format):
    out = tmp_path / "out"
    generate(
        tiny_pair, "--input", questions, "--output", out, "--format", format, "--rows-per-shard", 5,
        "--num-generations", 2, "--keep-columns", "answer", "n", "--max-concurrency", 4,
    )  # fmt: skip
    outputs = batch(tiny_pair, [text for text in QUESTIONS for _ in range(2)])
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
        settings, versions = json.loads(row["settings"]), json.loads(row["versions"])
        assert (settings["top_k"], settings["seed"], settings["max_tokens"]) == (20, 0, 6)
        assert versions["theta"]["root"] == str(tiny_pair.theta_model)
    assert len(list(out.glob(f"train-*.{format}"))) == 5
    assert not [path for path in out.iterdir() if path.name.startswith(".")], "nothing is left over"


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


# ---- killed, damaged, changed ---------------------------------------------------------------------------------------


class Forkable:
    """A process that has imported everything and forks one to run a command, so that a kill hits the work itself."""

    SOURCE = """
import os, signal, sys
from dual_rollout.cli import main
from dual_rollout.production import run
from dual_rollout.text import load_tokenizer
import datasets
load_tokenizer(sys.argv[1])
def tell(line):
    os.write(1, line.encode() + b"\\n")
add = run._Progress.add
def add_and_tell(self, output):
    add(self, output)
    tell("row")
run._Progress.add = add_and_tell
for command in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(main(command.split()))
    tell(f"pid {child}")
    tell(f"exit {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
"""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SOURCE, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_until(self, command: list[str], number: signal.Signals, delay_s: float) -> int:
        """Start a command, send it a signal some time after its first row, and give its exit status."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(" ".join(command) + "\n")
        self._process.stdin.flush()
        pid = int(self._read("pid")[1])
        if (found := self._read("row", "exit")) == ["row"]:
            time.sleep(delay_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            found = self._read("exit")
        return int(found[1])

    def close(self) -> str:
        """Its stderr."""
        return self._process.communicate(timeout=60)[1]

    def _read(self, *words: str) -> list[str]:
        """The next line that begins with one of them."""
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline().split()
            assert line, self.close()
            if line[0] in words:
                return line


@pytest.fixture(scope="module")
def forkable(tiny_models: tuple[Path, Path]) -> Iterator[Forkable]:
    process = Forkable(tiny_models[0])
    yield process
    process.close()


def test_killed_at_random_moments_it_ends_as_if_undisturbed(tiny_pair, tmp_path, forkable):
    rows = [{"prompt": f"{n} and {n * n} is"} for n in range(40)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    common = ("--input", source, "--rows-per-shard", 7, "--max-concurrency", 4, "--max-tokens", 12)
    generate(tiny_pair, *common, "--output", tmp_path / "undisturbed")
    command = flags(tiny_pair, *common, "--output", tmp_path / "killed")
    clock, made = random.Random(0), []
    while (status := forkable.run_until(command, signal.SIGKILL, clock.uniform(0.0, 0.15))) == -signal.SIGKILL:
        made.append(finished_rows(tmp_path / "killed"))
        assert len(made) < 60
    assert status == 0
    made.append(finished_rows(tmp_path / "killed"))
    assert len(made) >= 3 and 0 < len(made[0]) < len(made[-2]), "it was killed on its way"
    for earlier, later in itertools.pairwise(made):
        assert earlier.items() <= later.items(), "a finished row was lost, or made again"
    assert_same(rows_of(tmp_path / "killed"), rows_of(tmp_path / "undisturbed"))
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("killed", "undisturbed")]
    assert names[0] == names[1]


def test_a_stop_keeps_what_is_finished(tiny_pair, tmp_path, forkable):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": text} for text in QUESTIONS * 40])
    command = flags(tiny_pair, "--input", source, "--output", tmp_path / "out")
    assert forkable.run_until(command, signal.SIGTERM, 0.0) == 128 + signal.SIGTERM
    assert finished_rows(tmp_path / "out")


def finished_rows(folder: Path) -> dict[int, str]:
    """By number, of shards and journals, without the digits that depend on what a server computes at once."""
    rows = [row for path in folder.glob("train-*.parquet") for row in pq.read_table(path).to_pylist()]
    for path in folder.glob(".train-*.journal"):
        journal = Journal(Path(shutil.copy(path, folder.parent / "copy.journal")))
        rows += [row for _, row in journal.items()]
        journal.close()
    return {row["index"]: repr([row["logprobs_q"], row["generated_tokens"]]) for row in rows}


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
    journal.close()
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for kept in range(len(last)):
        path.write_bytes(whole[: len(whole) - len(last) + kept])
        torn = Journal(path)
        assert [number for number, _ in torn.items()] == [1, 3]
        torn.add(7, {"x": 7})
        torn.close()
        again = Journal(path)
        assert [number for number, _ in again.items()] == [1, 3, 7]
        again.close()


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
    with open(tmp_path / "out/manifest-00000-of-00001.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        generate(tiny_pair, *command, status=2)
    assert "another process" in capsys.readouterr().err


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

    return asyncio.run(asyncio.wait_for(run(), 60))


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


def test_a_server_that_is_gone_ends_the_iteration(tiny_pair, tmp_path, monkeypatch):
    real = DualVLLMCoordinator._preflight

    async def then_lose_the_target(self: Any, *args: Any) -> bool:
        there = await real(self, *args)

        async def gone(*_: Any, **__: Any) -> Any:
            raise EngineUnavailableError("gone", url=self.t.url)

        monkeypatch.setattr(self.t, "next_top_k", gone)
        return there

    monkeypatch.setattr(DualVLLMCoordinator, "_preflight", then_lose_the_target)
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
            [sys.executable, "-c", READER, str(path)], capture_output=True, text=True, timeout=60, check=True
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


def test_empty_keys_that_arrow_adds_to_messages_are_dropped(tmp_path):
    messages = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": None, "name": "b"}]
    pq.write_table(pa.Table.from_pylist([{"prompt": messages}]), tmp_path / "in.parquet")
    (row,) = open_source([str(tmp_path / "in.parquet")], Columns())
    assert Columns().prompt_of(row) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "name": "b"},
    ]
