"""Claim: CONTRIBUTING.md lists every module in a table, and imports go only up the table, never in a circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

from tests.helpers.repository import ROOT

PACKAGE = ROOT / "repvgg_jax"


def rows() -> list[list[str]]:
    """Return the modules and subpackages (here: rooms) of `repvgg_jax`, row by row."""
    table = re.findall(r"^\| (`repvgg_jax/[^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    return [[Path(name).stem for name in re.findall(r"`([^`]+)`", cell)] for cell in table]


def room_of(module: Path) -> str:
    """Return the name of the module, or of the subpackage that contains it."""
    return Path(module.relative_to(PACKAGE).parts[0]).stem


def imports(module: Path) -> set[tuple[str, ...]]:
    """Return what a module imports from the package, also inside functions: `("net", "fusion", "to_deploy")`."""
    folder = ["repvgg_jax", *module.relative_to(PACKAGE).parts[:-1]]
    names: list[list[str]] = []
    pending: list[ast.AST] = [ast.parse(module.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
            names += [[*origin, alias.name] for alias in node.names]
        if not isinstance(node, ast.If):  # `if TYPE_CHECKING` does not run
            pending += ast.iter_child_nodes(node)
    return {tuple(parts[1:]) for parts in names}


def modules() -> list[Path]:
    return [m for m in PACKAGE.rglob("*.py") if m not in (PACKAGE / "__init__.py", PACKAGE / "version.py")]


def test_every_module_has_a_room():
    listed = [name for row in rows() for name in row]
    assert len(listed) == len(set(listed))
    assert set(listed) == {room_of(module) for module in modules()}


def test_rooms_import_only_from_their_own_row_and_those_above():
    row_of = {name: number for number, row in enumerate(rows()) for name in row}
    seen = 0
    for module in modules():
        for imported in {parts[0] for parts in imports(module)} - {room_of(module), "version"}:
            seen += 1
            assert row_of[imported] <= row_of[room_of(module)], f"{module.relative_to(ROOT)} imports {imported}"
    assert seen > 100


def test_no_module_imports_itself_through_others():
    named = {module.relative_to(PACKAGE).with_suffix("").parts: module for module in modules()}
    named |= {name[:-1]: module for name, module in named.items() if name[-1] == "__init__"}
    graph = {
        module: {named[name] if name in named else named.get(name[:-1]) for name in imports(module)} - {None}
        for module in named.values()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
    assert sum(map(len, graph.values())) > 150
