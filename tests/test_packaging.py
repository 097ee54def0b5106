"""What is built, what it brings, and that the core of it works where the lab's packages are not installed."""

import email
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {"torch", "numpy", "scipy", "safetensors", "jaxtyping", "rich", "typer"}
LAB = {
    "accelerate",
    "pydantic",
    "PyYAML",
    "pyarrow",
    "Pillow",
    "huggingface_hub",
    "scikit-learn",
    "matplotlib",
    "Jinja2",
}
NOT_COPIED = ("[.]git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs", "*.safetensors")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built from a copy of the project."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_COPIED))
    build = "from setuptools import build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build], cwd=folder / "tree", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "tree")
    return folder


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """The wheel, unpacked as an installer does."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(built / "site")
    return built / "site"


def test_the_wheel_has_the_recipes_and_the_types(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"secateur/lab/recipes/{path.name}" for path in (ROOT / "src/secateur/lab/recipes").glob("*.yaml")}
    assert len(recipes) > 30 and recipes | {"secateur/py.typed"} <= names
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/secateur").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "bench"))]


def test_the_source_distribution_has_docs_and_tests(built: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("docs", "tests"):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md"}}
        assert files and files <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"} <= names


def requirements(installed: Path) -> dict[str, set[str]]:
    """Name of the extra ("" for none) to the distributions it brings."""
    (metadata,) = installed.glob("*.dist-info/METADATA")
    found: dict[str, set[str]] = {}
    for line in email.message_from_string(metadata.read_text("utf-8")).get_all("Requires-Dist", []):
        name = re.match(r"[\w.-]+", line).group()
        extra = re.search(r'extra == "(\w+)"', line)
        found.setdefault(extra.group(1) if extra else "", set()).add(name)
    return found


def test_what_an_installation_brings(installed: Path) -> None:
    found = requirements(installed)
    assert found[""] == CORE and found["lab"] == LAB
    assert "secateur" in found["dev"]  # the lab
    assert found["onnx"] == {"onnx", "onnxscript", "onnxruntime"}
    assert found["ray"] == {"secateur", "ray"}
    assert set(found) == {"", "lab", "onnx", "ray", "dev", "bench"}


BLOCKED = """
import sys

class Without:
    'A finder that finds nothing under some names, as if it were not installed.'
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {names!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
CORE_AT_WORK = """
import torch, secateur as sc
from pathlib import Path

assert Path(sc.__file__).is_relative_to(sys.argv[1]), sc.__file__
torch.manual_seed(0)
model, images = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)), torch.randn(5, 8)
data = [(images, torch.arange(5) % 4)]
graph = sc.trace(model, images)
plan = sc.allocate(graph, sc.score(model, graph), sc.Budget(macs=0.5))
sc.save(sc.cut(model, plan), "small")
small = sc.load("small", build=lambda: torch.nn.Sequential(
    torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)))
assert sc.trace(small, images).macs() <= 0.5 * graph.macs()
for name in sc.__all__:
    getattr(sc, name)
print("done")
"""


def plain(name: str) -> str:
    """The name of a distribution as packagers compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def brought_by(names: set[str]) -> set[str]:
    """Distributions and all that they need themselves."""
    found, left = set(), {plain(name) for name in names}
    while left:
        name = left.pop()
        found.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another system, say
            continue
        left |= {plain(re.match(r"[\w.-]+", line).group()) for line in needed if "extra ==" not in line} - found
    return found


def lab_modules() -> set[str]:
    """The names under which what the lab alone brings is imported; typer, say, may need pydantic itself."""
    owned = {plain(name) for name in LAB} - brought_by(CORE)
    found = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if owned & {plain(owner) for owner in owners}
    }
    assert {"yaml", "PIL", "sklearn", "accelerate"} <= found and not {"torch", "numpy", "rich"} & found
    return found


def without_the_lab(code: str, installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = BLOCKED.format(names=lab_modules()) + code
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, env={"PYTHONPATH": str(installed), "NO_COLOR": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_core_works_without_the_packages_of_the_lab(installed: Path, tmp_path: Path) -> None:
    done = without_the_lab(CORE_AT_WORK, installed, tmp_path, str(installed))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_where_the_lab_is_missing_one_error_names_the_extra(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib, secateur
for name in ("lab.recipe", "lab.run", "lab.training.loop", "lab.run.api", "lab.recipe.reading"):
    try:
        importlib.import_module(f"secateur.{name}")
        print("no error")
    except secateur.SecateurError as error:
        assert isinstance(error, ImportError)
        print(error)
from secateur.lab.data import load
try:
    load("digits")
except secateur.SecateurError as error:
    print(error)
"""
    done = without_the_lab(code, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert re.fullmatch(r".* needs \w+, which is not installed: pip install .secateur\[lab\].", line)


COMMAND = "from secateur.cli import main; main()"


def test_the_command_works_without_the_lab_where_it_needs_none_of_it(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "nets_of_mine.py").write_text(
        "from torch import nn\n\n"
        "def make(width=8):\n"
        "    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))\n"
    )
    code = """
import sys
from secateur.cli import app
sys.path.append("")
import nets_of_mine, secateur
secateur.save(nets_of_mine.make(), "saved")
for words in (
    ["--version"],
    ["--help"],
    ["inspect", "lenet5"],
    ["inspect", "nets_of_mine:make", "width=3", "--input", "1,4"],
    ["inspect", "saved", "--build", "nets_of_mine:make", "--input", "1,4"],
):
    print("---")
    app(words, standalone_mode=False)
"""
    done = without_the_lab(code, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("---\n")) == 6 and all(done.stdout.split("---\n")[1:])
    for words in (["run", "digits-taylor"], ["list"]):
        done = without_the_lab(COMMAND, installed, tmp_path, *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install 'secateur[lab]'" in done.stderr


def test_recipes_are_listed_and_run_from_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    def secateur(*words: str) -> subprocess.CompletedProcess[str]:
        program = "import secateur.cli as cli, sys; print(cli.__file__, file=sys.stderr); cli.main()"
        return subprocess.run(
            [sys.executable, "-c", program, *words], cwd=tmp_path, env={"PYTHONPATH": str(installed), "NO_COLOR": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    listed = secateur("list", "recipes")
    assert str(installed) in listed.stderr and "digits-taylor" in listed.stdout.split(": ")[1].split(", ")
    words = ["train.epochs=1", "finetune.epochs=1", "measure.repeats=1"]
    done = secateur("run", "digits-taylor", *words)
    assert done.returncode == 0 and "test accuracy" in done.stdout, done.stderr
    assert (tmp_path / "runs" / "digits-taylor" / "run.json").exists()
