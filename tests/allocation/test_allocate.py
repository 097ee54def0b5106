"""A plan meets and uses its budget; what cannot be met, scored or done by a strategy is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 37, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(37 * 16, 50), nn.ReLU(), nn.Linear(50, 4),
    )  # fmt: skip
    graph = sc.trace(model, torch.randn(1, 3, 8, 8))
    return model, graph, sc.score(model, graph, "magnitude")


BUDGETS = [
    {"macs": 0.5}, {"params": 0.3}, {"channels": 0.4}, {"macs": 0.2, "params": 0.5}, {"macs": 0.5, "round_to": 8},
    {"params": 0.5, "at_least": 10}, {"macs": 0.5, "at_least": 0.4}, {"macs": 0.9, "params": 0.9, "channels": 0.9},
    {"macs": 1.0}, {"channels": 0.5, "at_least": {"0": 15}},
]  # fmt: skip


def by_scores_alone():
    """The names of the strategies that need no data."""
    return [name for name in sc.STRATEGIES if not sc.STRATEGIES.find(name).needs.data]


@pytest.mark.parametrize("strategy", by_scores_alone())
@pytest.mark.parametrize("limits", BUDGETS, ids=str)
def test_a_budget_is_met_and_used(traced, strategy, limits):
    _, graph, scores = traced
    budget = sc.Budget(**{"round_to": 1} | limits)
    plan = sc.allocate(graph, scores, budget, strategy=strategy)
    assert within(graph, plan, budget)
    step = budget.round_to
    floors = budget.floors(graph)
    for i, group in enumerate(graph.groups):
        gone = list(plan.removed.get(group.name, ()))
        left = len(group) - len(gone)
        assert left >= floors[i]
        assert left == len(group) or left % step == 0
        if gone:  # one block less would break it
            fewer = min(step, len(gone)) if left + step <= len(group) else len(gone)
            order = sorted(gone, key=lambda p: -scores[group.name][p])
            again = sc.make_plan(graph, {**plan.removed, group.name: order[fewer:]})
            assert not within(graph, again, budget)
            kept = [p for p in range(len(group)) if p not in gone]
            assert scores[group.name][gone].max() <= scores[group.name][kept].min()


def within(graph, plan, budget):
    used = {"macs": graph.macs(plan), "params": graph.params(plan), "channels": int(graph.kept(plan).sum())}
    full = {"macs": graph.macs(), "params": graph.params(), "channels": int(graph.widths.sum())}
    return all(used[unit] <= fraction * full[unit] for unit, fraction in budget.limits.items())


def test_infeasible_budgets_are_told_with_what_is_feasible(traced):
    _, graph, scores = traced
    low = graph.feasible()["macs"][0]
    with pytest.raises(sc.SecateurError, match=f"feasible are {low:,}"):
        sc.allocate(graph, scores, sc.Budget(macs=1e-5))
    edge = low / graph.macs()
    assert graph.macs(sc.allocate(graph, scores, sc.Budget(macs=edge + 1e-9))) == low


def test_contradicting_budgets_are_told(traced):
    _, graph, scores = traced
    with pytest.raises(sc.SecateurError, match="at_least"):
        sc.allocate(graph, scores, sc.Budget(macs=0.2, at_least=0.9))


def test_global_takes_what_frees_most_for_its_score():
    model = nn.Sequential(nn.Linear(100, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
    graph = sc.trace(model, torch.randn(1, 100))
    scores = {"0": torch.ones(10), "2": torch.ones(10)}
    plan = sc.allocate(graph, scores, sc.Budget(params=0.8), strategy="global")
    assert set(plan.removed) == {"0"}  # a unit of the first layer frees 111 parameters, of the second 13
    cheap = {"0": torch.full((10,), 100.0), "2": torch.full((10,), 1.0)}
    assert set(sc.allocate(graph, cheap, sc.Budget(params=0.95), strategy="global").removed) == {"2"}


def test_groups_without_scores_are_left_alone_and_said(traced):
    _, graph, scores = traced
    plan = sc.allocate(graph, {"0": scores["0"]}, sc.Budget(channels=0.9))
    assert set(plan.removed) == {"0"}
    assert plan.skipped == {"4": "has no scores", "7": "has no scores"}


def test_the_same_again(traced):
    _, graph, scores = traced
    a, b = (sc.allocate(graph, scores, sc.Budget(macs=0.37)) for _ in range(2))
    assert a == b
    assert a.to_json() == b.to_json()


@dataclass(frozen=True)
class Given:
    """A strategy of one's own: these widths, or the least for None."""

    answer: Any = None

    def widths(self, problem, work):
        return problem.least if self.answer is None else self.answer


def test_a_strategy_of_ones_own(traced):
    _, graph, scores = traced
    budget = sc.Budget(macs=0.6, round_to=1)
    assert within(graph, sc.allocate(graph, scores, budget, strategy=Given()), budget)
    widths = np.array([10, 20, 30])
    some = sc.allocate(graph, scores, budget, strategy=Given(widths))
    assert within(graph, some, budget) and (graph.kept(some) >= widths).all()  # room that is left is used
    for answer, message in (
        (graph.widths, "does not meet"),
        ("wide", "it gave no widths"),
        ([10, 20], "a whole number from 1 to its width for every group"),
        ([10.5, 20, 30], "a whole number from 1 to its width for every group"),
        ([10, 20, 51], "a whole number from 1 to its width for every group"),
        ([10, 20, 0], "fewer channels than must stay"),
    ):
        with pytest.raises(sc.SecateurError, match=message):
            sc.allocate(graph, scores, budget, strategy=Given(answer))
    with pytest.raises(sc.SecateurError, match=r"a name \(.*global, .*uniform\), or settings with a method widths"):
        sc.allocate(graph, scores, budget, strategy=None)
    with pytest.raises(sc.SecateurError, match="settings with a method widths"):
        sc.allocate(graph, scores, budget, strategy=lambda problem: problem.least)


class Table(nn.Module):
    """Looks up and adds up: no multiplication at all."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, ids):
        return self.table(ids).relu().sum(-1)


def test_a_unit_that_the_model_has_none_of_is_refused():
    net = Table()
    graph = sc.trace(net, torch.arange(5))
    assert graph.macs() == 0
    with pytest.raises(sc.SecateurError, match="has no macs to count"):
        sc.allocate(graph, sc.score(net, graph), sc.Budget(macs=0.5))


def test_unknown_names_suggest_the_nearest(traced):
    _, graph, scores = traced
    with pytest.raises(sc.SecateurError, match="did you mean 'global'"):
        sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy="globl")
    with pytest.raises(sc.SecateurError, match="unknown group 'conv'"):
        sc.allocate(graph, {"conv": torch.ones(3)}, sc.Budget(macs=0.5))
    with pytest.raises(sc.SecateurError, match="one score for each of 20"):
        sc.allocate(graph, {"0": torch.ones(3)}, sc.Budget(macs=0.5))
    with pytest.raises(sc.SecateurError, match="NaN"):
        sc.allocate(graph, {"0": torch.full((20,), math.nan)}, sc.Budget(macs=0.5))
