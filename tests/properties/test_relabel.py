"""Relabelling: the network computes what it did (random networks: ``test_networks``)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.lab.models.registry import build, example_input
from secateur.surgery.permute import keeps_its_order, moves, permuted

from .checks import gap, shuffled


@pytest.mark.parametrize("name", ["lenet5", "resnet8", "vgg16_bn"])
def test_the_papers_networks_compute_the_same(name):
    torch.manual_seed(0)
    model, x = build(name).eval(), torch.randn(2, *example_input(name)[1:])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that tell channels apart
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = model.double()
    graph = sc.trace(model, x.double())
    other = permuted(model, graph, shuffled(graph, 0))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        assert gap(model(x.double()), other(x.double())) < 1e-10


def test_orders_are_positions_of_the_channels_that_come_next():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    graph = sc.trace(model, torch.zeros(1, 2))
    other = permuted(model, graph, {"0": [2, 0, 1]})
    assert torch.equal(other[0].weight, model[0].weight[[2, 0, 1]])
    assert torch.equal(other[0].bias, model[0].bias[[2, 0, 1]])
    assert torch.equal(other[2].weight, model[2].weight[:, [2, 0, 1]])
    assert torch.equal(other[2].bias, model[2].bias)


class Rolled(nn.Module):
    """Each channel of the first layer becomes two, side by side; a roll by one parts those of the first."""

    def __init__(self, by):
        super().__init__()
        self.enter, self.each = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1, groups=16)
        self.one, self.two, self.by = nn.Conv2d(32, 12, 1), nn.Conv2d(32, 12, 1), by

    def forward(self, x):
        x = self.each(self.enter(x).relu()).relu()
        return self.one(x) + self.two(torch.cat(x.split([self.by, x.size(1) - self.by], 1)[::-1], 1))


class Shifted(nn.Module):
    """Some of the channels are those of the place before (arXiv 1811.08383)."""

    def __init__(self, first, times=1):
        super().__init__()
        self.enter, self.one, self.first = nn.Conv2d(3, 16, 1), nn.Conv2d(16 * times, 12, 1), first
        self.times = times

    def forward(self, x):
        x = self.enter(x).relu()
        x = torch.cat([x] * self.times, 1)
        y = torch.zeros_like(x)
        y[:, : self.first, 1:] = x[:, : self.first, :-1]
        y[:, self.first :] = x[:, self.first :]
        return self.one(y)


@pytest.mark.parametrize(
    ("make", "keeps"),
    [
        (lambda: Rolled(0), False),
        (lambda: Rolled(1), True),
        (lambda: Shifted(16), False),
        (lambda: Shifted(5), True),
        (lambda: Shifted(21, 2), True),
    ],
)
def test_where_channels_are_told_apart_by_their_place_the_group_keeps_its_order(make, keeps):
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    graph = sc.trace(model, x)
    (group,) = graph.groups
    assert len(group) == 16 and keeps_its_order(graph, group) == keeps
    order = torch.randperm(16).tolist()
    if keeps:
        with pytest.raises(SecateurError, match="cannot change places"):
            moves(graph, {group.name: order})
    else:
        other = permuted(model, graph, {group.name: order})
        with torch.no_grad():
            assert gap(model(x), other(x)) < 1e-12
    pivoted = sc.pivot(model, x, keep=0.5).model
    packed = sc.pack(pivoted, x, way="blocks")  # refused what was relabelled, for it computed something else
    with torch.no_grad():
        assert gap(pivoted(x), packed(x)) < 1e-10


def test_bad_orders_are_told():
    graph = sc.trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 2))
    with pytest.raises(SecateurError, match="a permutation of the numbers below 3"):
        moves(graph, {"0": [0, 1, 1]})
    with pytest.raises(SecateurError, match="group"):
        moves(graph, {"nothing": [0]})
