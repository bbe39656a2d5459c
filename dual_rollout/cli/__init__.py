"""The `dual-rollout` command: one file per subcommand, each importing what it needs only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dual_rollout import __version__
from dual_rollout.cli import bench, doctor, generate, report, serve, serve_native, train
from dual_rollout.exit_status import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 2 for a caller's mistake, 1 for a server's fault."""
    parser = argparse.ArgumentParser(
        prog="dual-rollout", description="Rollouts from q*, between a policy and a target model."
    )
    parser.add_argument("--version", action="version", version=f"dual-rollout {__version__}")
    parser.add_argument("--debug", action="store_true", help="before the command: show a traceback when it fails")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (bench, doctor, generate, report, serve, serve_native, train):
        command.add_parser(subparsers)
    for given in sys.argv[1:] if argv is None else argv:
        try:
            given.encode()
        except UnicodeEncodeError:
            parser.error(f"an argument is not valid Unicode: {given!a:.80}")
    args, rest = parser.parse_known_args(argv)
    if rest:
        if not getattr(args, "accepts_rest", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
    return exit_status(f"dual-rollout {args.command}", lambda: args.run(args), debug=args.debug)
