"""Widths by sensitivity: the greedy answer, its oracle, and what is tried."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocation.problem import fill
from secateur.allocation.sensitivity import alone, greedy, tried_alone


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


def by_hand(problem, tried, rises):
    """One step after another, as the equation has it."""
    taken = [0] * len(problem.count)
    rise = {one: r for own, some in zip(tried, rises, strict=True) for one, r in zip(own, some, strict=True)}
    while not problem.meter.met(problem.widths(np.array(taken))):
        widths = problem.widths(np.array(taken))
        freed = problem.meter.freed(widths, [u for u, over in problem.meter.excess(widths).items() if over > 0])
        options = []
        for own in tried:
            group = own[0][0]
            more = [t for _, t in own if t > taken[group]]
            if more:
                wider = problem.widths(alone(problem, group, taken[group]))[group]
                channels = wider - problem.widths(alone(problem, group, more[0]))[group]
                price = (rise[group, more[0]] - rise.get((group, taken[group]), 0.0)) / (channels * freed[group])
                options.append((price, group, more[0]))
        _, group, more = min(options)
        taken[group] = more
    return taken


@pytest.mark.parametrize(
    "budget",
    [sc.Budget(macs=0.5), sc.Budget(params=0.3, channels=0.6), sc.Budget(macs=0.4, round_to=4), sc.Budget(macs=0.9)],
)
@pytest.mark.parametrize("most", [6, 13, 100])
def test_greedy_takes_what_costs_least_until_the_budget_is_met(budget, most):
    problem, rng = problem_of(budget), np.random.default_rng(0)
    tried = tried_alone(problem, most)
    assert sum(map(len, tried)) <= most
    for own in tried:
        assert [taken for _, taken in own] == sorted({taken for _, taken in own})
        assert own[0][1] > 0 and own[-1][1] == problem.count[own[0][0]]  # so any budget that can be met is
    for _ in range(20):
        rises = [np.cumsum(rng.random(len(own)) - 0.2).tolist() for own in tried]  # noise may let them fall
        found = greedy(problem, tried, rises)
        assert found.tolist() == by_hand(problem, tried, rises)
        assert problem.meter.met(problem.widths(found))


def test_a_group_that_does_not_matter_goes_first():
    problem = problem_of(sc.Budget(channels=0.8))
    tried = tried_alone(problem, 100)
    rises = [[0.0 if own[0][0] == 1 else 1.0 + number for number in range(len(own))] for own in tried]
    found = greedy(problem, tried, rises)
    assert found[1] > 0 and found[0] == found[2] == 0


def test_fewer_than_two_widths_a_group_are_none():
    problem = problem_of(sc.Budget(macs=0.5))
    assert tried_alone(problem, 5) == []
    assert [len(own) for own in tried_alone(problem, 6)] == [2, 2, 2]


def test_the_strategy_is_greedy_by_what_a_loss_rises_by():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [(torch.randn(16, 8), torch.randint(0, 4, (16,))) for _ in range(6)]
    graph, budget = sc.trace(model, data[0][0]), sc.Budget(macs=0.5)
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

    due = fill(problem, greedy(problem, tried, [[rise(one) for one in own] for own in tried]))
    work = sc.Workload(model, data, "cross_entropy")
    plan = sc.allocate(graph, scores, budget, strategy=sc.Sensitivity(evaluations=64, seed=3), work=work)
    assert graph.kept(plan).tolist() == problem.widths(due).tolist()
    assert work.forwards == 6 + 4 * sum(map(len, tried)) == 6 + 64
    assert plan == sc.allocate(graph, scores, budget, strategy=sc.Sensitivity(64, seed=3), work=work)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluations": 0}, "evaluations=0: a whole number from 1 on"),
        ({"steps": 1}, "steps=1: a whole number from 2 on"),
        ({"norms": "none"}, "unknown norms 'none'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings_are_told(options, message):
    with pytest.raises(sc.SecateurError, match=message):
        sc.Sensitivity(**options)
