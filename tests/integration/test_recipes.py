"""Recipes: every shipped one parses and runs, mistakes are named, and both ways to launch one do the same thing."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from datasets import IterableDataset
from trl import GRPOConfig

from dual_rollout import CoordinatorConfig, DualGRPOTrainer
from dual_rollout.training.arguments import parse_recipe
from dual_rollout.training.script import load_data, main, reward_function
from dual_rollout.training.tasks import final_answer
from tests.hang import HANG
from tests.integration.conftest import TinyPair
from tests.qwen_pair import check_rollouts, make_qwen_pair
from tests.report_page import read_page
from tests.warm_servers import WarmServer

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "model_name_or_path" in path.read_text())
QUICKSTART = ROOT / "recipes/quickstart/grpo_cpu.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_parses(path: Path) -> None:
    recipe = parse_recipe(["--config", str(path), "--use_cpu", "true"])
    config = recipe.dual.coordinator_config("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert config.top_k == yaml.safe_load(path.read_text()).get("dual_top_k", 100)


def test_every_argument_of_the_trainer_is_a_key() -> None:
    """And goes to it: those that several keys make are named here."""
    ours = [kind for kind in DualGRPOTrainer.__mro__ if kind.__module__.startswith("dual_rollout")]
    signatures = [inspect.signature(vars(kind)["__init__"]) for kind in ours if "__init__" in vars(kind)]
    parameters = [parameter for signature in signatures for parameter in signature.parameters.values()]
    named = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    options = parse_recipe(["--config", str(QUICKSTART), "--dual_kept_rollouts", "3"]).dual.trainer_options()
    assert {*options, "dual_config", "alpha_schedule"} == named
    assert options["kept_rollouts"] == 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_is_described(path: Path) -> None:
    assert path.name in (path.parent / "README.md").read_text()


FOR_REAL_WORK = [path for path in RECIPES if path.parent.name not in ("quickstart", "native")]


def test_the_uses_there_are_recipes_for() -> None:
    uses = {path.parent.name for path in FOR_REAL_WORK}
    assert uses == {"math", "self_distillation", "alignment", "lora", "two_node"}


@pytest.fixture(scope="module")
def qwen_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyPair]:
    """The math recipe's own pair, whose vocabularies are padded to different sizes."""
    models = make_qwen_pair(tmp_path_factory.mktemp("qwen"))
    flags = ["--max-logprobs", "200", "--max-model-len", "256", "--threads", "1"]
    with WarmServer(models[0], flags) as theta, WarmServer(models[1], flags) as t:
        yield TinyPair(*models, theta.url, t.url)


@pytest.mark.parametrize("options", [{}, {"support": "tail", "missing": "exact"}], ids=["union", "tail"])
def test_rollouts_of_the_math_recipes_pair_are_exact(qwen_pair: TinyPair, options: dict[str, Any]) -> None:
    """α, log q*, both log-probabilities and the weights, by plain forwards; no id that one model lacks is drawn."""
    check_rollouts(qwen_pair.theta_model, qwen_pair.t_model, qwen_pair.theta_url, qwen_pair.t_url, top_k=100, **options)


@pytest.mark.parametrize("path", FOR_REAL_WORK, ids=lambda path: path.parent.name)
def test_a_recipe_runs_two_steps_with_stand_ins(
    path: Path, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Tiny models, a few rows with the dataset's columns, small batches, no GPU; everything else as the recipe says."""
    monkeypatch.chdir(ROOT)
    pair = request.getfixturevalue("qwen_pair") if path.parent.name == "math" else tiny_pair
    recipe = yaml.safe_load(path.read_text())
    recipe |= {
        "model_name_or_path": str(pair.theta_model),
        "dual_t_model_name_or_path": str(pair.t_model),
        "dataset_name": str(rows_like_the_dataset(tmp_path / "rows")),
        "dual_theta_url": pair.theta_url,
        "dual_t_url": pair.t_url,
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    if "reward_model_name_or_path" in recipe:
        recipe["reward_model_name_or_path"] = str(pair.t_model)
    if "dual_weight_sync_dir" in recipe:
        recipe["dual_weight_sync_dir"] = str(tmp_path / "weights")
    if recipe.get("dual_weight_sync") == "lora":  # the run's own servers take adapters
        recipe |= {"dual_theta_url": None, "dual_t_url": None, "dual_server_threads": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    main(["--config", str(tmp_path / "recipe.yaml")])

    entries = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    first, last = entries
    assert 0 < first["sampling/alpha/max"] <= recipe.get("dual_alpha_max", 1.0)
    if "dual_alpha_schedule" in recipe:
        assert last["sampling/alpha/max"] == 0, "its last step is on-policy"
        # The distribution is then π_θ, but for what the lists do not hold.
        assert last["sampling/rollout_weight/mean"] == pytest.approx(1, abs=0.1)
    if not recipe.get("mask_truncated_completions"):
        assert first["sampling/importance_sampling_ratio/max"] <= recipe["dual_importance_sampling_clip_max"]
    assert "sampling/policy_drift/max" not in first or first["sampling/policy_drift/max"] < 0.5  # bfloat16 autocast
    saved = "adapter_model.safetensors" if recipe.get("use_peft") else "model.safetensors"
    assert (tmp_path / "out" / saved).exists()
    assert (tmp_path / "out/checkpoint-2" / saved).exists()
    assert "π_t" in (tmp_path / "out/README.md").read_text()


def rows_like_the_dataset(folder: Path) -> Path:
    """A dataset on disk with the columns of those that the recipes name."""
    folder.mkdir()
    rows = [
        {"prompt": [{"role": "user", "content": f"what is {n} and {n}"}], "solution": f"${2 * n}$"} for n in range(12)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes/accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_accelerate_config_loads(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.to_dict().items() >= {"num_machines": 1, "compute_environment": "LOCAL_MACHINE"}.items()
    stage = {"zero2": 2, "zero3": 3}.get(path.stem)
    if stage is not None:
        assert config.deepspeed_config["zero_stage"] == stage
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    assert config.use_cpu == ("cpu" in path.stem)
    if not config.use_cpu:
        assert re.search("NOT TESTED|Run on", path.read_text()), "each says whether it was run"


def write_recipe(tmp_path: Path, **changes: object) -> str:
    values = {**yaml.safe_load(QUICKSTART.read_text()), **changes}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("dual_topk", "dual_top_k"), ("num_generation", "num_generations"), ("dual_alpha", "dual_alpha_min")],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{wrong}'.*did you mean '{nearest}'"):
        parse_recipe(["--config", write_recipe(tmp_path, **{wrong: 1})])
    with pytest.raises(ValueError, match=f"unknown flag --{wrong}.*did you mean '{nearest}'"):
        parse_recipe(["--config", str(QUICKSTART), f"--{wrong}", "1"])


def test_flags_override_the_recipe(tmp_path: Path) -> None:
    recipe = parse_recipe(["--config", str(QUICKSTART), "--dual_top_k", "7", "--max_steps", "3"])
    config = recipe.dual.coordinator_config("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert (config.top_k, recipe.training.max_steps) == (7, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dual_task": "no_such_task"}, "no_such_task"),
        ({"dual_task_options": '{"min_terms": 9, "max_terms": 2}'}, "dual_task_options"),
        ({"dual_t_prompt_template": "{no_column}"}, "no_column"),
        ({"dataset_name": "some/dataset"}, "exactly one of dual_task and dataset_name"),
        ({"reward_funcs": ["no_such_module.reward"]}, "no_such_module"),
    ],
)
def test_wrong_data_is_named_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(parse_recipe(["--config", write_recipe(tmp_path, **changes)]))


def test_the_target_prompt_is_filled_from_the_columns(tmp_path: Path) -> None:
    dataset, _ = load_data(parse_recipe(["--config", write_recipe(tmp_path, dual_task_size=3)]))
    for row in dataset["train"]:
        assert row["prompt"][-1]["content"] == row["question"]
        assert row["t_prompt"][-1]["content"] == f"{row['question']} (The correct answer is {row['answer']}.)"


def test_a_dataset_is_streamed_where_the_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"prompt": f"what {split} {n}", "answer": n}) + "\n" for n in range(3)]
        (tmp_path / f"data/{split}.jsonl").write_text("".join(lines))
    changes = {"dual_task": None, "dataset_name": str(tmp_path / "data"), "dataset_streaming": True, "max_steps": 2}
    changes |= {"reward_funcs": ["think_format_reward"], "dual_t_prompt_template": "{prompt}: {answer}"}
    changes |= {"dual_eval_rows": 2}
    dataset, _ = load_data(parse_recipe(["--config", write_recipe(tmp_path, **changes)]))
    assert list(dataset) == ["train", "test"]
    for split, count in (("train", 3), ("test", 2)):
        assert isinstance(dataset[split], IterableDataset)
        assert [row["t_prompt"] for row in dataset[split]] == [f"what {split} {n}: {n}" for n in range(count)]
    for more, named in (
        ({"max_steps": -1}, "set max_steps"),
        ({"dual_t_prompt_template": "{solution}"}, "'solution' is none of"),
        ({"dual_task": "chain_sum", "dataset_name": None}, "leave it out with dual_task"),
    ):
        with pytest.raises(ValueError, match=named):
            load_data(parse_recipe(["--config", write_recipe(tmp_path, **{**changes, **more})]))


def test_a_reward_may_import_its_neighbours_when_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dotted name is looked for in the current folder first, as under `python -m`, and so is what it imports."""
    source = (
        "def score(completions, **_):\n    import late_neighbour\n    return [late_neighbour.VALUE] * len(completions)"
    )
    (tmp_path / "late_reward.py").write_text(source)
    (tmp_path / "late_neighbour.py").write_text("VALUE = 7.0\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    assert reward_function("late_reward.score")(["a", "b"]) == [7.0, 7.0]
    with pytest.raises(ValueError, match=rf"'no_such.reward', looked for in {tmp_path} first"):
        reward_function("no_such.reward")


@pytest.mark.parametrize(
    ("text", "answer"),
    [("It is 3 + 4 = 7.", "7"), ("<answer> x </answer> 9", "x"), ("no idea ", "no idea"), ("so -2.5", "-2.5")],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_both_ways_to_launch_do_the_same(tmp_path: Path, tiny_pair: TinyPair) -> None:
    """The first with servers of its own, as `make demo` runs the second."""
    launchers = {
        "train": [sys.executable, "-m", "dual_rollout.cli", "train"],
        "accelerate": [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(ROOT / "recipes/accelerate_configs/one_cpu.yaml")),
            *("-m", "dual_rollout.training.script", "--config"),
        ],
    }
    servers = {"train": {}, "accelerate": {"dual_theta_url": tiny_pair.theta_url, "dual_t_url": tiny_pair.t_url}}
    rewards, tables = {}, {}
    for name, launcher in launchers.items():
        folder = tmp_path / name
        recipe = write_recipe(
            tmp_path,
            model_name_or_path=str(tiny_pair.theta_model),
            dual_t_model_name_or_path=str(tiny_pair.t_model),
            **servers[name],
            dual_top_k=20,
            dual_seed=5,
            output_dir=str(folder),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=5,
            dual_eval_rows=3,
            num_generations_eval=2,
            per_device_eval_batch_size=2,
        )
        done = subprocess.run([*launcher, recipe], capture_output=True, text=True, timeout=HANG, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in entries] == [0, 1, 2, 2], "evaluated before and after"
        assert [entry["eval_reward_rows"] for entry in entries if "eval_reward" in entry] == [3, 3]
        rewards[name] = [entry[key] for entry in entries[1:3] for key in ("reward", "sampling/alpha/mean", "loss")]
        tables[name] = done.stdout
        assert (folder / "model.safetensors").exists()
    assert rewards["train"] == pytest.approx(rewards["accelerate"], abs=1e-4)
    for label in ("reward", "α mean", "weight π_θ/q* mean", "ESS ratio", "tokens/s", "rollout, s", "update, s"):
        assert label in tables["train"]
    for words in ("on 3 held-out rows", "after    0 steps  reward", "show no difference"):
        assert words in tables["train"]
    page = read_page(tmp_path / "train/report.html")
    assert f"Its rollouts, token by token: {tmp_path / 'train/report.html'}" in tables["train"]
    assert page.data["found"] == 8 and len(page.data["steps"]) == 4


@pytest.mark.parametrize(
    ("flags", "bf16"),
    [([], False), (["--bf16", "true"], True), (["--bf16=false"], False)],
)
def test_a_cpu_computes_in_float32_unless_the_recipe_says_otherwise(
    tmp_path: Path, flags: list[str], bf16: bool
) -> None:
    """transformers' advice for a machine without a GPU is use_cpu, which leaves TRL's bf16 on."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: x\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\n")
    assert parse_recipe(["--config", str(recipe), *flags]).training.bf16 is bf16
    if flags == []:
        recipe.write_text(recipe.read_text() + "bf16: true\n")
        assert parse_recipe(["--config", str(recipe)]).training.bf16 is True


def test_bf16_on_a_cpu_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bf16=False"):
        DualGRPOTrainer(
            model="no such model",
            reward_funcs=len,
            args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            dual_config=CoordinatorConfig(),
        )
