"""Every code block of README and of the pages runs as it is printed, in order, and links lead somewhere.

``python`` blocks of a page share their names; one with a ``title`` is a file. ``bash`` blocks are run line by line; of
what installs or builds (``make``, ``pip``) other tests see. ``text`` is not run: outputs, mathematics, commands for
models that nobody here has.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import matplotlib
import pytest
import torch
from typer.testing import CliRunner

import secateur as sc
from secateur import cli
from secateur.allocation.contract import STRATEGIES
from secateur.lab.recipe.reference import BEGIN, END, reference
from secateur.methods.contract import METHODS, TRAINING_METHODS
from secateur.repair.contract import REPAIRS
from secateur.scoring.contract import CRITERIA

matplotlib.use("agg")
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r'(?:href|src)="([^"]*)"')
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
KINDS = {"python", "bash", "yaml", "text"}
ELSEWHERE = ("make ", "pip ", "bash ", "python -m pip", "cd ", "git ")
"""Commands that build or install."""
SKIPPED = {"timm wants torchvision, which the tests do without"}


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(found["kind"], found["code"]) for found in FENCE.finditer(page.read_text())]


def runs(page: Path) -> bool:
    return any(kind.split()[0] in {"python", "bash"} for kind, _ in blocks(page) if kind)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page: Path) -> None:
    text = page.read_text()
    assert text.count("\n```") % 2 == 0
    for kind, code in blocks(page):
        assert kind.split(" ")[0] in KINDS, f"{page.name}: ```{kind}\n{code[:80]}"
        if "skip=" in kind:
            assert re.search(r'skip="([^"]+)"', kind)[1] in SKIPPED


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=lambda page: page.stem)
def test_every_block_runs_as_it_is_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    for registry in (CRITERIA, STRATEGIES, REPAIRS, METHODS, TRAINING_METHODS):
        registry.names()
        monkeypatch.setattr(registry, "_known", dict(registry._known))
    for path in (ROOT / "docs" / "extending").glob("*.py"):
        shutil.copy(path, tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": page.stem}
    try:
        for number, (kind, code) in enumerate(blocks(page), 1):
            where = f"{page.name}, block {number}"
            if "skip=" in kind:
                continue
            if title := re.search(r'title="([^"]+)"', kind):  # a file
                (tmp_path / title[1]).write_text(code)
            elif kind.startswith("python"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what a page shows may be told of; that it fails may not
                    exec(compile(code, where, "exec"), names)
            elif kind == "bash":
                for line in code.splitlines():
                    shell(line, where, tmp_path)
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in {"small", "my_net", "words"} or name.startswith("own_"):
                del sys.modules[name]


def shell(line: str, where: str, folder: Path) -> None:
    """A line of a terminal."""
    words = shlex.split(line, comments=True)
    if not words or line.startswith(ELSEWHERE):
        return
    assert words[0] in {"secateur", ".venv/bin/secateur"}, f"{where}: {line}"
    given: list[str] = []
    for word in words[1:]:
        found = sorted(folder.glob(word)) if word.endswith("/*") else []
        given += map(str, found) if found else [word]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 0, f"{where}: {line}\n{done.output}"


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", page.read_text()), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head)).strip().lower().replace(" ", "-")
        for head in heads
    }


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "bench" / "checkpoints" / "README.md"], ids=lambda p: p.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(FENCE, "", page.read_text())):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def test_the_keys_of_a_recipe_are_those_of_its_classes() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    written = page.split(BEGIN)[1].split(END)[0]
    assert written.strip() == reference().strip(), "python -m secateur.lab.recipe.reference"
    assert "|  |" not in written, "a key without a meaning"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it: warnings are errors."""
    out = tmp_path_factory.mktemp("site")
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-f", ROOT / "mkdocs.yml", "-d", out],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begun < 120
    return out


def test_the_site_has_no_dead_link_and_asks_nothing_of_a_network(site: Path) -> None:
    pages = {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    names = {path: set(re.findall(r' (?:id|name)="([^"]+)"', text)) for path, text in pages.items()}
    assert len(pages) > 20
    for path, text in pages.items():
        for target in LINK.findall(text):
            if target.startswith(("https://", "http://", "mailto:", "data:", "javascript:")):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), f"{path.name}: {target}"
            if anchor and there in names:
                assert anchor in names[there] or anchor == "__skip", f"{path.name}: {target}"
        for asked in re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(https?:[^"]*)"', text):
            assert "canonical" in asked, f"{path.name} asks {asked} of a network"


def test_the_reference_has_every_public_name(site: Path) -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    listed = re.findall(r"^::: secateur\.([\w.]+)$", page, re.MULTILINE)
    assert sorted(name.rpartition(".")[2] for name in listed) == sorted(sc.__all__)
    html = (site / "reference.html").read_text()
    assert all(f'id="secateur.{name}"' in html for name in listed) and ":func:" not in html


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text().split("nav:")[1], re.MULTILINE)
    there = {page.name for page in (ROOT / "docs").glob("*.md")} - {"package.md"}
    assert sorted(listed) == sorted(there)


def test_the_page_of_the_package_has_no_link_that_needs_the_repository() -> None:
    assert not re.search(r"\]\((?!https?:)", (ROOT / "docs" / "package.md").read_text())
