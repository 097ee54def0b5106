"""Weight norm: cut exactly, with the lengths of what loses inputs made what they must be."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import is_parametrized

import secateur as sc

Wrap = Callable[..., nn.Module]


def old(module: nn.Module, **options: int) -> nn.Module:
    """The weight norm of older releases: a hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return nn.utils.weight_norm(module, **options)


def chain(wrap: Wrap) -> nn.Sequential:
    return nn.Sequential(
        wrap(nn.Conv1d(4, 10, 3, padding=1)), nn.ReLU(), wrap(nn.Conv1d(10, 12, 3, padding=1)), nn.LeakyReLU(0.1),
        wrap(nn.ConvTranspose1d(12, 8, 4, 2)), nn.Tanh(), nn.Conv1d(8, 5, 1),
    )  # fmt: skip


class Residual(nn.Module):
    """As in vocoders and temporal networks."""

    def __init__(self, wrap: Wrap):
        super().__init__()
        self.first = wrap(nn.Conv1d(4, 9, 1))
        self.a, self.b = wrap(nn.Conv1d(9, 9, 3, padding=1)), wrap(nn.Conv1d(9, 9, 3, padding=2, dilation=2))
        self.last = wrap(nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for conv in (self.a, self.b):
            x = x + conv(torch.relu(x))
        return self.last(x.mean(-1))


NETWORKS = {"chain": chain, "residual": Residual}
X = torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module) -> nn.Module:
    source = torch.Generator().manual_seed(0)
    model.double()
    for name, tensor in model.named_parameters():
        tensor.data.copy_(torch.randn(tensor.shape, generator=source, dtype=torch.float64) * 0.4)
        if name.endswith(("original0", "weight_g")):
            tensor.data.abs_().add_(0.5)
    return model.eval()


def halves(graph: sc.ChannelGraph) -> dict[str, list[int]]:
    source = torch.Generator().manual_seed(2)
    return {g.name: torch.randperm(len(g), generator=source)[: len(g) // 2].tolist() for g in graph.groups}


@pytest.mark.parametrize("wrap", [weight_norm, old])
@pytest.mark.parametrize("network", NETWORKS)
def test_exact(network: str, wrap: Wrap):
    model = randomised(NETWORKS[network](wrap))
    plain = sc.trace(NETWORKS[network](lambda m: m).double(), X)
    graph = sc.trace(model, X)
    assert sorted(map(len, graph.groups)) == sorted(map(len, plain.groups)) and all(g.exact for g in graph.groups)
    plan = sc.make_plan(graph, halves(graph))
    assert plan.weight_norms and sc.Plan.from_json(plan.to_json()) == plan
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, X) < 1e-12
    assert sc.check(model, sc.cut(model, sc.Plan.from_json(plan.to_json())), plan, X) < 1e-12
    again = sc.trace(small, X)
    more = sc.make_plan(again, halves(again))
    assert sc.check(small, sc.cut(small, more), more, X) < 1e-12


def test_masked_is_the_network_without_the_channels():
    """Not merely what the cut one is: other channels' weights are untouched."""
    model = randomised(chain(weight_norm))
    plan = sc.make_plan(sc.trace(model, X), {"0": [1, 2], "2": [0], "4": [3]})
    with torch.no_grad():
        zeroed = sc.masked(model, plan)
        y = model[0](X)
        y[:, [1, 2]] = 0
        y = model[2](y.relu())
        y[:, 0] = 0
        y = model[4](model[3](y))
        y[:, 3] = 0
        wanted = model[6](y.tanh())
        assert torch.allclose(zeroed(X), wanted, atol=1e-12, rtol=0)


def test_it_goes_on_as_a_weight_norm():
    model = randomised(chain(weight_norm))
    small = sc.cut(model, sc.make_plan(sc.trace(model, X), {"0": list(range(5))}))
    assert is_parametrized(small[0]) and is_parametrized(small[2]) and small[2].in_channels == 5
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small.train()(X).square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_a_direction_without_anything_left():
    layers = nn.Linear(4, 3), nn.ReLU(), weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)
    model = randomised(nn.Sequential(*layers))
    with torch.no_grad():
        model[2].parametrizations.weight.original1[1, 1:] = 0  # what is left reads the first channel only
    x = X[0, :, :4]
    plan = sc.make_plan(sc.trace(model, x), {"0": [0]})
    assert sc.check(model, sc.cut(model, plan), plan, x) < 1e-12


def test_lengths_of_another_use_are_not_exact():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.v, self.g = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.rand(5, 1) + 0.5)
            self.c = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            w = torch._weight_norm(self.v * 2, self.g, 0)
            return self.b(x) + self.c(nn.functional.linear(x, w).relu())

    model = Twice().double()
    groups = {g.name: g for g in sc.trace(model, X[0, :, :4]).groups}
    assert not groups["a"].exact and "weight norm" in groups["a"].reason


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm])
def test_sizes_are_told(wrap: Wrap):
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), wrap(nn.Conv2d(8, 8, 3, groups=8)), nn.ReLU(), nn.Conv2d(8, 2, 1)
    model = nn.Sequential(*layers)
    x = torch.randn(1, 3, 9, 9)
    graph = sc.trace(model, x)
    if wrap is weight_norm:
        small = sc.cut(model, sc.make_plan(graph, {"0": [0, 3]}))
        assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (6, 6, 6)
    else:
        assert not [g for g in graph.groups if g.exact]
