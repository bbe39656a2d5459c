"""What rollouts from one engine do not work with: flags, before a server starts, and its configuration,
since not all comes by flags."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

_ONE_ENGINE = "both requests of a rollout must reach one engine: start one server per engine"
_ONE_PROCESS = "one process counts the rollouts: start several servers, each with its own engine"
_ONE_PLACE = "the logits of both rows must be in one place in each step"
_SPECULATION = "vLLM takes no logits processors with it"
_ONE_RANK = "both rows of a rollout must be on one rank"

_FLAGS = {
    "--model": "it would replace π_θ: write THETA first",
    "--scheduler-cls": "both requests of a rollout must come to the scheduler at once",
    "--worker-extension-cls": "it is used to fetch the numbers",
    "--logits-processors": "the one of rollouts must be there",
    "--data-parallel*": _ONE_ENGINE,
    "-dp*": _ONE_ENGINE,
    "--api-server-count": _ONE_PROCESS,
    "--pipeline-parallel-size": _ONE_PLACE,
    "-pp": _ONE_PLACE,
    "--speculative-config": _SPECULATION,
    "-sc": _SPECULATION,
    "--enable-batch-sharded-sampling": _ONE_RANK,
}
"""Patterns, since vLLM has many flags for data parallelism."""


def refuse_flags(flags: Sequence[str], *, two_models: bool) -> None:
    """Raise `ValueError` for flags that rollouts do not work with, before anything is started."""
    of_two = {"--hf-overrides": "they hold π_t: write it into THETA's config.json"} if two_models else {}
    found = [
        f"{name}: {reason}"
        for pattern, reason in (_FLAGS | of_two).items()
        for name in fnmatch.filter(names_of(flags), pattern)
    ]
    _refuse(found)


def refuse_config(vllm_config: Any) -> None:
    """Raise `ValueError` for an engine that rollouts do not work with: flags may be in a file (`--config`), too."""
    parallel = vllm_config.parallel_config
    faults = {
        f"data parallelism: {_ONE_ENGINE}": parallel.data_parallel_size > 1,
        f"several API servers: {_ONE_PROCESS}": getattr(parallel, "_api_process_count", 1) > 1,
        f"pipeline parallelism: {_ONE_PLACE}": parallel.pipeline_parallel_size > 1,
        f"speculative decoding: {_SPECULATION}": vllm_config.speculative_config is not None,
        f"sampling sharded over ranks: {_ONE_RANK}": getattr(parallel, "enable_batch_sharded_sampling", False),
    }
    _refuse([fault for fault, there in faults.items() if there])


def names_of(flags: Sequence[str]) -> set[str]:
    """The flags among the words of a command line, without values, as vLLM's documentation spells them."""
    return {flag.split("=")[0].split(".")[0].replace("_", "-") for flag in flags if flag.startswith("-")}


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError("rollouts from q* do not work with " + "; nor with ".join(faults))
