"""Arrows between rooms point down, and no module needs itself."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import secateur

ROOT = Path(secateur.__file__).parent
FLOORS = [
    {"_internal"},
    {"tracing", "report"},
    {"plan", "shipping"},
    {"curvature", "measure", "result"},
    {"scoring", "surgery"},
    {"allocation", "repair"},
    {"auto", "storage"},
    {"pruning"},
    {"methods"},
    {"lab", "loops"},
    {"cli"},
    {"__main__"},
]
"""Rooms (packages, and modules beside them) from the ground up. Who is on one floor does not know of each other."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """All modules by their dotted names."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(("secateur", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of secateur that a module imports, wherever in it."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what is for annotations alone is not imported
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if {alias.name for alias in node.names} == {"__version__"}:
                continue  # which needs nothing else of the house
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in inner}
    return {name for name in found if name in known}


def room(module: str) -> str:
    return module.split(".")[1]


GRAPH = {name: imports(path, modules()) for name, path in modules().items() if name != "secateur"}


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in GRAPH} <= FLOOR.keys()


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_arrows_point_down(module: str) -> None:
    for other in GRAPH[module] - {"secateur"}:
        same, down = room(other) == room(module), FLOOR[room(other)] < FLOOR[room(module)]
        assert same or down, f"{module} imports {other}"


def test_no_room_but_the_cellar_asks_for_the_whole_house() -> None:
    assert [name for name, found in GRAPH.items() if "secateur" in found] == []


def test_there_is_no_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in GRAPH.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_a_method_never_imports_another() -> None:
    from secateur.methods.contract import METHODS, TRAINING_METHODS

    methods = {registry.find(name).__module__ for registry in (METHODS, TRAINING_METHODS) for name in registry}
    for name in methods & GRAPH.keys():
        assert not (GRAPH[name] & methods) - {name}


def test_no_package_shadows_a_public_function() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {p.stem for p in ROOT.glob("*.py")}
    functions = {name for name in secateur.__all__ if inspect.isfunction(getattr(secateur, name))}
    assert not packages & functions
