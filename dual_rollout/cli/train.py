"""`dual-rollout train RECIPE.yaml`: the training script in this process."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train with a recipe",
        description="Train with a recipe, like accelerate launch -m dual_rollout.training.script --config RECIPE. "
        "Further flags override the recipe's keys, e.g. --max_steps 2.",
    )
    parser.add_argument("recipe", help="a YAML file of TRL's keys and ours (dual_*)")
    parser.set_defaults(run=run, accepts_rest=True, rest=[])


def run(args: argparse.Namespace) -> int:
    from dual_rollout.training.script import main

    main(["--config", args.recipe, *args.rest])
    return 0
