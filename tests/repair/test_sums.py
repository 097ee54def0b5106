"""What a layer's outputs are added to: it makes up for what is missing there, exactly where it can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.repair.sums import Added, affine

KINDS = ("plain", "norm", "scale", "in place", "turned round", "second first")


class TwoPaths(nn.Module):
    """``v + u``: the path of ``u`` sees all that the other does, which loses a hidden unit."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.d, self.c = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, bias=kind != "norm")
        self.norm = nn.BatchNorm2d(4) if kind == "norm" else nn.Identity()
        self.gamma = nn.Parameter(torch.tensor([0.5, -2.0, 3.0, 1e-6]).reshape(4, 1, 1))

    def v(self, x):
        return self.c(self.d(x).relu())

    def u(self, x):
        y = self.norm(self.b(self.a(x).relu()))
        return y * self.gamma if self.kind == "scale" else y

    def forward(self, x):
        if self.kind == "second first":  # then the layer that runs last is that of v, which cannot make up for itself
            u = self.u(x)
            return self.v(x) + u
        v = self.v(x)
        u = self.u(x)
        if self.kind == "in place":
            u += v
            return u
        return u + v if self.kind == "turned round" else v + u


def made(kind):
    torch.manual_seed(0)
    model, x = TwoPaths(kind).double().eval(), torch.randn(64, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        model.a.weight[:5], model.a.bias[:5] = model.d.weight, model.d.bias
        if kind == "norm":
            model.norm.weight.copy_(torch.tensor([0.3, -1.0, 2.0, 0.7]))
    sc.recalibrate(model, [x])
    graph = sc.trace(model, x[:1])
    return model, x, sc.make_plan(graph, {"d": [1]})


@pytest.mark.parametrize("together", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_makes_up_for_what_is_missing_in_what_its_outputs_are_added_to(kind, together):
    model, x, plan = made(kind)
    small = sc.cut(model, plan)
    before = (small(x) - model(x)).square().mean((0, 2, 3))
    sc.refit(model, small, plan, x.split(16), damping=1e-12, together=together)
    fresh = torch.randn(64, 3, 4, 4, dtype=torch.float64)
    missing = (small(fresh) - model(fresh)).square().mean((0, 2, 3))
    if kind == "second first":
        assert (missing > 1e-4 * before).all()
    elif kind == "scale":  # the last channel counts too little to be asked
        assert (missing[:3] < 1e-12).all()
        assert missing[3] > 1e-4 * before[3]
    else:
        assert (missing < 1e-12).all(), missing


def test_what_is_computed_from_the_layers_own_outputs_is_not_asked_for():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x):
            y = self.b(self.a(x).relu())
            return y + y.sigmoid()

    torch.manual_seed(0)
    model, x = Own().double().eval(), torch.randn(64, 3, dtype=torch.float64)
    plan = sc.make_plan(sc.trace(model, x[:1]), {"a": [1]})
    small, other = sc.cut(model, plan), sc.cut(model, plan)
    sc.refit(model, small, plan, [x])
    plain = nn.Sequential(model.a, nn.ReLU(), model.b)  # the same layers, and nothing is added
    names = {"a": "0", "b": "2"}
    of_plain = sc.make_plan(sc.trace(plain, x[:1]), {"0": [1]})
    alone = sc.cut(plain, of_plain)
    sc.refit(plain, alone, of_plain, [x])
    for name, number in names.items():
        torch.testing.assert_close(small.get_submodule(name).weight, alone.get_submodule(number).weight)
    assert not torch.equal(small.b.weight, other.b.weight)


def test_affine_is_found_row_by_row_and_nothing_else_is():
    torch.manual_seed(0)
    y = torch.randn(1, 50, 3, dtype=torch.float64)
    y[..., 2] = 4.0
    a, b = torch.tensor([[2.0, -0.5, 0.0]]).double(), torch.tensor([[1.0, 0.0, 7.0]]).double()
    found = affine(y, y * a[:, None] + b[:, None])
    assert found is not None
    torch.testing.assert_close(found[0], a)
    torch.testing.assert_close(found[1], b)
    assert affine(y, y.relu()) is None
    assert affine(y, torch.randn_like(y)) is None
    assert affine(y, y[..., :2]) is None
    assert affine(y[:, :2], y[:, :2]) is None
    asked = Added(0, 0, torch.tensor([[2.0, 1e-4, -0.1]]), b, None).asked
    assert asked.tolist() == [[True, False, True]]
