"""What is imported when: public names at their first use, each module by itself, and nothing heavy at the door."""

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import secateur as sc

SOURCE = ast.parse(Path(sc.__file__).read_text("utf-8"))
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(sc.__path__, "secateur.")
    if module.name != "secateur.__main__"  # it is the command itself
)


def for_type_checkers() -> dict[str, str]:
    """Name to module of what ``__init__`` imports where types are checked."""
    (block,) = (node for node in SOURCE.body if isinstance(node, ast.If))
    return {alias.name: line.module for line in block.body for alias in line.names}


def test_the_three_lists_of_public_names_are_one() -> None:
    at_run_time = {name: f"secateur.{room}" for name, room in sc._ROOM_OF.items()}
    assert at_run_time == for_type_checkers(), "secateur/__init__.py: _ROOMS and the imports for type checkers differ"
    assert sorted(sc.__all__) == sorted(at_run_time), "secateur/__init__.py: __all__ and _ROOMS differ"


def test_every_public_name_is_there_and_no_other() -> None:
    for name in sc.__all__:
        assert getattr(sc, name).__name__ == name or not hasattr(getattr(sc, name), "__name__")
    assert set(sc.__all__) <= set(dir(sc))
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = sc.prun


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_the_first(module: str) -> None:
    """What is imported at its first use is imported in any order, so no module may count on another's import."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "secateur"}
    try:
        importlib.import_module(module)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "secateur"]:
            del sys.modules[name]
        sys.modules.update(kept)


def seconds(code: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begun


def test_the_import_takes_no_longer_than_that_of_torch() -> None:
    """In turn, the best of each so far: what else runs on the machine only ever makes it slower."""
    torch_alone = both = float("inf")
    for _ in range(10):
        torch_alone, both = min(torch_alone, seconds("import torch")), min(both, seconds("import torch, secateur"))
        if both <= 1.15 * torch_alone:
            return
    pytest.fail(f"import torch takes {torch_alone:.2f} s, and with secateur {both:.2f} s")


def test_the_import_brings_nothing_heavy() -> None:
    code = (
        "import sys, secateur; secateur.__version__; "
        "print(sorted({'torch', 'numpy', 'scipy', 'rich', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def imported(path: Path) -> set[str]:
    """The modules that a file imports, for types alone left out."""
    tree = ast.parse(path.read_text("utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    lines = [node for node in ast.walk(tree) if id(node) not in typing]
    whole = {alias.name for node in lines if isinstance(node, ast.Import) for alias in node.names}
    return whole | {
        f"{node.module}.{alias.name}" for node in lines if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_nothing_below_the_lab_imports_it() -> None:
    """Only the command line is above: ``load`` knows the built-in networks by a name that the lab registers."""
    root = Path(sc.__file__).parent
    below = [p for p in root.rglob("*.py") if p.relative_to(root).parts[0] not in {"lab", "cli.py", "__main__.py"}]
    up = {str(p.relative_to(root)): [n for n in imported(p) if n.startswith("secateur.lab")] for p in below}
    assert len(up) > 90 and not {path: names for path, names in up.items() if names}
