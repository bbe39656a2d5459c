"""The Python of the documents runs as it stands there, with tiny models and this machine's servers."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from tests.documents import PAGES, ROOT, blocks
from tests.integration.conftest import TinyPair
from tests.integration.test_distillation import distillation_config
from tests.integration.test_training import chat_dataset

RUN_ELSEWHERE = {
    ("README.md", "DualGRPOTrainer"): "test_readme.py",
    ("README.md", "DualVLLMCoordinator"): "test_readme.py",
    ("docs/api.md", "coordinator.generate_batch"): "a sketch with `...` in the place of URLs",
    ("docs/generate.md", "ray.remote"): "Ray is not installed; its commands are those of test_generate.py",
    ("docs/native.md", "DualVLLMCoordinator"): "needs vLLM: tests/vllm/test_native.py",
    ("docs/native.md", "GRPOConfig"): "needs vLLM: tests/vllm/test_native.py",
    ("docs/training.md", "DualAsyncGRPOTrainer"): "test_async_trainer.py",
    ("docs/training.md", "DualGRPOTrainer"): "tools: test_tools.py",
}
SNIPPETS = {(page.relative_to(ROOT).as_posix(), text) for page in PAGES for text in blocks(page, "python")}


def snippet(page: str, name: str) -> str:
    """The only one of a page that names something."""
    (found,) = [text for where, text in SNIPPETS if where == page and name in text]
    return found


def run(source: str, **names: Any) -> dict[str, Any]:
    """Run a snippet with what its page takes for granted; returns its names."""
    exec(compile(source, "a document", "exec"), names)
    return names


def test_a_dataset_gets_the_column_of_the_target() -> None:
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "3?"}]], "question": ["3?"], "answer": ["7"]})
    made = run(snippet("docs/training.md", "with_t_prompts"), dataset=rows)["dataset"][0]["t_prompt"]
    assert [turn["content"] for turn in made] == ["You know that the answer is 7.", "3? (The correct answer is 7.)"]


def test_a_student_is_distilled(tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = snippet("docs/distillation.md", "DualDistillationTrainer")
    for name, model in (("0.5B", tiny_pair.theta_model), ("3B", tiny_pair.t_model)):
        source = source.replace(f"Qwen/Qwen2.5-{name}-Instruct", str(model))
    monkeypatch.setattr(trl, "DistillationConfig", lambda _: distillation_config(tmp_path, max_steps=1))
    urls = {"STUDENT": tiny_pair.theta_url, "TEACHER": tiny_pair.t_url}
    trainer = run(source, dataset=chat_dataset(), **urls)["trainer"]
    with trainer.rollout:
        trainer.train()
    assert trainer.metrics_log.table() and (tmp_path / "metrics.jsonl").stat().st_size > 0


def test_sequences_come_as_they_finish(tiny_pair: TinyPair) -> None:
    async def texts() -> list[str]:
        config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=20)
        found: list[str] = []
        source = snippet("docs/generate.md", "generate_iter").replace(
            "    ...", "    found.append(output.generated_text)"
        )
        source = source.replace("max_tokens=256", "max_tokens=4")
        async with DualVLLMCoordinator(config) as coordinator:
            code = compile(source, "a document", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            await eval(code, {"coordinator": coordinator, "prompts": ["what is", "the user"], "found": found})
        return found

    assert len(asyncio.run(texts())) == 2


def test_each_snippet_is_run_here_or_elsewhere() -> None:
    here = {("docs/training.md", "with_t_prompts"), ("docs/distillation.md", "DualDistillationTrainer")}
    here |= {("docs/generate.md", "generate_iter")}
    assert {(page, snippet(page, name)) for page, name in here | {*RUN_ELSEWHERE}} == SNIPPETS
