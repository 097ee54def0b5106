"""Budgets: what is refused at the door, and that a plan meets and uses its budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocation.budget import in_round
from secateur.allocation.strategies import STRATEGIES

BAD = [
    ({"macs": 0}, "keeps nothing"),
    ({"macs": -1}, "keeps nothing"),
    ({"macs": 1.5}, r"Budget\(macs=1.5\): a fraction of the original in \(0, 1\].*keeps more than everything"),
    ({"params": math.nan}, "not a number"),
    ({"channels": "half"}, "not a number"),
    ({"macs": True}, "not a number"),
    ({}, "nothing is limited"),
    ({"macs": 0.5, "round_to": 0}, "round_to"),
    ({"macs": 0.5, "at_least": 0}, "at_least"),
    ({"macs": 0.5, "at_least": 2.5}, "at_least"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_budgets_are_refused(given, message):
    with pytest.raises(sc.SecateurError, match=message):
        sc.Budget(**given)


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


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("limits", BUDGETS, ids=str)
def test_a_budget_is_met_and_used(traced, strategy, limits):
    _, graph, scores = traced
    budget = sc.Budget(**limits)
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
    plan = sc.allocate(graph, scores, sc.Budget(params=0.8))
    assert set(plan.removed) == {"0"}  # a unit of the first layer frees 111 parameters, of the second 13
    cheap = {"0": torch.full((10,), 100.0), "2": torch.full((10,), 1.0)}
    assert set(sc.allocate(graph, cheap, sc.Budget(params=0.95)).removed) == {"2"}


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


def test_a_strategy_of_ones_own(traced):
    _, graph, scores = traced
    plan = sc.allocate(graph, scores, sc.Budget(macs=0.6), strategy=lambda problem: problem.count)
    assert within(graph, plan, sc.Budget(macs=0.6))
    with pytest.raises(sc.SecateurError, match="does not meet"):
        sc.allocate(graph, scores, sc.Budget(macs=0.6), strategy=lambda problem: np.zeros(3, dtype=int))
    with pytest.raises(sc.SecateurError, match="the callable gave no numbers of items"):
        sc.allocate(graph, scores, sc.Budget(macs=0.6), strategy=lambda problem: None)
    with pytest.raises(sc.SecateurError, match="strategy=None: global, threshold, uniform or a callable is expected"):
        sc.allocate(graph, scores, sc.Budget(macs=0.6), strategy=None)


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


def test_rounds_end_at_the_budget_to_the_unit():
    source = np.random.default_rng(0)
    for _ in range(2000):
        full = {"macs": int(source.integers(10, 4_000_000_000))}
        fraction, rounds = float(source.uniform(0.01, 1)), int(source.integers(1, 9))
        budget, now = sc.Budget(macs=fraction), full
        for number in range(1, rounds + 1):
            step = in_round(budget, number, rounds, full, now)
            allowed = math.floor(fraction ** (number / rounds) * full["macs"] + 1e-9)
            assert math.floor(step.macs * now["macs"] + 1e-9) == min(allowed, now["macs"])
            now = {"macs": allowed - int(source.integers(0, 2))}  # what an allocation may leave unused
        assert now["macs"] <= fraction * full["macs"]


def test_what_is_below_a_rounds_budget_already_stays():
    assert in_round(sc.Budget(params=0.5), 1, 2, {"params": 100}, {"params": 40}).params == 1.0
    with pytest.raises(sc.SecateurError, match="are others in every round"):
        in_round(sc.Budget(params=0.5, at_least=0.1), 1, 2, {"params": 100}, {"params": 40})
