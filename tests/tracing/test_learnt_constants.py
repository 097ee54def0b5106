"""Layers on what the model has learnt, not on its inputs; and what is looked up by masks and numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import Run
from torch import nn

import secateur as sc


def queries(m, x):
    k = m.e(x)
    q = m.f2(F.relu(m.f1(m.q)))
    return m.o(torch.softmax(q @ k.transpose(1, 2), -1) @ k)


def coordinates(m, x):
    bias = m.c2(F.relu(m.c1(m.grid))).flatten(1)
    return m.o(F.relu(m.e(x)) * bias)


P = nn.Parameter
NETWORKS = {
    "learnt queries": (
        lambda: Run(queries, q=P(torch.randn(6, 16)), f1=nn.Linear(16, 20), f2=nn.Linear(20, 16), e=nn.Linear(5, 16),
                    o=nn.Linear(16, 3)),
        torch.randn(2, 7, 5), {"f1": 20, "f2": 16, "q": 16},
    ),
    "a table through convolutions": (
        lambda: Run(coordinates, grid=P(torch.randn(1, 2, 1)), c1=nn.Conv1d(2, 9, 1), c2=nn.Conv1d(9, 8, 1),
                    e=nn.Linear(5, 8), o=nn.Linear(8, 3)),
        torch.randn(2, 5), {"c1": 9, "c2": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_they_have_producers_and_consumers(name):
    make, x, widths = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), x.double()
    graph = sc.trace(model, x)
    found = {g.name: len(g) for g in graph.groups if g.exact}
    assert widths.items() <= found.items(), graph.summary()
    for group in graph.groups:
        plan = sc.make_plan(graph, {group.name: [0, len(group) - 1][: len(group) - 1]})
        assert sc.check(model, sc.cut(model, plan), plan, x) < 1e-12


def test_a_low_rank_weight_is_still_a_weight():
    model = Run(lambda m, x: m.last(F.linear(m.first(x).relu(), m.b @ m.a).relu()), first=nn.Linear(4, 8),
                a=P(torch.randn(3, 8)), b=P(torch.randn(6, 3)), last=nn.Linear(6, 2))  # fmt: skip
    model, x = model.double().eval(), torch.randn(5, 4).double()
    graph = sc.trace(model, x)
    assert {g.name: len(g) for g in graph.groups if g.exact} == {"first": 8, "a": 3, "b": 6}
    plan = sc.make_plan(graph, {"first": [1], "a": [0], "b": [5, 2]})
    assert sc.check(model, sc.cut(model, plan), plan, x) < 1e-12


def test_a_mask_of_several_dims_picks_positions():
    def forward(m, x, mask):
        return m.f2(F.relu(m.f1(F.relu(m.c(x)).permute(0, 2, 3, 1)[mask])))

    model = Run(forward, c=nn.Conv2d(3, 16, 3, padding=1), f1=nn.Linear(16, 32), f2=nn.Linear(32, 4)).double().eval()
    inputs = (torch.randn(2, 3, 8, 8).double(), torch.rand(2, 8, 8) > 0.4)
    graph = sc.trace(model, inputs)
    assert {g.name: len(g) for g in graph.groups} == {"c": 16, "f1": 32}
    plan = sc.make_plan(graph, {"c": [0, 9], "f1": [3]})
    assert sc.check(model, sc.cut(model, plan), plan, inputs) < 1e-12


def test_values_that_are_put_where_a_mask_says_are_produced_too():
    def forward(m, x, mask):
        y = m.a(x)
        y[mask] = m.instead
        return m.b(y.relu())

    model = Run(forward, a=nn.Linear(4, 9), instead=P(torch.randn(9)), b=nn.Linear(9, 2)).double().eval()
    inputs = (torch.randn(2, 5, 4).double(), torch.rand(2, 5) > 0.5)
    graph = sc.trace(model, inputs)
    (group,) = graph.groups
    assert {axis.name for axis in group.producers} == {"a.weight", "a.bias", "instead"} and group.exact
    plan = sc.make_plan(graph, {group.name: [2, 3]})
    assert sc.check(model, sc.cut(model, plan), plan, inputs) < 1e-12


def test_a_shape_that_is_read_binds_nothing():
    def forward(m, x):
        y = m.a(x)
        return m.b(y.relu() + torch.arange(y[:, :, -1].shape[1]).to(y)[:, None] * 0)

    model = Run(forward, a=nn.Linear(4, 9), b=nn.Linear(9, 2)).eval()
    graph = sc.trace(model, torch.randn(2, 5, 4))
    assert {g.name: len(g) for g in graph.groups} == {"a": 9}
