"""A flag for each field of `CoordinatorConfig`, and a YAML file of the same keys that flags override."""

from __future__ import annotations

import argparse
import functools
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from dual_rollout.config import CoordinatorConfig, field_hints
from dual_rollout.field_types import expected, from_text
from dual_rollout.yaml_file import read_mapping

_PREFIX = "config_"


def add_config_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """`--config FILE.yaml`, and `--top-k` for `top_k` and so on; `defaults` are the command's own."""
    group = parser.add_argument_group(
        "servers and sampling", "The fields of CoordinatorConfig, by name; flags override the file."
    )
    group.add_argument("--config", metavar="FILE.yaml", help="a mapping of these fields, such as top_k: 100")
    for spec in fields(CoordinatorConfig):
        value = defaults.get(spec.name, spec.default)
        default = "" if value is None else f" Default: {value}."
        group.add_argument(
            f"--{spec.name.replace('_', '-')}",
            dest=_PREFIX + spec.name,
            default=argparse.SUPPRESS,
            help=(spec.metadata["help"] + default).replace("%", "%%"),
            **_flag_of(field_hints()[spec.name]),
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
    if any(get_origin(other) is list for other in others):
        return {"nargs": "+", "metavar": "URL"}
    words = [word for other in others if get_origin(other) is Literal for word in get_args(other)]
    name = "JSON" if get_origin(kind) is dict else "|".join(["N", *words]) if words else kind.__name__.upper()
    return {"type": functools.partial(_parse, hint), "metavar": name}


def _parse(hint: Any, text: str) -> Any:
    try:
        return from_text(text, hint)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be {expected(hint)}: {error}") from error
