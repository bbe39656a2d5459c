"""`dual-rollout serve-native`: one vLLM server that samples from q*."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

_RULE = {"alpha_method": "kl_symmetry", "fixed_alpha": None, "alpha_min": 0.0, "alpha_max": 1.0, "temperature": 1.0}
"""Defaults of what two models are told of α."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `serve-native` command; flags it does not know are vLLM's."""
    parser = subparsers.add_parser(
        "serve-native",
        help="serve q* of two models from one vLLM engine",
        description="Serve q* of THETA and T from one vLLM engine (docs/native.md). Runs in vLLM's environment. "
        "All other flags are vLLM's own, e.g. --port 8000 --tensor-parallel-size 2.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("theta", metavar="THETA", help="folder or hub name of the policy")
    parser.add_argument(
        "t",
        metavar="T",
        nargs="?",
        help="of the target, with the same token ids; without it THETA serves in both roles, for pairs of prompts",
    )
    methods = ["kl_symmetry", "fixed"]
    parser.add_argument("--alpha-method", choices=methods, default="kl_symmetry", help="how α is chosen")
    parser.add_argument("--fixed-alpha", type=float, help="the α of --alpha-method fixed")
    parser.add_argument("--alpha-min", type=float, default=0.0, help="lower bound on α")
    parser.add_argument("--alpha-max", type=float, default=1.0, help="upper bound on α")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the pair that α is solved for; clients ask for the same"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    parser.set_defaults(run=run, accepts_rest=True, rest=[])


def run(args: argparse.Namespace) -> int:
    """Become vLLM's API server."""
    from dual_rollout.native.serving import NativeSettings, pairs_command, vllm_command

    values = {name: getattr(args, name) for name in NativeSettings.__dataclass_fields__}
    if args.t is None:
        given = [f"--{name.replace('_', '-')}" for name, default in _RULE.items() if values[name] != default]
        if given:
            raise ValueError(f"{', '.join(given)} belong to two models; with one, each request has its own rule for α")
        command = pairs_command(args.theta, args.rest)
    else:
        command = vllm_command(NativeSettings(**values), args.rest)
    if not args.dry_run:
        sys.stdout.flush()
        os.execv(command[0], command)
    print(shlex.join(command))
    return 0
