"""Per-token diagnostics of q* when π_t sees the answer, streaming, and a plot of α."""

from __future__ import annotations

import asyncio
from pathlib import Path

from servers import parse_args, two_servers

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput

QUESTION = "How much is 17 + 25?"
PROMPT = [{"role": "user", "content": QUESTION}]
T_PROMPT = [{"role": "user", "content": f"{QUESTION} (The correct answer is 42.)"}]
PLOT = Path("outputs/examples/alpha.png")


async def run(theta_url: str, t_url: str, max_tokens: int) -> tuple[GenerationOutput, list[str]]:
    """A sequence, and the text of each of its tokens."""
    config = CoordinatorConfig(theta_url=theta_url, t_url=t_url, top_k=100, support="tail", seed=1)
    async with DualVLLMCoordinator(config) as coordinator:
        print("streamed: ", end="")
        async for chunk in coordinator.generate_stream(PROMPT, t_prompt=T_PROMPT, max_tokens=max_tokens):
            print(chunk.text, end="", flush=True)
        print()
        (output,) = await coordinator.generate_batch(
            [PROMPT], t_prompts=[T_PROMPT], max_tokens=max_tokens, return_diagnostics=True
        )
        speed, mass = coordinator.stats.tokens_per_second, coordinator.stats.decoding.top_k_mass_mean
        print(f"{speed:.1f} tokens/s; the lists of 100 tokens held {mass:.1%} of their model's mass on average")
        return output, [coordinator.tokenizer.decode([token]) for token in output.generated_tokens]


def main() -> None:
    args = parse_args(__doc__)
    with two_servers(args) as servers:
        output, texts = asyncio.run(run(*servers, args.max_tokens))
    print(f"{'position':>8} {'token':>14} {'α':>6} {'KL':>8} {'weight':>8} {'ESS θ/t':>8}")
    rows = zip(
        texts,
        output.alpha_history,
        output.diagnostics["kl_theta"],
        output.importance_weights,
        output.diagnostics["ess_ratio"],
        strict=True,
    )
    for position, (text, alpha, kl, weight, ess) in enumerate(rows):
        print(f"{position:>8} {text!r:>14} {alpha:>6.3f} {kl:>8.4f} {weight:>8.3f} {ess:>8.3f}")
    print(f"largest |KL(q‖π_θ) − KL(q‖π_t)|: {output.diagnostics['kl_diff_max']:.1e} nats")
    plot(output)


def plot(output: GenerationOutput) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: pip install 'dual_rollout[plots]'")
        return
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.step(range(len(output.alpha_history)), output.alpha_history, where="mid")
    axes.set(xlabel="position", ylabel="α", ylim=(0, 1), title="α per token")
    figure.savefig(PLOT, dpi=120)
    print(f"plot: {PLOT}")


if __name__ == "__main__":
    main()
