"""The models, and their examination on held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.evidence.sampler import PairSampler, Samples
from recipes.evidence.tasks import Task


def load_model(folder: Path) -> Any:
    """A causal model in float32, on the GPU where there is one (its matrix products in TF32)."""
    torch.set_float32_matmul_precision("high")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def prompt_ids(tokenizer: Any, questions: Sequence[str]) -> list[list[int]]:
    return chat_ids(tokenizer, [[{"role": "user", "content": question}] for question in questions])


def chat_ids(tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Chat messages as the model reads them."""
    return [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]


class Examiner:
    """Held-out questions of a task, put to the policy alone."""

    def __init__(self, task: Task, tokenizer: Any, questions: int):
        rows, self._reward = task.held_out_rows()
        self._rows = rows.select(range(questions))
        self._tokenizer = tokenizer
        self.prompts = chat_ids(tokenizer, self._rows["prompt"])

    def examine(self, sampler: PairSampler, seed: int, *, draws: int = 1) -> dict[str, float]:
        """Success on the questions, each answered greedily and by `draws` samples at temperature 1.

        Returns:
            `greedy` and `sampled`: shares that are right; `ever`: share of questions that any sample answers; `length`:
            mean tokens of a sample.
        """
        greedy = self._score(sampler.generate(self.prompts, method="policy", greedy=True))
        samples = [sampler.generate(self.prompts, method="policy", seed=seed + draw) for draw in range(draws)]
        right = torch.stack([self._score(drawn) for drawn in samples])
        lengths = torch.stack([drawn.batch.completion_mask.sum(dim=1) for drawn in samples])
        return {
            "greedy": greedy.mean().item(),
            "sampled": right.mean().item(),
            "ever": right.amax(dim=0).mean().item(),
            "length": lengths.float().mean().item(),
        }

    def _score(self, samples: Samples) -> torch.Tensor:
        texts = self._tokenizer.batch_decode(samples.batch.completion_ids, skip_special_tokens=True)
        return torch.tensor(self._reward(texts, self._rows["task_index"]))
