"""Buffers that are part of a channel: zero in the masked network, gone in the cut one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.measure.counting import count_macs


class FrozenNorm(nn.Module):
    """As in detectors' backbones."""

    def __init__(self, width: int):
        super().__init__()
        values = {"weight": torch.rand(width) + 0.5, "bias": torch.randn(width), "mean": torch.randn(width),
                  "var": torch.rand(width) + 0.5}  # fmt: skip
        for name, value in values.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.var + 1e-5).rsqrt()
        shift = self.bias - self.mean * scale
        return x * scale[None, :, None, None] + shift[None, :, None, None]


class Divides(FrozenNorm):
    """The same, where a buffer must not be zero: it stays what it is, and nothing needs it to be zero."""

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        x = x * (self.weight / self.var.sqrt()).view(shape)
        return x + self.bias.view(shape)


class Shifts(FrozenNorm):
    """A buffer that must not be zero, and must be for the channel to be: not exact."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (1 / self.var)[None, :, None, None]


class Positions(nn.Module):
    """Positional encodings that are no parameter, saved or not."""

    def __init__(self, *, saved: bool):
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.register_buffer("pe", torch.randn(1, 20, 12), persistent=saved)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.pe[:, : x.shape[1]]
        return self.head(x + self.down(torch.relu(self.up(x))))


def network(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    layers = nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 10, 3), norm(10), nn.ReLU(), nn.Conv2d(10, 4, 1)
    return nn.Sequential(*layers).double().eval()


X = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [FrozenNorm, Divides])
def test_frozen_norms_are_cut_exactly(norm: type[nn.Module]):
    model = network(norm)
    graph = sc.trace(model, X)
    assert all(g.exact for g in graph.groups)
    plan = sc.make_plan(graph, {"0": [0, 3, 5], "3": list(range(1, 9))})
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, X) < 1e-12
    assert small[1].weight.shape == (5,)
    with torch.no_grad():
        y = model[:3](X)
        y[:, [0, 3, 5]] = 0
        y = model[3:6](y)
        y[:, 1:9] = 0
        assert torch.allclose(model[6](y), small(X), atol=1e-12, rtol=0)


def test_what_must_not_be_zero_is_left_as_it_is():
    model = network(Divides)
    graph = sc.trace(model, X)
    names = {axis.name for group in graph.groups for axis in group.constants}
    assert "1.bias" in names and "1.var" not in names
    masked = sc.masked(model, sc.make_plan(graph, {"0": [2]}))
    assert masked[1].bias[2] == 0 and masked[1].var[2] == model[1].var[2] != 0


def test_what_must_not_be_zero_but_would_have_to_is_not_exact():
    graph = sc.trace(network(Shifts), X)
    assert not any(g.exact for g in graph.groups)


@pytest.mark.parametrize("saved", [True, False])
def test_positions(saved: bool):
    model = Positions(saved=saved).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    graph = sc.trace(model, x)
    assert {g.name for g in graph.groups if g.exact} == {"embed", "up"}
    plan = sc.make_plan(graph, {"embed": [0, 4, 11], "up": [3]})
    small = sc.cut(model, plan)
    assert small.pe.shape == (1, 20, 9) and sc.check(model, small, plan, x) < 1e-12


def test_zero_channels_have_zero_constants():
    model = network(FrozenNorm)
    graph = sc.trace(model, X)
    with torch.no_grad():
        model[0].weight[:4], model[0].bias[:4] = 0, 0
        model[1].bias[:2], model[1].weight[:2], model[1].mean[:2], model[1].var[:2] = 0, 0, 0, 0
    assert sc.zero_channels(model, graph).removed == {"0": [0, 1]}


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "random"])
def test_one_line(criterion: str):
    batches = [(X, torch.tensor([0, 1]))]

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out.mean((2, 3)), target)

    data = {} if criterion != "taylor" else {"data": batches, "loss": loss}
    model = network(FrozenNorm)
    result = sc.prune(model, X, criterion=criterion, budget=sc.Budget(macs=0.5), repair="none", **data)
    assert 0 < count_macs(result.model, X) <= 0.5 * count_macs(model, X)
    assert sc.check(model, result.model, result.plan, X) < 1e-12


def test_training_methods_say_what_they_leave():
    model = network(FrozenNorm)
    plan = sc.SDPrun(model, sc.trace(model, X), lr=0.1).plan()
    assert not plan.removed and "1.weight, which is not trained" in plan.skipped["0"]
