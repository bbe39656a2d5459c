"""`dual-rollout generate`: sequences from q* for every row of an input, or for one prompt as they come."""

from __future__ import annotations

import argparse
import os
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from dual_rollout.cli.config_flags import add_config_flags, config_from

if TYPE_CHECKING:
    from dual_rollout.config import CoordinatorConfig
    from dual_rollout.production.shards import Share

DEFAULTS = {"seed": 0, "show_progress": True}
"""Of the config. Without a seed a run could not be continued; see docs/generate.md."""

FAILED_ROWS = 3
"""Exit status of a run that is complete, but has rows with an error."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="generate for every row of an input, into shards that datasets reads",
        description="Draw a sequence from q* for every row of a JSONL or Parquet file or a dataset, and write shards "
        "that datasets.load_dataset reads. Killed at any moment and started again with the same flags, it goes on "
        "where it was. See docs/generate.md.",
        epilog="Exit status: 0 all rows are there; 1 a server's fault, start it again; 2 a mistake in what was asked; "
        "3 all rows are there, some with an error; 128 + N stopped by signal N, start it again.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("input")
    data.add_argument(
        "--input", nargs="+", help=".jsonl, .jsonl.gz or .parquet files, or the name or folder of one dataset"
    )
    data.add_argument("--input-config", help="configuration of the dataset")
    data.add_argument("--split", default="train", help="split of the dataset. Default: train.")
    data.add_argument("--limit", type=int, help="use the first rows only")
    data.add_argument("--prompt-column", default="prompt", help="text, chat messages or token ids. Default: prompt.")
    data.add_argument("--t-prompt-column", help="what π_t sees instead")
    data.add_argument(
        "--t-prompt-template", help='the user turn π_t sees instead, e.g. "{question} (The answer is {answer}.)"'
    )
    data.add_argument("--t-system-prompt", help="a system turn that only π_t sees, with columns in braces")
    data.add_argument("--keep-columns", nargs="+", default=[], help="columns of the input to copy to the output")

    what = parser.add_argument_group("output")
    what.add_argument("--output", help="a folder: new, or that of a run to go on with")
    what.add_argument("--format", choices=("parquet", "jsonl"), default="parquet", help="of the shards")
    what.add_argument("--rows-per-shard", type=int, default=1000, help="Default: 1000.")
    what.add_argument("--max-tokens", type=int, default=256, help="tokens per sequence at most. Default: 256.")
    what.add_argument("--num-generations", type=int, default=1, help="sequences per row of the input. Default: 1.")
    what.add_argument(
        "--diagnostics", action="store_true", help="also KL(q‖π_θ) and the lists' coverage at every token, for a report"
    )
    what.add_argument("--retry-failed", action="store_true", help="generate rows with an error again")
    what.add_argument("--overwrite", action="store_true", help="remove the run that the folder holds, and begin anew")

    spread = parser.add_argument_group(
        "several processes", "One command line for all of them; accelerate launch, torchrun and srun number them."
    )
    spread.add_argument("--num-shards", type=int, help="how many processes share the work")
    spread.add_argument("--shard-index", type=int, help="which of them this is, from 0")

    stream = parser.add_argument_group("a single prompt")
    stream.add_argument("--stream", action="store_true", help="print the tokens of --prompt as they come")
    stream.add_argument("--prompt", help="text")
    stream.add_argument("--t-prompt", help="what π_t sees instead")
    stream.add_argument("--chat", action="store_true", help="the prompts are what a user says, for the chat template")
    add_config_flags(parser, **DEFAULTS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import asyncio
    import logging

    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("dual_rollout").setLevel(logging.INFO)
    if args.stream:
        if args.prompt is None or args.input or args.output:
            raise ValueError("--stream prints one prompt: it needs --prompt, and neither --input nor --output")
        return asyncio.run(_stoppable(_stream(args, config_from(args)), ""))
    if not args.input or not args.output:
        raise ValueError("set --input and --output, or --stream and --prompt")
    if args.prompt is not None or args.t_prompt is not None or args.chat:
        raise ValueError("--prompt, --t-prompt and --chat go with --stream; an input has --prompt-column and the like")
    again = (
        "; the same command goes on from here" if not args.overwrite else "; without --overwrite it goes on from here"
    )
    return asyncio.run(_stoppable(_produce(args, config_from(args, **DEFAULTS)), again))


async def _produce(args: argparse.Namespace, config: CoordinatorConfig) -> int:
    from pathlib import Path

    from dual_rollout.production.rows import Columns
    from dual_rollout.production.run import Job, produce

    share = _share(args)
    columns = Columns(
        prompt=args.prompt_column,
        t_prompt=args.t_prompt_column,
        t_prompt_template=args.t_prompt_template,
        t_system_prompt=args.t_system_prompt,
        keep=tuple(args.keep_columns),
    )
    job = Job(
        inputs=args.input,
        output=Path(args.output),
        columns=columns,
        input_config=args.input_config,
        split=args.split,
        max_tokens=args.max_tokens,
        num_generations=args.num_generations,
        format=args.format,
        rows_per_shard=args.rows_per_shard,
        limit=args.limit,
        share=share,
        diagnostics=args.diagnostics,
        retry_failed=args.retry_failed,
        overwrite=args.overwrite,
    )
    summary = await produce(job, config)
    part = "" if share.count == 1 else f", the share {share.index} of {share.count}"
    print(f"{summary.rows} rows in {args.output}{part}")
    if summary.failed:
        print(f"{summary.failed} of them failed: see their column error; --retry-failed generates them again")
    return FAILED_ROWS if summary.failed else 0


async def _stream(args: argparse.Namespace, config: CoordinatorConfig) -> int:
    import sys

    from dual_rollout.coordinator import DualVLLMCoordinator
    from dual_rollout.types import Prompt

    def prompt(text: str) -> Prompt:
        return [{"role": "user", "content": text}] if args.chat else text

    t_prompt = None if args.t_prompt is None else prompt(args.t_prompt)
    alphas, finish_reason = [], None
    async with DualVLLMCoordinator(config) as coordinator:
        async for chunk in coordinator.generate_stream(
            prompt(args.prompt), max_tokens=args.max_tokens, t_prompt=t_prompt
        ):
            print(chunk.text, end="", flush=True)
            alphas.append(chunk.alpha)
            finish_reason = chunk.finish_reason
    print()
    mean = sum(alphas) / len(alphas)
    print(f"{len(alphas)} tokens, mean α {mean:.2f}, ended by {finish_reason}", file=sys.stderr)
    return 0


async def _stoppable(work: Coroutine[Any, Any, int], again: str) -> int:
    """The status of `work`, or 128 + N when signal N ended it, with a message that `again` completes."""
    import asyncio
    import signal
    import sys

    task, caught = asyncio.ensure_future(work), []

    def stop(number: int) -> None:
        caught.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not caught:
            raise
        print(f"stopped by {signal.Signals(caught[0]).name}{again}", file=sys.stderr)
        return 128 + caught[0]


def _share(args: argparse.Namespace) -> Share:
    """From the flags, or else from the launcher's environment."""
    from dual_rollout.production.shards import Share

    if (args.num_shards is None) != (args.shard_index is None):
        raise ValueError("set both --num-shards and --shard-index, or neither")
    if args.num_shards is not None:
        return Share(args.shard_index, args.num_shards)
    # Slurm also sets SLURM_PROCID and SLURM_NTASKS in a batch script, of which there is only one: the number of the
    # step's tasks is set by srun alone.
    for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if index in os.environ and count in os.environ:
            try:
                return Share(int(os.environ[index]), int(os.environ[count]))
            except ValueError as error:
                raise ValueError(f"{index} and {count} in the environment: {error}") from error
    return Share()
