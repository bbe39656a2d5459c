"""YAML files with a mapping of keys to values: configs and recipes."""

from __future__ import annotations

from typing import Any


def read_mapping(path: str, what: str) -> dict[Any, Any]:
    """The mapping in the file at `path`, which `what` names for the user.

    Raises:
        ValueError: the file cannot be read, is no YAML, or holds something else; names the file.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_scalar(self, node: Any) -> Any:
            value = super().construct_scalar(node)
            value.encode()  # an escape can stand for half a character, which no file or server takes
            return value

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"cannot read {what} {path}: {reason}") from error
    try:
        loader = Loader(text)
        values = loader.get_single_data()
    except RecursionError as error:
        raise ValueError(f"{path} is not valid YAML: it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except Exception as error:  # for a date or a number that is none, PyYAML raises whatever Python does
        raise ValueError(f"{path} is not valid YAML: a value is not what its form says ({error!r})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of keys to values")
    return values
