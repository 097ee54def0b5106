"""Runs and results side by side: every form says the same, and what differs is told."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
import torch
from pylatexenc.latexwalker import LatexEnvironmentNode, LatexWalker
from torch import nn
from typer.testing import CliRunner

import secateur as sc
from secateur import cli
from secateur.lab.comparing import compare, entry_of_run, terminal_table
from secateur.report.comparison import Comparison, Entry
from secateur.report.page import render


def called(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished runs that differ in their criterion."""
    at = tmp_path_factory.mktemp("runs")
    for name in ("taylor", "magnitude"):
        words = [
            "seeds=[0,1]",
            "model.options.width=0.25",
            "train.epochs=1",
            "finetune=null",
            f"prune.criterion={name}",
        ]
        found = called("run", "digits-taylor", *words, "measure.batch_sizes=[1]", "--out", at / name, "--quiet")
        assert found.exit_code == 0, found.output
    return [at / "taylor", at / "magnitude"]


def test_every_form_has_the_same_numbers(runs: list[Path], tmp_path: Path) -> None:
    data = json.loads(called("compare", *runs, "--format", "json").output)
    assert [e["name"] for e in data["entries"]] == ["taylor", "magnitude"]
    rows = list(csv.DictReader(io.StringIO(called("compare", *runs, "--format", "csv").output)))
    for entry, row, folder in zip(data["entries"], rows, runs, strict=True):
        run = json.loads((folder / "run.json").read_text())
        wanted = run["summary"]["after"]["test_accuracy"]["mean"]
        assert entry["metrics"]["test_accuracy"]["after"]["mean"] == pytest.approx(wanted)
        assert float(row["test_accuracy_after_mean"]) == pytest.approx(wanted)
        assert len(entry["metrics"]["macs"]["after"]["each"]) == 2
        for kind in ("markdown", "latex", "table"):
            told = called("compare", *runs, "--format", kind).output
            assert f"{100 * wanted:.2f}" in told, kind
        html = render(compare(runs).page())
        assert f"{100 * wanted:.2f}" in html and "<circle" in html
    for suffix in ("md", "csv", "tex", "json", "html"):
        out = tmp_path / f"x.{suffix}"
        assert called("compare", *runs, "--out", out).output.strip() == str(out) and out.stat().st_size > 200


def test_the_latex_parses(runs: list[Path]) -> None:
    entry = entry_of_run("a_b & 50% {x} \\ $1 #2 ^~ <|> ±", json.loads((runs[0] / "run.json").read_text()))
    text = Comparison([entry], {"c": "it_failed\nbadly & 100 %"}).latex()
    nodes, *_ = LatexWalker(text, tolerant_parsing=False).get_latex_nodes()
    tabular = next(node for node in nodes if isinstance(node, LatexEnvironmentNode))
    assert tabular.environmentname == "tabular"
    body = re.sub(r"\\[&%$#_{}]", "", text)
    columns = re.search(r"tabular}{(\w+)}", text)[1]
    for line in body.splitlines():
        if line.endswith(r"\\"):
            assert line.count("&") == len(columns) - 1
            assert "$" not in line.replace(r"$\pm$", "").replace(r"$\rightarrow$", "")


def test_markdown_has_as_many_cells_in_every_row(runs: list[Path]) -> None:
    lines = [line for line in compare(runs).markdown().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1 and len(lines) == 4


def test_what_differs_is_told(runs: list[Path]) -> None:
    run = json.loads((runs[0] / "run.json").read_text())
    other = json.loads(json.dumps(run))
    other["recipe"]["data"]["name"], other["seeds"] = "mnist", {"0": other["seeds"]["0"]}
    other["seeds"]["0"]["before"]["test_accuracy"] = 0.5
    found = Comparison([entry_of_run("a", run), entry_of_run("b", other)])
    told = " ".join(found.notes)
    for words in ("data sets", "digits, mnist", "numbers of seeds", "Not all begin with the same network"):
        assert words in told
    assert not Comparison([entry_of_run("a", run)] * 2).notes


def test_results_and_saved_answers_are_compared_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    results = {str(part): sc.prune(model, torch.zeros(1, 4), sc.Budget(params=part)) for part in (0.8, 0.5)}
    found = compare(results)
    assert [e.how for e in found.entries] == ["magnitude/uniform/none"] * 2
    assert found.rows()[1][6] == f"{100 * results['0.5'].after.params / results['0.5'].before.params:.1f} %"
    assert not found.metrics and "side by side" in found.verdict()
    render(found.page())


def test_a_run_without_pruning_and_a_failure_have_a_row(runs: list[Path], tmp_path: Path) -> None:
    words = ["model.options.width=0.25", "train.epochs=1", "finetune=null", "prune={}"]
    assert called("run", "digits-taylor", *words, "--out", tmp_path / "whole", "--quiet").exit_code == 0
    found = compare([*runs, tmp_path / "whole"])
    found = Comparison(found.entries, {"four": "the loss is nan"})
    assert [row[0] for row in found.rows()] == ["taylor", "magnitude", "whole", "four"]
    assert "failed: the loss is nan" in found.markdown() and "four" in found.csv()
    for width in (None, 200, 80, 30):
        terminal_table(found, width)
    render(found.page())


BAD = {
    "nothing there": (["none"], "give the folder of a finished run"),
    "twice the same": (["run", "run"], "named twice"),
    "unfinished": (["unfinished"], "not finished"),
    "no such format": (["run", "--format", "pdf"], "html is expected"),
    "no such file": (["run", "--out", "x.pdf"], "is expected"),
    "html to nowhere": (["run", "--format", "html"], "wants --out"),
    "a table as a file": (["run", "--format", "table", "--out", "x.txt"], "is no file"),
    "no folder": (["run", "--out", "none/x.csv"], "there is no folder"),
    "a folder as a file": (["run", "--out", "unfinished", "--format", "csv"], "it is a folder"),
    "damaged": (["damaged"], "is damaged: it has no recipe"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(case: str, runs: list[Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(runs[0])
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text('{"secateur_run": 1, "finished": false}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text('{"secateur_run": 1, "finished": true}')
    arguments, words = BAD[case]
    found = called("compare", *arguments)
    assert found.exit_code == 2 and words in found.output and found.output.count("secateur:") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "run", "unfinished"]


def test_no_values_give_no_cells() -> None:
    found = Comparison(
        [Entry("a", "net", "", "x", 1, {"macs": [2.0]}, {"macs": [1.0]}), Entry("b", "net", "", "y", 1, {})]
    )
    assert found.rows()[0][5] == "50.0 %" and found.rows()[1][5] == ""
    with pytest.raises(sc.SecateurError, match="nothing is given"):
        Comparison([])
