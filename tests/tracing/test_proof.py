"""A graph is data, and no plan is cut that nobody has proven: from the graph that was traced, or from a copy of it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from small_networks import Run, conv
from torch import nn

import secateur as sc
from secateur._internal.errors import CannotCut, NothingToPrune
from secateur.tracing import proof
from secateur.tracing.proof import has_skeleton, verify

COPIES = {
    "pickled": lambda graph: pickle.loads(pickle.dumps(graph)),
    "deep copy": copy.deepcopy,
    "copy": copy.copy,
}


def picky(m, x):
    """Five channels go another way, and only they: what no probe of the trace meets."""
    x = m.a(x)
    return m.b(x * 2 if x.shape[1] == 5 else x)


def odd_network():
    torch.manual_seed(0)
    first = Run(picky, a=nn.Linear(4, 8), b=nn.Linear(8, 6))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2)).double()


def plain_network():
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)
    ).double()


X = torch.randn(3, 4, dtype=torch.float64)
IMAGE = torch.randn(2, 3, 6, 6, dtype=torch.float64)


@pytest.fixture(params=COPIES)
def copied(request):
    return COPIES[request.param]


def test_counts_and_plans_of_a_copy_are_equal_and_its_cut_is_exact(copied):
    model = plain_network()
    graph = sc.trace(model, IMAGE)
    other = copied(graph)
    assert has_skeleton(graph) and not has_skeleton(other)
    removed = {"0": [1, 4, 7], "3": [0, 2]}
    plan, again = sc.make_plan(graph, removed), sc.make_plan(other, removed)
    assert plan == again and hash(plan) == hash(again)
    assert plan.slices == again.slices
    assert (graph.macs(), graph.params(), graph.feasible()) == (other.macs(), other.params(), other.feasible())
    assert (graph.macs(plan), graph.params(plan)) == (other.macs(again), other.params(again))
    assert graph.summary() == other.summary()
    assert plan.proven and not again.proven
    small = sc.cut(model, again)
    assert sc.check(model, small, again, IMAGE) < 1e-10
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), sc.cut(model, plan).parameters(), strict=True))
    assert sc.Plan.from_json(sc.record(small)[0]["cut"]).proven
    scores = sc.score(model, graph)
    assert sc.allocate(other, scores, sc.Budget(macs=0.5)) == sc.allocate(graph, scores, sc.Budget(macs=0.5))


def test_a_graph_whose_inputs_want_gradients_can_be_copied(copied):
    model = plain_network()
    graph = sc.trace(model, (IMAGE.clone().requires_grad_() * 2,))
    assert torch.equal(copied(graph).inputs[0], 2 * IMAGE)


def test_what_a_model_does_not_bear_is_refused_when_planned_or_of_a_copy_when_cut(copied):
    model = odd_network()
    graph = sc.trace(model, X)
    removed = {"0.a": [0, 1, 2]}
    with pytest.raises(CannotCut, match="takes another path"):
        sc.make_plan(graph, removed)
    plan = sc.make_plan(copied(graph), removed)
    with pytest.raises(CannotCut, match="takes another path"):
        sc.cut(model, plan)
    with pytest.raises(CannotCut, match="nobody has proven"):
        sc.cut(model, sc.Plan.from_json(plan.to_json()))


def test_allocate_does_without_the_guilty_groups_and_of_a_copy_cut_tells():
    model = odd_network()
    graph = sc.trace(model, X)
    scores = {"0.a": torch.zeros(8), "2": torch.ones(7)}

    def allocated(graph):
        return sc.allocate(graph, scores, sc.Budget(channels=18 / 21, round_to=1), strategy="threshold")

    other = copy.deepcopy(graph)
    plan = allocated(other)
    assert {name: len(p) for name, p in plan.removed.items()} == {"0.a": 3} and not plan.proven
    with pytest.raises(CannotCut, match="takes another path"):
        sc.cut(model, plan)
    assert has_skeleton(other)  # cut has built one: from here on plans are proven as they are made
    for each in (graph, other):
        found = allocated(each)
        assert {name: len(p) for name, p in found.removed.items()} == {"2": 3} and found.proven
        assert found.skipped["0.a"].startswith("this combination cannot be cut") and "path" in found.skipped["0.a"]
        assert sc.check(model, sc.cut(model, found), found, X) < 1e-10


def test_verify_needs_the_model_of_a_copy_and_only_that_one():
    model = odd_network()
    graph = copy.deepcopy(sc.trace(model, X))
    plan = sc.make_plan(graph, {"0.a": [0, 1, 2]})
    with pytest.raises(sc.SecateurError, match="a copy and has no skeleton: give the model"):
        verify(None, graph, plan)
    with pytest.raises(sc.SecateurError, match="another model"):
        verify(plain_network(), graph, plan)
    assert "takes another path" in verify(model, graph, plan)
    assert "takes another path" in verify(None, graph, plan)
    assert verify(None, graph, sc.make_plan(graph, {"0.a": [0]})) == ""


def test_a_model_whose_forward_is_another_by_now_is_told():
    model = odd_network()
    graph = copy.deepcopy(sc.trace(model, X))
    plan = sc.make_plan(graph, {"0.a": [0]})
    model[0].function = lambda m, x: m.b(m.a(x).flip(1) + m.a(x))
    with pytest.raises(sc.SecateurError, match="forward is another than when its graph was traced"):
        sc.cut(model, plan)


def test_what_only_training_uses_is_proven_too(copied):
    def forward(m, x):
        x = m.a(x).relu()
        return (m.b(x), m.aux(x * 2 if x.shape[1] == 5 else x)) if m.training else m.b(x)

    model = Run(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2), aux=nn.Linear(8, 3)).double()
    graph = sc.trace(model, X)
    with pytest.raises(CannotCut, match="takes another path"):
        sc.make_plan(graph, {"a": [0, 1, 2]})
    other = copied(graph)
    with pytest.raises(CannotCut, match="takes another path"):
        sc.cut(model, sc.make_plan(other, {"a": [0, 1, 2]}))
    sc.cut(model, sc.make_plan(copied(graph), {"a": [0, 1]}))


def test_the_skeleton_goes_with_the_graph():
    graph = sc.trace(plain_network(), IMAGE)
    held = weakref.ref(proof._PROOFS[graph])
    del graph
    gc.collect()
    assert held() is None


def test_graphs_and_plans_cannot_be_changed():
    graph = sc.trace(plain_network(), IMAGE)
    plan = sc.make_plan(graph, {"0": [1]})
    for thing, name in ((graph, "groups"), (graph, "inputs"), (graph.groups[0], "least"), (plan, "slices")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, None)


def test_an_unproven_plan_says_so_in_its_json():
    graph = copy.deepcopy(sc.trace(plain_network(), IMAGE))
    plan = sc.make_plan(graph, {"0": [1]})
    assert not sc.Plan.from_json(plan.to_json()).proven
    with pytest.raises(sc.SecateurError, match="'proven' must be true or false"):
        sc.Plan.from_json(plan.to_json().replace('"proven": false', '"proven": 0'))


class Written(nn.Module):
    """What is written fills as many channels as the input has, which nothing but its size says."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.stem, self.parts = nn.Conv2d(3, 4, 1), nn.ModuleList(nn.Conv2d(4, width, 1) for width in widths)
        self.conv, self.last = nn.Conv2d(sum(widths), sum(widths), 1), nn.Conv2d(sum(widths) + 1, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([part(x) for part in self.parts], 1)
        y = x.new_zeros(x.size(0), x.size(1) + 1, *x.shape[2:])
        y[:, : x.size(1)] = self.conv(x)
        return self.last(y)


@pytest.mark.parametrize("widths", [(2,), (3,), (4,), (5,), (2, 2), (2, 3)])
def test_what_may_go_may_go_in_every_combination(widths):
    graph = sc.trace(Written(*widths), torch.randn(1, 3, 4, 4))
    ways = [range(len(g) - g.least + 1) for g in graph.groups]
    for numbers in itertools.product(*ways):
        sc.make_plan(graph, {g.name: list(range(n)) for g, n in zip(graph.groups, numbers, strict=True)})
    assert len(list(itertools.product(*ways))) > 1


class Shifted(nn.Module):
    """Of heads of some size none is left over by a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        y = self.a(x).unflatten(-1, (-1, 2))
        z = torch.zeros_like(y)
        z[:, :4] = y[:, :4].relu()
        z[:, 4:] = y[:, 4:]
        return self.b(z.flatten(1))


def test_an_empty_slice_is_nothing():
    model, x = Shifted().double().eval(), torch.randn(2, 3).double()
    graph = sc.trace(model, x)
    plan = sc.make_plan(graph, {g.name: [0] for g in graph.groups if g.exact and len(g) > g.least})
    assert sc.check(model, sc.cut(model, plan), plan, x) < 1e-12


def returned(m, x):
    """What is looked at makes real tensors stand in, whose sizes may depend on values; that of a slice does not."""
    assert float(x.sum()) < 1e9
    return m.a(x)[:, 2:], m.b(x)


def only_some(m, x):
    """The slice is none once enough has gone, and a transposed convolution's own check is left out without data."""
    y = m.a(x).relu()
    return m.c(torch.cat([y, m.b(y)], 1)[:, :7])


def test_a_slice_that_fixes_a_size_is_seen_where_values_are_looked_at():
    model = Run(returned, a=nn.Linear(3, 6), b=nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    graph = sc.trace(model, torch.randn(2, 3))
    assert [g.name for g in graph.groups if g.exact] == ["b.0"]


def test_a_slice_that_vanishes_fixes_a_size_all_the_same():
    model = Run(only_some, a=nn.Conv2d(3, 4, 1), b=conv(4, 4, groups=4), c=nn.ConvTranspose2d(7, 2, 2))
    with pytest.raises(NothingToPrune):
        sc.trace(model, torch.randn(1, 3, 4, 4))
