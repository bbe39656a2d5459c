"""Lower layers never import higher ones, and heavy libraries stay where they belong. Read from the source."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dual_rollout"
FILES = sorted(PACKAGE.rglob("*.py"))

# What the files of a layer may import of this package, besides their own layer.
_DATA = {"types", "record", "exceptions", "config"}
ALLOWED: dict[str, set[str]] = {
    "record": set(),
    "exceptions": set(),
    "types": {"record"},
    "field_types": set(),
    "config": {"types", "exceptions", "field_types"},
    "yaml_file": set(),
    "functional": {"types", "config"},
    "prompts": {"types"},
    "text": {"types", "prompts"},
    "engine": {"types"},
    "prompt_encoder": {"types", "config", "text", "engine"},
    "decoding": _DATA | {"functional", "engine"},
    "servers": {"types", "exceptions", "config", "functional", "engine"},
    "tokens": {"exceptions", "servers", "engine"},
    "preflight": {"exceptions", "config", "servers", "engine", "tokens"},
    "samplers": _DATA | {"text", "engine", "prompt_encoder", "decoding", "servers", "preflight"},
    "stats": {"prompt_encoder", "decoding", "servers"},
    "coordinator": _DATA | {"text", "engine", "prompt_encoder", "decoding", "servers", "samplers", "stats"},
    "benchmark": {"config", "text", "servers", "coordinator"},
    "production": _DATA | {"prompts", "decoding", "preflight", "coordinator"},
    "server": {"types", "exceptions"},
    "native": {"types", "exceptions", "config", "functional"},
    "training": _DATA
    | {"field_types", "yaml_file", "functional", "prompts", "text", "servers", "decoding", "coordinator", "server"},
}

# Of libraries outside the standard one, what these layers may import at all. Others are bound by HOME below.
LIBRARIES: dict[str, set[str]] = {
    "types": {"numpy"},
    "exceptions": set(),
    "record": set(),
    "config": {"numpy"},
    "engine": {"numpy"},
    "functional": {"numpy"},
    "servers": {"numpy", "aiohttp", "orjson", "tenacity"},
    "decoding": {"numpy"},
}

# Layers a library may be imported in; with "(late)" inside functions only.
HOME: dict[str, set[str]] = {
    "trl": {"training", "cli (late)"},
    "vllm": {"native"},
    "torch": {"server", "training", "native", "cli (late)"},
    "transformers": {"server", "training", "native", "text (late)", "cli (late)"},
    "aiohttp": {"servers", "server"},
    "datasets": {"production", "training"},
    "pyarrow": {"production"},
}


@dataclass(frozen=True)
class Import:
    file: str
    layer: str
    module: str
    late: bool

    def __str__(self) -> str:
        return f"{self.file} imports {self.module}"


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(path: Path) -> list[Import]:
    relative = path.relative_to(PACKAGE.parent)
    layer = layer_of(".".join(relative.with_suffix("").parts))
    found = []

    def visit(node: ast.AST, late: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, ast.Import):
            found.extend(Import(str(relative), layer, alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            of_package = node.module == "dual_rollout"
            found.extend(Import(str(relative), layer, name, late) for name in (names if of_package else [node.module]))
        for child in ast.iter_child_nodes(node):
            visit(child, late)

    visit(ast.parse(path.read_text(encoding="utf-8")), late=False)
    return found


IMPORTS = [found for path in FILES for found in imports_of(path)]


def test_the_package_is_found():
    assert {found.layer for found in IMPORTS} >= set(ALLOWED) - {"native"}


def test_every_file_has_a_layer():
    layers = {layer_of(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)) for path in FILES}
    assert layers <= {*ALLOWED, "cli", "__init__"}


@pytest.mark.parametrize("layer", ALLOWED)
def test_no_layer_imports_a_higher_one(layer):
    wrong = [
        str(found)
        for found in IMPORTS
        if found.layer == layer
        and found.module.split(".")[0] == "dual_rollout"
        and layer_of(found.module) not in ALLOWED[layer] | {layer, "__version__"}
    ]
    assert wrong == []


@pytest.mark.parametrize("layer", LIBRARIES)
def test_low_layers_need_few_libraries(layer):
    wrong = [
        str(found)
        for found in IMPORTS
        if found.layer == layer
        and (top := found.module.split(".")[0]) not in sys.stdlib_module_names
        and top not in LIBRARIES[layer] | {"dual_rollout"}
    ]
    assert wrong == []


@pytest.mark.parametrize("library", HOME)
def test_heavy_libraries_stay_at_home(library):
    wrong = [
        str(found)
        for found in IMPORTS
        if found.module.split(".")[0] == library
        and found.layer not in HOME[library]
        and not (found.late and f"{found.layer} (late)" in HOME[library])
    ]
    assert wrong == []


def test_commands_import_nothing_heavy_until_they_run():
    allowed = {
        "dual_rollout",
        "dual_rollout.cli",
        "dual_rollout.config",
        "dual_rollout.exceptions",
        "dual_rollout.field_types",
        "dual_rollout.types",
        "dual_rollout.yaml_file",
    }
    wrong = [
        str(found)
        for found in IMPORTS
        if found.layer == "cli"
        and not found.late
        and found.module.split(".")[0] not in sys.stdlib_module_names
        and not found.module.startswith("dual_rollout.cli")
        and found.module not in allowed | {"dual_rollout.__version__"}
    ]
    assert wrong == []
