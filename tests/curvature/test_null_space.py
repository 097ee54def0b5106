"""The projector on flat directions: its three forms, against definitions and each other."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur._internal.workload import Workload
from secateur.curvature.hessian_products import Products
from secateur.curvature.null_space import Deflated, Kronecker, steep

DOUBLE = torch.float64
G = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, 6, 6, dtype=DOUBLE, generator=G)
Y = torch.randint(0, 4, (24,), generator=G)
BASES = {
    "exact": {"basis": "exact"},
    "hessian": {"basis": "exact", "matrix": "hessian"},
    "lanczos": {"basis": "lanczos", "k": 9},
    "kfe": {"basis": "kfe", "form": "full"},
    "kfe channel": {"basis": "kfe"},
    "kfe soft": {"basis": "kfe", "soft": True},
    "kfe ekfac": {"basis": "kfe", "ekfac": True},
}


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 4)).double()


def batches():
    return [(X[:10], Y[:10]), (X[10:], Y[10:])]


def random_vector(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, dtype=DOUBLE, generator=generator) for n, p in model.named_parameters()}


def dot(one, other):
    return sum((one[name] * other[name]).sum() for name in one)


@pytest.mark.parametrize("name", BASES)
def test_it_is_symmetric_and_shortens(name):
    model = network()
    flat = sc.null_space_projector(model, batches(), "cross_entropy", **BASES[name])
    x, y = random_vector(model, 1), random_vector(model, 2)
    px, py = flat.project(x), flat.project(y)
    assert set(px) == set(flat.shapes) == {n for n, _ in model.named_parameters()}
    torch.testing.assert_close(dot(px, y), dot(py, x))
    assert 0 < dot(px, x) < dot(x, x)
    torch.testing.assert_close(dot(px, flat.project(x)), dot(px, px))
    if name in {"exact", "hessian", "lanczos", "kfe"}:  # a true projector; in channel form a bias has many taps
        again = flat.project(px)
        for n in px:
            torch.testing.assert_close(again[n], px[n], rtol=1e-7, atol=1e-10)
    assert flat.facts["steep"] < flat.facts["directions"]


def test_the_exact_one_leaves_what_the_loss_does_not_see():
    model = network()
    flat = sc.null_space_projector(model, batches(), "cross_entropy", basis="exact", share=0.999)
    products = Products(Workload(model, batches(), "cross_entropy"), matrix="gauss_newton")
    x = products.join(random_vector(model, 1))
    inside = products.join(flat.project(products.split(x)))
    assert isinstance(flat, Deflated)
    steep_ones = flat.vectors[:, : flat.count]
    assert (steep_ones.T @ inside).abs().max() < 1e-9
    bent = products(torch.stack([inside, x]))
    assert bent[0].norm() <= flat.facts["cutoff"] * inside.norm() * (1 + 1e-6)
    assert bent[1].norm() > bent[0].norm()
    mass = flat.values.abs().double().cumsum(0) / flat.values.abs().sum()
    assert mass[flat.count - 1] >= 0.999 > mass[flat.count - 2]


def test_lanczos_finds_the_same_directions():
    model = network()
    exact = sc.null_space_projector(model, batches(), "cross_entropy", basis="exact")
    lanczos = sc.null_space_projector(model, batches(), "cross_entropy", basis="lanczos", k=12, tolerance=1e-9)
    torch.testing.assert_close(lanczos.values, exact.values[:12], rtol=1e-6, atol=1e-9)
    one, other = exact.vectors[:, :12], lanczos.vectors
    torch.testing.assert_close(one @ one.T, other @ other.T, rtol=1e-5, atol=1e-6)
    again = sc.null_space_projector(model, batches(), "cross_entropy", basis="lanczos", k=12, tolerance=1e-9)
    assert torch.equal(again.vectors, lanczos.vectors)


@pytest.mark.parametrize("form", ["channel", "full"])
def test_a_bias_keeps_its_length_in_every_form(form):
    """Where everything is flat but one direction, next to nothing is taken from a vector of biases."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 4)).double()
    flat = sc.null_space_projector(model, batches(), "cross_entropy", form=form, share=1e-6)
    x = {n: torch.ones_like(p) if n == "0.bias" else torch.zeros_like(p) for n, p in model.named_parameters()}
    for n, value in flat.project(x).items():
        assert (value - x[n]).norm() <= 1 + 1e-9
    assert isinstance(flat, Kronecker)
    everything = copy.copy(flat)
    object.__setattr__(everything, "cutoff", float("inf"))
    for n, value in everything.project(x).items():
        torch.testing.assert_close(value, x[n], rtol=0, atol=1e-10)


def test_the_soft_one_is_half_at_the_cutoff_and_both_agree_far_from_it():
    model = network()
    hard, soft = (
        sc.null_space_projector(model, batches(), "cross_entropy", soft=s, form="full") for s in (False, True)
    )
    assert hard.cutoff == soft.cutoff
    for name, basis in hard.bases.items():
        curvature = basis.curvature().expand_as(basis.layer.table())
        at = int((curvature - hard.cutoff).abs().argmin())
        unit = torch.zeros(curvature.numel(), dtype=curvature.dtype)
        unit[at] = 1
        weight, bias = basis.layer.weights(basis.back(unit.view_as(curvature)))
        x = {f"{name}.weight": weight} | ({f"{name}.bias": bias} if bias is not None else {})
        share = float(hard.cutoff / (hard.cutoff + curvature.flatten()[at]))
        torch.testing.assert_close(dot(x, soft.project(x)), torch.tensor(share, dtype=DOUBLE), rtol=1e-6, atol=0)
        kept = float(curvature.flatten()[at] < hard.cutoff)
        torch.testing.assert_close(dot(x, hard.project(x)), torch.tensor(kept, dtype=DOUBLE), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("basis", ["exact", "lanczos"])
def test_completing_is_the_least_of_the_quadratic(basis):
    model = network()
    k = {"k": 30} if basis == "lanczos" else {}
    flat = sc.null_space_projector(model, batches(), "cross_entropy", basis=basis, **k)
    products, x = flat.products, random_vector(model, 3)
    rows = torch.tensor([True, False, True, False])
    fixed = {"0.weight": {0: rows}, "0.bias": {0: rows}, "5.weight": {1: torch.arange(16) < 3}}
    given = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    given["0.weight"][rows] = given["0.bias"][rows] = True
    given["5.weight"][:, :3] = True
    moved = {name: torch.where(given[name], x[name], 0) for name in x}
    found = products.join(flat.complete(moved, fixed, damping=1e-2))
    size, vectors = flat.values.abs().double()[: flat.count], flat.vectors.double()[:, : flat.count]
    matrix = vectors @ torch.diag(size) @ vectors.T
    ridge = 1e-2 * size.min()
    z = products.join({name: mask.double() for name, mask in given.items()}).bool()
    d = products.join(moved)
    inner = matrix[~z][:, ~z] + ridge * torch.eye(int((~z).sum()), dtype=DOUBLE)
    torch.testing.assert_close(found[~z], -torch.linalg.solve(inner, matrix[~z][:, z] @ d[z]), rtol=1e-5, atol=1e-8)
    assert torch.equal(found[z], d[z])


# ------------------------------------------------------------------------------------------ trained networks, real data


def digits(shape):
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).view(-1, *shape)[:300] / 16, torch.tensor(data.target)[:300]


def perceptron():
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)), (64,)


def convolutional():
    layers = [nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10)), (1, 8, 8)


@pytest.mark.parametrize(("make", "seed"), [(perceptron, 0), (perceptron, 1), (convolutional, 0)])
def test_scores_of_the_cheap_projectors_rank_channels_as_the_exact_ones_do(make, seed):
    torch.manual_seed(seed)
    model, shape = make()
    x, y = digits(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        for part in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    graph, data = sc.trace(model, x[:2]), [(x, y)]

    def scores(**options):
        found = sc.directional_scores(model, graph, sc.null_space_projector(model, data, "cross_entropy", **options))
        return np.concatenate([found[g.name].numpy() for g in graph.groups])

    exact = scores(basis="exact")
    kfe = spearmanr(exact, scores(basis="kfe", soft=True, fisher="exact")).statistic
    lanczos = spearmanr(exact, scores(basis="lanczos", k=100)).statistic
    print(f"{make.__name__}, seed {seed}: rank correlation with the exact one: kfe {kfe:.3f}, lanczos {lanczos:.3f}")
    assert kfe > 0.8
    assert lanczos > 0.9


# ------------------------------------------------------------------------------------------------------------ bad input


def test_steep_is_the_smallest_set_that_carries_the_share():
    count, cutoff = steep(torch.tensor([1.0, 5.0, 3.0, 1.0]), 0.75)
    assert (count, cutoff) == (2, 3.0)
    assert steep(torch.tensor([1.0, 5.0, 3.0]), 0.7, torch.tensor([4, 1, 2])) == (3, 3.0)
    with pytest.raises(SecateurError, match="every direction is steep"):
        steep(torch.ones(4), 0.9)
    with pytest.raises(SecateurError, match="no curvature"):
        steep(torch.zeros(4), 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "kfa"}, "did you mean 'kfe'"),
        ({"share": 1.0}, r"share=1.0.*\(0, 1\)"),
        ({"basis": "lanczos", "k": 10_000}, r"k=10000.*from 1 to 251 .*252 parameters"),
        ({"basis": "lanczos", "k": 0}, r"k=0.*from 1"),
        ({"basis": "lanczos", "k": 20, "iterations": 1, "tolerance": 1e-12}, r"did not converge: give fewer"),
        ({"basis": "exact", "soft": True}, r"soft: basis 'exact' has no such option; it takes matrix"),
        ({"basis": "exact", "matrix": "fisher"}, r"unknown matrix 'fisher'"),
    ],
    ids=str,
)
def test_bad_input_is_told(options, message):
    with pytest.raises(SecateurError, match=message):
        sc.null_space_projector(network(), batches(), "cross_entropy", **options)


def test_more_parameters_than_all_eigenpairs_can_be_found_of_are_told():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 300)).double()
    with pytest.raises(SecateurError, match=r"up to 20,000 parameters, this model has 32,700"):
        sc.null_space_projector(model, [(X, Y)], "cross_entropy", basis="exact")
