"""Paths that the example inputs do not take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc


class EarlyExit(nn.Module):
    """Easy images leave early."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.easy = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(3, 1), nn.Linear(16, 4)
        self.body, self.middle, self.hard = nn.Conv2d(16, 32, 3), nn.Conv2d(32, 24, 1), nn.Linear(24, 4)
        self.gate.weight.data.fill_(1.0)
        self.gate.bias.data.zero_()

    def forward(self, x):
        y = F.relu(self.stem(x))
        if self.gate(x.mean((2, 3))).mean() > 0:
            return self.easy(y.mean((2, 3)))
        return self.hard(F.relu(self.middle(F.relu(self.body(y)))).mean((2, 3)))


HARD, EASY = -torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)


def test_what_another_path_may_read_stays_whole():
    model = EarlyExit().eval()
    graph = sc.trace(model, HARD)
    assert {g.name: len(g) for g in graph.groups} == {"body": 32, "middle": 24}
    (reason,) = {f for f in graph.frozen if f.axis == "stem.weight" and f.dim == 0}
    assert "may be read by easy." in reason.reason and "test_paths.py:" in reason.reason
    assert "trace(model, [x1, x2])" in reason.reason
    small = sc.prune(model, HARD, sc.Budget(macs=0.5), criterion="magnitude").model
    assert small(EASY).shape == small(HARD).shape == (1, 4)


def test_with_inputs_for_each_path_all_are_bound_together():
    model = EarlyExit().double().eval()
    inputs = [HARD.double(), EASY.double()]
    graph = sc.trace(model, inputs)
    assert {g.name: len(g) for g in graph.groups} == {"stem": 16, "body": 32, "middle": 24}
    assert graph.macs() == sc.trace(model, inputs[0]).macs()
    plan = sc.make_plan(graph, {"stem": [0, 5], "body": [1], "middle": [2, 3]})
    small = sc.cut(model, plan)
    for x in inputs:
        assert sc.check(model, small, plan, x) < 1e-12
    again = sc.cut(model, sc.Plan.from_json(plan.to_json()))
    assert torch.equal(again(inputs[1]), small(inputs[1]))


def test_prune_takes_several_too():
    model = EarlyExit().eval()
    result = sc.prune(model, [HARD, EASY], sc.Budget(macs=0.4), criterion="magnitude")
    assert result.after.macs <= 0.4 * result.before.macs and result.model(EASY).shape == (1, 4)


def test_a_path_may_fail_on_one_of_the_inputs():
    with pytest.raises(sc.SecateurError, match=r"EarlyExit fails on the example inputs \(\[1, 4, 8, 8\]"):
        sc.trace(EarlyExit(), [HARD, torch.rand(1, 4, 8, 8)])
    with pytest.raises(sc.SecateurError, match="the list is empty"):
        sc.trace(EarlyExit(), [])


def test_what_is_never_used_freezes_nothing_where_no_value_steers():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.idle = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(x).relu())

    assert [g.name for g in sc.trace(Idle(), torch.randn(2, 4)).groups] == ["a"]
