"""A flag for each field of `CoordinatorConfig`, and a YAML file of the same keys that flags override."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dual_rollout.config import CoordinatorConfig
from dual_rollout.yaml_file import read_mapping

_PREFIX = "config_"


def add_config_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """`--config FILE.yaml`, and `--top-k` for `top_k` and so on; `defaults` are the command's own."""
    group = parser.add_argument_group(
        "servers and sampling", "The fields of CoordinatorConfig, by name; flags override the file."
    )
    group.add_argument("--config", metavar="FILE.yaml", help="a mapping of these fields, such as top_k: 100")
    hints = get_type_hints(CoordinatorConfig)
    for spec in fields(CoordinatorConfig):
        value = defaults.get(spec.name, spec.default)
        default = "" if value is None else f" Default: {value}."
        group.add_argument(
            f"--{spec.name.replace('_', '-')}",
            dest=_PREFIX + spec.name,
            default=argparse.SUPPRESS,
            help=(spec.metadata["help"] + default).replace("%", "%%"),
            **_flag_of(hints[spec.name]),
        )


def config_from(args: argparse.Namespace, **defaults: Any) -> CoordinatorConfig:
    """The config that file and flags describe; `defaults` stand in for what neither sets.

    Raises:
        ValueError: the file is no YAML mapping, or a key (with the nearest valid one) or a value is not valid.
    """
    values = read_mapping(args.config, "--config") if args.config is not None else {}
    for flag, value in vars(args).items():
        if flag.startswith(_PREFIX):
            values[flag.removeprefix(_PREFIX)] = value[0] if isinstance(value, list) and len(value) == 1 else value
    for name, value in defaults.items():
        if values.get(name) is None:
            values[name] = value
    try:
        return CoordinatorConfig.from_dict(values)
    except ValueError as error:
        if args.config is None:
            raise
        raise ValueError(f"{args.config}, with the flags: {error}") from error


def _flag_of(hint: Any) -> dict[str, Any]:
    """What argparse is to do for a field of this type."""
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    kind, *others = get_args(hint) or (hint,)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is dict:
        return {"type": _json_object, "metavar": "JSON"}
    if any(get_origin(other) is list for other in others):
        return {"nargs": "+", "metavar": "URL"}
    if words := [word for other in others if get_origin(other) is Literal for word in get_args(other)]:
        return {"type": lambda text: text if text in words else kind(text), "metavar": "|".join(["N", *words])}
    return {"type": kind, "metavar": kind.__name__.upper()}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a JSON object")
    return value
