"""What is imported when: public names at their first use, each module by itself, and nothing heavy at the door."""

import ast
import os
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import secateur as sc

SOURCE = ast.parse(Path(sc.__file__).read_text("utf-8"))
FOUND = [module for module in pkgutil.walk_packages(sc.__path__, "secateur.") if module.name != "secateur.__main__"]
MODULES = sorted(module.name for module in FOUND)
ROOMS = sorted(module.name for module in FOUND if module.ispkg)


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
        assert getattr(getattr(sc, name), "__name__", name) == name
    assert set(sc.__all__) <= set(dir(sc))
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = sc.prun


EACH_FIRST = """
import importlib, sys
for module in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "secateur"]:
        del sys.modules[name]
    try:
        importlib.import_module(module)
    except Exception as error:
        print(f"{module}: {type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("modules", [ROOMS, pytest.param(MODULES, marks=pytest.mark.slow)], ids=["rooms", "modules"])
def test_every_one_can_be_the_first(modules: list[str]) -> None:
    """What is imported at its first use is imported in any order, so no module may count on another's import."""
    done = subprocess.run([sys.executable, "-c", EACH_FIRST, *modules], capture_output=True, text=True, check=True)
    assert len(modules) > 20 and done.stdout == ""


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


def test_a_trace_brings_no_compiler() -> None:
    """PyTorch's takes longer to import than PyTorch itself, and a trace wants none of it."""
    code = (
        "import sys, torch, secateur as sc; from torch import nn; "
        "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)); "
        "x = torch.randn(1, 3, 8, 8); print(len(sc.prune(model, x, sc.Budget(macs=0.5)).plan)); "
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "False"]


def test_the_import_brings_nothing_heavy() -> None:
    code = (
        "import sys, secateur; secateur.__version__; "
        "print(sorted({'torch', 'numpy', 'scipy', 'rich', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
