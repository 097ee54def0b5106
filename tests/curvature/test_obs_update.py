"""What makes up for given displacements is the least of the quadratic, by brute force in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur._internal.errors import SecateurError
from secateur.curvature.damped_inverse import inverse
from secateur.curvature.kronecker import Factors
from secateur.curvature.layers import Layer
from secateur.curvature.obs_update import obs_update_columns, obs_update_rows

DOUBLE = torch.float64


def positive(groups, size, seed):
    a = torch.randn(groups, size, size + 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return a @ a.mT / (size + 3)


def case(module, form):
    layer = Layer("layer", module.double(), form)
    groups, rows, _, columns = layer.table().shape
    return Factors(layer, positive(groups, columns, 1), positive(groups, rows, 2))


MODULES = {
    "linear": lambda: nn.Linear(4, 5),
    "no bias": lambda: nn.Linear(4, 5, bias=False),
    "convolution": lambda: nn.Conv2d(3, 4, 2),
    "grouped": lambda: nn.Conv1d(6, 4, 3, groups=2),
}


def least(factors, displacement, given):
    """The least ``1/2 tr(G D A D^T)`` over what is not given, all taps, by one linear system for each group."""
    result = displacement.clone()
    for n, (a, g) in enumerate(zip(factors.a, factors.g, strict=True)):
        fisher = torch.kron(g, a)
        for tap in range(displacement.shape[2]):
            d, known = displacement[n, :, tap].flatten(), given[n, :, tap].flatten()
            d = torch.where(known, d, 0)
            d[~known] = torch.linalg.solve(fisher[~known][:, ~known], -fisher[~known][:, known] @ d[known])
            result[n, :, tap] = d.view(displacement[n, :, tap].shape)
    return result


@pytest.mark.parametrize("form", ["channel", "full"])
@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_least_rise(name, form):
    torch.manual_seed(0)
    factors = case(MODULES[name](), form)
    layer = factors.layer
    displacement = torch.randn(layer.table().shape, dtype=DOUBLE)
    outputs = torch.zeros(layer.module.weight.shape[0], dtype=torch.bool)
    outputs[1:3] = True
    where = outputs.view(displacement.shape[:2])[:, :, None, None].expand_as(displacement)
    torch.testing.assert_close(
        obs_update_rows(factors, displacement, outputs, 0.0), least(factors, displacement, where)
    )
    inputs = torch.zeros(layer.module.weight.shape[1], dtype=torch.bool)
    inputs[1:2] = True
    marked = torch.zeros_like(layer.module.weight)
    marked[:, inputs] = 1
    where = layer.table_of(marked, torch.zeros(len(outputs), dtype=DOUBLE) if layer.bias else None).bool()
    found = obs_update_columns(factors, displacement, inputs, 0.0)
    torch.testing.assert_close(found, least(factors, displacement, where))


def test_nothing_given_moves_nothing_and_all_given_stays():
    factors = case(nn.Linear(4, 5, bias=False), "channel")
    displacement = torch.randn(1, 5, 1, 4, dtype=DOUBLE)
    for make_up, size in ((obs_update_rows, 5), (obs_update_columns, 4)):
        assert not make_up(factors, displacement, torch.zeros(size, dtype=torch.bool), 0.0).any()
        torch.testing.assert_close(
            make_up(factors, displacement, torch.ones(size, dtype=torch.bool), 0.0), displacement
        )


def test_columns_that_others_predict_cost_nothing():
    """An input that is a linear function of the others (and of the constant 1) can go without a trace."""
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=DOUBLE)
    x[:, 3] = 2 * x[:, 0] - x[:, 1] + 0.5
    layer = Layer("layer", nn.Linear(4, 3).double())
    ones = torch.cat([x, torch.ones(50, 1, dtype=DOUBLE)], 1)
    factors = Factors(layer, (ones.T @ ones / 50)[None], torch.eye(3, dtype=DOUBLE)[None])
    gone = torch.tensor([False, False, False, True])
    before = layer.table()
    weight, bias = layer.weights(before + obs_update_columns(factors, -before, gone, 0.0))
    assert not weight[:, 3].any()
    torch.testing.assert_close(x @ weight.T + bias, layer.module(x).detach())


def test_a_factor_that_is_zero_costs_nothing_and_is_not_singular() -> None:
    factors = torch.zeros(2, 1, 1)
    factors[1] = 4.0
    found = inverse(factors, 0.5)
    assert found[0].item() > 1e20 and found[1].item() == pytest.approx(1 / 6)
    with pytest.raises(SecateurError, match="singular"):
        inverse(factors, 0.0)
