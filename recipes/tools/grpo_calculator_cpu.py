"""GRPO with a calculator on two CPU cores: every turn is drawn from q*, and only π_t is told what to call.

python recipes/tools/grpo_calculator_cpu.py [--model MODEL] [--max-steps 4] [--output-dir outputs/calculator]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig
from trl.chat_template_utils import qwen3_instruct_2507_chat_template

from dual_rollout import CoordinatorConfig, DualGRPOTrainer
from dual_rollout.server.launch import EmbeddedServer


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


EXAMPLES = [(17, 23), (45, 61), (38, 74)]


def questions(count: int) -> Dataset:
    """Both prompts begin with sums that were done with the tool; `t_prompt` says what to call and what comes."""
    numbers, rows = random.Random(0), []
    for _ in range(count):
        a, b = numbers.randint(12, 99), numbers.randint(12, 99)
        rows.append({"prompt": _prompt(a, b, _question), "t_prompt": _prompt(a, b, _told), "product": a * b})
    return Dataset.from_list(rows)


def _prompt(a: int, b: int, ask: Callable[[int, int], str]) -> list[dict[str, Any]]:
    examples = [message for pair in EXAMPLES for message in [_user(ask(*pair)), *_answer(*pair)]]
    return [*examples, _user(ask(a, b))]


def _question(a: int, b: int) -> str:
    return f"What is {a} times {b}?"


def _told(a: int, b: int) -> str:
    return f"{_question(a, b)} (Call multiply with a={a} and b={b}. It gives {a * b}.)"


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(a: int, b: int) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": a, "b": b}}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": str(a * b)},
        {"role": "assistant", "content": f"{a} times {b} is {a * b}."},
    ]


def called_and_answered(completions: list[list[dict[str, Any]]], product: list[int], **_: Any) -> list[float]:
    """½ for a call that returned the product, and ½ for an answer that has it."""
    rewards = []
    for messages, right in zip(completions, product, strict=True):
        said = {role: [str(m.get("content")) for m in messages if m["role"] == role] for role in ("tool", "assistant")}
        rewards.append(0.5 * (str(right) in said["tool"]) + 0.5 * any(str(right) in text for text in said["assistant"]))
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="outputs/models/SmolLM2-135M-Instruct")
    parser.add_argument("--max-steps", type=int, default=4)
    parser.add_argument("--max-completion-length", type=int, default=96)
    parser.add_argument("--output-dir", default="outputs/calculator")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = qwen3_instruct_2507_chat_template  # ChatML, as the model's own, with tools
    args = GRPOConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=options.max_completion_length,
        max_tool_calling_iterations=2,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        log_completions=True,
        num_completions_to_print=2,
    )
    flags = ["--max-logprobs", "100", "--threads", "1"]
    with EmbeddedServer(options.model, flags) as theta, EmbeddedServer(options.model, flags) as t:
        trainer = DualGRPOTrainer(
            model=options.model,
            processing_class=tokenizer,
            tools=[multiply],
            reward_funcs=called_and_answered,
            args=args,
            train_dataset=questions(64),
            dual_config=CoordinatorConfig(theta_url=theta.url, t_url=t.url, top_k=100, support="tail", seed=0),
        )
        with trainer.rollout:
            trainer.train()
    if trainer.accelerator.is_main_process:
        print(trainer.metrics_log.table())


if __name__ == "__main__":
    main()
