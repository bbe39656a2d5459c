"""The `dual-rollout` command: one file per subcommand, each importing what it needs only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dual_rollout import __version__
from dual_rollout.cli import bench, doctor, serve, serve_native, train
from dual_rollout.exceptions import DualRolloutError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="dual-rollout", description="Rollouts from q*, between a policy and a target model."
    )
    parser.add_argument("--version", action="version", version=f"dual-rollout {__version__}")
    parser.add_argument("--debug", action="store_true", help="show a traceback when a command fails")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (bench, doctor, serve, serve_native, train):
        command.add_parser(subparsers)
    args, rest = parser.parse_known_args(argv)
    if rest:
        if not getattr(args, "accepts_rest", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
    try:
        return args.run(args)
    except (ValueError, OSError, DualRolloutError) as error:
        if args.debug:
            raise
        print(f"dual-rollout: error: {error}", file=sys.stderr)
        return 1
