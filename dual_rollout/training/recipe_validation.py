"""A recipe's file, checked before anything is made of it: readable, known keys, values of the keys' types."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from dual_rollout.config import did_you_mean
from dual_rollout.field_types import expected, fits
from dual_rollout.yaml_file import read_mapping

SECRETS = ("hub_token", "push_to_hub_token")
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)


def check_recipe_file(path: str, kinds: Sequence[type]) -> None:
    """Refuse a file that is no recipe of the fields of the dataclasses `kinds`.

    Raises:
        ValueError: names the file, the key, and what its value must be.
    """
    values = read_mapping(path, "the recipe")
    hints = {spec.name: get_type_hints(kind)[spec.name] for kind in kinds for spec in fields(kind)}
    hints["resume_from_checkpoint"] = bool | str | None  # true: the last one
    for key, value in values.items():
        if key == "env":
            _check_env(path, value)
        elif key in SECRETS:
            raise ValueError(f"{path}: {key} does not belong in a file: set HF_TOKEN in the environment")
        elif key not in hints:
            raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(str(key), list(hints))}")
        elif not fits(value, hints[key], as_text=True):
            raise ValueError(f"{path}: {key} must be {expected(hints[key])}, got {value!r:.80}")


def _check_env(path: str, variables: Any) -> None:
    if not isinstance(variables, Mapping):
        raise ValueError(f"{path}: env must be a mapping of variables to values, got {variables!r:.80}")
    for name in variables:
        if not isinstance(name, str):
            raise ValueError(f"{path}: env must name variables, got {name!r}")
        if _SECRET_VARIABLE.search(name):
            raise ValueError(f"{path}: env.{name}: a secret does not belong in a file, export it before the launch")
