"""What goes wrong, and what you see: a bad prompt alone, a server that is down, a top-k the server does not allow."""

from __future__ import annotations

import asyncio
import logging

from servers import parse_args, two_servers

from dual_rollout import CoordinatorConfig, generate_with_optimal_sampling
from dual_rollout.exceptions import EngineUnavailableError, PreflightError

PROMPT = [{"role": "user", "content": "Say hello."}]


async def run(theta_url: str, t_url: str, max_tokens: int) -> None:
    config = CoordinatorConfig(theta_url=theta_url, t_url=t_url, seed=0)
    good, bad = await generate_with_optimal_sampling([PROMPT, [10**9]], config, max_tokens=max_tokens)
    print(f"one prompt fails alone: {good.generated_text!r} and error: {bad.error}")

    down = CoordinatorConfig(theta_url=theta_url, t_url="http://127.0.0.1:9", max_retries=1)
    try:
        await generate_with_optimal_sampling([PROMPT], down, max_tokens=max_tokens)
    except EngineUnavailableError as error:
        print(f"a server is down: {error}")

    greedy = CoordinatorConfig(theta_url=theta_url, t_url=t_url, top_k=100_000)
    try:
        await generate_with_optimal_sampling([PROMPT], greedy, max_tokens=max_tokens)
    except PreflightError as error:
        print(f"a server is not set up for this: {error}")

    try:
        CoordinatorConfig.from_dict({"theta_url": theta_url, "t_url": t_url, "topk": 20})
    except ValueError as error:
        print(f"a typing error: {error}")


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    args = parse_args(__doc__)
    with two_servers(args) as servers:
        asyncio.run(run(*servers, args.max_tokens))


if __name__ == "__main__":
    main()
