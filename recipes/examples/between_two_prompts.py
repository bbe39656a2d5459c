"""One sequence between two prompts of one model, drawn here token by token, with what each side would have said.

The whole algorithm, by hand: both lists, α, q*, one draw, its weight. The target sees the answer, the policy does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np
from servers import make_parser

from dual_rollout import (
    CoordinatorConfig,
    DualVLLMCoordinator,
    compute_q_star,
    merge_top_k_candidates,
    sample_from_distribution,
    solve_kl_symmetry,
)
from dual_rollout.server.launch import EmbeddedServer
from dual_rollout.text import load_tokenizer

QUESTION = "How much is 17 + 25?"
PROMPT = [{"role": "user", "content": QUESTION}]
T_PROMPT = [{"role": "user", "content": f"{QUESTION} (The correct answer is 42.)"}]
TOP_K, SHOWN = 100, 4  # tokens of a list, and of what is printed of it
PLAIN, BOLD, BLUE, ORANGE = ("\033[0m", "\033[1m", "\033[34m", "\033[33m") if sys.stdout.isatty() else ("",) * 4


@contextlib.contextmanager
def one_server(args: Namespace) -> Iterator[str]:
    """The URL of the one model, which is both policy and target."""
    if args.theta_url:
        yield args.theta_url
        return
    with EmbeddedServer(args.model, ["--max-logprobs", str(TOP_K), "--threads", "1"]) as server:
        yield server.url


async def draw(url: str, max_tokens: int, seed: int) -> None:
    config, rng = CoordinatorConfig(theta_url=url, t_url=url, top_k=TOP_K), np.random.default_rng(seed)
    async with DualVLLMCoordinator(config) as coordinator:
        tokenizer = coordinator.tokenizer = load_tokenizer((await coordinator.theta.describe()).root)
        before, t_before = coordinator.encode(PROMPT), coordinator.encode(T_PROMPT)
        drawn: list[int] = []
        log_weight = 0.0
        while len(drawn) < max_tokens and (not drawn or drawn[-1] != tokenizer.eos_token_id):
            lists = await coordinator.theta.next_top_k([before + drawn, t_before + drawn], TOP_K)
            rows = [dict(zip(*row, strict=True)) for row in zip(lists.token_ids, lists.logprobs, strict=True)]
            candidates, policy, target = merge_top_k_candidates(*rows)
            alpha = solve_kl_symmetry(policy, target)
            q = compute_q_star(policy, target, alpha)
            token = sample_from_distribution(q, candidates, rng)
            exact = rows[0].get(token)  # `policy` is normalised over both lists; a weight needs π_θ(y) itself
            if exact is None:  # only the target listed it
                ((exact,),) = await coordinator.theta.named_logprobs([before + drawn], [[token]])
            token_log_weight = exact - math.log(q[candidates == token][0])
            log_weight += token_log_weight
            print(f"{BOLD}{len(drawn):>3}  {tokenizer.decode([token])!r}{PLAIN}   α {alpha:.3f}   ", end="")
            print(f"weight π_θ/q* {math.exp(token_log_weight):.3f}")
            for name, probs, colour in (("policy", policy, BLUE), ("q*", q, BOLD), ("target", target, ORANGE)):
                print(f"     {colour}{name:>6}{PLAIN}  {likeliest(candidates, probs, tokenizer)}")
            drawn.append(token)
    print(f"\n{tokenizer.decode(drawn, skip_special_tokens=True)}")
    print(f"{len(drawn)} tokens; the product of their weights is {math.exp(log_weight):.3g}")


def likeliest(candidates: np.ndarray, probs: np.ndarray, tokenizer: Any) -> str:
    """The most likely tokens with their probabilities."""
    places = np.argsort(-probs)[:SHOWN]
    return "  ".join(f"{tokenizer.decode([candidates[i]])!r} {probs[i]:.3f}" for i in places)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with one_server(args) as url:
        asyncio.run(draw(url, args.max_tokens, args.seed))


if __name__ == "__main__":
    main()
