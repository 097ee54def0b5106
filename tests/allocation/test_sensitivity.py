"""Widths by sensitivity: what is tried, the table of what was measured, and what the layers behind make up for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocation.least_rise import least_rise
from secateur.allocation.problem import fill
from secateur.allocation.search import local_repair
from secateur.allocation.search.evaluator import Evaluator
from secateur.allocation.sensitivity import alone, measured, tried_alone


class Catch:
    """A strategy that keeps the problem it was given."""

    def widths(self, problem, work):
        self.problem = problem
        return problem.least


def problem_of(budget, widths=(12, 16, 20)):
    torch.manual_seed(0)
    sizes = [8, *widths]
    layers = [layer for ins, outs in itertools.pairwise(sizes) for layer in (nn.Linear(ins, outs), nn.ReLU())]
    model, caught = nn.Sequential(*layers, nn.Linear(sizes[-1], 4)), Catch()
    graph = sc.trace(model, torch.zeros(1, 8))
    sc.allocate(graph, sc.score(model, graph, "magnitude"), budget, strategy=caught)
    return caught.problem


@pytest.mark.parametrize("budget", [sc.Budget(macs=0.5), sc.Budget(macs=0.4, round_to=4), sc.Budget(params=0.3)])
@pytest.mark.parametrize("most", [6, 13, 100])
def test_what_was_measured_becomes_a_table_that_never_falls(budget, most):
    problem, rng = problem_of(budget), np.random.default_rng(0)
    tried = tried_alone(problem, most)
    assert sum(map(len, tried)) <= most
    for own in tried:
        assert [taken for _, taken in own] == sorted({taken for _, taken in own})
        assert own[0][1] > 0 and own[-1][1] == problem.count[own[0][0]]  # so any budget that can be met is
    for _ in range(20):
        rises = [np.cumsum(rng.random(len(own)) - 0.2).tolist() for own in tried]  # noise may let them fall
        found = measured(problem, tried, rises)
        assert (found.score >= 0).all()
        for own, some in zip(tried, rises, strict=True):
            table = found.rises[own[0][0]]
            if (np.diff([0.0, *some]) >= 0).all():
                assert [table[taken] for _, taken in own] == pytest.approx(some)
            channels = problem.gone[own[0][0]]
            at = [0, *(taken for _, taken in own)]
            assert np.interp(channels, channels[at], table[at]) == pytest.approx(table)


def test_a_group_that_does_not_matter_goes_first():
    problem = problem_of(sc.Budget(channels=0.8))
    tried = tried_alone(problem, 100)
    rises = [[0.0 if own[0][0] == 1 else 1.0 + number for number in range(len(own))] for own in tried]
    found = least_rise(measured(problem, tried, rises))
    assert found[1] > 0 and found[0] == found[2] == 0


def test_fewer_than_two_widths_a_group_are_none():
    problem = problem_of(sc.Budget(macs=0.5))
    assert tried_alone(problem, 5) == []
    assert [len(own) for own in tried_alone(problem, 6)] == [2, 2, 2]


def test_the_strategy_takes_what_a_loss_rises_by():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [(torch.randn(16, 8), torch.randint(0, 4, (16,))) for _ in range(6)]
    graph, budget = sc.trace(model, data[0][0]), sc.Budget(macs=0.5, round_to=1)
    scores, caught = sc.score(model, graph, "magnitude"), Catch()
    sc.allocate(graph, scores, budget, strategy=caught)
    problem = caught.problem
    tried = tried_alone(problem, 64)
    chosen = np.random.default_rng(3).permutation(6)[::-1][:4]  # all of it on four of the six batches

    def rise(one):
        gone = problem.start - problem.widths(alone(problem, *one))
        removed = {graph.groups[i].name: problem.orders[i][: gone[i]] for i in np.flatnonzero(gone)}
        small, loss = sc.cut(model, sc.make_plan(graph, removed)), nn.functional.cross_entropy
        with torch.no_grad():
            return np.mean([float(loss(small(x), y) - loss(model(x), y)) for x, y in (data[b] for b in chosen)])

    due = fill(problem, least_rise(measured(problem, tried, [[rise(one) for one in own] for own in tried])))
    work = sc.Workload(model, data, "cross_entropy")
    plan = sc.allocate(graph, scores, budget, strategy=sc.Sensitivity(evaluations=64, seed=3, repair=False), work=work)
    assert graph.kept(plan).tolist() == problem.widths(due).tolist()
    assert work.forwards == 6 + 4 * sum(map(len, tried)) == 6 + 64
    assert plan == sc.allocate(graph, scores, budget, strategy=sc.Sensitivity(64, seed=3, repair=False), work=work)


def test_the_layers_behind_make_up_for_what_goes(monkeypatch):
    """On a linear network the best that the layer behind can do is a regression on the inputs that are left."""
    monkeypatch.setattr(local_repair, "DAMPING", 1e-10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(64, 10, dtype=torch.float64)
    graph = sc.trace(model, x)
    caught = Catch()
    sc.allocate(graph, sc.score(model, graph, "magnitude"), sc.Budget(macs=0.5, round_to=1), strategy=caught)
    problem = caught.problem
    work = sc.Workload(model, [(x, torch.randint(0, 3, (64,)))], "cross_entropy")
    evaluate = Evaluator(work, problem, repair=True)
    for taken in range(1, 8):
        weights = evaluate.masked_weights(alone(problem, 0, taken))
        gone = problem.orders[0][:taken]
        with torch.no_grad():
            hidden = model[0](x)
            stays = [c for c in range(10) if c not in gone]
            given = torch.cat([hidden[:, stays], torch.ones(64, 1, dtype=torch.float64)], 1)
            best = given @ torch.linalg.lstsq(given, model[1](hidden)).solution
            found = nn.functional.linear(hidden, weights["1.weight"], weights["1.bias"])
        assert (weights["1.weight"][:, gone] == 0).all() and (weights["0.weight"][gone] == 0).all()
        torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)
    both = evaluate.masked_weights(np.array([3, 4]))
    assert both.keys() == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert (both["1.weight"][problem.orders[1][:4]] == 0).all()  # rows that go stay gone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluations": 0}, "evaluations=0: a whole number from 1 on"),
        ({"steps": 1}, "steps=1: a whole number from 2 on"),
        ({"norms": "none"}, "unknown norms 'none'"),
        ({"repair": 1}, "repair=1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings_are_told(options, message):
    with pytest.raises(sc.SecateurError, match=message):
        sc.Sensitivity(**options)


def test_what_is_tried_without_repair_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    ).eval()
    data = [(torch.randn(16, 2, 2, 2), torch.randint(0, 3, (16,))) for _ in range(3)]
    graph = sc.trace(model, data[0][0])
    work = sc.Workload(model, data, "cross_entropy")
    sc.allocate(
        graph, sc.score(model, graph, "magnitude"), sc.Budget(macs=0.6, round_to=1), strategy="sensitivity", work=work
    )
    assert work.facts["sensitivity"]["tried without repair"] == {"2": "it is grouped"}
