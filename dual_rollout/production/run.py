"""From an input to a folder of shards: what has been done is not done again, however often the process is killed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dual_rollout import __version__
from dual_rollout.config import CoordinatorConfig
from dual_rollout.coordinator import DualVLLMCoordinator
from dual_rollout.decoding.outage import ask_target
from dual_rollout.engine import Engine
from dual_rollout.preflight import fingerprint
from dual_rollout.production.progress import Progress
from dual_rollout.production.rows import Columns, Row, Source, open_source
from dual_rollout.production.shard_columns import output_columns, output_schema
from dual_rollout.production.shards import Format, Journal, OutputFolder, Share
from dual_rollout.types import GenerationOutput, GenerationRequest

logger = logging.getLogger(__name__)

# Of the config, what does not change the rows: a run may be continued on other machines, faster or slower.
_OPERATION = frozenset(
    {
        "theta_url",
        "t_url",
        "targets",
        "max_concurrency",
        "max_retries",
        "request_timeout",
        "total_timeout",
        "connection_pool_size",
        "show_progress",
    }
)
_MOST = 2**31 - 1  # of anything that is counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to generate, and where.

    Attributes:
        inputs: JSONL or Parquet files, or the name of one dataset, whose configuration and split are
            `input_config` and `split`.
        output: a folder; see `production.shards`.
        columns: what the input's columns mean.
        max_tokens: per sequence at most.
        num_generations: sequences per row of the input.
        rows_per_shard: sequences per shard.
        limit: use only the first rows of the input.
        share: the shards of this process.
        diagnostics: keep `KEPT_DIAGNOSTICS` of each token too.
        retry_failed: generate rows that failed in an earlier run again.
        overwrite: remove the earlier run first.
    """

    inputs: Sequence[str]
    output: Path
    columns: Columns = field(default_factory=Columns)
    input_config: str | None = None
    split: str = "train"
    max_tokens: int = 256
    num_generations: int = 1
    format: Format = "parquet"
    rows_per_shard: int = 1000
    limit: int | None = None
    share: Share = field(default_factory=Share)
    diagnostics: bool = False
    retry_failed: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "num_generations", "rows_per_shard", "limit"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1 and at most {_MOST}, got {value}")


@dataclass(frozen=True, slots=True)
class Summary:
    """Of this process's share: sequences that are in the output, and those of them that failed."""

    rows: int
    failed: int


async def produce(job: Job, config: CoordinatorConfig) -> Summary:
    """Generate what of `job` is not in its output folder yet.

    Raises:
        ValueError: the input, the columns or the output folder do not fit what is asked; nothing was generated.
        EngineUnavailableError: a server is gone; another call goes on from here.
        DualRolloutError: other faults of the servers that concern all rows.
    """
    if config.seed is None:
        raise ValueError("seed must be set: a run that is continued has to draw the same tokens")
    source = open_source(job.inputs, job.columns, config_name=job.input_config, split=job.split, limit=job.limit)
    schema = output_schema(source.schema, job.columns, diagnostics=job.diagnostics)
    async with DualVLLMCoordinator(dataclasses.replace(config, show_progress=False)) as coordinator:
        versions = await _versions(coordinator)
        settings = _settings(job, config, versions, source)
        folder = OutputFolder(
            job.output,
            settings,
            schema,
            format=job.format,
            rows_per_shard=job.rows_per_shard,
            share=job.share,
            overwrite=job.overwrite,
        )
        try:
            if job.retry_failed:
                logger.info("%d failed rows are generated again", folder.reopen_failed())
            described = {"versions": json.dumps(versions), "settings": json.dumps(settings["generation"])}
            run = _Run(job, source, folder, coordinator, described, show_progress=config.show_progress)
            await run.to_end()
        finally:
            folder.close()
    return Summary(sum(folder.finished.values()), sum(folder.failed.values()))


class _Run:
    def __init__(
        self,
        job: Job,
        source: Source,
        folder: OutputFolder,
        coordinator: DualVLLMCoordinator,
        described: Mapping[str, str],
        *,
        show_progress: bool,
    ):
        self._job, self._source, self._folder, self._coordinator = job, source, folder, coordinator
        self._described = described
        self._journals: dict[int, Journal] = {}
        self._rows: dict[int, Row] = {}  # of the input, while their sequences are in flight
        self._complete: list[int] = []
        self._end: int | None = None  # sequences in all, once the input has ended
        total = None if source.total is None else _owned(source.total * job.num_generations, job)
        self._progress = Progress(coordinator, total, sum(folder.finished.values()), job.share, show=show_progress)

    async def to_end(self) -> None:
        job = self._job
        outputs = self._coordinator.generate_iter(
            self._requests(), max_tokens=job.max_tokens, return_diagnostics=job.diagnostics
        )
        try:
            async for number, output in outputs:
                shard = number // self._job.rows_per_shard
                self._journals[shard].add(number, self._row(number, output))
                self._progress.add(output)
                self._note_if_complete(shard)
                await self._write_complete()
            for shard in list(self._journals):  # the last one may be short; others were complete from the beginning
                self._note_if_complete(shard)
            await self._write_complete()
        finally:
            await outputs.aclose()
            self._progress.close()

    def _requests(self) -> Iterator[GenerationRequest]:
        """One per sequence that is this process's to make and not made yet."""
        job, number = self._job, 0
        for row in self._source:
            for _ in range(job.num_generations):
                shard = number // job.rows_per_shard
                if job.share.has(shard) and shard not in self._folder.finished and not self._has(shard, number):
                    self._rows[number] = row
                    yield GenerationRequest(number, job.columns.prompt_of(row), job.columns.t_prompt_of(row))
                number += 1
        self._end = number

    def _has(self, shard: int, number: int) -> bool:
        """Whether the sequence is in the journal of its shard; opens it at the first."""
        if shard in self._complete:
            return True
        if shard not in self._journals:
            self._journals[shard] = self._folder.journal(shard)
            self._progress.restore(len(self._journals[shard]))
            self._note_if_complete(shard)
        return shard in self._complete or number in self._journals[shard]

    def _note_if_complete(self, shard: int) -> None:
        size = self._job.rows_per_shard
        expected = size if self._end is None else min(size, self._end - shard * size)
        if len(self._journals[shard]) == expected and shard not in self._complete:
            self._complete.append(shard)

    async def _write_complete(self) -> None:
        """In a thread, so that the sequences in flight go on; to its end, also when stopped meanwhile."""
        while self._complete:
            shard = self._complete[0]
            writing = asyncio.ensure_future(asyncio.to_thread(self._folder.write, shard, self._journals[shard]))
            try:
                await asyncio.shield(writing)
            finally:
                await asyncio.wait([writing])
            del self._complete[0], self._journals[shard]

    def _row(self, number: int, output: GenerationOutput) -> dict[str, Any]:
        columns, row = self._job.columns, self._rows.pop(number)
        index, generation = divmod(number, self._job.num_generations)
        return {
            "index": index,
            "generation": generation,
            **output_columns(output, row, columns, diagnostics=self._job.diagnostics),
            **self._described,
            **{name: row[name] for name in columns.keep},
        }


async def _versions(coordinator: DualVLLMCoordinator) -> dict[str, Any]:
    """Of the package, and for each server the model's name and folder, what serves it, and which weights it has now.

    None for a π_t that is not there, where `on_target_failure` says that the rows are made without.
    """

    async def ask(engine: Engine) -> dict[str, Any]:
        info = await engine.describe()
        return {
            "model": info.model,
            "root": info.root,
            "server": await engine.software_version(),
            "weights": await engine.weight_version(),
            "logprob": await fingerprint(engine),
        }

    theta, t = await asyncio.gather(
        ask(coordinator.theta),
        ask_target(lambda: ask(coordinator.t), coordinator.t.url, coordinator.config.on_target_failure),
    )
    return {"dual_rollout": __version__, "theta": theta, "t": t or dict.fromkeys(theta)}


def _settings(job: Job, config: CoordinatorConfig, versions: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """All that a later run must repeat to go on with this one. A newer version of the package may."""
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OPERATION}
    return {
        "input": {**source.identity, "limit": job.limit},
        "columns": dataclasses.asdict(job.columns),
        "models": {
            name: {key: versions[name][key] for key in ("model", "root", "weights", "logprob")}
            for name in ("theta", "t")
        },
        "generation": {"max_tokens": job.max_tokens, "num_generations": job.num_generations, **chosen},
        "output": {
            "format": job.format,
            "rows_per_shard": job.rows_per_shard,
            **({"diagnostics": True} if job.diagnostics else {}),
        },
    }


def _owned(total: int, job: Job) -> int:
    """How many of `total` sequences are this process's."""
    size, (index, count) = job.rows_per_shard, (job.share.index, job.share.count)
    full, rest = divmod(total, size)
    whole = len(range(index, full, count))
    return whole * size + (rest if job.share.has(full) else 0)
