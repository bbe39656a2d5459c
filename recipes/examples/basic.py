"""Sample from q* between two servers in one call."""

from __future__ import annotations

import asyncio

from servers import parse_args, two_servers

from dual_rollout import CoordinatorConfig, generate_with_optimal_sampling


def main() -> None:
    args = parse_args(__doc__)
    prompts = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "Name three colours."}],
    ]
    with two_servers(args) as (theta_url, t_url):
        config = CoordinatorConfig(theta_url=theta_url, t_url=t_url, top_k=100, seed=0)
        outputs = asyncio.run(generate_with_optimal_sampling(prompts, config, max_tokens=args.max_tokens))
    for output in outputs:
        mean_alpha = sum(output.alpha_history) / len(output.alpha_history)
        mean_weight = sum(output.importance_weights) / len(output.importance_weights)
        print(f"{output.generated_text!r}  [{output.finish_reason}, α {mean_alpha:.2f}, weight {mean_weight:.2f}]")


if __name__ == "__main__":
    main()
