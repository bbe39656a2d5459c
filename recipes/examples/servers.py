"""The two servers of the examples: given by URL, or embedded ones started for the example's life."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from dual_rollout.server.launch import EmbeddedServer


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--theta-url", help="π_θ's server; an embedded one is started when unset")
    parser.add_argument("--t-url", help="π_t's server; an embedded one is started when unset")
    parser.add_argument("--model", default="outputs/models/SmolLM2-135M-Instruct", help="model of embedded servers")
    parser.add_argument("--max-tokens", type=int, default=32)
    return parser


def parse_args(description: str | None) -> argparse.Namespace:
    return make_parser(description).parse_args()


@contextlib.contextmanager
def two_servers(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """URLs of π_θ and π_t."""
    if args.theta_url and args.t_url:
        yield args.theta_url, args.t_url
        return
    flags = ["--max-logprobs", "100", "--threads", "1"]
    with EmbeddedServer(args.model, flags) as theta, EmbeddedServer(args.model, flags) as t:
        yield theta.url, t.url
