"""What takes long shows how far it is, where that is asked for, and nothing otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal import progress


def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).eval()
    data = [(torch.randn(16, 6), torch.arange(16) % 3) for _ in range(3)]
    return model, sc.trace(model, data[0][0]), data


def by(strategy):
    def call(model, graph, data, shown):
        scores = sc.score(model, graph)
        given = {"model": model, "data": data, "loss": "cross_entropy", "progress": shown}
        sc.allocate(graph, scores, sc.Budget(macs=0.5, round_to=1), strategy=strategy, **given)

    return call


def measured(model, graph, data, shown):
    sc.measure_latency(model, graph, sc.LatencySettings(samples=4, threads=1), progress=shown)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (by(sc.Bandit(evaluations=40)), ["loss of the whole network", "search of widths: ", " of 40"]),
        (by(sc.Sensitivity(evaluations=24)), ["loss of the whole network", "sensitivity: 24 of 24"]),
        (measured, ["networks timed: 4 of 4"]),
    ],
)
def test_progress_is_shown_where_it_is_asked_for(call, what, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    call(*case(), True)
    shown = capsys.readouterr().err
    assert all(text in shown for text in what)
    call(*case(), False)
    assert capsys.readouterr() == ("", "")


def test_a_trace_that_takes_long_says_so(monkeypatch, capsys):
    """And one that does not says nothing."""
    model, graph, data = case()
    capsys.readouterr()
    sc.trace(model, data[0][0])
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.LateBar("tracing: runs", after=-1.0) as bar:
        bar.step()
        bar.step()
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == ["tracing: runs: 1", "tracing: runs: 2"]
    assert graph.groups
