"""What people see of a graph and a plan: it fits their terminal, it is short, and it is escaped."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from small_networks import Run, conv
from torch import nn

import secateur as sc
from secateur.lab.models.registry import build
from secateur.tracing.display import html_table, listed, shortened, text_table, wrapped


@pytest.fixture(scope="module")
def graphs():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 3)
    deep = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Sequential(nn.Linear(16, 16), encoder)))
    return {
        "resnet": sc.trace(build("resnet20"), torch.randn(1, 3, 32, 32)),
        "deep": sc.trace(deep, torch.ones(2, 5, 8)),
    }


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("name", ["resnet", "deep"])
def test_a_summary_fits_the_terminal(graphs, name, width):
    graph = graphs[name]
    text = graph.summary(width)
    assert max(map(len, text.splitlines())) <= width
    assert text == text.rstrip() and all(line == line.rstrip() for line in text.splitlines())
    flat = " ".join(text.split())
    assert f"{graph.macs():,} MACs, {graph.params():,} params" in flat
    for reason in {f.reason for f in graph.frozen} | {g.reason for g in graph.groups}:
        assert reason in flat  # whole words, and whole sentences
    for group in graph.groups:
        assert group.name in text


def test_names_are_whole_where_there_is_room_and_their_ends_are_kept_where_not(graphs):
    graph = graphs["resnet"]
    wide, narrow = graph.summary(200), graph.summary(80)
    assert "stages.0.0.conv1.weight:0, stages.0.0.bn1.weight:0, stages.0.0.bn1.bias:0" in wide
    assert "….0.0.conv1.weight:0 +2" in narrow and "producers" in narrow
    assert "producers and consumers need a wider terminal" in " ".join(graph.summary(40).split())
    assert "…" not in wide


def test_the_width_is_that_of_the_terminal(graphs, monkeypatch):
    for width in (50, 130):
        monkeypatch.setenv("COLUMNS", str(width))
        assert graphs["deep"].summary() == graphs["deep"].summary(width)


def test_axes_that_are_frozen_for_one_reason_are_told_together(graphs):
    graph = graphs["deep"]
    text = graph.summary(80)
    for reason, operation in {(f.reason, f.operation) for f in graph.frozen}:
        count = sum(f.positions for f in graph.frozen if (f.reason, f.operation) == (reason, operation))
        assert f"frozen, {count:,} positions: {reason} ({operation})" in " ".join(text.split())
    assert len(text.splitlines()) < len(graph.frozen)


NAMES = {
    ("layers.0.linear1.weight:0", 25): "layers.0.linear1.weight:0",
    ("layers.0.linear1.weight:0", 24): "….0.linear1.weight:0",
    ("layers.0.linear1.weight:0", 18): "….linear1.weight:0",
    ("layers.0.linear1.weight:0", 17): "….weight:0",
    ("layers.0.linear1.weight:0", 5): "…ht:0",
    ("a.bcdefgh.i.jkl.m.n:0", 18): "a.….i.jkl.m.n:0",
    ("weight:0", 1): "…",
}


@pytest.mark.parametrize(("name", "width"), NAMES)
def test_dotted_names_lose_parts(name, width):
    assert shortened(name, width) == NAMES[name, width]


def test_lists_say_how_many_more_there_are():
    names = ["one", "two", "three"]
    assert [listed(names, w) for w in (15, 14, 11, 10, 8, 5)] == [
        "one, two, three", "one, two +1", "one, two +1", "one +2", "one +2", "…e +2",
    ]  # fmt: skip
    assert listed(names, 100, most=1) == "one +2" and listed([], 9) == ""


def test_a_table_without_lists_shares_the_room():
    rows = [("name", "what"), ("a" * 30, "b" * 4), ("c", "d" * 30)]
    lines = text_table(rows, 30)
    assert [len(line) for line in lines] == [20, 20, 30]
    assert text_table([("name", "what")], 30) == ["name  what"]
    assert wrapped("a long-winded word " + "x" * 12, 12) == ["a", "long-winded", "word", "x" * 12]


def test_html_is_a_plain_table_with_escaped_text():
    parts = {"<script>&": nn.Linear(4, 6), "out": nn.Linear(6, 2)}
    model = Run(lambda m, x: m.out(getattr(m, "<script>&")(x).relu()), **parts)
    graph = sc.trace(model, torch.ones(1, 4))
    plan = sc.make_plan(graph, {"<script>&": [0, 1]}, skipped={"out": "5 < 6 & so on"})
    for text in (graph._repr_html_(), plan._repr_html_()):
        assert text.startswith("<table>") and "<script>" not in text and "&lt;script&gt;&amp;" in text
        assert set(re.findall(r"</?(\w+)", text)) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
        assert len(re.findall("<t[dh]>", text)) == 5 * (2 if "producers" in text else 3)
    assert "<td>6</td><td>2</td><td>4</td>" in plan._repr_html_() and "5 &lt; 6 &amp; so on" in plan._repr_html_()


def test_long_html_tables_say_how_many_rows_are_missing():
    text = html_table([("number",), *((i,) for i in range(100))])
    assert text.count("<tr>") == 1 + 60 + 1 and "and 40 more" in text


def test_reprs_are_one_line():
    model = nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 6), nn.ReLU(), conv(6, 2))
    graph = sc.trace(model, torch.ones(1, 3, 4, 4))
    macs = 16 * 9 * (3 * 8 + 8 * 6 + 6 * 2)
    assert repr(graph) == (
        f"<ChannelGraph: {macs:,} MACs, 772 params, 14 removable channels in 2 groups (1 not exact), 3 frozen axes; "
        "summary() tells more>"
    )
    reason = graph.groups[0].reason
    assert (
        repr(graph.groups[0]) == f"<ChannelGroup '0': 8 channels, not exact: {reason}; written by 0.weight:0, 0.bias:0>"
    )
    assert repr(graph.groups[1]) == "<ChannelGroup '2': 6 channels, exact; written by 2.weight:0, 2.bias:0>"
    plan = sc.make_plan(graph, {"2": [0, 1, 2]}, skipped={"0": graph.groups[0].reason})
    kept = 16 * 9 * (3 * 8 + 8 * 3 + 3 * 2) / macs
    assert repr(plan).startswith(f"<Plan: 3 channels go (2: 3); {kept:.1%} of the MACs and ")
    assert repr(plan).endswith(" of the params stay; 1 group is left alone>")
    assert repr(sc.Plan.from_json(plan.to_json())) == "<Plan: 3 channels go (2: 3); 1 group is left alone>"
    unproven = sc.make_plan(copy.deepcopy(graph), {"2": [0]})
    assert repr(unproven).endswith("; not proven yet>")
    assert repr(sc.make_plan(graph, {})) == "<Plan: nothing goes>"
