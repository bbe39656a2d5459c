"""Train with a recipe: `accelerate launch -m dual_rollout.training.script --config RECIPE.yaml`.

Without server URLs in the recipe, two embedded servers are started for the run and stopped after it. With several
processes each rolls out its own slice of a batch; the main one starts the servers and sends the weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging
from trl import get_peft_config, get_quantization_config

from dual_rollout.config import ENGINE_SERVERS, CoordinatorConfig, url_list
from dual_rollout.exceptions import DualRolloutError
from dual_rollout.exit_status import exit_status
from dual_rollout.report.page import write_report
from dual_rollout.server.launch import EmbeddedServer
from dual_rollout.training.arguments import PREFIX, DualArguments, Recipe, parse_recipe
from dual_rollout.training.contexts import with_t_prompts
from dual_rollout.training.metrics_log import SUMMARY_HEADINGS
from dual_rollout.training.output_dir import check_output_dir, checkpoint_to_resume, what_is_kept
from dual_rollout.training.processes import fail_together
from dual_rollout.training.tasks import hold_out, load_rows, load_task, task_options
from dual_rollout.training.trainer import DualGRPOTrainer


def main(argv: list[str] | None = None) -> None:
    """Run the recipe named in `argv` to its end."""
    recipe = parse_recipe(sys.argv[1:] if argv is None else argv)
    check_processes()
    output_dir = Path(str(recipe.training.output_dir))
    with fail_together():
        if PartialState().is_main_process:
            check_output_dir(recipe.training, overwrite=recipe.dual.dual_overwrite_output_dir)
    checkpoint = checkpoint_to_resume(recipe.training)
    transformers_logging.disable_progress_bar()  # one for every file that is read or saved; the console has its own
    disable_progress_bars()  # of datasets
    dataset, reward_funcs = load_data(recipe)
    recipe.training.eval_on_start |= recipe.dual.dual_eval_rows > 0
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
            eval_dataset=dataset[recipe.script.dataset_test_split] if evaluates(recipe) else None,
            quantization_config=get_quantization_config(recipe.model),
            peft_config=get_peft_config(recipe.model),
            dual_config=recipe.dual.coordinator_config(theta_url, t_url),
            alpha_schedule=recipe.dual.alpha_schedule(),
            **recipe.dual.trainer_options(),
        )
        with trainer.rollout:
            with _told_when_it_stops(trainer):
                trainer.train(resume_from_checkpoint=checkpoint)
                if recipe.dual.dual_eval_rows and not trainer.metrics_log.evaluated_at(trainer.state.global_step):
                    trainer.evaluate()
            trainer.save_model(str(output_dir))
            trainer.create_model_card(model_name=output_dir.name, dataset_name=recipe.script.dataset_name)
            trainer.remove_sent_weights()
    if trainer.accelerator.is_main_process:
        trainer.console.display.table(SUMMARY_HEADINGS, trainer.metrics_log.summary())
        logs = ", the servers' logs" if starts_servers(recipe.dual) else ""
        print(trainer.metrics_log.before_and_after())
        print(f"The run is in {output_dir}/: the model and its card, metrics.jsonl{logs}.")
        print(f"Its rollouts, token by token: {_write_report(output_dir)}")
    if recipe.training.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
    PartialState().wait_for_everyone()  # none leaves while another still needs it
    PartialState().destroy_process_group()


def _write_report(output_dir: Path) -> str:
    """The page's path, or what is in its way: a run that is done does not fail for it."""
    page = output_dir / "report.html"
    try:
        write_report([output_dir], page)
    except (ValueError, OSError) as error:
        return f"there is no report: {error}"
    return str(page)


@contextlib.contextmanager
def _told_when_it_stops(trainer: DualGRPOTrainer) -> Iterator[None]:
    """After Ctrl-C or an error, print the figures so far, what of the training is kept, and how to go on."""
    try:
        yield
    except BaseException as error:
        if trainer.accelerator.is_main_process:
            unlogged = trainer.unlogged_metrics()
            trainer.console.display.table(SUMMARY_HEADINGS, trainer.metrics_log.summary(unlogged))
            print(what_is_kept(trainer.args, trainer.state), flush=True)
            if _is_of_the_target(error, trainer.rollout.config):
                print("dual_on_target_failure: policy goes on without π_t, and wait waits for its server.", flush=True)
        raise


def _is_of_the_target(error: BaseException, config: CoordinatorConfig) -> bool:
    """Whether the target's server has failed, and the run stops for it."""
    named = any(url in str(error) and url not in url_list(config.theta_url) for url in url_list(config.t_url))
    return isinstance(error, DualRolloutError) and named and config.on_target_failure == "fail"


def check_processes() -> None:
    """Refuse a launch of several processes of which each takes itself for the only one.

    Raises:
        ValueError: there are as many runs as processes.
    """
    launched, known = int(os.environ.get("WORLD_SIZE", "1")), PartialState().num_processes
    if launched != known:
        raise ValueError(
            f"{launched} processes were launched, but each of them trains with {known}: on a machine without a GPU set "
            "use_cpu: true in the recipe"
        )


def load_data(recipe: Recipe) -> tuple[dict[str, Any], list[str | Callable[..., Any]]]:
    """The splits that the run uses, with a `t_prompt` column where the recipe has a template, and the rewards.

    Raises:
        ValueError: neither or both sources of data, a stream without `max_steps`, or a template that names a column the
            dataset lacks.
    """
    dual, script = recipe.dual, recipe.script
    if script.dataset_streaming:
        if dual.dual_task is not None:
            raise ValueError("dataset_streaming streams a dataset_name: leave it out with dual_task")
        if recipe.training.max_steps <= 0:
            raise ValueError("dataset_streaming: a stream has no known length, set max_steps")
    if (dual.dual_task is None) == (script.dataset_name is None):
        raise ValueError("set exactly one of dual_task and dataset_name")
    reward_funcs: list[str | Callable[..., Any]] = [reward_function(name) for name in script.reward_funcs or []]
    if script.reward_model_name_or_path is not None:
        reward_funcs.append(script.reward_model_name_or_path)
    if dual.dual_task is not None:
        dataset, task_reward = load_task_splits(recipe)
        reward_funcs.append(task_reward)
    else:
        splits = [script.dataset_train_split]
        if evaluates(recipe):
            splits.append(script.dataset_test_split)
        dataset = load_rows(str(script.dataset_name), script.dataset_config, splits, streaming=script.dataset_streaming)
        if dual.dual_eval_rows:
            dataset[script.dataset_test_split] = dataset[script.dataset_test_split].take(dual.dual_eval_rows)
    if not reward_funcs:
        raise ValueError("no reward: set reward_funcs or reward_model_name_or_path")
    turns = {"template": dual.dual_t_prompt_template, "system_prompt": dual.dual_t_system_prompt}
    dataset = {name: with_t_prompts(rows, **turns) for name, rows in dataset.items()}
    for rows in dataset.values():
        next(iter(rows))  # a stream tries a template when it is read, which is late for the first row
    return dataset, reward_funcs


def load_task_splits(recipe: Recipe) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The rows of `dual_task` to train on, those that are held out, if any, and the reward of both.

    Raises:
        ValueError: as `load_task`, or the task has too few questions.
    """
    dual, script = recipe.dual, recipe.script
    size, held_out = dual.dual_task_size, dual.dual_eval_rows
    rows, reward = load_task(
        str(dual.dual_task),
        size=size + _DRAWN_FOR_ONE * held_out,
        seed=recipe.training.seed,
        options=task_options(dual.dual_task_options),
    )
    train, test = hold_out(rows, size, held_out)
    return {script.dataset_train_split: train, **({script.dataset_test_split: test} if held_out else {})}, reward


_DRAWN_FOR_ONE = 10  # questions, of which one at least should be new


def evaluates(recipe: Recipe) -> bool:
    """Whether the policy is evaluated, during the training or only before and after it."""
    return recipe.training.eval_strategy != "no" or recipe.dual.dual_eval_rows > 0


@contextlib.contextmanager
def servers(recipe: Recipe) -> Iterator[tuple[str | list[str], str | list[str]]]:
    """The URLs of both servers; embedded ones are started by the main process when the recipe names none.

    Raises:
        ValueError: a URL is not set, and not all servers can be embedded ones.
    """
    if not starts_servers(recipe.dual):
        engine, given = recipe.dual.dual_engine, _given_urls(recipe.dual)
        found = [url for url in given if url is not None]
        if len(found) < len(given):
            raise ValueError(f"dual_engine is {engine}: set {ENGINE_SERVERS[engine].missing.format(prefix=PREFIX)}")
        yield found[0], found[-1]
        return
    with contextlib.ExitStack() as stack:
        urls = ["", ""]
        with fail_together():
            if PartialState().is_main_process:
                urls = [server.url for server in _start_servers(recipe, stack)]
        broadcast_object_list(urls)
        yield urls[0], urls[1]


def starts_servers(dual: DualArguments) -> bool:
    """Whether the run has embedded servers of its own."""
    return ENGINE_SERVERS[dual.dual_engine].can_be_embedded and all(url is None for url in _given_urls(dual))


def _given_urls(dual: DualArguments) -> list[str | list[str] | None]:
    """What the recipe says of each server that its engine has."""
    return [getattr(dual, f"{PREFIX}{name}") for name in ENGINE_SERVERS[dual.dual_engine].fields]


def _start_servers(recipe: Recipe, stack: contextlib.ExitStack) -> list[EmbeddedServer]:
    """π_θ's server and π_t's; `stack` stops them."""
    dual, folder = recipe.dual, Path(str(recipe.training.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    policy = str(recipe.model.model_name_or_path)
    flags = [*_server_flags(recipe), "--weights-dir", str(Path(dual.dual_weight_sync_dir or folder).resolve())]
    running = [
        EmbeddedServer(model, flags, log_path=folder / f"server_{name}.log", env=_server_env(dual))
        for name, model in (("theta", policy), ("t", dual.dual_t_model_name_or_path or policy))
    ]
    print(f"Starting two embedded servers (logs in {folder}/server_*.log) ...", flush=True)
    for server in running:
        stack.callback(server.stop)
        server.start()
    return running


def _server_flags(recipe: Recipe) -> list[str]:
    dual = recipe.dual
    flags = ["--enable-lora", "--max-logprobs", "-1" if dual.dual_top_k == "auto" else str(dual.dual_top_k)]
    if recipe.training.temperature != 1.0:  # else block decoding is refused, and the mass outside lists is a guess
        flags += ["--logprobs-mode", "processed_logprobs"]
    if dual.dual_max_model_len is not None:
        flags += ["--max-model-len", str(dual.dual_max_model_len)]
    if dual.dual_server_threads is not None:
        flags += ["--threads", str(dual.dual_server_threads)]
    return flags


def _server_env(dual: DualArguments) -> dict[str, str]:
    return {} if dual.dual_server_threads is None else {"OMP_NUM_THREADS": str(dual.dual_server_threads)}


def reward_function(name: str) -> Callable[..., Any]:
    """The reward function of a name that TRL's own script knows, or of a dotted import path.

    A path is looked for in the current folder and then where Python looks. As under `python -m`, the folder stays on
    `sys.path`, for what the function imports when it is called.

    Raises:
        ValueError: there is none, or it needs a package that is not installed.
    """
    module, _, attribute = (name if "." in name else f"trl.rewards.{name}").rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"reward_funcs: cannot import {name!r}, looked for in {os.getcwd()} first: {error}") from error
    if function.__module__ == "trl.rewards.accuracy_rewards" and importlib.util.find_spec("math_verify") is None:
        raise ValueError(f"reward_funcs: {name} needs the package math-verify: pip install 'dual_rollout[math]'")
    if name == "get_soft_overlong_punishment":  # not a reward but what makes one, here with the values of TRL's script
        return function(max_completion_len=1280, soft_punish_cache=256)
    return function


if __name__ == "__main__":
    sys.exit(exit_status("dual_rollout.training.script", main))
