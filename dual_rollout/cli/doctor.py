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
from collections.abc import Awaitable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from dual_rollout.config import ServerKind

if TYPE_CHECKING:
    from dual_rollout.config import CoordinatorConfig
    from dual_rollout.servers import Capabilities, Engine
    from dual_rollout.tokenizer_files import Comparison

T = TypeVar("T")

PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "aiohttp", "numpy")
COLUMNS = 80
SYMBOLS = {"ok": "✓", "failed": "✗", "optional": "–"}
PROMPT = [1, 2, 3, 4]  # ids that any vocabulary has
TIMEOUT_S = 8.5  # for everything, so that the command answers in less than 10
REQUEST_SHARE = 0.7  # of it at most for one request

_REFUSED = "speed: a rollout works without it; the server's own words say what it lacks"
NEEDED_TO_TRAIN = {"disk": "weight reload", "lora": "LoRA loading"}
"""By the way in which a run sends weights, the row that must be there."""
_NO_TENSORS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file
_WRONG_ROWS = 1.5  # nats; two kernels in bfloat16 differ by up to 0.4


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        server: "π_θ", "π_t" or "both"; "q*" for a native one.
        status: "failed" when a rollout would fail; "optional" for what only some features need.
        detail: what was found.
        fix: what to do about it, or what it would be needed for.
    """

    server: str
    name: str
    status: Literal["ok", "failed", "optional"]
    detail: str
    fix: str = ""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check the servers before a rollout",
        description="Ask both servers, or the native one, what they are and can do. Exits with 1 when a rollout would "
        "fail, or with --train a training run.",
    )
    parser.add_argument("--engine", choices=["dual", "native"], default="dual", help="two servers, or one native one")
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
    from dual_rollout.config import CoordinatorConfig, server_fields

    if ("t_url" in server_fields(args.engine)) != (args.t_url is not None):
        raise ValueError("--t-url is the second of two servers: set it with --engine dual, and not with native")
    if not 0 < args.timeout < math.inf:
        raise ValueError(f"--timeout must be a number of seconds above 0, got {args.timeout}")
    config = CoordinatorConfig(
        engine=args.engine,
        theta_url=args.theta_url,
        **({"t_url": args.t_url} if args.t_url else {}),
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
        checks, servers = asyncio.run((examine_native if args.t_url is None else examine)(config))
        if args.train:
            checks = for_training(checks, args.train)
        if args.weights_dir is not None and all(check.status != "failed" for check in checks):
            checks.append(asyncio.run(weights_dir_check(config, args.weights_dir)))
    healthy = all(check.status != "failed" for check in checks)
    if args.json:
        report = {"ok": healthy, "versions": versions(), "servers": servers, "checks": [asdict(c) for c in checks]}
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print(render(checks, servers))
        what = "A training run" if args.train else "A rollout"
        print(f"\n{what} would {'work.' if healthy else 'fail: see the rows with ✗.'}")
    return 0 if healthy else 1


async def examine(config: CoordinatorConfig) -> tuple[list[Check], dict[str, dict[str, Any] | None]]:
    """All checks, and each server's capabilities by its URL's name in the config."""
    from dual_rollout.coordinator import DualVLLMCoordinator
    from dual_rollout.tokenizer_check import compare_tokens

    async with DualVLLMCoordinator(config) as coordinator:
        assert coordinator.t is not None, "a server that holds both models is for examine_native"
        engines = (coordinator.theta, coordinator.t)
        deadline = asyncio.get_running_loop().time() + config.total_timeout
        found = await asyncio.gather(*(_by(deadline, engine.probe(PROMPT)) for engine in engines))
        checks = []
        for name, flag, result in zip(("π_θ", "π_t"), ("theta_url", "t_url"), found, strict=True):
            checks += server_checks(name, flag, getattr(config, flag), result, int(config.top_k))
        capabilities = [None if isinstance(result, Exception) else result for result in found]
        for name, engine, there in zip(("π_θ", "π_t"), engines, capabilities, strict=True):
            if there is not None:
                checks.append(weights_check(name, there.root, await _by(deadline, weights_of(engine))))
                if (await engine.describe()).owned_by == "vllm":
                    checks.append(sessions_check(name, there))
        theta, t = capabilities
        if theta is not None and t is not None:
            compared = await _by(deadline, compare_tokens(*engines, theta, t))
            checks += pair_checks(config, theta, t, compared)
    names = ("theta", "t")
    return checks, {name: asdict(c) if c is not None else None for name, c in zip(names, capabilities, strict=True)}


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


async def weights_dir_check(config: CoordinatorConfig, folder: Path) -> Check:
    """Whether the policy's server sees what is written to the folder. Its weights stay as they are."""
    from dual_rollout.coordinator import DualVLLMCoordinator

    with tempfile.TemporaryDirectory(dir=folder) as written:
        os.chmod(written, 0o755)
        Path(written, "model.safetensors").write_bytes(_NO_TENSORS)
        async with DualVLLMCoordinator(config) as coordinator:
            name = "q*" if coordinator.t is None else "π_θ"
            deadline = asyncio.get_running_loop().time() + config.total_timeout
            answer = await _by(deadline, coordinator.theta.check_sees(str(Path(written).resolve())))
    if isinstance(answer, Exception):
        return Check(name, "weights folder", "failed", str(answer), "share the folder under one path (docs/serving.md)")
    return Check(name, "weights folder", "ok", f"sees {folder}")


async def weights_of(engine: Engine) -> tuple[str | None, float | None]:
    """The name of the weights that a server has now, and their fingerprint."""
    from dual_rollout.preflight import fingerprint

    return await engine.weight_version(), await fingerprint(engine)


def weights_check(name: str, root: str | None, found: tuple[str | None, float | None] | Exception) -> Check:
    """Whether they are those that the server was started with, where it tells."""
    if isinstance(found, Exception):
        return Check(name, "weights", "optional", f"not known: {found}")
    version, logprob = found
    detail = (
        f"{version or 'not named'}; log-probability of a fixed text {logprob if logprob is not None else 'unknown'}"
    )
    if version in (None, "default"):
        return Check(name, "weights", "ok", detail)
    fix = f"they were given to it by a training run: restart the server to have those of {root or 'its own folder'}"
    return Check(name, "weights", "optional", detail, fix)


def sessions_check(name: str, found: Capabilities) -> Check:
    """Whether a vLLM server keeps texts between requests."""
    from dual_rollout.sessions.wire import MIDDLEWARE, SCHEDULER

    if found.sessions:
        return Check(name, "sessions", "ok", "yes")
    flags = f"--middleware {MIDDLEWARE} --scheduler-cls {SCHEDULER}"
    return Check(name, "sessions", "optional", "no", f"speed: start it with {flags} (docs/serving.md)")


async def examine_native(config: CoordinatorConfig) -> tuple[list[Check], dict[str, dict[str, Any] | None]]:
    """All checks of a native server, and what it said of itself. A few tokens show whether it draws from the right
    rows."""
    from dual_rollout.native.client import NativeEngine
    from dual_rollout.servers import HttpTransport

    http = HttpTransport(str(config.theta_url), request_timeout=config.request_timeout, max_retries=config.max_retries)
    engine = NativeEngine(http, config.theta_model)
    deadline = asyncio.get_running_loop().time() + config.total_timeout
    try:
        server = await _by(deadline, engine.native_server())
        if isinstance(server, Exception):
            return [_native_fault(server)], {"native": None}
        info, difference = await _by(deadline, engine.describe()), await _by(deadline, engine.compare_values())
        reloads, weights = await _by(deadline, engine.reloads_weights()), await _by(deadline, weights_of(engine))
        lora = Check("q*", "LoRA loading", "ok", "yes")
        if await _by(deadline, engine.loads_lora()) is not True:
            needed = "two models take no adapters: train with dual_weight_sync=disk" if server.target else _LORA
            lora = Check("q*", "LoRA loading", "optional", "no", needed)
    finally:
        await engine.aclose()
    for found in (info, difference):
        if isinstance(found, Exception):
            return [_native_fault(found)], {"native": asdict(server)}
    assert not isinstance(info, Exception) and not isinstance(difference, Exception)
    sides = "log π_θ" if server.target else "both sides"
    values = Check("q*", "values", "ok", f"{sides} within {difference:.2g} nats of the server's own")
    if difference > _WRONG_ROWS:
        fix = "its numbers are of other rows, or rounded too far: report it, with vLLM's version and its flags"
        values = Check("q*", "values", "failed", f"{sides}: {difference:.2g} nats from the server's own", fix)
    reload = Check("q*", "weight reload", "ok", "yes; π_θ's alone" if server.target else "yes; of both roles")
    if reloads is not True:
        fix = "for training with dual_weight_sync=disk, start it with VLLM_SERVER_DEV_MODE=1"
        reload = Check("q*", "weight reload", "optional", "no", fix)
    requests = server.max_requests
    checks = [
        Check("q*", "server", "ok", f"{info.model} at {engine.url}"),
        Check("q*", "target", "ok", server.target or "the same model: give it a prompt of its own, or another adapter"),
        Check("q*", "vocabulary", "ok", f"{server.common_vocab_size} tokens"),
        Check(
            "q*", "places", "ok", f"{requests} rollouts at once, or {requests // 2} with two prompts (--max-num-seqs)"
        ),
        values,
        reload,
        lora,
        weights_check("q*", info.model, weights),
    ]
    return checks, {"native": asdict(server)}


def _native_fault(error: Exception) -> Check:
    from dual_rollout.exceptions import PreflightError

    if isinstance(error, PreflightError):
        fix = "serve the models with dual-rollout serve-native (docs/native.md), or check two servers (--engine dual)"
        return Check("q*", "native", "failed", str(error), fix)
    fix = (
        "start dual-rollout serve-native, or correct theta_url; one that has just started compiles at first "
        "(--timeout 300)"
    )
    return Check("q*", "server", "failed", str(error) or type(error).__name__, fix)


def server_checks(name: str, flag: str, url: str, found: Capabilities | Exception, top_k: int) -> list[Check]:
    """The rows of one server."""
    if isinstance(found, Exception):
        fix = f"start the server, or correct {flag}; one that has just started compiles at first (--timeout 300)"
        return [Check(name, "server", "failed", str(found) or type(found).__name__, fix)]
    cap = found.max_logprobs
    enough = cap is None or cap >= top_k

    def optional(what: str, there: bool | None, detail: str, use: str) -> Check:
        return Check(name, what, "ok", detail) if there else Check(name, what, "optional", "no", use)

    processed = found.logprobs_mode == "processed"
    return [
        Check(name, "server", "ok", f"{found.model} at {url}, version {found.version or 'unknown'}"),
        Check(name, "context", "ok", f"{found.max_model_len or 'unknown'} tokens"),
        Check(
            name,
            "top_k",
            "ok" if enough else "failed",
            f"{top_k} of at most {'any number' if cap is None else cap}",
            "" if enough else f"start it with --max-logprobs {top_k}, or ask for less (--top-k {cap})",
        ),
        Check(
            name,
            "log-probabilities",
            "ok" if processed else "optional",
            found.logprobs_mode,
            "" if processed else "temperature != 1 needs --logprobs-mode processed_logprobs to be exact",
        ),
        optional("named tokens", found.named_logprobs, "yes", 'missing="exact" needs a vLLM with logprob_token_ids'),
        optional(
            "prefix caching",
            found.prefix_caching,
            "on",
            "speed: do not start it with --no-enable-prefix-caching"
            if found.prefix_caching is False
            else "speed: it does not say whether it caches; --enable-prompt-tokens-details shows it",
        ),
        Check(name, "draft scoring", "ok", " or ".join(found.scoring)),
        *(Check(name, "refused", "optional", refusal, _REFUSED) for refusal in found.refused),
        *([] if name == "π_t" else _sync_checks(name, found)),
    ]


def _sync_checks(name: str, found: Capabilities) -> list[Check]:
    """What training needs of the policy's server alone."""

    def optional(what: str, there: bool, use: str) -> Check:
        return Check(name, what, "ok", "yes") if there else Check(name, what, "optional", "no", use)

    reloads = found.reloads_weights and found.resets_prefix_cache
    return [
        optional("weight reload", reloads, "training with dual_weight_sync=disk needs VLLM_SERVER_DEV_MODE=1"),
        optional("LoRA loading", found.loads_lora, _LORA),
    ]


_LORA = "training with dual_weight_sync=lora needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


def pair_checks(
    config: CoordinatorConfig, theta: Capabilities, t: Capabilities, compared: Comparison | Exception
) -> list[Check]:
    """The rows about both servers together."""
    models = Check("both", "two models", "ok", "yes")
    if config.theta_url == config.t_url and theta.model == t.model:
        fix = "α means nothing, unless π_t sees other prompts (t_prompts)"
        models = Check("both", "two models", "optional", "one", fix)
    return [models, _token_check(compared)]


def _token_check(compared: Comparison | Exception) -> Check:
    if isinstance(compared, Exception):
        return Check("both", "tokens", "optional", f"not checked: {compared}")
    detail = "; ".join([*compared.differences, *compared.notes])
    if compared.same is None:
        return Check("both", "tokens", "optional", detail, "make sure yourself that the tokenizers are the same")
    if not compared.same:
        return Check("both", "tokens", "failed", detail, "serve two models that have one tokenizer")
    return Check("both", "tokens", "ok", f"same{'; ' if detail else ''}{detail}")


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


def render(checks: list[Check], servers: dict[str, dict[str, Any] | None]) -> str:
    """The report as text of 80 columns, to be pasted into an issue."""
    lines = _wrapped("", ", ".join(f"{name} {number}" for name, number in versions().items()))
    for server, capabilities in servers.items():
        lines.append(f"{server} server: {(capabilities or {}).get('version') or 'unknown'}")
    lines.append("")
    width = max(len(check.name) for check in checks)
    for check in checks:
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


async def _by(deadline: float, answer: Awaitable[T]) -> T | Exception:
    """The answer, or what went wrong."""
    from dual_rollout.exceptions import DualRolloutError

    try:
        async with asyncio.timeout_at(deadline):
            return await answer
    except TimeoutError:
        return TimeoutError("no answer in time")
    except DualRolloutError as error:
        return error
