"""What a recipe may say: TRL's keys, and ours under the prefix `dual_`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NoReturn

from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from dual_rollout.config import CoordinatorConfig, did_you_mean, field_hints
from dual_rollout.field_types import expected, from_text
from dual_rollout.training.recipe_validation import SECRETS, check_recipe_file
from dual_rollout.training.schedules import AlphaSchedule
from dual_rollout.yaml_file import read_mapping

PREFIX = "dual_"

TRAINER_OPTIONS = (
    "importance_sampling_mode",
    "importance_sampling_clip_min",
    "importance_sampling_clip_max",
    "weight_sync",
    "weight_sync_dir",
    "policy_check_bound",
    "kept_rollouts",
)
"""The keys that go to `DualGRPOTrainer` as they are, without the prefix."""

# argparse takes what stands before None: one flag with one or several URLs, and a mapping as JSON.
_HINTS: dict[str, Any] = {
    "theta_url": list[str] | None | str,
    "t_url": list[str] | None | str,
    "targets": str | None | dict[str, Any],
    "top_k": str | None | int,
}


def _coordinator_options() -> type:
    """A dataclass with one `dual_<name>` field per field of `CoordinatorConfig`; the URLs may stay unset."""
    options = []
    for spec in fields(CoordinatorConfig):
        hint = _HINTS.get(spec.name, field_hints()[spec.name])
        default = None if spec.name in ("theta_url", "t_url") else spec.default
        options.append((PREFIX + spec.name, hint, field(default=default, metadata={"help": spec.metadata["help"]})))
    return dataclasses.make_dataclass("CoordinatorOptions", options)


@dataclass
class DualArguments(_coordinator_options()):  # type: ignore[misc]
    """Ours, in a recipe and on the command line. Those of `CoordinatorConfig` are inherited, prefixed.

    `dual_temperature` is not among them: under a trainer the temperature is TRL's `temperature`.
    """

    dual_t_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "π_t of a run without URLs, served by an embedded server; the policy's model when unset."},
    )
    dual_server_threads: int | None = field(
        default=None, metadata={"help": "CPU threads of each embedded server; its own default when unset."}
    )
    dual_max_model_len: int | None = field(
        default=None, metadata={"help": "Context length of the embedded servers, in tokens; the model's when unset."}
    )
    dual_importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"
    ] = field(default="token_truncate", metadata={"help": "How the weights π_θ/q* enter the loss."})
    dual_importance_sampling_clip_min: float = field(default=0.0, metadata={"help": "Lower bound on a weight."})
    dual_importance_sampling_clip_max: float = field(default=3.0, metadata={"help": "Upper bound on a weight."})
    dual_alpha_schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "How what has a dual_*_end moves there over the training steps."}
    )
    dual_kl_budget_end: float | None = field(
        default=None, metadata={"help": "dual_kl_budget at the last step, in nats; 0 ends on-policy."}
    )
    dual_fixed_alpha_end: float | None = field(default=None, metadata={"help": "dual_fixed_alpha at the last step."})
    dual_alpha_min_end: float | None = field(default=None, metadata={"help": "dual_alpha_min at the last step."})
    dual_alpha_max_end: float | None = field(default=None, metadata={"help": "dual_alpha_max at the last step."})
    dual_weight_sync: Literal["auto", "disk", "lora"] = field(
        default="auto",
        metadata={
            "help": 'How new weights reach π_θ\'s server: "disk" writes all of them, "lora" the adapter alone, "auto" '
            "takes the adapter where the model has one and the server loads it."
        },
    )
    dual_weight_sync_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the weights, which trainer and server see under one path; inside output_dir when unset."
        },
    )
    dual_policy_check_bound: float | None = field(
        default=None,
        metadata={
            "help": "Nats per token that log π_θ of the trainer and of its server may differ by on fixed texts, before "
            "and after each rollout; what rounding explains when unset. Beyond it the run stops."
        },
    )
    dual_kept_rollouts: int = field(
        default=8,
        metadata={
            "help": "Rollouts of each step that stay in output_dir/rollouts for dual-rollout report; 0 for none."
        },
    )
    dual_overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into an output_dir that is not empty; what is in it stays or goes."}
    )
    dual_task: str | None = field(
        default=None,
        metadata={"help": "A reasoning-gym task to train on, instead of dataset_name and reward_funcs."},
    )
    dual_task_options: str = field(
        default="{}", metadata={"help": 'Options of the task as JSON, for example {"max_terms": 3}.'}
    )
    dual_task_size: int = field(default=500, metadata={"help": "Number of questions made from the task."})
    dual_eval_rows: int = field(
        default=0,
        metadata={
            "help": "Held-out rows on which the policy alone is evaluated before and after training: of dual_task, "
            "questions that it does not train on; of a dataset, the first ones of dataset_test_split. 0 for none."
        },
    )
    dual_t_prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "The user turn π_t sees instead: the dataset's columns in braces, {question} for the prompt's."
        },
    )
    dual_t_system_prompt: str | None = field(
        default=None,
        metadata={"help": "A system turn that only π_t sees; the dataset's columns in braces."},
    )

    def coordinator_config(self, theta_url: str | list[str], t_url: str | list[str]) -> CoordinatorConfig:
        """The `CoordinatorConfig` these arguments describe, for servers at the given URLs.

        Raises:
            ValueError: a value out of range.
        """
        values = {spec.name: getattr(self, PREFIX + spec.name) for spec in fields(CoordinatorConfig)}
        for name in ("top_k", "targets"):
            hint, value = field_hints()[name], values[name]
            if isinstance(value, str):  # a flag's
                try:
                    values[name] = from_text(value, hint)
                except ValueError as error:
                    raise ValueError(f"{PREFIX}{name} must be {expected(hint)}: {error}") from error
        return CoordinatorConfig(**{**values, "theta_url": theta_url, "t_url": t_url})

    def trainer_options(self) -> dict[str, Any]:
        """The arguments of `DualGRPOTrainer` that are keys here, each by itself."""
        return {name: getattr(self, PREFIX + name) for name in TRAINER_OPTIONS}

    def alpha_schedule(self) -> AlphaSchedule:
        """The `AlphaSchedule` these arguments describe."""
        return AlphaSchedule(
            shape=self.dual_alpha_schedule,
            kl_budget_end=self.dual_kl_budget_end,
            fixed_alpha_end=self.dual_fixed_alpha_end,
            alpha_min_end=self.dual_alpha_min_end,
            alpha_max_end=self.dual_alpha_max_end,
        )


@dataclass
class TrainScriptArguments(ScriptArguments):
    """TRL's own, as in its GRPO script."""

    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A reward model, by name or folder: a sequence classifier with one score."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: dotted import paths, e.g. my_lib.rewards.accuracy, or names in trl.rewards."
        },
    )


@dataclass
class Recipe:
    """A parsed recipe."""

    dual: DualArguments
    script: TrainScriptArguments
    training: GRPOConfig
    model: ModelConfig


def _check_rollouts(dual: DualArguments, training: GRPOConfig) -> None:
    """What the first rollout would refuse, before servers are started and models loaded."""
    try:
        config = dual.coordinator_config(dual.dual_theta_url or _ANY_URL, dual.dual_t_url or _ANY_URL)
    except ValueError as error:
        raise ValueError(f"{PREFIX}{str(error).removeprefix(PREFIX)}") from error
    dataclasses.replace(config, temperature=training.temperature)
    for name in ("dual_kept_rollouts", "dual_eval_rows"):
        if getattr(dual, name) < 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(dual, name)}")
    if dual.dual_task is not None and training.eval_strategy != "no" and dual.dual_eval_rows == 0:
        raise ValueError("eval_strategy needs held-out rows: set dual_eval_rows to how many of dual_task")
    if training.max_completion_length is None or training.max_completion_length < 1:
        raise ValueError(f"max_completion_length must be at least 1, got {training.max_completion_length}")


_ANY_URL = "http://127.0.0.1"


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # argparse would print hundreds of flags first


def _is_named(key: str, argv: list[str]) -> bool:
    """Whether the recipe or a flag sets `key`."""
    flags = [flag.removeprefix("--").split("=")[0].replace("-", "_") for flag in argv if flag.startswith("--")]
    recipe = read_mapping(argv[argv.index("--config") + 1], "the recipe") if "--config" in argv else {}
    return key in recipe or key in flags


def parse_recipe(argv: list[str]) -> Recipe:
    """Parse `--config RECIPE.yaml` and flags that override it.

    Raises:
        ValueError: an unknown key (with the nearest valid one), an unreadable file, or values that do not fit.
    """
    types: list[Any] = [DualArguments, TrainScriptArguments, GRPOConfig, ModelConfig]
    known = [spec.name for kind in types for spec in fields(kind)]
    if argv[-1:] == ["--config"]:
        raise ValueError("--config needs the path of a recipe")
    if "--config" in argv:
        check_recipe_file(argv[argv.index("--config") + 1], types)
    for flag in argv:
        name = flag.removeprefix("--").split("=")[0].replace("-", "_")
        if flag.startswith("--") and name in SECRETS:
            raise ValueError(f"{flag.split('=')[0]} does not belong on a command line: set HF_TOKEN in the environment")
        if flag.startswith("--") and name not in [*known, "config"] and name.removeprefix("no_") not in known:
            raise ValueError(f"unknown flag {flag.split('=')[0]}{did_you_mean(name, known)}")
    try:
        dual, script, training, model = _Parser(types).parse_args_and_config(argv)
    except (TypeError, ArithmeticError, AttributeError, LookupError, ImportError) as error:
        raise ValueError(f"TRL does not take the recipe's values: {error}") from error
    if training.use_cpu and not _is_named("bf16", argv):
        training.bf16 = False  # TRL's default is for GPUs, and rounds log π_θ by a tenth of a nat
    if model.model_name_or_path is None:
        raise ValueError("set model_name_or_path to the policy")
    try:
        _check_rollouts(dual, training)
    except ValueError as error:
        where = f"{argv[argv.index('--config') + 1]}: " if "--config" in argv else ""
        raise ValueError(f"{where}{error}") from error
    training.output_dir = training.output_dir or "outputs"
    return Recipe(dual, script, training, model)
