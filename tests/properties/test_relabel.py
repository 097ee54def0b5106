"""Relabelling: the network computes what it did (random networks: ``test_networks``)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.lab.models.registry import build, example_input
from secateur.surgery.permute import moves, permuted

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


def test_bad_orders_are_told():
    graph = sc.trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 2))
    with pytest.raises(SecateurError, match="a permutation of the numbers below 3"):
        moves(graph, {"0": [0, 1, 1]})
    with pytest.raises(SecateurError, match="group"):
        moves(graph, {"nothing": [0]})
