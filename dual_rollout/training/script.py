"""Train with a recipe: `accelerate launch -m dual_rollout.training.script --config RECIPE.yaml`.

Without server URLs in the recipe, two embedded servers are started for the run and stopped after it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict, load_dataset
from trl import get_peft_config, get_quantization_config

from dual_rollout.server.launch import EmbeddedServer
from dual_rollout.training.arguments import DualArguments, Recipe, parse_recipe
from dual_rollout.training.report import RunReport
from dual_rollout.training.tasks import load_task
from dual_rollout.training.trainer import T_PROMPT_COLUMN, DualGRPOTrainer


def main(argv: list[str] | None = None) -> None:
    """Run the recipe named in `argv` to its end."""
    recipe = parse_recipe(sys.argv[1:] if argv is None else argv)
    dataset, reward_funcs = load_data(recipe)
    model_init_kwargs: Any = recipe.training.model_init_kwargs or {}
    recipe.training.model_init_kwargs = {
        "revision": recipe.model.model_revision,
        "attn_implementation": recipe.model.attn_implementation,
        "dtype": recipe.model.dtype,
        **model_init_kwargs,
    }
    with servers(recipe) as (theta_url, t_url):
        trainer = DualGRPOTrainer(
            model=recipe.model.model_name_or_path,
            reward_funcs=reward_funcs,
            args=recipe.training,
            train_dataset=dataset[recipe.script.dataset_train_split],
            eval_dataset=(dataset[recipe.script.dataset_test_split] if recipe.training.eval_strategy != "no" else None),
            quantization_config=get_quantization_config(recipe.model),
            peft_config=get_peft_config(recipe.model),
            dual_config=recipe.dual.coordinator_config(theta_url, t_url),
            importance_sampling_mode=recipe.dual.dual_importance_sampling_mode,
            importance_sampling_clip_min=recipe.dual.dual_importance_sampling_clip_min,
            importance_sampling_clip_max=recipe.dual.dual_importance_sampling_clip_max,
            alpha_schedule=recipe.dual.alpha_schedule(),
            weight_sync=recipe.dual.dual_weight_sync,
            weight_sync_dir=recipe.dual.dual_weight_sync_dir,
        )
        report = RunReport(Path(str(recipe.training.output_dir)))
        trainer.add_callback(report)
        with trainer.rollout:
            trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
        trainer.save_model(recipe.training.output_dir)
    if trainer.accelerator.is_main_process:
        print(report.table())
        print(f"The run is in {recipe.training.output_dir}/: the model, metrics.jsonl, the servers' logs.")


def load_data(recipe: Recipe) -> tuple[DatasetDict, list[Callable[..., Any]]]:
    """The dataset, with a `t_prompt` column where the recipe has a template, and the reward functions.

    Raises:
        ValueError: neither or both sources of data, or a template that names a column the dataset lacks.
    """
    dual, script = recipe.dual, recipe.script
    if (dual.dual_task is None) == (script.dataset_name is None):
        raise ValueError("set exactly one of dual_task and dataset_name")
    reward_funcs = [_import(path) for path in script.reward_funcs or []]
    if dual.dual_task is not None:
        options = json.loads(dual.dual_task_options)
        rows, task_reward = load_task(
            dual.dual_task, size=dual.dual_task_size, seed=recipe.training.seed, options=options
        )
        dataset = DatasetDict({script.dataset_train_split: rows, script.dataset_test_split: rows})
        reward_funcs.append(task_reward)
    else:
        dataset = load_dataset(script.dataset_name, name=script.dataset_config)
    if not reward_funcs:
        raise ValueError("no reward: set reward_funcs to dotted import paths of reward functions")
    if dual.dual_t_prompt_template is not None:
        dataset = DatasetDict(
            {name: with_t_prompts(rows, dual.dual_t_prompt_template) for name, rows in dataset.items()}
        )
    return dataset, reward_funcs


def with_t_prompts(rows: Dataset, template: str) -> Dataset:
    """Add what π_t sees: the row's prompt with its last user turn replaced by the filled template."""

    def fill(row: dict[str, Any]) -> dict[str, Any]:
        try:
            content = template.format(**row)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"dual_t_prompt_template names {error}, but the dataset has the columns {', '.join(row)}"
            ) from error
        if isinstance(row["prompt"], str):
            return {T_PROMPT_COLUMN: content}
        return {T_PROMPT_COLUMN: [*row["prompt"][:-1], {"role": "user", "content": content}]}

    return rows.map(fill)


@contextlib.contextmanager
def servers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The URLs of both servers; embedded ones are started by the main process when the recipe names none.

    Raises:
        ValueError: only one of the two URLs is set, or the native engine's is not.
    """
    dual = recipe.dual
    if dual.dual_engine == "native":
        if dual.dual_theta_url is None:
            raise ValueError("dual_engine: native needs dual_theta_url, the URL of dual-rollout serve-native")
        yield dual.dual_theta_url, dual.dual_theta_url
        return
    if (dual.dual_theta_url is None) != (dual.dual_t_url is None):
        raise ValueError("set both dual_theta_url and dual_t_url, or neither to start embedded servers")
    if dual.dual_theta_url is not None:
        yield dual.dual_theta_url, dual.dual_t_url
        return
    state = PartialState()
    with contextlib.ExitStack() as stack:
        urls: list[str | None] = [None, None]
        if state.is_main_process:
            folder = Path(str(recipe.training.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            policy = str(recipe.model.model_name_or_path)
            running = [
                EmbeddedServer(
                    model, _server_flags(dual), log_path=folder / f"server_{name}.log", env=_server_env(dual)
                )
                for name, model in (("theta", policy), ("t", dual.dual_t_model_name_or_path or policy))
            ]
            print(f"Starting two embedded servers (logs in {folder}/server_*.log) ...", flush=True)
            for server in running:
                stack.callback(server.stop)
                server.start()
            urls = [server.url for server in running]
        broadcast_object_list(urls)
        yield str(urls[0]), str(urls[1])


def _server_flags(dual: DualArguments) -> list[str]:
    flags = ["--enable-lora", "--max-logprobs", str(dual.dual_top_k)]
    if dual.dual_max_model_len is not None:
        flags += ["--max-model-len", str(dual.dual_max_model_len)]
    if dual.dual_server_threads is not None:
        flags += ["--threads", str(dual.dual_server_threads)]
    return flags


def _server_env(dual: DualArguments) -> dict[str, str]:
    return {} if dual.dual_server_threads is None else {"OMP_NUM_THREADS": str(dual.dual_server_threads)}


def _import(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"reward_funcs: cannot import {path!r}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())


if __name__ == "__main__":
    main()
