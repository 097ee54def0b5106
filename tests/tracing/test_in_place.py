"""What is written through a view changes what all views of the storage are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import Run
from torch import nn

import secateur as sc
from secateur._internal.errors import NothingToPrune


def padded(m, x):
    p = x.new_zeros(len(x), x.shape[1], 16, 16)
    p[:, :, : x.shape[2], : x.shape[3]].copy_(x)
    return m.f2(F.relu(m.f1(F.relu(m.c2(F.relu(m.c1(p)))).mean((2, 3)))))


def batched(m, x):
    y = x.new_empty(len(x), 8, 13, 10).zero_()
    for i in range(len(x)):
        y[i] = F.relu(m.a(x[i : i + 1]))[0]
    return m.b(y).mean((2, 3))


def patched(m, x):
    y = F.relu(m.a(x))
    y[:, :, 2:4] += m.c(y[:, :, 2:4])
    return m.b(y).mean((2, 3))


def lasting(m, x):
    y = F.relu(m.a(x))
    y[:, :, :3].sigmoid_()
    return m.b(y).mean((2, 3))


NETWORKS = {
    "padding into zeros": (
        padded, {"c1": nn.Conv2d(3, 16, 3, padding=1), "c2": nn.Conv2d(16, 24, 3, padding=1), "f1": nn.Linear(24, 32),
                 "f2": nn.Linear(32, 4)}, {"c1": 16, "c2": 24, "f1": 32}),
    "adding to a part": (
        patched, {"a": nn.Conv2d(3, 8, 1), "c": nn.Conv2d(8, 8, 1), "b": nn.Conv2d(8, 2, 1)}, {"a": 8}),
    "a part that does not vanish": (lasting, {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 2, 1)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_roles_and_exactness_are_those_of_what_was_written(name):
    forward, parts, exact = NETWORKS[name]
    torch.manual_seed(0)
    model, x = Run(forward, **parts).double().eval(), torch.randn(2, 3, 13, 10).double()
    graph = sc.trace(model, x)
    assert {g.name: len(g) for g in graph.groups if g.exact} == exact, graph.summary()
    for group in graph.groups:
        assert {axis.name for axis in group.producers} <= {n for n in dict(model.named_parameters()) if n[0] in "acf"}
        if group.exact:
            plan = sc.make_plan(graph, {group.name: [0, 3]})
            assert sc.check(model, sc.cut(model, plan), plan, x) < 1e-12


def test_a_width_that_the_forward_writes_down_is_named():
    model = Run(batched, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)).eval()
    with pytest.raises(NothingToPrune, match=r"test_in_place.py:\d+: y\[i\] = "):
        sc.trace(model, torch.randn(2, 3, 13, 10))


def test_what_was_copied_and_is_written_through_a_view_is_no_copy_any_more():
    """Nor is what was zero: the channels meet different numbers then, and must stay."""

    class Copies(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.a, self.b, self.how = nn.Linear(5, 8), nn.Linear(8, 3), how

        def forward(self, x):
            y = self.a(x)
            return self.b(y + self.how(y))

    def written(y):
        z = torch.ones(len(y), 1, dtype=y.dtype).expand(-1, y.shape[1]).clone()
        z[:, 2] = 5
        return z

    def added(y):
        z = torch.zeros(len(y), 1, dtype=y.dtype).expand(-1, y.shape[1]).clone()
        z[:1] += 1
        return z

    def untouched(y):
        return torch.zeros(len(y), 1, dtype=y.dtype).expand(-1, y.shape[1]).clone()

    x = torch.randn(4, 5, dtype=torch.float64)
    for how, exact in ((written, None), (added, None), (untouched, True)):
        model = Copies(how).double()
        try:
            group = sc.trace(model, x).group("a")
            assert exact is not None and group.exact == exact, how
        except sc.SecateurError:
            assert exact is None, how


def test_hidden_states_written_into_tensors_of_the_cpu():
    """Zeros, ones and masks that a forward makes are on the CPU, what is written into them has no data in a trace."""

    class Steps(nn.Module):
        def __init__(self, start):
            super().__init__()
            self.a, self.b, self.start = nn.Linear(5, 8), nn.Linear(8, 3), start

        def forward(self, x):
            y = self.start(len(x), self.a.out_features, dtype=x.dtype)
            y[:, :] = self.a(x)
            return self.b(y)

    x = torch.randn(4, 5, dtype=torch.float64)
    for start in (torch.zeros, torch.empty, torch.ones):
        model = Steps(start).double()
        graph = sc.trace(model, x)
        plan = sc.make_plan(graph, {"a": [1, 2, 7]})
        small = sc.cut(model, plan)
        assert sc.check(model, small, plan, x) < 1e-12 and small.b.in_features == 5
