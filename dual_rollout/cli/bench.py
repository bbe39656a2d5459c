"""`dual-rollout bench`: tokens per second of each way to sample from q*, beside what the servers do alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dual_rollout.benchmark import Row


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure decoding modes on two servers, and on a native one",
        description="Measure, on the same prompts in one run: each server generating alone (theta, t), both side by "
        "side (both), the obvious two-model loop (naive), q* by lockstep, block and auto, and, with --native-url, q* "
        "from one native server (native: of two models; pairs: π_t sees another prompt; native_plain and pairs_plain: "
        "what it generates plainly, of one context and of both). Give two URLs, or two models to serve with embedded "
        "servers, or --native-url alone.",
    )
    parser.add_argument("--theta-url", help="π_θ's server")
    parser.add_argument("--t-url", help="π_t's server")
    parser.add_argument(
        "--naive-urls",
        nargs=2,
        metavar=("THETA", "T"),
        help="servers for the naive loop, which sends text, where the others have no tokenizer",
    )
    parser.add_argument("--native-url", help="a dual-rollout serve-native, of the same two models for mode native")
    parser.add_argument("--theta-model", help="model folder of π_θ for an embedded server, when there is no URL")
    parser.add_argument("--t-model", help="model folder of π_t for an embedded server; π_θ's when unset")
    parser.add_argument("--tokenizer", help="tokenizer of the prompts; π_θ's when unset")
    parser.add_argument(
        "--modes",
        nargs="+",
        help="any of theta t both naive lockstep block auto native_plain native pairs_plain pairs; all that have "
        "servers when unset",
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64], help="sequences at once")
    parser.add_argument("--context", type=int, nargs="+", default=[64, 512], help="prompt lengths, tokens")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens per sequence")
    parser.add_argument("--repeat", type=int, default=1, help="runs of everything, in turn; the median is reported")
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--support", choices=("union", "tail"), default="union")
    parser.add_argument("--output", default="outputs/bench", help="folder for bench.json and bench.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import asyncio
    import contextlib

    from dual_rollout.benchmark import MODES, NATIVE_MODES
    from dual_rollout.server.launch import EmbeddedServer

    if args.modes is None:
        two_servers = args.theta_url is not None or args.theta_model is not None or args.native_url is None
        args.modes = [mode for mode in MODES if (args.native_url if mode in NATIVE_MODES else two_servers)]
    if unknown := set(args.modes) - set(MODES):
        raise ValueError(f"--modes: {', '.join(sorted(unknown))} unknown; choose from {', '.join(MODES)}")
    if (args.theta_url is None) != (args.t_url is None):
        raise ValueError("set both --theta-url and --t-url, or --theta-model to start embedded servers")
    only_native = set(args.modes) <= set(NATIVE_MODES)
    if args.theta_url is None and args.theta_model is None and not (only_native and args.native_url):
        raise ValueError("set --theta-url and --t-url, or --theta-model, or --native-url for its modes alone")
    if args.native_url is None and set(args.modes) & set(NATIVE_MODES):
        raise ValueError("the native modes need --native-url, a dual-rollout serve-native")
    if args.repeat < 1:
        raise ValueError(f"--repeat must be at least 1, got {args.repeat}")
    with contextlib.ExitStack() as stack:
        if args.theta_url is None and only_native:
            args.theta_url = args.t_url = args.native_url
        elif args.theta_url is None:
            length = max(args.context) + 4 * args.max_tokens + 1  # the naive loop's text may be read as more tokens
            flags = ["--max-logprobs", str(args.top_k), "--max-model-len", str(length), "--threads", "1"]
            models = (args.theta_model, args.t_model or args.theta_model)
            args.theta_url, args.t_url = (stack.enter_context(EmbeddedServer(m, flags)).url for m in models)
        asyncio.run(_bench(args))
    return 0


async def _bench(args: argparse.Namespace) -> None:
    from dual_rollout.benchmark import Benchmark, summarise
    from dual_rollout.config import CoordinatorConfig

    config = CoordinatorConfig(
        theta_url=args.theta_url,
        t_url=args.t_url,
        tokenizer=args.tokenizer,
        top_k=args.top_k,
        support=args.support,
    )
    benchmark = Benchmark(config, naive_urls=args.naive_urls, native_url=args.native_url, max_tokens=args.max_tokens)
    rows: list[Row] = []
    print(_HEADER)
    for context in args.context:
        for concurrency in args.concurrency:
            runs = []
            for _ in range(args.repeat):  # in turn, so that a drift of the machine's speed meets all modes alike
                runs.append([await benchmark.run(mode, concurrency, context) for mode in args.modes])
            for row in summarise(runs):
                rows.append(row)
                print(_line(row), flush=True)
    print(_ratios(rows))
    _save(rows, args)


_HEADER = "mode          conc. context    tok/s  req/tok  KB/tok  accept  first s  CPU µs"


def _line(row: Row) -> str:
    chosen = f"\n{'':13}{row.chosen}" if row.chosen else ""
    accept = "" if row.acceptance is None else f"{row.acceptance:.2f}"
    return (
        f"{row.mode:13}{row.concurrency:>6}{row.context:>8}{row.tokens_per_second:>9.1f}{row.requests_per_token:>9.3f}"
        f"{row.kb_per_token:>8.1f}{accept:>8}{row.first_token_s:>9.3f}{row.cpu_us_per_token:>8.0f}{chosen}"
    )


def _ratios(rows: list[Row]) -> str:
    """The closing table: each speed as a multiple of what it is to be compared with, whose names are above each other
    where they have two words."""
    bases = list(rows[0].relative)
    if not bases:
        return ""
    words = [("", *base.split("_"))[-2:] for base in bases]
    upper, lower = ("".join(f" {word:>8}" for word in each) for each in zip(*words, strict=True))
    above = [f"{'':26}{upper}"] if upper.strip() else []
    lines = ["", "Speed as a multiple of that of", *above, f"mode         conc. context{lower}"]
    for row in rows:
        shown = "".join(f" {row.relative[base]:>8.2f}" for base in bases)
        lines.append(f"{row.mode:12}{row.concurrency:>6}{row.context:>8}{shown}")
    return "\n".join(lines)


def _save(rows: list[Row], args: argparse.Namespace) -> None:
    import json
    import platform
    from dataclasses import asdict
    from pathlib import Path

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if isinstance(value, (str, int, list, type(None)))}
    machine = {"python": platform.python_version(), "platform": platform.platform()}
    document = {"settings": settings, "machine": machine, "rows": [asdict(row) for row in rows]}
    (folder / "bench.json").write_text(json.dumps(document, indent=1))
    print(f"{folder}/bench.json")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: pip install 'dual_rollout[plots]'")
        return
    contexts = sorted({row.context for row in rows})
    figure, panels = plt.subplots(
        1, len(contexts), figsize=(5 * len(contexts), 3.5), squeeze=False, layout="constrained"
    )
    for axes, context in zip(panels[0], contexts, strict=True):
        for mode in args.modes:
            shown = [row for row in rows if (row.mode, row.context) == (mode, context)]
            speeds = [row.tokens_per_second for row in shown]
            axes.plot([row.concurrency for row in shown], speeds, marker="o", label=mode)
        axes.set(xlabel="sequences at once", ylabel="tokens/s", title=f"context {context}", xscale="log", yscale="log")
    panels[0][-1].legend()
    figure.savefig(folder / "bench.png", dpi=120)
    print(f"{folder}/bench.png")
