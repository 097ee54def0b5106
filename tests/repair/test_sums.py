"""What a layer's outputs are added to: it makes up for what is missing there, exactly where it can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.repair.sums import Added

KINDS = ("plain", "norm", "dropped out", "in place", "turned round", "second first")


class TwoPaths(nn.Module):
    """``v + u``: the path of ``u`` sees all that the other does, which loses a hidden unit."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.d, self.c = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, bias=kind != "norm")
        self.norm = nn.BatchNorm2d(4) if kind == "norm" else nn.Identity()

    def v(self, x):
        return self.c(self.d(x).relu())

    def u(self, x):
        y = self.norm(self.b(self.a(x).relu()))
        return nn.functional.dropout(y, 0.5, self.training) if self.kind == "dropped out" else y

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
            model.norm.weight.copy_(torch.tensor([0.3, -1.0, 2.0, 1e-6]))
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
    elif kind == "norm":  # the last channel counts too little to be asked
        assert (missing[:3] < 1e-12).all()
        assert missing[3] > 1e-4 * before[3]
    else:
        assert (missing < 1e-12).all(), missing


def halved(module, args, y):
    return 0.5 * y


class Strange(nn.Module):
    """Sums whose operand is not, or not alone, what the layer gives: it is fitted as if nothing were added."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.d, self.c = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.norm, self.g = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.gamma = nn.Parameter(torch.tensor([0.1, -0.3, 0.5, 0.2]).reshape(4, 1, 1))

    def forward(self, x):
        v = self.c(self.d(x).relu())
        hidden = self.a(x).relu()
        y = self.b(hidden)
        match self.kind:
            case "scaled after a norm":
                return v + self.gamma * self.norm(y)
            case "a norm elsewhere":
                z = self.norm(y).relu()
                return v + y + self.g(z)
            case "read twice":
                s = v + y
                return s + self.g(y.relu())
            case "a norm read twice":
                z = self.norm(y)
                s = v + z
                return s + self.g(z.relu())
            case "a second sum":
                s, skip = v + y, x.mean(1, keepdim=True) + y
                return s + self.g(skip)
            case "half and its own":
                return 0.5 * y + y
            case "its own norm":
                return y + self.norm(y)
            case "sorted":
                return y + y.sort(1)[0]
            case "inputs changed":
                hidden.mul_(0.1)
                return v + y
            case "written into":
                y.mul_(2)
                return v + y
            case _:
                return v + y


STRANGE = (
    "scaled after a norm", "a norm elsewhere", "read twice", "a norm read twice", "a second sum", "half and its own",
    "its own norm", "sorted", "inputs changed", "written into", "a hook",
)  # fmt: skip


@pytest.mark.parametrize("together", [None, 16])
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_not_the_layers_outputs_alone_is_left_as_it_is(kind, together, monkeypatch):
    torch.manual_seed(0)
    model, x = Strange(kind).double().eval(), torch.randn(64, 3, 4, 4, dtype=torch.float64)
    if kind == "a hook":
        model.b.register_forward_hook(halved)
    sc.recalibrate(model, [x])
    plan = sc.make_plan(
        sc.trace(model, x[:1]), {"d": [1], "a": [2]} if "own" not in kind and kind != "sorted" else {"a": [2]}
    )
    found = []
    for _ in range(2):
        small = sc.cut(model, plan)
        sc.refit(model, small, plan, x.split(16), together=together)
        found.append(small.state_dict())
        monkeypatch.setattr("secateur.repair.refit._Original.sums_of_all", lambda self, work, names: {})
    for name, tensor in found[0].items():
        if not name.startswith("g."):  # which may well make up for what is missing in its own sum
            torch.testing.assert_close(tensor, found[1][name], msg=name)


def test_a_norm_over_another_dim_than_the_rows_takes_no_mean(monkeypatch):
    """A linear over tokens, whose batch norm has a channel for each token: every row has a mean of its own."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 6, bias=False)
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.b(self.a(x).relu()))

    torch.manual_seed(0)
    model, x = Tokens().double().eval(), torch.randn(256, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        model.a.bias += 1.5
    sc.recalibrate(model, [x])
    plan = sc.make_plan(sc.trace(model, x[:1]), {"a": [1, 2, 3, 7]})
    found = []
    for _ in range(2):
        small = sc.cut(model, plan)
        sc.refit(model, small, plan, [x])
        found.append(small.state_dict())
        monkeypatch.setattr("secateur.repair.refit._Original.normed_of_all", lambda self, work, names: set())
    torch.testing.assert_close(found[0], found[1])


def test_channels_that_count_little_are_not_asked():
    asked = Added(None, torch.tensor([[2.0, 1e-4, -0.1]])).asked
    assert asked.tolist() == [[True, False, True]]
