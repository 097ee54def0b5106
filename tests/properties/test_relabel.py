"""Relabelling: the network computes what it did, whatever it is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.errors import NothingToPrune, SecateurError
from secateur.lab.models.registry import build, example_input
from secateur.surgery.permute import moves, permuted

from .checks import fresh, gap, run
from .networks import network, random_spec


def shuffled(graph, seed):
    rng = np.random.default_rng(seed)
    return {g.name: rng.permutation(len(g)).tolist() for g in graph.groups if g.exact}


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_random_networks_compute_the_same(first):
    moved = 0
    for seed in range(first, first + 25):
        model, inputs = network(random_spec(seed))
        model, inputs = model.double().eval(), fresh(inputs)
        try:
            graph = sc.trace(model, inputs)
        except NothingToPrune:
            continue
        other = permuted(model, graph, shuffled(graph, seed))
        moved += any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        with torch.no_grad():
            for a, b in zip(run(model, inputs), run(other, inputs), strict=True):
                assert gap(a, b) < 1e-10, seed
    assert moved > 20


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
