"""A criterion, a strategy, a repair and a method of a user's own: from Python, from a recipe, from the command line."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import forked
import secateur as sc
from secateur.lab.models.registry import build

FOLDER = Path(__file__).parents[1] / "docs" / "extending"
FILES = sorted(FOLDER.glob("own_*.py"))
IMAGE = torch.zeros(1, 1, 8, 8)
RECIPE = """
name: own
device: cpu
threads: 1
data: {name: digits, batch_size: 64}
model: {name: digits_cnn, options: {width: 0.25}}
train: {epochs: 1, lr: 0.1}
prune: {PRUNE}
measure: {batch_sizes: [1], repeats: 1}
"""
SEATS = """
  budget: {macs: 0.5}
  criterion: {name: "own_criterion:PowerSum", power: 2}
  strategy: "own_strategy:PowerLaw"
  repair: "own_repair:Rescale"
"""
METHOD = """
  budget: {macs: 0.5}
  method: {name: "own_method:Fading", steps: 10}
  train: {optimizer: {name: sgd, momentum: 0.9}, epochs: 1, lr: 0.01}
"""


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.syspath_prepend(str(FOLDER))
    for registry in (sc.CRITERIA, sc.STRATEGIES, sc.REPAIRS, sc.TRAINING_METHODS):
        registry.names()
        monkeypatch.setattr(registry, "_known", dict(registry._known))  # they are no others' afterwards
    for path in FILES:
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return {path.stem: importlib.import_module(path.stem) for path in FILES}


def command(folder: Path, *words: str) -> str:
    done = forked.run(forked.command, *words, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_is_a_short_file_and_printed_in_the_docs() -> None:
    assert [path.stem for path in FILES] == ["own_criterion", "own_method", "own_repair", "own_strategy"]
    page = (FOLDER.parent / "extending.md").read_text()
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 25 and text.rstrip() in page, path.name


def test_from_python(own: dict) -> None:
    torch.manual_seed(0)
    model = build("digits_cnn", width=0.25)
    seats = {
        "criterion": own["own_criterion"].PowerSum(power=2), "strategy": own["own_strategy"].PowerLaw(),
        "repair": own["own_repair"].Rescale(),
    }  # fmt: skip
    result = sc.prune(model, IMAGE, sc.Budget(macs=0.5), **seats)
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.facts["chosen"]["criterion"] == {"name": "power_sum", "power": 2}
    assert result.facts["rescaled"]
    named = sc.prune(
        model, IMAGE, sc.Budget(macs=0.5), criterion={"name": "power_sum", "power": 2}, strategy="power_law",
        repair="rescale",
    )  # fmt: skip
    assert named.plan == result.plan
    with pytest.raises(sc.SecateurError, match="power=-1"):
        own["own_criterion"].PowerSum(power=-1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = sc.TRAINING_METHODS.make("fading", {"steps": 5}).attach(
        model, sc.trace(model, IMAGE), optimizer, sc.Budget(macs=0.5)
    )
    while not handle.done:
        optimizer.zero_grad()
        model(torch.randn(8, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        handle.step()
    small = sc.cut(model, handle.plan())
    torch.testing.assert_close(small.eval()(IMAGE + 1), model.eval()(IMAGE + 1))


@pytest.mark.parametrize("prune", [SEATS, METHOD], ids=["seats", "method"])
def test_from_a_recipe(tmp_path: Path, prune: str) -> None:
    for path in FILES:
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "own.yaml").write_text(RECIPE.replace(" {PRUNE}", prune))
    command(tmp_path, "run", "own.yaml", "--out", "run", "--quiet")
    found = json.loads((tmp_path / "run" / "run.json").read_text())["seeds"]["0"]
    assert found["after"]["macs"] <= 0.5 * found["before"]["macs"]


def test_from_the_command_line(tmp_path: Path) -> None:
    for path in FILES:
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "own.yaml").write_text(RECIPE.replace("{PRUNE}", "{budget: {macs: 0.5}}"))
    command(
        tmp_path, "run", "own.yaml", "prune.criterion=own_criterion:PowerSum", "prune.strategy=own_strategy:PowerLaw",
        "prune.repair=own_repair:Rescale", "--out", "run", "--quiet",
    )  # fmt: skip
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["seeds"]["0"]["stages"]["pruned"]
    assert [facts["chosen"][seat]["name"] for seat in ("criterion", "strategy")] == ["power_sum", "power_law"]
    assert facts["chosen"]["repair"][0]["name"] == "rescale"
