"""Short GRPO runs that look at π_θ's server after every weight sync; for embedded and for real servers."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from dual_rollout import DualGRPOTrainer
from dual_rollout.training.connections import ADAPTER_NAME
from tests.hang import HANG
from tests.integration.conftest import TinyPair
from tests.integration.test_training import chat_dataset, count_of_the, dual_config, grpo_config

PROMPTS = [[10, 20, 30], [200, 7], list(range(40, 90))]


def lora_config(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)


def post(url: str, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=HANG) as answer:
        return json.load(answer)


def served_models(url: str) -> list[str]:
    with urllib.request.urlopen(url + "/v1/models", timeout=HANG) as answer:
        return [card["id"] for card in json.load(answer)["data"]]


def served(url: str, model: str | None = None, k: int = 50) -> list[dict[int, float]]:
    """The k log-probabilities after each of `PROMPTS`, by token id, of the base model or of an adapter."""
    options = {"max_tokens": 1, "logprobs": k, "temperature": 0.0, "return_tokens_as_token_ids": True}
    body = {"model": model or served_models(url)[0], "prompt": PROMPTS, **options}
    rows = [choice["logprobs"]["top_logprobs"][0] for choice in post(url, "/v1/completions", body)["choices"]]
    return [{int(token.removeprefix("token_id:")): value for token, value in row.items()} for row in rows]


def largest_error(rows: list[dict[int, float]], model: Any) -> float:
    """Between served log-probabilities and those of a model in this process."""
    errors = []
    for prompt, row in zip(PROMPTS, rows, strict=True):
        with torch.no_grad():
            logprobs_V = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        errors += [abs(logprobs_V[token].item() - value) for token, value in row.items()]
    return max(errors)


def distance(rows: list[dict[int, float]], others: list[dict[int, float]]) -> float:
    """The largest difference between served log-probabilities of the same tokens."""
    both = zip(rows, others, strict=True)
    return max(abs(row[token] - other[token]) for row, other in both for token in row.keys() & other.keys())


class Synced(DualGRPOTrainer):
    """Keeps, for every sync, how far the served log-probabilities are from the trainer's right after it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.errors: list[float] = []
        self.versions: list[list[int | None]] = []

    def _generate(self, prompts: Any) -> Any:
        output = super()._generate(prompts)
        config = self.rollout.config
        adapter = ADAPTER_NAME if ADAPTER_NAME in served_models(config.theta_url) else None
        self.model.eval()
        self.errors.append(largest_error(served(config.theta_url, adapter), self.model))
        self.model.train()
        self.versions.append(self._rollout_columns["weight_version"])
        return output


def train(pair: TinyPair, folder: Path, peft_config: Any = None, **options: Any) -> Synced:
    trainer = Synced(
        model=str(pair.theta_model),
        reward_funcs=count_of_the,
        args=grpo_config(folder, max_steps=3, learning_rate=3e-2),
        train_dataset=chat_dataset(),
        dual_config=dual_config(pair),
        peft_config=peft_config,
        **options,
    )
    with trainer.rollout:
        trainer.train()
        assert trainer.rollout._open().tokenizer is trainer.processing_class, "not one from the server's folder"
    return trainer
