"""Graph networks: what is gathered and scattered along nodes and edges keeps its channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc

Aggregate = Callable[[Tensor, Tensor, Tensor], Tensor]


def wide(index: Tensor, like: Tensor) -> Tensor:
    return index[:, None].expand_as(like)


def reduced(how: str) -> Aggregate:
    def aggregate(x: Tensor, v: Tensor, to: Tensor) -> Tensor:
        empty = x.new_zeros(len(x), v.shape[1])
        return empty.scatter_reduce(0, wide(to, v), v, how, include_self=False)

    return aggregate


def copied(x: Tensor, v: Tensor, to: Tensor) -> Tensor:
    return torch.zeros_like(x[:, :1]).expand(-1, v.shape[1]).clone().index_add(0, to, v)


def attended(x: Tensor, v: Tensor, to: Tensor) -> Tensor:
    """A softmax over the edges of a node, channel by channel."""
    top = v.new_full((len(x), v.shape[1]), -1e9).scatter_reduce(0, wide(to, v), v, "amax")
    weights = (v - top[to]).exp()
    total = torch.zeros(len(x), v.shape[1], dtype=v.dtype).index_add(0, to, weights)
    return torch.zeros(len(x), v.shape[1], dtype=v.dtype).scatter_add(0, wide(to, v), v * weights / total[to])


WAYS: dict[str, Aggregate] = {
    "scatter_add": lambda x, v, to: x.new_zeros(len(x), v.shape[1]).scatter_add(0, wide(to, v), v),
    "in place": lambda x, v, to: torch.zeros(len(x), v.shape[1], dtype=v.dtype).scatter_add_(0, wide(to, v), v),
    "index by a view": lambda x, v, to: torch.zeros(len(x), v.shape[1], dtype=v.dtype).scatter_add(
        0, to.view(-1, 1).expand(-1, v.shape[-1]), v),
    "index_add": copied,
    "index_add, one line": lambda x, v, to: torch.zeros(len(x), v.shape[1], dtype=v.dtype).index_add_(0, to, v),
    "index_put": lambda x, v, to: torch.zeros(len(x), v.shape[1], dtype=v.dtype).index_put((to,), v, accumulate=True),
    "sum": reduced("sum"), "mean": reduced("mean"), "largest": reduced("amax"),
    "index_reduce": lambda x, v, to: torch.zeros(len(x), v.shape[1], dtype=v.dtype).index_reduce(0, to, v, "mean"),
    "softmax": attended,
    "dense": lambda x, v, to: F.one_hot(to, len(x)).to(v).T @ v,
    "gathered back": lambda x, v, to: torch.zeros(len(x), v.shape[1], dtype=v.dtype).index_add(
        0, to, v.gather(0, torch.arange(len(v))[:, None].expand_as(v))),
    "some nodes filled": lambda x, v, to: torch.zeros(len(x), v.shape[1], dtype=v.dtype).index_add(0, to, v).index_fill(
        0, torch.tensor([0]), 0.0),
}  # fmt: skip


class Layer(nn.Module):
    def __init__(self, inside: int, outside: int, aggregate: Aggregate):
        super().__init__()
        self.neighbours, self.root = nn.Linear(inside, outside), nn.Linear(inside, outside)
        self.aggregate = aggregate

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return torch.relu(self.aggregate(x, self.neighbours(x)[edges[0]], edges[1]) + self.root(x))


class Network(nn.Module):
    def __init__(self, aggregate: Aggregate):
        super().__init__()
        self.a, self.b = Layer(5, 8, aggregate), Layer(8, 6, aggregate)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.out(self.b(self.a(x, edges), edges).mean(0, keepdim=True))


EDGES = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
X = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("way", WAYS)
def test_channels_pass_through(way: str):
    torch.manual_seed(0)
    model = Network(WAYS[way]).double()
    graph = sc.trace(model, (X, EDGES))
    assert sorted(map(len, graph.groups)) == [6, 8] and all(g.exact for g in graph.groups)
    plan = sc.make_plan(graph, {g.name: [0, 2, len(g) - 1] for g in graph.groups})
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, (X, EDGES)) < 1e-12
    lone = sc.make_plan(graph, {g.name: list(range(len(g) - g.least)) for g in graph.groups})
    assert sc.check(model, sc.cut(model, lone), lone, (X, EDGES)) < 1e-12


def test_an_index_that_differs_from_channel_to_channel_keeps_them():
    class Sorts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
            self.register_buffer("index", torch.randint(0, 5, (5, 8)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(torch.relu(self.b(torch.zeros_like(x).scatter_add(0, self.index, x))))

    graph = sc.trace(Sorts(), X.float())
    assert [g.name for g in graph.groups if g.exact] == ["a", "b"]  # the table of positions goes with them
    plan = sc.make_plan(graph, {"a": [1, 2]})
    model = Sorts()
    small = sc.cut(model, sc.make_plan(sc.trace(model, X.float()), {"a": [1, 2]}))
    assert small.index.shape == (5, 6) and plan.slices["index"] == {1: [1, 2]}
    assert sc.check(model, small, plan, X.float()) < 1e-5


def test_a_width_that_is_written_down_is_still_found():
    """A dim along which one value is copied takes any width, but not where the model says which."""

    def fixed(x: Tensor, v: Tensor, to: Tensor) -> Tensor:
        return v.new_zeros(len(x), v.shape[1]).scatter_add(0, to[:, None].expand(-1, 8), v)

    model = Network(lambda x, v, to: v.new_zeros(len(x), v.shape[1]).index_add(0, to, v)).double()
    model.a.aggregate = fixed
    graph = sc.trace(model, (X, EDGES))
    assert [g.name for g in graph.groups] == ["b.neighbours"]
    reasons = [f for f in graph.frozen if f.axis == "a.neighbours.weight" and f.dim == 0]
    assert reasons and "expand(-1, 8)" in reasons[0].place + reasons[0].reason
