"""Budgets: what is refused at the door, what the words mean, and the budgets of several rounds."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.allocation.budget import Meter, auto_step, in_round
from secateur.allocation.rank_allocation import Choice, Room, Shape, lagrangian, threshold

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
    ({"macs": 0.5, "at_least": 1.0}, "at_least=1 is one channel, at_least='all' is every channel"),
    ({"macs": 0.5, "at_least": True}, "at_least=1 is one channel, at_least='all' is every channel"),
    ({"macs": 0.5, "at_least": {"conv": 1.0}}, "at_least=1 is one channel, at_least='all' is every channel"),
    ({"macs": 0.5, "at_least": "most"}, "'all' is expected"),
    ({"flops": 0.5}, r"Budget\(flops=0.5\): the word here is macs="),
    ({"macs": 0.5, "parameters": 0.3}, r"Budget\(parameters=0.3\): the word here is params="),
    ({"mac": 0.5}, "did you mean 'macs'"),
    ({"macs": 0.5, "rounding": 8}, "unknown budget 'rounding'.*round_to"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_budgets_are_refused(given, message):
    with pytest.raises(sc.SecateurError, match=message):
        sc.Budget(**given)


def test_the_same_budget_is_equal_and_cannot_be_changed():
    budget = sc.Budget(macs=0.5, round_to=8)
    assert budget == sc.Budget(0.5, round_to=8) and hash(budget) == hash(sc.Budget(0.5, round_to=8))
    assert budget == pickle.loads(pickle.dumps(budget)) == copy.deepcopy(budget)
    with pytest.raises(FrozenInstanceError):
        budget.macs = 0.3
    with pytest.raises(sc.SecateurError, match="the word here is macs="):
        replace(budget, flops=0.3)
    assert list(inspect.signature(sc.Budget).parameters)[:3] == ["macs", "params", "channels"]


@pytest.mark.parametrize(
    ("budget", "shown"),
    [
        (sc.Budget(macs=0.5), "Budget(macs=0.5)"),
        (sc.Budget(params=1 / 3, at_least="all"), "Budget(params=0.3333333333333333, at_least='all')"),
        (sc.Budget(macs=1, latency_ms=4, round_to=8), "Budget(macs=1, latency_ms=4, round_to=8)"),
        (sc.Budget(channels=0.5, at_least={"fc": 3}), "Budget(channels=0.5, at_least={'fc': 3})"),
    ],
)
def test_a_budget_is_shown_as_it_was_given(budget, shown):
    assert repr(budget) == shown


def test_what_at_least_means():
    graph = sc.trace(nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 2)), X)
    for at_least, floors in ((1, [1, 1]), (3, [3, 3]), (0.5, [5, 4]), ("all", [10, 7]), ({"0": "all"}, [10, 1])):
        assert sc.Budget(macs=0.5, at_least=at_least, round_to=1).floors(graph).tolist() == floors
    with pytest.raises(sc.SecateurError, match="unknown group 'conv'"):
        sc.Budget(macs=0.5, at_least={"conv": 2}).floors(graph)


def test_widths_are_made_for_kernels_unless_a_group_is_too_narrow():
    sizes = (256, 32, 31, 16, 12, 8, 5, 4, 3)
    layers = [nn.Linear(a, b) for a, b in pairwise((4, *sizes))]
    graph = sc.trace(nn.Sequential(*layers, nn.Linear(3, 2)), X)
    budget = sc.Budget(macs=0.5)
    assert budget.steps(graph).tolist() == [8, 8, 4, 4, 2, 2, 1, 1, 1]
    stops = [own.tolist() for own in budget.stops(graph)]
    assert stops[0] == [*range(248, 0, -8), 4, 2, 1]
    assert stops[1:5] == [[24, 16, 8, 4, 2, 1], [28, 24, 20, 16, 12, 8, 4, 2, 1], [12, 8, 4, 2, 1], [10, 8, 6, 4, 2, 1]]
    assert stops[5:] == [[6, 4, 2, 1], [4, 3, 2, 1], [3, 2, 1], [2, 1]]
    assert budget.floors(graph).tolist() == sc.Budget(macs=0.5, round_to=1).floors(graph).tolist()
    floors = sc.Budget(macs=0.5, at_least=5).floors(graph).tolist()
    assert floors == [8, 8, 8, 8, 6, 6, 5, 4, 3]


@pytest.mark.parametrize("strategy", ["global", "uniform", "threshold"])
def test_the_widths_that_are_chosen_are_those(strategy):
    sizes = pairwise([4, 240, 200, 20, 2])
    model = nn.Sequential(*(m for a, b in sizes for m in (nn.Linear(a, b), nn.ReLU())))[:-1]
    graph, budget = sc.trace(model, X), sc.Budget(macs=0.4)
    plan = sc.allocate(graph, sc.score(model, graph, "magnitude"), budget, strategy=strategy)
    assert graph.macs(plan) <= 0.4 * graph.macs()
    for own, width, group in zip(budget.stops(graph), graph.kept(plan), graph.groups, strict=True):
        assert width in (len(group), *own)
    result = sc.prune(model, X, budget, strategy=strategy)
    assert all(n % step == 0 for n, step in zip(graph.kept(plan), budget.steps(graph), strict=True))
    kept = dict(zip((g.name for g in graph.groups), graph.kept(result.plan), strict=True))
    assert result.facts["round_to"] == {
        name: math.gcd(int(n), step) for (name, n), step in zip(kept.items(), (8, 8, 4), strict=True)
    }


def test_a_head_is_as_wide_as_it_is():
    """Heads of 8 are multiples of 8 already; of heads of 2, four make one."""
    assert [auto_step(12, positions) for positions in (1, 2, 4, 8, 64, 3)] == [2, 1, 1, 1, 1, 2]
    assert [auto_step(64, positions) for positions in (1, 2, 4, 8, 64, 3)] == [8, 4, 2, 1, 1, 8]


def test_a_layer_of_one_channel_is_told():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    found = sc.prune(model, X, sc.Budget(macs=0.2)).facts["remarks"]
    assert any("one channel is left of 0" in remark for remark in found)
    assert not sc.prune(model, X, sc.Budget(macs=0.5)).facts["remarks"]


def test_a_head_that_is_left_is_no_single_channel():
    model = nn.TransformerEncoderLayer(8, 2, 4, batch_first=True, dropout=0.0)
    result = sc.prune(model, torch.zeros(2, 3, 8), sc.Budget(channels=0.84), exclude=["linear1"])
    assert 1 in result.graph.kept(result.plan)
    assert not result.facts["remarks"]


def test_a_budget_that_rounded_widths_leave_unused_is_told():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    coarse, auto, fine = (sc.prune(model, X, sc.Budget(macs=0.7, round_to=n)) for n in (4, "auto", 1))
    assert coarse.after.macs == 48 and auto.after.macs == fine.after.macs == 66
    assert any("multiples of 4 use 71% of what the budget allows" in remark for remark in coarse.facts["remarks"])
    assert not auto.facts["remarks"] and not fine.facts["remarks"]


@pytest.mark.parametrize("strategy", ["global", "uniform", "threshold"])
@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(2, 90), min_size=1, max_size=4),
    unit=st.sampled_from(["macs", "params", "channels"]),
    fraction=st.floats(0.3, 0.95),
    seed=st.integers(0, 99),
)
def test_auto_leaves_no_more_unused_than_a_twentieth_or_a_channel(strategy, widths, unit, fraction, seed):
    """And what it fills with is what its own steps leave: no group is narrower than with them."""
    sizes = [3, *widths, 2]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    graph = sc.trace(nn.Sequential(*layers[:-1]), torch.zeros(1, 3))
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(len(g), generator=generator) for g in graph.groups}
    budget = sc.Budget(**{unit: fraction})
    meter = Meter(graph, budget)
    try:
        plan = sc.allocate(graph, scores, budget, strategy=strategy)
    except sc.InfeasibleBudget:
        assert not meter.met(budget.floors(graph))
        return
    kept = np.array(list(graph.kept(plan)))
    assert meter.met(kept)
    wider = kept + np.eye(len(kept), dtype=np.int64)
    assert meter.used(kept) >= 0.95 or not any(meter.met(w) for w in wider[kept < graph.widths])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sc.Budget, "finer", ())
        steps = sc.allocate(graph, scores, budget, strategy=strategy)
    assert (kept >= np.array(list(graph.kept(steps)))).all()


def test_a_budget_in_milliseconds_is_not_filled_by_finer_widths_and_that_is_told():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    result = sc.prune(model, X, sc.Budget(macs=0.7, latency_ms=1000.0))
    assert result.after.macs == 48
    assert any("multiples of 4 use 71% of what the budget allows" in remark for remark in result.facts["remarks"])


class Picky(nn.Module):
    """Takes another path at widths that only finer steps reach."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x.flip(-1) if x.shape[-1] in (9, 10, 11) else x)


def test_finer_widths_that_the_forward_does_not_bear_are_left():
    result = sc.prune(Picky(), X, sc.Budget(macs=0.7))
    assert result.after.macs == 48 and not result.plan.skipped


X = torch.zeros(1, 4)


def test_an_infeasible_budget_is_told_with_the_numbers_that_were_given():
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    graph = sc.trace(model, X)
    with pytest.raises(sc.InfeasibleBudget, match=r"macs=0.0123456 asks for at most 0 of 60 macs; feasible are 6 "):
        sc.allocate(graph, sc.score(model, graph), sc.Budget(macs=0.0123456))


def room(**budget):
    """One layer of 6 x 8 that may become a bottleneck."""
    damage = np.sort(np.random.default_rng(0).random((6, 8)))[::-1, ::-1]
    return Room([Choice("a", damage, {"params": Shape(48, 6, 8, 1)})], {"params": 100}, sc.Budget(**budget))


@pytest.mark.parametrize("rule", [lagrangian, threshold])
def test_ranks_under_a_budget_that_cannot_be_met_are_told_alike(rule):
    with pytest.raises(sc.InfeasibleBudget, match=r"params=0.1234567 asks for at most 12 of 100 params; feasible are"):
        rule(room(params=0.1234567))
    with pytest.raises(sc.InfeasibleBudget, match=r"cannot meet Budget.params=0.7. with limit=0.01"):
        threshold(room(params=0.7), limit=0.01)


def test_layers_of_which_all_must_stay_are_left_alone():
    assert lagrangian(room(params=1.0, at_least="all")) == [None]
    with pytest.raises(sc.InfeasibleBudget, match="cannot be met"):
        lagrangian(room(params=0.6, at_least="all"))


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
