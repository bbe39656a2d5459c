"""`dual-rollout doctor`: what the servers are and can do, and what to change before a rollout works."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import platform
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dual_rollout.config import EngineKind, ServerKind

if TYPE_CHECKING:
    from dual_rollout.config import CoordinatorConfig
    from dual_rollout.samplers.base import Servers
    from dual_rollout.samplers.examination import Check, Examination

PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "aiohttp", "numpy")
COLUMNS = 80
SYMBOLS = {"ok": "✓", "failed": "✗", "optional": "–"}
TIMEOUT_S = 8.5  # for everything, so that the command answers in less than 10
REQUEST_SHARE = 0.7  # of it at most for one request

NEEDED_TO_TRAIN = {"disk": "weight reload", "lora": "LoRA loading"}
"""By the way in which a run sends weights, the row that must be there."""
_NO_TENSORS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check the servers before a rollout",
        description="Ask both servers, or the native one, what they are and can do. Exits with 1 when a rollout would "
        "fail, or with --train a training run.",
    )
    parser.add_argument("--engine", choices=get_args(EngineKind), default="dual", help="two servers, or one native one")
    parser.add_argument("--theta-url", required=True, help="URL of the policy's server (π_θ), or of the native one")
    parser.add_argument("--t-url", help="URL of the target's server (π_t); not with --engine native")
    parser.add_argument("--theta-engine", choices=get_args(ServerKind), default="vllm", help="what serves π_θ")
    parser.add_argument("--t-engine", choices=get_args(ServerKind), default="vllm", help="what serves π_t")
    parser.add_argument("--top-k", type=int, default=100, help="candidates the rollout will ask for")
    parser.add_argument(
        "--train",
        nargs="?",
        const="disk",
        choices=[*NEEDED_TO_TRAIN],
        help="check for a training run, which sends the policy's server new weights: all of them (disk, when no value "
        "is given) or an adapter alone (lora)",
    )
    parser.add_argument(
        "--weights-dir",
        type=Path,
        help="with --train: the folder through which they go, dual_weight_sync_dir or else output_dir; writes an empty "
        "file there and asks the server whether it sees it",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        help="seconds for all checks (%(default)g); a vLLM that has just started may compile for minutes",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when a rollout would work."""
    from dual_rollout.config import ENGINE_SERVERS, CoordinatorConfig

    urls = {name: getattr(args, name) for name in ("theta_url", "t_url") if getattr(args, name) is not None}
    if urls.keys() != set(ENGINE_SERVERS[args.engine].fields):
        raise ValueError("--t-url is the second of two servers: set it with --engine dual, and not with native")
    if not 0 < args.timeout < math.inf:
        raise ValueError(f"--timeout must be a number of seconds above 0, got {args.timeout}")
    config = CoordinatorConfig(
        engine=args.engine,
        **urls,
        theta_engine=args.theta_engine,
        t_engine=args.t_engine,
        top_k=args.top_k,
        max_retries=1,
        request_timeout=REQUEST_SHARE * args.timeout,
        total_timeout=args.timeout,
    )
    if args.weights_dir is not None and not (args.train == "disk" and args.weights_dir.is_dir()):
        raise ValueError("--weights-dir goes with --train disk, and must be there: make the folder first")
    with _errors_only():  # the report says it all
        found = asyncio.run(examine(config, args.train, args.weights_dir))
    works = healthy(found.checks)
    if args.json:
        print(json.dumps({"ok": works, "versions": versions(), **asdict(found)}, ensure_ascii=False, indent=2))
    else:
        print(render(found))
        what = "A training run" if args.train else "A rollout"
        print(f"\n{what} would {'work.' if works else 'fail: see the rows with ✗.'}")
    return 0 if works else 1


async def examine(config: CoordinatorConfig, train: str | None, weights_dir: Path | None) -> Examination:
    """What the servers say. `train`: how a training run would send weights, of `NEEDED_TO_TRAIN`; `weights_dir`: the
    folder through which they would go, tried where nothing else would fail."""
    from dual_rollout.coordinator import DualVLLMCoordinator

    async with DualVLLMCoordinator(config) as coordinator:
        found = await coordinator.servers.examine()
        checks = found.checks if train is None else for_training(found.checks, train)
        if weights_dir is not None and healthy(checks):
            checks = [*checks, await weights_dir_check(coordinator.servers, weights_dir, config.total_timeout)]
    return replace(found, checks=checks)


def healthy(checks: list[Check]) -> bool:
    """Whether what was asked for would work."""
    return all(check.status != "failed" for check in checks)


def for_training(checks: list[Check], method: str) -> list[Check]:
    """The rows, with a fault where the policy's server lacks what a training run cannot do without.

    Args:
        method: how the weights are sent, of `NEEDED_TO_TRAIN`.
    """
    needed = NEEDED_TO_TRAIN[method]
    return [
        replace(check, status="failed") if (check.name, check.status) == (needed, "optional") else check
        for check in checks
    ]


async def weights_dir_check(servers: Servers, folder: Path, timeout_s: float) -> Check:
    """Whether the policy's server sees what is written to the folder. Its weights stay as they are."""
    from dual_rollout.samplers.examination import Check, answered

    name, deadline = servers.policy_name, asyncio.get_running_loop().time() + timeout_s
    with tempfile.TemporaryDirectory(dir=folder) as written:
        os.chmod(written, 0o755)
        Path(written, "model.safetensors").write_bytes(_NO_TENSORS)
        answer = await answered(servers.theta.check_sees(str(Path(written).resolve())), deadline)
    if isinstance(answer, Exception):
        return Check(name, "weights folder", "failed", str(answer), "share the folder under one path (docs/serving.md)")
    return Check(name, "weights folder", "ok", f"sees {folder}")


def versions() -> dict[str, str]:
    """Of this package, Python, and what matters of the rest; imports none of them."""
    from dual_rollout import __version__

    found = {"dual_rollout": __version__, "python": platform.python_version(), "platform": sys.platform}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def render(found: Examination) -> str:
    """The report as text of 80 columns, to be pasted into an issue."""
    lines = _wrapped("", ", ".join(f"{name} {number}" for name, number in versions().items()))
    for server, capabilities in found.servers.items():
        lines.append(f"{server} server: {(capabilities or {}).get('version') or 'unknown'}")
    lines.append("")
    width = max(len(check.name) for check in found.checks)
    for check in found.checks:
        lines += _wrapped(f"{SYMBOLS[check.status]} {check.server:<4}  {check.name:<{width}}  ", check.detail)
        if check.fix:
            lines += _wrapped(f"{'':<{width + 10}}→ ", check.fix)
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> list[str]:
    """A text behind its label; URLs and flags stay whole, even where they are longer than a line."""
    lines = textwrap.wrap(text, COLUMNS - len(label), break_long_words=False, break_on_hyphens=False) or ["–"]
    return [(label if number == 0 else " " * len(label)) + line for number, line in enumerate(lines)]


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    logger = logging.getLogger("dual_rollout")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
