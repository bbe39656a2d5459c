"""`dual-rollout serve-native`: one vLLM server that samples from q*."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import fields
from typing import get_args

from dual_rollout.config import AlphaMethod, AlphaRule


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `serve-native` command; flags it does not know are vLLM's."""
    parser = subparsers.add_parser(
        "serve-native",
        help="serve q* from one vLLM engine",
        description="Serve rollouts from q* of THETA and T from one vLLM engine (docs/native.md). Runs in vLLM's "
        "environment. All other flags are vLLM's own, e.g. --port 8000 --tensor-parallel-size 2.",
        allow_abbrev=False,
    )
    parser.add_argument("theta", metavar="THETA", help="folder or hub name of the policy")
    parser.add_argument(
        "t",
        metavar="T",
        nargs="?",
        help="of the target, with the same token ids; without it THETA serves in both roles, for pairs of prompts",
    )
    parser.add_argument(
        "--ordinary-requests",
        choices=["policy", "q_star"],
        default="policy",
        help="what requests that are no rollouts are drawn from: the policy, or (with T) q*, for frameworks that ask "
        "vLLM for tokens in their own way; the rule for α of these is",
    )
    parser.add_argument("--alpha-method", choices=get_args(AlphaMethod), help="how α is chosen, kl_symmetry when unset")
    parser.add_argument("--fixed-alpha", type=float, help="the α of --alpha-method fixed")
    parser.add_argument("--kl-budget", type=float, help="the bound of --alpha-method kl_budget on KL(q‖π_θ), nats")
    parser.add_argument("--alpha-min", type=float, help="lower bound on α")
    parser.add_argument("--alpha-max", type=float, help="upper bound on α")
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    parser.set_defaults(run=run, accepts_rest=True, rest=[])


def run(args: argparse.Namespace) -> int:
    """Become vLLM's API server."""
    from dual_rollout.native.serving import vllm_command

    command = vllm_command(args.theta, args.t, args.rest, _rule_of_ordinary_requests(args))
    if not args.dry_run:
        sys.stdout.flush()
        os.execv(command[0], command)
    print(shlex.join(command))
    return 0


def _rule_of_ordinary_requests(args: argparse.Namespace) -> AlphaRule | None:
    values = {spec.name: getattr(args, spec.name) for spec in fields(AlphaRule)}
    given = {name: value for name, value in values.items() if value is not None}
    if args.ordinary_requests == "policy":
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{flags} belong to --ordinary-requests q_star: a rollout has its own rule for α")
        return None
    if args.t is None:
        raise ValueError("--ordinary-requests q_star needs T: an ordinary request shows both models one prompt")
    return AlphaRule(**given)
