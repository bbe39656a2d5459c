"""What `top_k: auto` saves: bytes, list lengths and covered mass, by the fixed and the adaptive way.

    python -m tests.bench_lists [--max-logprobs 200] [--decoding block] [100 auto:0.9 ...]

Two embedded servers of one model; π_t sees each question with its answer. Counts, not timings: they do not depend on
what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from dual_rollout.server.launch import EmbeddedServer

QUESTIONS = [
    ("How much is 17 + 25? Think step by step.", "It is 42."),
    ("What is the capital of France?", "It is Paris."),
    ("Explain why the sky is blue.", "Air scatters short waves of light more than long ones."),
    ("Repeat this sentence word by word: The quick brown fox jumps over the lazy dog.", "It is a pangram."),
    ("Count from one to ten.", "One, two, three, four, five, six, seven, eight, nine, ten."),
    ("Write a short story about a dog.", "The dog is called Rex and finds a bone."),
    ("What causes tides?", "The Moon's gravity, and the Sun's."),
    ("Give three pieces of advice for a job interview.", "Prepare, listen, ask questions."),
]
WAYS = ["20", "100", "200", "1000", "auto:0.9", "auto:0.95", "auto:0.99"]


async def measure(theta: str, t: str, way: str, args: argparse.Namespace) -> None:
    k, _, mass = way.partition(":")
    options: dict[str, Any] = {"top_k": "auto", "top_k_mass": float(mass)} if mass else {"top_k": int(k)}
    config = CoordinatorConfig(theta_url=theta, t_url=t, support="tail", decoding=args.decoding, seed=0, **options)
    prompts = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
    t_prompts = [[{"role": "user", "content": f"{question} ({answer})"}] for question, answer in QUESTIONS]
    async with DualVLLMCoordinator(config) as coordinator:
        await coordinator.generate_batch(prompts, t_prompts=t_prompts, max_tokens=1)  # with what is asked once
        stats = coordinator.stats
        start = (stats.theta.bytes_received + stats.t.bytes_received, stats.decoding.tokens)
        outputs = await coordinator.generate_batch(
            prompts, t_prompts=t_prompts, max_tokens=args.max_tokens, return_diagnostics=True
        )
    assert all(output.error is None for output in outputs)
    masses = [mass for o in outputs for mass in o.diagnostics["coverage_theta"]]  # type: ignore[union-attr]
    tokens = stats.decoding.tokens - start[1]
    kilobytes = (stats.theta.bytes_received + stats.t.bytes_received - start[0]) / tokens / 1000
    d = stats.decoding
    print(
        f"| {way} | {d.top_k_mean:.0f} | {d.received_tokens / (2 * d.positions):.0f} | {kilobytes:.1f} | "
        f"{sum(masses) / len(masses):.3f} | {sum(m < 0.9 for m in masses) / len(masses):.2f} | "
        f"{d.tail_tokens / d.tokens:.3f} | {d.repeated_lists / (2 * d.positions):.2f} |",
        flush=True,
    )


async def run(args: argparse.Namespace) -> None:
    flags = ["--max-logprobs", str(args.max_logprobs), "--max-model-len", "512", "--threads", "1"]
    with EmbeddedServer(args.model, flags) as theta, EmbeddedServer(args.model, flags) as t:
        print("| top_k | listed | received | KB/token | mass | mass < 0.9 | tail tokens | asked again |")
        print("|---|---|---|---|---|---|---|---|")
        for way in args.ways or WAYS:
            await measure(theta.url, t.url, way, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", help="top_k, or auto:<top_k_mass>")
    parser.add_argument("--max-logprobs", type=int, default=1000)
    parser.add_argument("--model", default="outputs/models/SmolLM2-135M-Instruct")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--decoding", choices=("lockstep", "block"), default="lockstep")
    asyncio.run(run(parser.parse_args()))
