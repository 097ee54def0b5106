"""Groups that are alike end with equally many channels, and are chosen as one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocation.alike import classes
from secateur.tracing.graph import role

DATA = [(torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))) for _ in range(3)]


class Block(nn.Module):
    """A residual block with a width of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 1)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class Blocks(nn.Module):
    """Several blocks of one width, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.blocks = nn.Sequential(Block(8, 16), Block(8, 16), Block(8, 16), Block(8, 12))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = Blocks().eval()
    graph = sc.trace(model, DATA[0][0])
    return model, graph, sc.score(model, graph, "magnitude")


FIRSTS = [f"blocks.{i}.first" for i in range(3)]


def widths(graph, plan):
    return dict(zip((g.name for g in graph.groups), graph.kept(plan).tolist(), strict=True))


def test_what_a_layer_is_called_where_it_stands():
    assert role("layers.3.mlp.gate_proj") == "gate_proj"
    assert role("features.3.conv.0.1") == "conv.0.1"
    assert role("0") == "0"
    assert role("blocks.0.qkv#2") == "qkv#2"


LIMITS = [{"macs": 0.5}, {"params": 0.4, "round_to": 1}, {"macs": 0.7, "params": 0.5}, {"channels": 0.5, "round_to": 1}]


@pytest.mark.parametrize("strategy", sorted(sc.STRATEGIES))
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_alike_groups_end_alike_within_the_budget(traced, strategy, limits):
    model, graph, scores = traced
    budget = sc.Budget(**limits, alike=True)
    options = {"model": model, "data": DATA, "loss": "cross_entropy"} if sc.STRATEGIES.find(strategy).needs.data else {}
    if strategy == "bandit":
        strategy = sc.Bandit(evaluations=60)
    elif strategy == "sensitivity":
        strategy = sc.Sensitivity(evaluations=30)
    plan = sc.allocate(graph, scores, budget, strategy=strategy, **options)
    kept = widths(graph, plan)
    assert len({kept[name] for name in FIRSTS}) == 1
    left = {"macs": graph.macs, "params": graph.params, "channels": lambda of=None: int(graph.kept(of).sum())}
    assert all(left[unit](plan) <= part * left[unit]() for unit, part in budget.limits.items())
    for name in FIRSTS:  # each decides for itself which go
        gone = list(plan.removed.get(name, ()))
        assert gone == sorted(scores[name].argsort(stable=True)[: len(gone)].tolist())
    assert sc.check(model, sc.cut(model, plan), plan, DATA[0][0]) < 1e-5


def test_predicted_rises_of_alike_groups_add_up(traced):
    _, graph, _ = traced
    rng = np.random.default_rng(0)
    steps = {g.name: np.sort(rng.exponential(size=len(g))) for g in graph.groups}

    class Predicted(sc.Scores):
        pass

    scores = Predicted({name: torch.tensor(own) for name, own in steps.items()})
    scores.rises = {name: torch.tensor(np.r_[0, own.cumsum()]) for name, own in steps.items()}
    budget = sc.Budget(params=0.5, round_to=1, alike=True)
    plan = sc.allocate(graph, scores, budget, strategy="global")

    def rise(kept):
        return sum(steps[g.name][: len(g) - k].sum() for g, k in zip(graph.groups, kept, strict=True))

    allowed = 0.5 * graph.params()
    best = min(
        rise(kept)
        for stem, inner, last in itertools.product(range(1, 9), range(1, 17), range(1, 13))
        for kept in [[stem, inner, inner, inner, last]]
        if graph.params_terms.total(graph.lengths(np.array(kept))) <= allowed
    )
    assert [g.name for g in graph.groups] == ["stem", *FIRSTS, "blocks.3.first"]
    assert rise(graph.kept(plan)) == pytest.approx(best, rel=1e-9)


def test_patterns_say_which_are_alike(traced):
    _, graph, scores = traced
    budget = sc.Budget(macs=0.5, round_to=1, alike=["blocks.[01].first", "blocks.[23].first"])
    assert [len(own) for own in classes(graph, budget.alike)] == [1, 2, 1, 1]  # the last two have other widths
    kept = widths(graph, sc.allocate(graph, scores, budget, strategy="threshold"))
    assert kept["blocks.0.first"] == kept["blocks.1.first"] != kept["blocks.2.first"]


def test_what_is_alike_to_a_group_that_stays_whole_stays_whole(traced):
    model, graph, scores = traced
    plan = sc.allocate(graph, scores, sc.Budget(macs=0.8, alike=True), exclude=["blocks.1.first"])
    assert not set(FIRSTS) & set(plan.removed)
    assert plan.skipped["blocks.0.first"] == "alike to 'blocks.1.first', which is left alone: excluded"
    with pytest.raises(sc.InfeasibleBudget, match="feasible are"):
        sc.prune(model, DATA[0][0], sc.Budget(macs=0.3, alike=True), exclude=["blocks.1.first", "stem"])
    left = {name: values for name, values in scores.items() if name != "blocks.2.first"}
    assert not set(FIRSTS) & set(sc.allocate(graph, left, sc.Budget(macs=0.8, alike=True)).removed)


def test_the_largest_floor_of_alike_groups_holds_for_all(traced):
    model, graph, scores = traced
    how = {"round_to": 1, "alike": True, "at_least": {"blocks.1.first": 9}}
    least = [1, 9, 9, 9, 1]
    assert sc.Budget(macs=0.4, **how).floors(graph).tolist() == least
    part = graph.macs_terms.total(graph.lengths(np.array(least))) / graph.macs()
    assert graph.kept(sc.allocate(graph, scores, sc.Budget(macs=part, **how))).tolist() == least
    with pytest.raises(sc.InfeasibleBudget):
        sc.prune(model, DATA[0][0], sc.Budget(macs=0.99 * part, **how))


class Clock:
    """Knows that a forward takes a millisecond for every 1,000 MACs."""

    def __init__(self, graph):
        self.graph = self.fitted = graph
        self.fitted = self

    def ms(self, widths):
        return self.graph.macs_terms.totals(self.graph.lengths(widths)) / 1000

    def slope(self, widths):
        return self.graph.multiplicity.T @ self.graph.macs_terms.gradient(self.graph.lengths(widths)) / 1000

    def key(self):
        return "clock"

    def measured(self, plan):
        return self.graph.macs(plan) / 1000


def test_a_latency_is_met_by_alike_groups(traced):
    _, graph, scores = traced
    limit = 0.5 * graph.macs() / 1000
    budget = sc.Budget(latency_ms=limit, round_to=1, alike=True)
    plan = sc.allocate(graph, scores, budget, strategy="global", latency=Clock(graph))
    kept = widths(graph, plan)
    assert len({kept[name] for name in FIRSTS}) == 1
    assert 0.9 * limit < graph.macs(plan) / 1000 <= limit


def test_methods_that_prune_while_training_zero_equally_many():
    torch.manual_seed(0)
    model = Blocks()
    graph = sc.trace(model, DATA[0][0])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    reg = sc.GReg(model, graph, optimizer, sc.Budget(macs=0.5, alike=True), every=1, rate=0.5, limit=1.0, settle=1)
    for step in range(200):
        if reg.done:
            break
        x, y = DATA[step % 3]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        reg.step()
    kept = widths(graph, reg.plan())
    assert len({kept[name] for name in FIRSTS}) == 1


@pytest.mark.parametrize(
    ("alike", "words"),
    [
        (3, "patterns of names"),
        ([], "patterns of names"),
        ([1], "patterns of names"),
        ("", "patterns of names"),
    ],
)
def test_what_does_not_say_which_are_alike_is_refused(alike, words):
    with pytest.raises(sc.SecateurError, match=words):
        sc.Budget(macs=0.5, alike=alike)


def test_wrong_patterns_are_refused(traced):
    _, graph, scores = traced
    with pytest.raises(sc.SecateurError, match=r"unknown group in alike.*blocks\.9"):
        sc.allocate(graph, scores, sc.Budget(macs=0.5, alike="blocks.9.*"))
    with pytest.raises(sc.SecateurError, match="one pattern mean all"):
        sc.allocate(graph, scores, sc.Budget(macs=0.5, alike=["*.first", "blocks.0.*"]))


def test_methods_that_give_every_layer_a_width_of_its_own_refuse(traced):
    model, graph, _ = traced
    budget = sc.Budget(macs=0.5, alike=True)
    for verb in (sc.hybrid, sc.eigendamage):
        with pytest.raises(sc.SecateurError, match="alike"):
            verb(model, DATA[0][0], budget, data=DATA, loss="cross_entropy")
    with pytest.raises(sc.SecateurError, match="alike"):
        sc.SDPrun(model, graph, lr=0.1, c=1e-4, budget=budget)
