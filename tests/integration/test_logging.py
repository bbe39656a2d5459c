"""What a run tells: metrics by their names, to every reporter and to metrics.jsonl; completions; the model card."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from transformers import TrainerCallback

from dual_rollout import CoordinatorConfig, DualGRPOTrainer
from dual_rollout.report.page import write_report
from dual_rollout.training.metrics_log import MetricsLog
from dual_rollout.training.schedules import AlphaSchedule
from dual_rollout.training.trackers import BINS
from tests.integration.conftest import TinyPair
from tests.integration.test_training import chat_dataset, count_of_the, dual_config, grpo_config
from tests.report_page import read_page

NAMES = {
    *(f"sampling/importance_sampling_ratio/{reduce}" for reduce in ("min", "mean", "max")),
    *(f"sampling/alpha/{reduce}" for reduce in ("min", "mean", "max")),
    "sampling/kl_residual/max",
    "sampling/top_k_mass/min",
    "sampling/top_k_mass/mean",
    "sampling/effective_sample_size_ratio",
    "spec_decode/acceptance_rate",
    "rollout/tokens_per_second",
    "rollout/retry_total",
    "perf/weight_sync_s",
}
SECRET = "key-that-nobody-may-see"


class Reporter(TrainerCallback):
    """Stands where the callbacks of wandb, trackio and tensorboard stand."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))


@dataclass
class Run:
    folder: Path
    reporter: Reporter
    entries: list[dict[str, Any]]
    columns: list[dict[str, Any]]
    report: MetricsLog


class SlowOptimizer(TrainerCallback):
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)


@pytest.fixture(scope="module")
def run(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps with an evaluation after the second."""
    folder, columns = tmp_path_factory.mktemp("logging"), []

    def reward(completions: list[Any], **given: Any) -> list[float]:
        columns.append({**given, "completions": completions})
        return count_of_the(completions)

    args = grpo_config(
        folder,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        log_completions=True,
        report_to=["tensorboard"],
    )
    config = dual_config(tiny_pair, decoding="block", alpha_method="kl_budget", kl_budget=0.1)
    trainer = DualGRPOTrainer(
        model=str(tiny_pair.theta_model),
        reward_funcs=reward,
        args=args,
        train_dataset=chat_dataset(with_t_prompts=True),
        eval_dataset=chat_dataset(with_t_prompts=True),
        dual_config=config,
        importance_sampling_mode="token_mask",
        importance_sampling_clip_min=0.1,
        alpha_schedule=AlphaSchedule(shape="linear", kl_budget_end=0.02),
        kept_rollouts=3,
    )
    reporter = Reporter()
    trainer.add_callback(reporter)
    trainer.add_callback(SlowOptimizer())
    with pytest.MonkeyPatch.context() as patch, trainer.rollout:
        patch.setenv("DUAL_ROLLOUT_API_KEY", SECRET)
        trainer.train()
        trainer.create_model_card(model_name="a-model")
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(folder, reporter, entries, columns, trainer.metrics_log)


def test_every_name_reaches_the_reporters_at_every_step(run: Run) -> None:
    steps = [logs for _, logs in run.reporter.logs if "loss" in logs]
    assert len(steps) == 2
    for logs in steps:
        assert logs.keys() >= NAMES
        assert all(math.isfinite(logs[name]) for name in NAMES)
        assert 0 < logs["spec_decode/acceptance_rate"] <= 1
        assert logs["rollout/retry_total"] == 0
        assert logs["perf/update_s"] > 0.3, "the optimizer's step is part of an update"
    assert [logs["sampling/kl_budget"] for logs in steps] == pytest.approx([0.1, 0.02])


def test_an_evaluation_logs_its_own(run: Run) -> None:
    (evaluation,) = [logs for _, logs in run.reporter.logs if "eval_loss" in logs]
    # It is of the policy alone, so that nothing is known of a target, and nothing drafted for one.
    absent = {"sampling/kl_residual/max", "sampling/top_k_mass/min", "sampling/top_k_mass/mean"}
    absent |= {"spec_decode/acceptance_rate", "perf/weight_sync_s"}
    assert evaluation.keys() >= {f"eval_{name}" for name in NAMES - absent}
    assert evaluation["eval_sampling/alpha/max"] == 0
    assert not evaluation.keys() & NAMES


def test_metrics_jsonl_has_all_of_it(run: Run) -> None:
    logged = [(step, logs) for step, logs in run.reporter.logs if "loss" in logs or "eval_loss" in logs]
    assert [entry["step"] for entry in run.entries] == [1, 2, 2]
    for entry, (step, logs) in zip(run.entries, logged, strict=True):
        assert entry.pop("step") == step
        assert {name: entry[name] for name in logs} == logs
    assert "reward" in run.report.table()


def test_tensorboard_gets_them(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = run.folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert set(accumulator.Tags()["scalars"]) >= {f"train/{name}" for name in NAMES}


def test_tensorboard_gets_histograms_and_texts(run: Run) -> None:
    """Of the tokens that the reward functions were given."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = run.folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events), size_guidance={"histograms": 0, "tensors": 0})
    accumulator.Reload()
    for name, bounds in BINS.items():
        found = accumulator.Histograms(f"train/{name}")
        assert [event.step for event in found] == [1, 2]
        for event, given in zip(found, run.columns, strict=False):
            values = np.concatenate([np.asarray(row) for row in given["alpha"]])
            if "weight" in name:
                values = np.log(np.concatenate([np.asarray(row) for row in given["importance_weights"]]))
            expected = dict(zip(bounds[1:], np.histogram(values, bounds)[0], strict=True))
            counts = dict(zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True))
            assert {edge: count for edge, count in counts.items() if count} == pytest.approx(
                {edge: count for edge, count in expected.items() if count}
            )
            assert event.histogram_value.num == len(values) > 0
    texts = [event for event in accumulator.Tensors("train/completions/text_summary") if event.step == 1]
    table = texts[0].tensor_proto.string_val[0].decode("utf-8", "replace")
    assert table.startswith("| prompt | completion | reward |") and "| alpha | importance_weight | advantage |" in table
    for prompt in run.columns[0]["prompts"]:
        assert f"| user: {prompt[0]['content']} |" in table
    assert table.count("\n") == 1 + len(run.columns[0]["prompts"])


def test_logged_completions_show_alpha_and_weight(run: Run) -> None:
    table = pd.read_parquet(run.folder / "completions/completions_00001.parquet")
    given = run.columns[0]
    for column, name in (("alpha", "alpha"), ("importance_weight", "importance_weights")):
        assert list(table[column]) == pytest.approx([sum(row) / len(row) for row in given[name]], abs=1e-3)


def test_a_step_keeps_some_rollouts_for_the_report(run: Run) -> None:
    """What the reward functions were given, and what they gave; not of the evaluation."""
    assert [path.name for path in sorted((run.folder / "rollouts").iterdir())] == [
        "rollouts_00001.parquet",
        "rollouts_00002.parquet",
    ]
    for step, given in ((1, run.columns[0]), (2, run.columns[1])):
        kept = pd.read_parquet(run.folder / f"rollouts/rollouts_{step:05d}.parquet").to_dict("list")
        assert len(kept["reward"]) == 3 < len(given["prompts"]), "no more than kept_rollouts"
        assert kept["reward"] == count_of_the(given["completions"])[:3]
        groups = np.reshape(count_of_the(given["completions"]), (-1, 2))  # of num_generations
        raw = (groups - groups.mean(axis=1, keepdims=True)) / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)
        assert kept["advantage"] == pytest.approx(raw.ravel()[:3].tolist(), rel=1e-4), "without the weights"
        for row in range(3):
            assert list(kept["generated_tokens"][row]) == given["completion_ids"][row]
            assert kept["prompt"][row] == f"user: {given['prompts'][row][0]['content']}"
            assert kept["t_prompt"][row] == f"{kept['prompt'][row]} is the assistant"
            for column, name in (("alpha_history", "alpha"), ("importance_weights", "importance_weights")):
                assert list(kept[column][row]) == pytest.approx(given[name][row], rel=1e-6)
            assert all(0 <= value <= 0.11 for value in kept["kl_theta"][row]), "the budget"
            assert kept["accepted_tokens"][row] <= min(kept["draft_tokens"][row], len(kept["generated_tokens"][row]))
        assert min(kept["draft_tokens"]) > 0 < sum(kept["accepted_tokens"]), "block decoding was asked for"


def test_the_report_is_of_them(run: Run, tmp_path: Path) -> None:
    source = write_report([run.folder], tmp_path / "report.html")
    assert source.found == 6 and [entry["step"] for entry in source.steps] == [1, 2, 2]
    page, given = read_page(tmp_path / "report.html"), run.columns[0]
    assert page.ids[:3] == given["completion_ids"][:3]
    shown, said = "".join(page.texts[0]), given["completions"][0][0]["content"]
    counted = [rollout["draft_tokens"] for rollout in page.data["rollouts"]]
    assert len(counted) == 6 and all(counted)
    assert re.sub("[‥\N{REPLACEMENT CHARACTER}]", "", shown).startswith(re.sub("\N{REPLACEMENT CHARACTER}", "", said))


def test_reward_functions_get_alpha_weights_and_logprobs(run: Run) -> None:
    given = run.columns[0]
    for i, ids in enumerate(given["completion_ids"]):
        for name in ("alpha", "importance_weights", "logprobs_q", "logprobs_theta", "logprobs_t"):
            assert len(given[name][i]) == len(ids)
        for weight, theta, q in zip(
            given["importance_weights"][i], given["logprobs_theta"][i], given["logprobs_q"][i], strict=True
        ):
            assert weight == pytest.approx(math.exp(theta - q), rel=1e-4)
        assert given["weight_version"][i] == 0


def test_the_model_card_names_method_and_settings(run: Run, tiny_pair: TinyPair) -> None:
    card = (run.folder / "README.md").read_text()
    section = card[card.index("### Rollouts") : card.index("### Framework versions")]
    assert "q^*(y)" in section
    for row in (
        "| policy π_θ | theta |",
        "| target π_t | t, which saw prompts of its own |",
        "| servers | two embedded servers |",
        "| `alpha_method` | kl_budget |",
        "| `kl_budget` | 0.1 to 0.02, linear over the training steps |",
        "| `support` | union |",
        "| `decoding` | block |",
        "| `top_k` | 20 |",
        "| weights π_θ/q\\* in the loss | token_mask, bounds 0.1 and 3 |",
    ):
        assert row in section
    assert "dual_rollout" in card.split("---")[1], "a tag"
    for secret in (SECRET, tiny_pair.theta_url, tiny_pair.t_url, "127.0.0.1", str(tiny_pair.theta_model.parent)):
        assert secret not in card


def test_a_card_is_written_when_servers_do_not_answer(tiny_models: tuple[Path, Path], tmp_path: Path) -> None:
    """And it names the targets that rows name, not those that could be named."""

    def section(targets: list[str | None] | None) -> str:
        rows: dict[str, Any] = {"prompt": ["a", "b", "c"], **({} if targets is None else {"t_target": targets})}
        nobody = {f"x{i}": f"http://127.0.0.1:{i}" for i in (3, 4)}
        config = CoordinatorConfig(
            theta_url="http://127.0.0.1:1", t_url="http://127.0.0.1:2", targets=nobody, max_retries=0
        )
        trainer = DualGRPOTrainer(
            model=str(tiny_models[0]),
            reward_funcs=count_of_the,
            args=grpo_config(tmp_path),
            train_dataset=Dataset.from_dict(rows),
            dual_config=config,
        )
        with trainer.rollout:
            trainer.create_model_card(model_name="a-model")
        return (tmp_path / "README.md").read_text()

    assert "| policy π_θ | unknown |\n| target π_t | unknown |\n| servers" in section(None)
    routed = section(["x4", "none", "x4"])
    assert "| target π_t | none but those that rows name |" in routed
    assert "| further targets | x4 |" in routed and "| rows without a target | drawn from π_θ |" in routed


def test_evaluations_of_several_datasets_are_kept(tmp_path: Path) -> None:
    report = MetricsLog(tmp_path / "out")
    report.on_log(None, State(step=0), None, {"eval_first_loss": 0.5, "eval_reward": 1.0})  # before any training
    report.on_log(None, State(step=0), None, {"eval_second_loss": 0.25, "eval_reward": 2.0})
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["eval_reward"] for line in lines] == [1.0, 2.0]


def test_the_table_and_file_of_steps_without_a_rollout(tmp_path: Path) -> None:
    """With several updates per rollout most steps have no reward of their own."""
    report, state = MetricsLog(tmp_path), State(step=1)
    report.on_train_begin(None, State(step=0), None)
    report.on_log(None, state, None, {"loss": 0.5, "reward": 1.0})
    report.on_log(None, State(step=2), None, {"loss": 0.25, "reward": None})
    report.on_log(None, State(step=2), None, {"train_runtime": 3.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert "1.000" in report.table()


@dataclass
class State:
    step: int
    is_world_process_zero: bool = True

    @property
    def global_step(self) -> int:
        return self.step
