"""Queries and keys that lose numbers: the nearest products there are, where nothing but their products counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.repair.logits import _nearest


class Attention(nn.Module):
    """Written by hand, its scale a number that it remembers; queries may be bent."""

    def __init__(self, heads: int = 2, shared: int = 2, bent: bool = False) -> None:
        super().__init__()
        self.heads, self.shared, self.scale, self.bent = heads, shared, 8**-0.5, bent
        self.q, self.k, self.v = nn.Linear(12, 8 * heads), nn.Linear(12, 8 * shared), nn.Linear(12, 8 * shared)
        self.o = nn.Linear(8 * heads, 12)

    def forward(self, x):
        q, k, v = (
            m(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for m, heads in ((self.q, self.heads), (self.k, self.shared), (self.v, self.shared))
        )
        k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
        q = q.tanh() if self.bent else q
        weights = torch.softmax(q @ k.mT * self.scale, -1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def attention(seed=0, rank=None, **given):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), Attention(**given)).double().eval()
    with torch.no_grad():
        for layer in (model[1].q, model[1].k):
            layer.weight *= 4
        if rank is not None:  # no head's queries have more directions than these
            for head in model[1].q.weight.split(8):
                head[rank:] = torch.randn(8 - rank, rank).double() @ head[:rank]
            for head in model[1].q.bias.split(8):
                head.zero_()
    return model, torch.randn(300, 5, 6, dtype=torch.float64)


def distance(small, model, x):
    with torch.no_grad():
        return float((small(x) - model(x)).norm() / model(x).norm())


@pytest.mark.parametrize(("heads", "shared"), [(2, 2), (4, 2), (3, 1)])
def test_what_queries_do_not_span_can_go_without_loss(heads, shared):
    """With query heads that share keys, all of them together must span no more."""
    model, x = attention(rank=3 if heads == shared else 2, heads=heads, shared=shared)
    if heads != shared:
        with torch.no_grad():  # the heads that share keys have the same queries, but for their size
            for group in model[1].q.weight.split(8 * heads // shared):
                for number, head in enumerate(group.split(8)):
                    head.copy_((1 + number) * group[:8])
    graph = sc.trace(model, x[:2], attention="sizes")
    plan = sc.make_plan(graph, {"1.q": [0, 1, 2, 5, 6]})  # three are left, and the rows of others span the queries
    small = sc.cut(model, plan)
    assert distance(small, model, x) > 0.01
    assert sc.refit(model, small, plan, [x[:200]], damping=1e-12) == {}
    assert distance(small, model, x[200:]) < 1e-4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_products_come_nearer_than_by_fitting_the_rows_that_are_left(seed):
    model, x = attention(seed)
    plan = sc.make_plan(sc.trace(model, x[:2], attention="sizes"), {"1.q": [0, 3, 5]})
    small, other = sc.cut(model, plan), sc.cut(model, plan)
    assert sc.refit(model, small, plan, [x[:200]]) == {}
    sc.refit(model, other, dataclasses.replace(plan, graph=None), [x[:200]])  # where nothing is known of the channels
    assert distance(small, model, x[200:]) < 0.5 * distance(other, model, x[200:])


def test_where_more_than_products_counts_the_rows_that_are_left_stay_what_they_are():
    model, x = attention(bent=True)
    plan = sc.make_plan(sc.trace(model, x[:2], attention="sizes"), {"1.q": [6, 7]})
    small, other = sc.cut(model, plan), sc.cut(model, plan)
    sc.refit(model, small, plan, [x])
    sc.refit(model, other, dataclasses.replace(plan, graph=None), [x])
    for (name, found), expected in zip(small.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_the_nearest_products_are_those_of_the_singular_values():
    torch.manual_seed(0)
    q, k = torch.randn(500, 6).double() @ torch.randn(6, 6).double(), torch.randn(400, 6).double()
    a, b = _nearest((q.mT @ q)[None], (k.mT @ k)[None], 3)
    u, s, vh = torch.linalg.svd(q @ k.mT, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    torch.testing.assert_close((q @ a[0]) @ (k @ b[0]).mT, best, rtol=1e-4, atol=1e-4 * float(s[0]) / 100)


class Gated(nn.Module):
    """Attention with bent queries counts for little."""

    def __init__(self, attention):
        super().__init__()
        self.enter, self.attention = attention[0], attention[1]

    def forward(self, x):
        x = self.enter(x)
        return x + 0.01 * self.attention(x)


class Chosen(nn.Module):
    """The best of what attention with bent queries gives."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x), self.attention(x).argmax(-1)


@pytest.mark.parametrize("kind", ["one token first", "counts for little", "whole numbers"])
def test_products_are_not_taken_for_all_that_counts_where_nothing_could_show_it(kind):
    model, x = attention(bent=True)
    data = [x[:20, :1], x[20:]] if kind == "one token first" else [x]
    if kind != "one token first":
        model = (Gated if kind == "counts for little" else Chosen)(model).double().eval()
    name = {"one token first": "1.q", "counts for little": "attention.q", "whole numbers": "attention.1.q"}[kind]
    graph = sc.trace(model, x[:2], attention="sizes", outputs=(lambda y: y[0]) if kind == "whole numbers" else None)
    plan = sc.make_plan(graph, {name: [0, 3]})
    small, other = sc.cut(model, plan), sc.cut(model, plan)
    sc.refit(model, small, plan, data)
    sc.refit(model, other, dataclasses.replace(plan, graph=None), data)
    for (name, found), expected in zip(small.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("uneven", [1.0, 100.0])
def test_an_exact_cut_stays_exact(uneven):
    model, x = attention()
    with torch.no_grad():  # channel 3 of the queries is zero, and its key may be large
        for head in range(2):
            model[1].q.weight[8 * head + 3], model[1].q.bias[8 * head + 3] = 0, 0
            model[1].q.weight[8 * head + 4] *= uneven
            model[1].k.weight[8 * head + 3] *= uneven
    plan = sc.make_plan(sc.trace(model, x[:2], attention="sizes"), {"1.q": [3]})
    small = sc.cut(model, plan)
    sc.refit(model, small, plan, [x])
    assert distance(small, model, x) < 1e-10
