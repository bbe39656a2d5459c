"""Many prompts to a JSONL file that `datasets` reads."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from datasets import load_dataset
from servers import parse_args, two_servers

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator

PATH = Path("outputs/examples/rollouts.jsonl")
COLUMNS = ("generated_text", "generated_tokens", "finish_reason", "alpha_history", "importance_weights", "error")


async def run(theta_url: str, t_url: str, max_tokens: int) -> None:
    prompts = [[{"role": "user", "content": f"How much is {n} + {n + 3}?"}] for n in range(12)]
    config = CoordinatorConfig(theta_url=theta_url, t_url=t_url, seed=0, max_concurrency=6, show_progress=True)
    PATH.parent.mkdir(parents=True, exist_ok=True)
    async with DualVLLMCoordinator(config) as coordinator:
        outputs = await coordinator.generate_batch(prompts, max_tokens=max_tokens)
    with PATH.open("w", encoding="utf-8") as file:
        for output in outputs:
            row = {"prompt": output.prompt, **{name: getattr(output, name) for name in COLUMNS}}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    args = parse_args(__doc__)
    with two_servers(args) as servers:
        asyncio.run(run(*servers, args.max_tokens))
    dataset = load_dataset("json", data_files=str(PATH), split="train")
    print(dataset)
    print(dataset[0]["generated_text"])


if __name__ == "__main__":
    main()
