"""Lower layers never import higher ones, and libraries stay where they belong: the table in CONTRIBUTING.md, read from
there, against the imports in the source."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dual_rollout.config import ENGINE_SERVERS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dual_rollout"
FILES = sorted(PACKAGE.rglob("*.py"))

EVERYTHING = "everything"
INSTALLED_AS = {"yaml": "pyyaml"}  # where it is not the name that is imported
BRINGS_US = {"vllm", "fastapi", "triton"}  # an environment of its own, into which this package is installed


@dataclass(frozen=True)
class Row:
    """A row of the table: its modules, what of ours and which libraries they may import; `late`: in functions alone."""

    modules: tuple[str, ...]
    ours: frozenset[str]
    ours_late: frozenset[str]
    libraries: frozenset[str]
    libraries_late: frozenset[str]


@dataclass(frozen=True)
class Import:
    file: str
    layer: str
    module: str
    late: bool

    def __str__(self) -> str:
        return f"{self.file} imports {self.module}{' inside a function' if self.late else ''}"

    @property
    def library(self) -> str | None:
        """What is neither ours nor Python's."""
        top = self.module.split(".")[0]
        return None if top == PACKAGE.name or top in sys.stdlib_module_names else top

    @property
    def ours(self) -> str | None:
        """The module of this package that is imported."""
        name = layer_of(self.module) if self.module.split(".")[0] == PACKAGE.name else ""
        return None if name in ("", "__version__") else name


def names_in(cell: str) -> tuple[frozenset[str], frozenset[str]]:
    """The names in a cell, and those of them in parentheses, apart."""
    late = re.findall(r"\(`?(\w+)`?\)", cell)
    return frozenset(re.findall(r"[\w.]+", re.sub(r"\([^)]*\)", "", cell))), frozenset(late)


def read_table() -> list[Row]:
    lines = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Layers\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [cell.split()[0] for cell in cells[0]] == ["modules", "import", "libraries", "what"]
    return [Row(tuple(re.findall(r"[\w.]+", row[0])), *names_in(row[1]), *names_in(row[2])) for row in cells[2:]]


ROWS = read_table()
NAMED = {name for row in ROWS for name in row.modules}


def layer_of(module: str) -> str:
    """The name in the table: the module's own, where it stands there, else that of the top of what it is in."""
    parts = module.split(".")
    own = ".".join(parts[1:3])
    return own if own in NAMED else parts[1] if len(parts) > 1 else ""


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


IMPORTS = [found for path in FILES for found in imports_of(path) if found.layer != "__init__"]

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.modules[0])


def of(row: Row) -> list[Import]:
    return [found for found in IMPORTS if found.layer in row.modules]


def test_every_module_stands_in_one_row():
    named = [name for row in ROWS for name in row.modules]
    assert sorted(named) == sorted(
        {layer_of(".".join(p.relative_to(ROOT).with_suffix("").parts)) for p in FILES} - {"__init__"}
    )


@each_row
def test_rows_name_only_what_stands_above_them(row):
    above = {name for other in ROWS[: ROWS.index(row)] for name in other.modules}
    assert row.ours <= above and row.ours_late <= {*above, EVERYTHING}


@each_row
def test_no_module_imports_what_its_row_does_not_name(row):
    first = ROWS[:1] if row.modules == ("cli",) else ROWS[:2]  # --help needs nothing heavy
    allowed = {name for other in first if ROWS.index(other) < ROWS.index(row) for name in other.modules}
    allowed |= {*row.modules, *row.ours}
    wrong = [
        str(found)
        for found in of(row)
        if found.ours is not None
        and found.ours not in allowed
        and not (found.late and (EVERYTHING in row.ours_late or found.ours in row.ours_late))
    ]
    assert wrong == [], f"see the row of {', '.join(row.modules)} in CONTRIBUTING.md"


@each_row
def test_libraries_stay_where_the_table_has_them(row):
    wrong = [
        str(found)
        for found in of(row)
        if found.library is not None
        and found.library not in row.libraries
        and not (found.late and found.library in row.libraries_late)
    ]
    assert wrong == [], f"see the row of {', '.join(row.modules)} in CONTRIBUTING.md"


@each_row
def test_the_table_names_nothing_that_is_not_imported(row):
    used = {found.ours for found in of(row)} | {EVERYTHING}
    libraries = {found.library for found in of(row)}
    assert row.ours | row.ours_late <= used
    assert row.libraries | row.libraries_late <= libraries


def test_one_file_chooses_between_engines():
    """And the config, which checks its own keys. Others are given what they need, and ask nobody what he is."""
    asking = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(asks_for_the_engine(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert asking == {"config.py", "samplers/from_config.py"}
    of_one_engine = re.compile(r"dual_rollout\.(native\.client|samplers\.(native|examine_|two|policy).*)")
    wrong = [str(found) for found in IMPORTS if of_one_engine.fullmatch(found.module) and found.layer != "samplers"]
    assert wrong == [], "a class that others could ask for with isinstance"


def asks_for_the_engine(node: ast.AST) -> bool:
    """Whether it compares something with an engine's name, or looks which clients a coordinator has."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    clients = [side for side in sides if re.search(r"(coordinator|servers|_open\(\))\.(theta|t)$", ast.unparse(side))]
    return bool(clients) or any(
        (isinstance(side, ast.Constant) and side.value in ENGINE_SERVERS)
        or (isinstance(side, ast.Attribute) and side.attr in ("engine", "dual_engine"))
        for side in sides
    )


def test_libraries_are_declared():
    """What is imported is asked for by name, and does not merely come with something else."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    always = distributions(setup["options"]["install_requires"])
    extras = distributions("\n".join(setup["options.extras_require"].values()))
    plain = {library for row in ROWS for library in row.libraries} - BRINGS_US
    late = {library for row in ROWS for library in row.libraries_late} - BRINGS_US
    assert {INSTALLED_AS.get(name, name) for name in plain} <= always
    assert {INSTALLED_AS.get(name, name) for name in late} <= always | extras


def distributions(requirements: str) -> set[str]:
    names = re.findall(r"^\s*([\w.-]+)", requirements, re.MULTILINE)
    return {name.lower().replace("-", "_") for name in names}
