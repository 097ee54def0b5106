"""The widths of least predicted rise: against all widths there are, for every kind of budget and table."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocation.budget import Meter
from secateur.allocation.least_rise import hull_slopes, least_rise
from secateur.allocation.problem import fill, narrowed
from secateur.allocation.strategies import uniform_items

BUDGETS = [
    {"macs": 0.5}, {"macs": 0.2}, {"params": 0.3}, {"channels": 0.4}, {"macs": 0.4, "params": 0.5},
    {"macs": 0.5, "round_to": 2}, {"params": 0.5, "at_least": 3},
]  # fmt: skip


class Catch:
    """A strategy that keeps the problem it was given."""

    def widths(self, problem, work):
        self.problem = problem
        return problem.least


def problem_of(limits, widths):
    torch.manual_seed(0)
    sizes = [5, *widths]
    layers = [layer for ins, outs in itertools.pairwise(sizes) for layer in (nn.Linear(ins, outs), nn.ReLU())]
    model, caught = nn.Sequential(*layers, nn.Linear(sizes[-1], 3)), Catch()
    graph = sc.trace(model, torch.zeros(1, 5))
    sc.allocate(graph, sc.score(model, graph, "magnitude"), sc.Budget(**{"round_to": 1} | limits), strategy=caught)
    return caught.problem


def drawn(problem, rng, kind):
    """The problem with other rises: convex, with steps, or any that grow."""
    score = rng.random(len(problem.group)) ** 4 + 1e-3
    if kind == "convex":
        for group in range(len(problem.start)):
            own = problem.group == group
            score[own] = np.sort(score[own])
    if kind == "steps":
        score[rng.random(len(score)) < 0.5] = 0.0
    return replace(problem, score=score * rng.lognormal(0, 1, len(problem.start))[problem.group])


def best_of_all(problem):
    """The least rise of all widths that meet the budget."""
    every = np.stack(np.meshgrid(*(np.arange(n + 1) for n in problem.count), indexing="ij"), -1)
    every = every.reshape(-1, len(problem.count))
    own = np.arange(len(problem.count))
    met = problem.meter.which_met(problem.start - problem.gone[own, every])
    return problem.rises[own, every].sum(1)[met].min()


@pytest.mark.parametrize("kind", ["convex", "steps", "any"])
@pytest.mark.parametrize("limits", BUDGETS, ids=str)
def test_nearly_the_best_of_all_widths(limits, kind):
    problem, rng = problem_of(limits, (7, 9, 8, 6)), np.random.default_rng(0)
    over = []
    for _ in range(10):
        one = drawn(problem, rng, kind)
        taken = least_rise(one)
        assert one.meter.met(one.widths(taken))
        assert (taken <= one.count).all()
        best = best_of_all(one)
        for other in (narrowed(one, np.zeros_like(one.count)), uniform_items(one)):
            assert one.rise(taken) <= one.rise(fill(one, other)) + 1e-12
        over.append(one.rise(taken) / best - 1 if best else one.rise(taken))
    assert np.mean(np.array(over) < 1e-9) >= 0.9  # exactly the best
    assert max(over) < 0.01 or kind != "convex"


@pytest.mark.parametrize("kind", ["convex", "steps", "any"])
def test_a_larger_budget_never_lets_the_loss_rise_more(kind):
    problem, rng = problem_of({"macs": 0.5}, (12, 16, 20, 9, 14)), np.random.default_rng(1)
    for _ in range(3):
        one = drawn(problem, rng, kind)
        least = one.meter.excess(one.least)["macs"] / one.meter.full["macs"] + 0.5
        rises = []
        for fraction in np.linspace(least + 0.01, 1.0, 12):
            meter = Meter(problem.meter.graph, sc.Budget(macs=fraction))
            other = replace(one, meter=meter)
            rises.append(other.rise(least_rise(other)))
        assert rises == sorted(rises, reverse=True)
        assert rises[-1] == 0.0


def test_slopes_are_those_of_the_greatest_convex_function_below():
    problem, rng = problem_of({"macs": 0.5}, (7, 9)), np.random.default_rng(0)
    for kind in ("convex", "steps", "any"):
        one = drawn(problem, rng, kind)
        slopes = hull_slopes(one)
        for group in range(len(one.start)):
            own = one.group == group
            assert (np.diff(slopes[own]) >= -1e-12).all()
            hull = np.r_[0, np.cumsum(slopes[own] * one.size[own])]
            table = one.rises[group, : len(hull)]
            assert (hull <= table + 1e-12).all()
            assert hull[-1] == pytest.approx(table[-1])
            if kind == "convex":
                assert slopes[own] == pytest.approx(one.score[own])


def test_predicted_rises_count_for_global_and_single_scores_where_there_are_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    graph, budget = sc.trace(model, torch.zeros(1, 5)), sc.Budget(channels=0.75)
    single = {"0": torch.full((8,), 1.0), "2": torch.full((8,), 2.0)}
    assert graph.kept(sc.allocate(graph, single, budget, strategy="global")).tolist() == [4, 8]
    cheap = torch.tensor([0.0, 1, 1, 1, 1, 9, 9, 9, 9]).double()  # only the first of four costs anything
    known = sc.Scores(single, rises={"2": cheap})
    plan = sc.allocate(graph, known, budget, strategy="global")
    assert graph.kept(plan).tolist() == [8, 4]
    wrong = {"2": cheap[:-1]}
    with pytest.raises(sc.SecateurError, match="the rises of 2"):
        sc.score(model, graph, Given(sc.Scores(single, rises=wrong)))
    with pytest.raises(sc.SecateurError, match=r"scores.rises\['2'\]: 1 for nothing and one for each of 8 channels"):
        sc.allocate(graph, sc.Scores(single, rises=wrong), budget)
    with pytest.raises(sc.SecateurError, match="unknown group 'there'"):
        sc.score(model, graph, Given(sc.Scores(single, rises={"there": cheap})))


@dataclass(frozen=True)
class Given:
    """A criterion with these scores."""

    given: sc.Scores

    def scores(self, graph, work):
        return self.given
