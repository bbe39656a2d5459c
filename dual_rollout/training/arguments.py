"""What a recipe may say: TRL's keys, and ours under the prefix `dual_`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import yaml
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from dual_rollout.config import CoordinatorConfig, did_you_mean
from dual_rollout.training.schedules import AlphaSchedule

PREFIX = "dual_"

_URLS = ("theta_url", "t_url")


def _coordinator_options() -> type:
    """A dataclass with one `dual_<name>` field per field of `CoordinatorConfig`; the URLs may stay unset."""
    from typing import get_type_hints

    hints = get_type_hints(CoordinatorConfig)
    options = []
    for spec in fields(CoordinatorConfig):
        unset = spec.name in _URLS
        hint = str | None if unset else hints[spec.name]
        default = None if unset else spec.default
        options.append((PREFIX + spec.name, hint, field(default=default, metadata=dict(spec.metadata))))
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
        default="constant", metadata={"help": "How bounds on α move over the training steps to their dual_*_end."}
    )
    dual_kl_budget_end: float | None = field(
        default=None, metadata={"help": "dual_kl_budget at the last step, in nats; 0 ends on-policy."}
    )
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
    dual_task: str | None = field(
        default=None,
        metadata={"help": "A reasoning-gym task to train on, instead of dataset_name and reward_funcs."},
    )
    dual_task_options: str = field(
        default="{}", metadata={"help": 'Options of the task as JSON, for example {"max_terms": 3}.'}
    )
    dual_task_size: int = field(default=500, metadata={"help": "Number of questions made from the task."})
    dual_t_prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "The user turn π_t sees instead: the dataset's columns in braces, {question} for the prompt's."
        },
    )

    def coordinator_config(self, theta_url: str, t_url: str) -> CoordinatorConfig:
        """The `CoordinatorConfig` these arguments describe, for servers at the given URLs."""
        values = {spec.name: getattr(self, PREFIX + spec.name) for spec in fields(CoordinatorConfig)}
        return CoordinatorConfig(**{**values, "theta_url": theta_url, "t_url": t_url})

    def alpha_schedule(self) -> AlphaSchedule:
        """The `AlphaSchedule` these arguments describe."""
        return AlphaSchedule(
            shape=self.dual_alpha_schedule,
            kl_budget_end=self.dual_kl_budget_end,
            alpha_max_end=self.dual_alpha_max_end,
        )


@dataclass
class TrainScriptArguments(ScriptArguments):
    """TRL's own, as in its GRPO script.

    Args:
        reward_funcs: dotted import paths of reward functions.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Dotted import paths of reward functions, e.g. my_lib.rewards.accuracy."},
    )


@dataclass
class Recipe:
    """A parsed recipe."""

    dual: DualArguments
    script: TrainScriptArguments
    training: GRPOConfig
    model: ModelConfig


def parse_recipe(argv: list[str]) -> Recipe:
    """Parse `--config RECIPE.yaml` and flags that override it.

    Raises:
        ValueError: an unknown key (with the nearest valid one), an unreadable file, or values that do not fit.
    """
    types: list[Any] = [DualArguments, TrainScriptArguments, GRPOConfig, ModelConfig]
    known = [spec.name for kind in types for spec in fields(kind)]
    if "--config" in argv[:-1]:
        _check_keys(argv[argv.index("--config") + 1], known)
    for flag in argv:
        name = flag.removeprefix("--").split("=")[0].replace("-", "_")
        if flag.startswith("--") and name not in [*known, "config"] and name.removeprefix("no_") not in known:
            raise ValueError(f"unknown flag {flag.split('=')[0]}{did_you_mean(name, known)}")
    dual, script, training, model = TrlParser(types).parse_args_and_config(argv)
    if model.model_name_or_path is None:
        raise ValueError("set model_name_or_path to the policy")
    training.output_dir = training.output_dir or "outputs"
    return Recipe(dual, script, training, model)


def _check_keys(path: str, known: list[str]) -> None:
    with open(path, encoding="utf-8") as file:
        try:
            values: Any = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of keys to values")
    for key in values:
        if key not in known and key != "env":
            raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(str(key), known)}")
