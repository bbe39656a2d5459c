"""A recipe's file, checked before anything is made of it: readable, known keys, values of the keys' types."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.hf_argparser import string_to_bool

from dual_rollout.config import did_you_mean
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
        elif not fits(value, hints[key]):
            raise ValueError(f"{path}: {key} must be {expected(hints[key])}, got {value!r:.80}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of a field's type; numbers may be written as text, as 1e-5 is in YAML."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, kind) for kind in _alternatives(arguments))
    if origin is Literal:
        return isinstance(value, (str, int)) and value in arguments
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [member.value for member in hint]
    kind = origin or hint
    if kind in (int, float, bool) and isinstance(value, str):
        return _reads_as(value, string_to_bool if kind is bool else kind)
    if kind in (int, float):
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        return number and _reads_as(value, kind)
    return isinstance(value, kind) if kind in (bool, str, list, dict, NoneType) else True


def expected(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(expected(kind) for kind in _alternatives(arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list of which each is {expected(arguments[0])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(member.value) for member in hint)}"
    return _WORDS.get(origin or hint, str(hint))


def _alternatives(kinds: tuple[Any, ...]) -> list[Any]:
    """Without `str` where an enumeration says which strings: transformers writes `SomeEnum | str`."""
    enumerated = any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds)
    return [kind for kind in kinds if not (enumerated and kind is str)]


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}


def _check_env(path: str, variables: Any) -> None:
    if not isinstance(variables, Mapping):
        raise ValueError(f"{path}: env must be a mapping of variables to values, got {variables!r:.80}")
    for name in variables:
        if not isinstance(name, str):
            raise ValueError(f"{path}: env must name variables, got {name!r}")
        if _SECRET_VARIABLE.search(name):
            raise ValueError(f"{path}: env.{name}: a secret does not belong in a file, export it before the launch")


def _reads_as(text: Any, kind: Any) -> bool:
    try:
        kind(text)
    except Exception:  # argparse's own error for what is no truth value; an integer that no float can hold
        return False
    return True
