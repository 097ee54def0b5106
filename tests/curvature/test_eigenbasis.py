"""The eigenbasis and the second moments in it, against exact oracles in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_kronecker import X, Y, network
from torch import nn

from secateur._internal.workload import Workload
from secateur.curvature.eigenbasis import eigenbasis_of, identity_basis, second_moments
from secateur.curvature.fisher import Fisher
from secateur.curvature.kronecker import kronecker_factors

FORMS = ("channel", "full")


def moments_of(model, bases, data):
    return second_moments(Workload(model, data, "cross_entropy"), bases, Fisher("empirical")).bases


def factored(form="channel"):
    model = network()
    return model, kronecker_factors(
        model, [(X[:4], Y[:4]), (X[4:], Y[4:])], "cross_entropy", fisher="empirical", form=form
    )


@pytest.mark.parametrize("form", FORMS)
def test_it_is_an_orthonormal_basis_in_which_the_factors_are_diagonal(form):
    _, factors = factored(form)
    for one in factors.values():
        basis = eigenbasis_of(one)
        for q, values, matrix in ((basis.qa, basis.a, one.a), (basis.qg, basis.g, one.g)):
            torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q))
            torch.testing.assert_close(q * values[:, None] @ q.mT, matrix, rtol=1e-8, atol=1e-10)
        table = one.layer.table()
        torch.testing.assert_close(basis.back(basis.rotate(table)), table)


@pytest.mark.parametrize("form", FORMS)
def test_the_energies_add_up_to_the_quadratic_form_of_the_weight(form):
    _, factors = factored(form)
    for one in factors.values():
        table, energy = one.layer.table(), eigenbasis_of(one).energy()
        exact = torch.einsum("grkc,gcd,gqkd,grq->", table, one.a, table, one.g)
        torch.testing.assert_close(energy.sum(), exact)


def test_removing_one_coordinate_costs_half_its_energy():
    _, factors = factored()
    for one in factors.values():
        basis = eigenbasis_of(one)
        rotated, energy = basis.rotate(one.layer.table()), basis.energy()
        for column in range(rotated.shape[-1]):
            gone = torch.zeros_like(rotated)
            gone[..., column] = rotated[..., column]
            change = basis.back(gone)
            cost = torch.einsum("grkc,gcd,gqkd,grq->", change, one.a, change, one.g)
            torch.testing.assert_close(cost, energy[..., column].sum(), rtol=1e-8, atol=1e-12)


def per_example(model, name, x, y):
    """Gradients of single examples with respect to a layer's table, [examples, groups, rows, taps, columns]."""
    model = model.eval()
    module = model.get_submodule(name)
    found = []
    for i in range(len(x)):
        parameters = [module.weight] + ([module.bias] if module.bias is not None else [])
        found.append(torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters))
    return found


@pytest.mark.parametrize("most", [2**26, 1])
@pytest.mark.parametrize("form", FORMS)
def test_moments_in_the_weights_coordinates_are_the_diagonal_of_the_fisher(form, most, monkeypatch):
    monkeypatch.setattr("secateur.curvature.eigenbasis.GRADIENTS_AT_ONCE", most)
    model, factors = factored(form)
    bases = {name: identity_basis(one.layer) for name, one in factors.items()}
    bases = moments_of(model, bases, [(X[:4], Y[:4]), (X[4:], Y[4:])])
    for name, basis in bases.items():
        grads = per_example(model, name, X, Y)
        weight, _ = basis.layer.weights(basis.moments)
        exact = sum(g[0].square() for g in grads) / len(X)
        torch.testing.assert_close(weight, exact, rtol=1e-9, atol=1e-14)
        if len(grads[0]) == 2:
            bias = sum(g[1].square() for g in grads) / len(X)  # each tap sees its share of the constant
            torch.testing.assert_close(
                basis.moments[..., -1].reshape(len(bias), -1) * basis.layer.taps**2,
                bias[:, None].expand(-1, basis.layer.taps),
                rtol=1e-9, atol=1e-14,
            )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_moments_in_the_eigenbasis_are_those_of_the_rotated_gradient(form):
    model, factors = factored(form)
    bases = moments_of(model, {n: eigenbasis_of(f) for n, f in factors.items()}, [(X, Y)])
    for name, basis in bases.items():
        total = 0
        for grads in per_example(model, name, X, Y):
            module = model.get_submodule(name)
            weight, bias = module.weight.detach().clone(), None if module.bias is None else module.bias.detach().clone()
            with torch.no_grad():
                module.weight.copy_(grads[0])
                if bias is not None:
                    module.bias.copy_(grads[1] / basis.layer.taps)
                gradient = basis.layer.table().clone()
                module.weight.copy_(weight)
                if bias is not None:
                    module.bias.copy_(bias)
            total = total + basis.rotate(gradient).square()
        torch.testing.assert_close(basis.moments, total / len(X), rtol=1e-8, atol=1e-14)


def test_moments_are_the_best_diagonal_in_the_basis():
    """They are nearer to the exact Fisher, in the Frobenius norm, than the product of the eigenvalues."""
    model, factors = factored()
    bases = moments_of(model, {n: eigenbasis_of(f) for n, f in factors.items()}, [(X, Y)])
    basis = bases["7"]
    rows = torch.stack([torch.cat([g[0], g[1][:, None]], 1).flatten() for g in per_example(model, "7", X, Y)])
    fisher = rows.T @ rows / len(X)
    q = torch.kron(basis.qg[0], basis.qa[0])
    errors = [
        (fisher - q @ torch.diag(diagonal.flatten()) @ q.T).norm()
        for diagonal in (basis.moments, basis.g[:, :, None, None] * basis.a[:, None, None, :])
    ]
    assert errors[0] <= errors[1]


def test_dead_and_doubled_inputs_have_no_curvature():
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64)
    x[:, 1], x[:, 4] = 0, x[:, 3]
    model = nn.Linear(5, 3, bias=False).double()
    basis = eigenbasis_of(kronecker_factors(model, [x], "cross_entropy")[""])
    assert (basis.a == 0).sum() == 2 and (basis.energy()[..., :2] == 0).all()
    table = basis.rotate(basis.layer.table())
    table[..., :2] = 0
    weight, _ = basis.layer.weights(basis.back(table))
    torch.testing.assert_close(F.linear(x, weight), model(x), rtol=1e-6, atol=1e-8)


def test_a_module_that_is_called_twice_adds_up_before_it_is_squared():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    bases = {"0": identity_basis(kronecker_factors(model, [x], "cross_entropy", layers=["0"])["0"].layer)}
    moments = moments_of(model, bases, [(x, y)])["0"].moments
    exact = sum(g[0].square() for g in per_example(model, "0", x, y)) / 5
    torch.testing.assert_close(moments[0, :, 0, :-1], exact)
