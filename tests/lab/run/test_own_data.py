"""Recipes with a user's own data, loss and metric: batches of any kind, a metric of which less may be better."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur import cli

CODE = """
import torch
from torch import nn
from torch.nn import functional as F

class Out(dict):
    __getattr__ = dict.__getitem__

class Tagger(nn.Module):
    # takes dicts as those of Hugging Face, gives logits and, with labels, its loss
    def __init__(self, width=16):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(12, 8), nn.Linear(8, width), nn.Linear(width, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.inner(self.table(input_ids)).relu())
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Out(logits=logits, loss=loss)

def tagger(width=16):
    return Tagger(width)

def splits(words=48):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(12, (words, 6), generator=g)
    def part(rows):
        return [{"input_ids": ids[i:i + 8], "labels": ids[i:i + 8] % 3} for i in rows]
    return {"train": part(range(0, words // 2, 8)), "validation": part([words // 2]),
            "test": part(range(words // 2 + 8, words, 8)), "notes": "made of nothing"}

def shuffled(seed):
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist()
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    return [(x[16 * i:16 * i + 16], x[16 * i:16 * i + 16].sum(1, keepdim=True)) for i in order]

def line():
    return {"train": shuffled, "test": shuffled(9)}

def net():
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 1))

@torch.no_grad()
def perplexity(model, batches):
    losses = [float(model(**batch).loss) for batch in batches]
    return float(torch.tensor(losses).mean().exp())

@torch.no_grad()
def off(model, batches):
    assert not model.training
    return sum(float((model(x) - y).abs().mean()) for x, y in batches) / len(batches)

def absolute(outputs, targets):
    return (outputs - targets).abs().mean()

def raises(model, batches):
    raise KeyError("word")

def nan(model, batches):
    return float("nan")

def text(model, batches):
    return "good"

def alone(model):
    return 1.0

def broken():
    raise OSError("no disk")

def wrong():
    return {"train": [1], "tset": []}

def once():
    return {"train": iter([]), "test": []}

def empty():
    return {"train": [], "test": []}

def nothing():
    return 7
"""

TAGGER = """
name: tagger
device: cpu
threads: 1
data: {name: "own_task:splits", options: {words: 64}}
model: {name: "own_task:tagger"}
train: {epochs: 3, lr: 0.05, optimizer: adamw}
prune: {budget: {params: 0.7}}
finetune: {epochs: 1, lr: 0.01, optimizer: adamw}
measure: {batch_sizes: [1, 3], repeats: 1, metric: {function: "own_task:perplexity", better: lower}}
"""
LINE = """
name: line
device: cpu
threads: 1
data: {name: "own_task:line"}
model: {name: "own_task:net"}
loss: own_task:absolute
train: {epochs: 2, lr: 0.01}
prune: {budget: {params: 0.6}, criterion: taylor}
measure: {batch_sizes: [2], repeats: 1, metric: {function: "own_task:off", name: error, unit: m, better: lower}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_task.py").write_text(CODE)
    (tmp_path / "tagger.yaml").write_text(TAGGER)
    (tmp_path / "line.yaml").write_text(LINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_batches_of_hugging_face_and_a_metric_of_which_less_is_better(folder: Path) -> None:
    found = called("run", "tagger.yaml", "--out", "out", "--quiet")
    assert found.exit_code == 0, found.output
    assert "test perplexity" in found.output and "accuracy" not in found.output
    run = json.loads((folder / "out" / "run.json").read_text())
    seed = run["seeds"]["0"]
    assert run["metric"] == {"name": "perplexity", "unit": "", "higher": False, "percent": False}
    assert run["data"] == "made of nothing"
    assert 1.0 < seed["before"]["test_perplexity"] < 3.0 and "validation_perplexity" in seed["after"]
    assert seed["stages"]["pruned"]["chosen"]["criterion"]["name"] == "schur"
    assert seed["after"]["params"] <= 0.7 * seed["before"]["params"] and set(seed["after"]["latency"]) == {"1", "3"}
    html = (folder / "out" / "report.html").read_text()
    assert "test perplexity" in html and "lower is better" in html and "perplexity held out" in html
    assert called("run", "tagger.yaml", "--out", "out", "--quiet").exit_code == 0


def test_a_sweep_and_a_comparison_take_it(folder: Path) -> None:
    found = called(
        "sweep", "tagger.yaml", "prune.budget.params=[0.8,0.6]", "finetune=null", "--alone", "--quiet", "--out", "s"
    )
    assert found.exit_code == 0, found.output
    told = json.loads(called("compare", *sorted((folder / "s" / "cells").iterdir()), "--format", "json").output)
    assert all("test_perplexity" in e["metrics"] for e in told["entries"])
    html = (folder / "s" / "report.html").read_text()
    assert "Lowest test perplexity of the pruned" in html


def test_a_loss_and_an_order_of_ones_own(folder: Path) -> None:
    found = called("run", "line.yaml", "seeds=[0,1]", "--out", "out", "--quiet")
    assert found.exit_code == 0, found.output
    assert "test error" in found.output and " m" in found.output
    run = json.loads((folder / "out" / "run.json").read_text())
    first, second = (run["seeds"][s]["stages"]["baseline"]["history"][0]["loss"] for s in "01")
    assert first != second
    assert called("run", "line.yaml", "--dry-run").exit_code == 0


BAD = {
    "the metric raises": ("line.yaml", ["measure.metric=own_task:raises"], "it fails (KeyError: 'word')"),
    "the metric is nan": ("line.yaml", ["measure.metric=own_task:nan"], "a finite number is expected"),
    "the metric is a word": ("line.yaml", ["measure.metric=own_task:text"], "a number is expected"),
    "the metric takes no batches": ("line.yaml", ["measure.metric=own_task:alone"], "a function of (model, batches)"),
    "no such metric": ("line.yaml", ["measure.metric=own_task:of"], "own_task"),
    "no function": ("line.yaml", ["measure.metric=accuracy"], "package.module:function is expected"),
    "an unknown word": (
        "line.yaml",
        ["measure.metric={function: own_task:off, beter: lower}"],
        "did you mean 'better'",
    ),
    "better is neither": ("line.yaml", ["measure.metric={function: own_task:off, better: less}"], "higher or lower"),
    "no such loss": ("line.yaml", ["loss=absolut"], "package.module:function of (outputs, targets)"),
    "label smoothing": ("line.yaml", ["train.label_smoothing=0.1"], "label_smoothing is for loss cross_entropy"),
    "the data fail": ("line.yaml", ["data.name=own_task:broken"], "no disk"),
    "another split": ("line.yaml", ["data.name=own_task:wrong"], "a dict with train and test"),
    "data for once": ("line.yaml", ["data.name=own_task:once"], "read several times"),
    "no data": ("line.yaml", ["data.name=own_task:empty"], "there is no batch"),
    "no dict": ("line.yaml", ["data.name=own_task:nothing"], "the factory gave int"),
    "options of none": ("line.yaml", ["data.name=digits", "data.options={a: 1}"], "takes none"),
    "accuracy of numbers": ("line.yaml", ["measure.metric=null"], "accuracy"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(case: str, folder: Path) -> None:
    recipe, words, told = BAD[case]
    found = called("run", recipe, *words, "--out", "out", "--quiet")
    assert found.exit_code == 2 and told in found.output, found.output
    assert found.output.count("secateur:") == 1 and "Traceback" not in found.output
