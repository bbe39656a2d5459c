"""`dual-rollout report`: rollouts token by token, and a run's figures, as one page of HTML."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "report",
        help="show rollouts and a run's figures in one page of HTML",
        description="Write one page of HTML, which needs no network, with the rollouts of a training run or of "
        "dual-rollout generate, every token coloured by α, weight, KL or log-ratio, and the run's figures.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_SHARDS", help="a run's folder, or shards")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="Default: report.html.")
    parser.add_argument("--tokenizer", help="name or folder of the policy's; where the run says that it is when unset")
    parser.add_argument(
        "--max-rollouts", type=int, default=2000, help="of more, ones at equal distances are shown. Default: 2000."
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dual_rollout.report.page import write_report

    source = write_report(args.paths, args.output, tokenizer=args.tokenizer, max_rollouts=args.max_rollouts)
    shown = f"{len(source.rollouts)} of {source.found} rollouts"
    print(f"{shown} and {len(source.steps)} entries of metrics in {args.output}")
    return 0
