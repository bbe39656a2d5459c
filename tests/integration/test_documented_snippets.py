"""The Python of the documents runs as it stands there, with tiny models and this machine's servers."""

from __future__ import annotations

import ast
import asyncio
import functools
from pathlib import Path

import pytest
import trl
from datasets import Dataset

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator
from dual_rollout.training.trl_settings import check_training_args
from tests.documents import PAGES, ROOT, blocks, run_snippet, snippet
from tests.integration.conftest import TinyPair
from tests.integration.test_distillation import distillation_config
from tests.integration.test_training import chat_dataset

RUN_ELSEWHERE = {
    ("README.md", "DualGRPOTrainer"): "test_readme.py",
    ("README.md", "DualVLLMCoordinator"): "test_readme.py",
    ("docs/generate.md", "ray.remote"): "Ray is not installed; its commands are those of test_generate.py",
    ("docs/native.md", "DualVLLMCoordinator"): "needs vLLM: tests/vllm/test_pairs.py",
    ("docs/training.md", "DualAsyncGRPOTrainer"): "test_async_trainer.py",
    ("docs/training.md", "tools="): "test_tools.py",
}
SNIPPETS = {(page.relative_to(ROOT).as_posix(), text) for page in PAGES for text in blocks(page, "python")}


def test_a_dataset_gets_the_column_of_the_target() -> None:
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "3?"}]], "question": ["3?"], "answer": ["7"]})
    made = run_snippet(snippet("docs/training.md", "with_t_prompts"), dataset=rows)["dataset"][0]["t_prompt"]
    assert [turn["content"] for turn in made] == ["You know that the answer is 7.", "3? (The correct answer is 7.)"]


def test_a_student_is_distilled(tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = snippet("docs/distillation.md", "DualDistillationTrainer")
    for name, model in (("0.5B", tiny_pair.theta_model), ("3B", tiny_pair.t_model)):
        source = source.replace(f"Qwen/Qwen2.5-{name}-Instruct", str(model))
    monkeypatch.setattr(trl, "DistillationConfig", lambda _: distillation_config(tmp_path, max_steps=1))
    urls = {"STUDENT": tiny_pair.theta_url, "TEACHER": tiny_pair.t_url}
    trainer = run_snippet(source, dataset=chat_dataset(), **urls)["trainer"]
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


def test_the_sketch_of_the_api(tiny_pair: TinyPair) -> None:
    source = snippet("docs/api.md", "coordinator.generate_batch")
    for name, url in (("theta_url", tiny_pair.theta_url), ("t_url", tiny_pair.t_url)):
        source = source.replace(f"({name}=...", f"({name}={url!r}").replace(f" {name}=...", f" {name}={url!r}")
    names = {"CoordinatorConfig": CoordinatorConfig, "DualVLLMCoordinator": DualVLLMCoordinator}
    (output,) = run_snippet(source, **names)["outputs"]
    assert output.error is None and output.generated_tokens


def test_the_settings_for_a_native_server_are_taken(tmp_path: Path) -> None:
    """And TRL's own are not."""
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    source = f"args = {snippet('docs/native.md', 'GRPOConfig')}"
    check_training_args(run_snippet(source, GRPOConfig=functools.partial(trl.GRPOConfig, **plain))["args"])
    without = "\n".join(line for line in source.splitlines() if "importance" not in line)
    with pytest.raises(ValueError, match='set it to "token_truncate"'):
        check_training_args(run_snippet(without, GRPOConfig=functools.partial(trl.GRPOConfig, **plain))["args"])


def test_each_snippet_is_run_here_or_elsewhere() -> None:
    here = {("docs/training.md", "with_t_prompts"), ("docs/distillation.md", "DualDistillationTrainer")}
    here |= {("docs/generate.md", "generate_iter"), ("docs/api.md", "coordinator.generate_batch")}
    here |= {("docs/native.md", "GRPOConfig")}
    assert {(page, snippet(page, name)) for page, name in here | {*RUN_ELSEWHERE}} == SNIPPETS
