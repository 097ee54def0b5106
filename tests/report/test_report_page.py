"""The page of a result, of a run and of an answer: one file that needs nothing else and answers what a reader asks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import secateur as sc
from secateur import cli
from secateur.report.charts import line_chart, scatter_chart, score_chart
from secateur.report.of_result import page_of_result
from secateur.report.page import Page, Section, Table, Text, render, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "rect", "line", "circle", "polyline", "img", "br"}


class Strict(HTMLParser):
    """HTML whose tags are closed in their order, and what it asks of the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href"} and not (value or "").startswith(("data:", "#")):
                self.outside.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def checked(html: str) -> Strict:
    """Well-formed, and whole in itself."""
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert not parser.open and not parser.outside
    assert not re.search(r"https?://(?!arxiv)", html)
    return parser


class Net(nn.Module):
    """Convolutions with norms around a sum, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.inner, self.outer, self.head = nn.Conv2d(12, 20, 3), nn.Conv2d(20, 12, 3, padding=2), nn.Linear(12, 4)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))


@pytest.fixture(scope="module")
def result() -> sc.Result:
    torch.manual_seed(0)
    data = [torch.randn(16, 1, 8, 8) for _ in range(3)]
    return sc.prune(Net(), torch.zeros(1, 1, 8, 8), sc.Budget(macs=0.5), data=data)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two seeds and a fine-tune."""
    out = tmp_path_factory.mktemp("runs") / "one"
    words = ["seeds=[0,1]", "model.options.width=0.5", "train.epochs=2", "finetune.epochs=1"]
    found = CliRunner().invoke(cli.app, ["run", "digits-taylor", *words, "--out", str(out), "--quiet"])
    assert found.exit_code == 0, found.output
    return out


def test_a_result_is_told_whole(result: sc.Result, tmp_path: Path) -> None:
    html = result.report(tmp_path / "r.html").read_text()
    assert {"h1", "table", "svg", "details"} <= checked(html).seen
    for words in ("Net", "first", "inner", "schur", "refit", "belongs to the model", "name what matters", "hatch"):
        assert words in html, words
    macs = 100 * result.after.macs / result.before.macs
    assert f"{macs:.1f} % of the MACs" in html and f"{result.before.macs:,}" in html
    json.dumps(result.as_data(), allow_nan=False)


def test_a_result_without_a_graph_is_told_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(4, (16,))) for _ in range(3)]
    found = sc.eigendamage(Net(), torch.zeros(1, 1, 8, 8), sc.Budget(params=0.5), data=batches, loss="cross_entropy")
    html = found.report(tmp_path / "r.html", title="In the eigenbasis").read_text()
    checked(html)
    assert "In the eigenbasis" in html and "outer" in html and "eigendamage" in html


def test_what_a_model_calls_itself_is_no_html(result: sc.Result) -> None:
    data = result.as_data()
    data["layers"][0]["layer"] = "<script>alert(1)</script>"
    data["facts"]["notices"] = ["<b>bold</b>"]
    html = render(page_of_result(data, title="<i>"))
    checked(html)
    assert "<script>alert" not in html and "<b>bold" not in html and "<i>" not in html


def test_scores_and_rises_that_are_not_finite_are_drawn(result: sc.Result) -> None:
    data = result.as_data()
    data["groups"][0]["scores"][0][0] = None
    data["groups"][0]["rises"] = [[0, 0.0], [1, None], [2, 3.0]]
    checked(render(page_of_result(data)))


QUESTIONS = {
    "was it chosen by the test images": ("held out", "The test examples are looked at here alone"),
    "what did pruning cost before the fine-tuning": ("pruned",),
    "is the small network the masked one": ("Masked and cut network differ by",),
    "is it faster, on what, how sure": ("times as fast", "quartiles", "1 thread", "median of"),
    "what was left alone, and why": ("Frozen, which cannot be removed", "what can be done"),
    "can I do it again": ("secateur run digits-taylor", "torch 2.", "seeds", "The recipe, defaults included"),
    "on what data": ("lossless",),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_sceptic_is_answered(run_folder: Path, question: str) -> None:
    html = (run_folder / "report.html").read_text()
    for words in QUESTIONS[question]:
        assert words in html, words


def test_every_seed_and_setting_of_a_run_is_there(run_folder: Path) -> None:
    html = (run_folder / "report.html").read_text()
    checked(html)
    run = json.loads((run_folder / "run.json").read_text())
    for seed, found in run["seeds"].items():
        for column in ("before", "pruned", "after"):
            assert f"<td>{100 * found[column]['test_accuracy']:.2f} %</td>" in html, (seed, column)
        before, after = (sum(row["macs"][at] for row in found["layers"]) for at in (0, 1))
        assert before == found["before"]["macs"] > after == found["after"]["macs"]
    for name in run["recipe"]:
        assert name in html
    assert len(html) < 3_000_000


def test_the_command_writes_it_again_and_figures_are_in_it(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "figures").mkdir(exist_ok=True)
    (run_folder / "figures" / "valley.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    found = CliRunner().invoke(cli.app, ["report", str(run_folder), "--out", str(tmp_path / "x.html")])
    assert found.exit_code == 0, found.output
    html = (tmp_path / "x.html").read_text()
    assert "valley" in html and "data:image/svg+xml;base64" in html


BAD = {
    "nothing": (lambda at: at / "none", "is no folder"),
    "a folder of others": (lambda at: at, "is a folder that is no run"),
    "a file": (lambda at: at / "file", "is a file"),
    "a damaged run": (lambda at: at / "damaged", "is damaged"),
    "an unfinished run": (lambda at: at / "unfinished", "is not finished"),
    "a saved model": (lambda at: at / "saved", "saved without what a report tells"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_page_is_told(case: str, tmp_path: Path) -> None:
    where, words = BAD[case]
    (tmp_path / "file").write_text("x")
    for name, text in (("damaged", "{"), ("unfinished", '{"secateur_run": 1, "finished": false}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    sc.save(sc.prune(Net(), torch.zeros(1, 1, 8, 8), sc.Budget(macs=0.5)).model, tmp_path / "saved")
    found = CliRunner().invoke(cli.app, ["report", str(where(tmp_path)), "--out", str(tmp_path / "x.html")])
    assert found.exit_code == 2 and found.output.count("secateur:") == 1 and words in found.output
    assert not (tmp_path / "x.html").exists()


def test_where_no_page_can_be_is_told(tmp_path: Path) -> None:
    page = Page("t", "v")
    with pytest.raises(sc.SecateurError, match="there is no folder"):
        write_page(page, tmp_path / "none" / "x.html")
    with pytest.raises(sc.SecateurError, match="is a folder"):
        write_page(page, tmp_path)


def test_sections_without_blocks_are_left_out() -> None:
    html = render(Page("t", "v", sections=[Section("Empty", [None]), Section("Full", [Text("here")])]))
    assert "Empty" not in html and "Full" in html


def test_charts_take_anything() -> None:
    nan = float("nan")
    for svg in (
        line_chart({"a": [(0, 1), (1, nan)], "b": []}, "x", "y"),
        line_chart({"a": [(1, 2)]}, "x", "y"),
        line_chart({}, "x", "y"),
        line_chart({"a": [(0, 1e-9), (1, 1e9)]}, "<x>", 'y"'),
        scatter_chart({"a": [(1, 2, 0, 0), (3, nan, 0, 0)], "b": []}, "x", "y", {"a": [(1, 1.5)]}),
        scatter_chart({}, "x", "y"),
        score_chart([]),
        score_chart([(nan, 1.0), (0.0, 0.0), (-1.0, 1.0)]),
    ):
        checked(f"<html>{svg}</html>")
        assert "nan" not in svg.replace("finite", "")


PROBE = """<script>
const drawn = [...document.querySelectorAll("figure svg, .layer svg")].filter(s => !s.closest("details"));
const bad = drawn.filter(s => !s.getBoundingClientRect().height);
for (const table of document.querySelectorAll("table")) table.tHead.rows[0].cells[0].click();
const first = document.querySelector("table");
first.tHead.rows[0].cells[0].click();
const names = [...first.tBodies[0].rows].map(r => r.cells[0].textContent);
document.body.innerHTML = "PROBE" + JSON.stringify({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth, inner: innerWidth, bad: bad.length,
  sorted: JSON.stringify(names) === JSON.stringify([...names].sort((a, b) => b.localeCompare(a))),
}) + "PROBE";
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: what a browser draws is not looked at")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it(run_folder: Path, tmp_path: Path, width: int) -> None:
    html = (run_folder / "report.html").read_text()
    for extra in ("", "<script>for (const d of document.querySelectorAll('details')) d.open = true;</script>"):
        page = tmp_path / "page.html"
        page.write_text(html.replace("</body>", f"{extra}{PROBE}</body>"))
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
             f"--user-data-dir={tmp_path / 'chromium'}", f"--window-size={width},1000", page.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert "CONSOLE" not in done.stderr, done.stderr
        found = json.loads(done.stdout.split("PROBE")[1])
        assert found["bad"] == 0 and found["sorted"]
        assert found["wide"] <= 0, f"{found['wide']} px wider than a window of {found['inner']}"


def test_a_table_has_names_for_its_columns() -> None:
    html = render(Page("t", "v", sections=[Section("s", [Table(["a", "b"], [["x", ("1 k", 1000.0)]])])]))
    assert 'data-by="1000.0"' in html and html.count('scope="col"') == 2


def test_what_a_search_learned_is_drawn(result: sc.Result) -> None:
    data = result.as_data()
    rows = [
        {"group": "first", "width": width, "of": 12, "gap": gap, "plays": 3, "active": width != 4, "found": width == 8}
        for width, gap in ((4, 0.3), (8, 0.0), (12, 0.1))
    ]
    data["facts"]["search"] = {"forwards": 90, "started": "uniform", "table": rows}
    html = render(page_of_result(data))
    checked(html)
    assert "What the search learned" in html and "data:image/svg+xml;base64," in html and "ruled out" in html
    data["facts"]["search"] = {"forwards": 0, "table": []}
    assert "What the search learned" not in render(page_of_result(data))


def test_what_was_measured_of_every_width_is_drawn_beside_what_was_predicted() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(16, 1, 8, 8), torch.randint(4, (16,))) for _ in range(3)]
    found = sc.prune(
        Net(), torch.zeros(1, 1, 8, 8), sc.Budget(macs=0.5), data=data, loss="cross_entropy",
        strategy=sc.Sensitivity(evaluations=60),
    )  # fmt: skip
    curves = found.facts["sensitivity"]["rises"]
    assert curves.keys() == {g.name for g in found.graph.groups}
    for group in found.graph.groups:
        rows = curves[group.name]
        assert rows[0] == [0, 0.0] and all(0 < n < len(group) for n, _ in rows[1:])
    html = render(page_of_result(found.as_data()))
    checked(html)
    assert "measured" in html and "predicted" in html and "rise of the loss" in html
