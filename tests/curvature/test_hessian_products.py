"""Products with second derivatives equal those with the matrix itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

from secateur._internal.errors import SecateurError
from secateur._internal.workload import Workload
from secateur.curvature.hessian_products import Products

DOUBLE = torch.float64
G = torch.Generator().manual_seed(0)
X = torch.randn(12, 4, dtype=DOUBLE, generator=G)
CLASSES = torch.randint(0, 3, (12,), generator=G)
VALUES = torch.randn(12, 3, dtype=DOUBLE, generator=G)


def network():
    torch.manual_seed(1)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def batches(targets):
    return [(X[:5], targets[:5]), (X[5:], targets[5:])]


def products_of(model, data, loss, **options):
    return Products(Workload(model, data, loss), **options)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def at(model, vector):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parts = vector.split([p.numel() for p in trained.values()])
    return functional_call(
        copy.deepcopy(model).eval(),
        {n: part.view(p.shape) for part, (n, p) in zip(parts, trained.items(), strict=True)},
        (X,),
    )


MEANS = {
    "cross_entropy": (CLASSES, lambda o: F.cross_entropy(o, CLASSES)),
    "mse": (VALUES, lambda o: 0.5 * (o - VALUES).square().sum() / 12),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("loss", MEANS)
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_it_is_the_matrix(matrix, loss, frozen):
    model = network()
    model[0].weight.requires_grad_(not frozen)
    targets, mean = MEANS[loss]
    products = products_of(model, batches(targets), loss, matrix=matrix)
    if matrix == "hessian":
        exact = hessian(lambda v: mean(at(model, v)), flat(model))
    else:
        slopes = jacobian(lambda v: at(model, v), flat(model)).flatten(0, 1)
        outputs = at(model, flat(model)).detach()
        bend = hessian(lambda o: mean(o.view(12, 3)), outputs.flatten())
        exact = slopes.T @ bend @ slopes
    exact = exact.detach()
    block = products(torch.eye(products.size, dtype=DOUBLE))
    torch.testing.assert_close(block, exact, rtol=1e-9, atol=1e-12)
    vector = torch.randn(1, products.size, dtype=DOUBLE, generator=G)
    torch.testing.assert_close(products(vector), vector @ exact, rtol=1e-9, atol=1e-12)
    assert products.examples == 12


def test_the_model_is_as_before():
    model = network().train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    products = products_of(model, batches(CLASSES), "cross_entropy")
    products(torch.ones(2, products.size, dtype=DOUBLE))
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_split_and_join_are_inverse():
    products = products_of(network(), batches(CLASSES), "cross_entropy")
    vector = torch.randn(products.size, dtype=DOUBLE, generator=G)
    assert torch.equal(products.join(products.split(vector)), vector)
    assert not products.join({})[:5].any()


def test_a_loss_that_is_linear_has_no_curvature():
    model = nn.Linear(4, 3, bias=False).double()
    for matrix in ("hessian", "gauss_newton"):
        products = products_of(model, batches(CLASSES), lambda o, t: o.sum() / len(t), matrix=matrix)
        assert not products(torch.ones(1, 12, dtype=DOUBLE)).any()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


def test_bad_input_is_told():
    model = network()
    with pytest.raises(SecateurError, match="did you mean 'hessian'"):
        products_of(model, batches(CLASSES), "cross_entropy", matrix="hesian")
    with pytest.raises(SecateurError, match="the loader is empty"):
        products_of(model, [], "cross_entropy")
    with pytest.raises(SecateurError, match="wants a gradient"):
        products_of(network().requires_grad_(False), batches(CLASSES), "cross_entropy")
    once = products_of(model, batches(CLASSES), lambda o, t: _Once.apply(o).sum() / len(t))
    with pytest.raises(SecateurError, match=r"cannot be differentiated twice.*basis='kfe'"):
        once(torch.ones(1, once.size, dtype=DOUBLE))
    with pytest.raises(SecateurError, match="does not fit the model"):
        products_of(model, [(X[:, :2], CLASSES)], "cross_entropy")(torch.ones(1, 48, dtype=DOUBLE))
    broken = products_of(model, [(X * torch.nan, CLASSES)], "cross_entropy")
    with pytest.raises(SecateurError, match="loss of batch 0 is nan"):
        broken(torch.ones(1, broken.size, dtype=DOUBLE))
