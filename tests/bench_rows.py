"""Memory and speed of `dual-rollout generate` without its servers: `python -m tests.bench_rows [ROWS ...]`.

Everything is real but the decoding, which appends made-up tokens at once. Each number of rows gets a process of its
own, whose peak memory must not depend on it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TOKENS = 16


def main() -> None:
    print("    rows   format   input MB   output MB   rows/s   peak MB")
    for rows in map(int, sys.argv[1:] or ("10000", "100000", "1000000")):
        subprocess.run([sys.executable, "-m", "tests.bench_rows", "--one", str(rows)], check=True)


def measure(rows: int) -> None:
    from dual_rollout.config import CoordinatorConfig
    from dual_rollout.production.rows import Columns
    from dual_rollout.production.run import Job, produce
    from tests.tiny_model import make_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer().save_pretrained(folder / "tokenizer")
        with open(folder / "in.jsonl", "w") as file:
            for n in range(rows):
                row = {"prompt": f"what is {n} and {n + 1}? " * 4, "answer": str(2 * n + 1), "notes": "of no use " * 30}
                file.write(json.dumps(row) + "\n")
        replace_servers()
        columns = Columns(t_prompt_template="{prompt} (it is {answer})", keep=("answer",))
        job = Job(inputs=[str(folder / "in.jsonl")], output=folder / "out", columns=columns, max_tokens=TOKENS)
        config = CoordinatorConfig(seed=0, tokenizer=str(folder / "tokenizer"))
        started = time.perf_counter()
        summary = asyncio.run(produce(job, config))
        seconds = time.perf_counter() - started
        assert (summary.rows, summary.failed) == (rows, 0)
        written = sum(path.stat().st_size for path in (folder / "out").iterdir())
        read = (folder / "in.jsonl").stat().st_size
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(
        f"{rows:8}  {job.format:8} {read / 1e6:7.0f} {written / 1e6:11.0f} {rows / seconds:8.0f} {peak / 1024:9.0f}",
        flush=True,
    )


def replace_servers() -> None:
    from dual_rollout.decoding.call import CallSettings
    from dual_rollout.decoding.sequence import DecodingSequence
    from dual_rollout.production import run
    from dual_rollout.samplers.two_servers import TwoServerSampler
    from dual_rollout.servers import EngineInfo, VLLMEngine

    async def describe(_: Any) -> EngineInfo:
        return EngineInfo("none", None, None)

    async def ready(sampler: TwoServerSampler, *_: Any) -> TwoServerSampler:
        return sampler

    async def sample(_: Any, sequences: Iterable[DecodingSequence], settings: CallSettings) -> None:
        for sequence in sequences:
            for token in range(TOKENS):
                numbers = sequence.rng.random(6).tolist()
                names = ("alpha", "logprobs_q", "logprobs_theta", "logprobs_t")
                sequence.append(token, **dict(zip(names, numbers[:4], strict=True)), tops=(numbers[4], numbers[5]))
            await settings.on_finished(sequence)

    async def versions(_: Any) -> dict[str, Any]:
        nothing = {"model": "none", "root": None, "server": None}
        return {"dual_rollout": "", "theta": nothing, "t": nothing}

    run._versions = versions
    VLLMEngine.describe = describe  # type: ignore[method-assign,assignment]
    TwoServerSampler.ready = ready  # type: ignore[method-assign,assignment]
    TwoServerSampler.sample = sample  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
    else:
        main()
