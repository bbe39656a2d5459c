"""Values by the type of the dataclass field that they are for: of a config, a recipe or a flag."""

from __future__ import annotations

import json
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_TRUTH_VALUES = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")  # as transformers' parser has them


def fits(value: Any, hint: Any, *, as_text: bool = False) -> bool:
    """Whether a value is of a field's type; a truth value is no number.

    Args:
        as_text: whether numbers and truth values may be written as text, as 1e-5 is in YAML.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, kind, as_text=as_text) for kind in _alternatives(arguments))
    if origin is Literal:
        return isinstance(value, (str, int)) and value in arguments
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0], as_text=as_text) for item in value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [member.value for member in hint]
    kind = origin or hint
    if kind is bool:
        return isinstance(value, bool) or (as_text and isinstance(value, str) and value.lower() in _TRUTH_VALUES)
    if kind in (int, float):
        return _is_number(value, kind) or (as_text and isinstance(value, str) and _reads_as(value, kind))
    return isinstance(value, kind) if kind in (str, list, dict, NoneType) else True


def expected(hint: Any, number: str | None = None) -> str:
    """A type in words; `number` says which numbers, or which texts, are allowed."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(expected(kind, number) for kind in _alternatives(arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else f'"{arguments[0]}"'
    if origin is list:
        return f"a list of which each is {expected(arguments[0])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(member.value) for member in hint)}"
    if number is not None and hint in (int, float, str):
        return number
    return _WORDS.get(origin or hint, str(hint))


def from_text(text: str, hint: Any) -> Any:
    """What a flag's text stands for: a number or a word for a union of both, an object for a mapping, else the text.

    Raises:
        ValueError: it stands for nothing of that type.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(get_origin(kind) is dict for kind in kinds):
        return _json_object(text)
    if any(get_origin(kind) is Literal and text in get_args(kind) for kind in kinds) or str in kinds:
        return text
    return next(kind for kind in kinds if kind in (int, float))(text)


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


def _is_number(value: Any, kind: type) -> bool:
    of_kind = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return of_kind and _reads_as(value, kind)


def _reads_as(value: Any, kind: Any) -> bool:
    try:
        kind(value)
    except (ValueError, OverflowError):  # no number; an integer that no float can hold
        return False
    return True


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{text!r:.80} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{text!r:.80} is not a JSON object")
    return value
