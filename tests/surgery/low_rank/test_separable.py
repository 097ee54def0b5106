"""Depthwise-separable bottlenecks against exact oracles in float64."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from test_bottleneck import DATA, LOSS, X, network
from torch import nn

import secateur as sc
from secateur.curvature.eigenbasis import eigenbasis_of
from secateur.curvature.kronecker import kronecker_factors
from secateur.surgery.low_rank.bottleneck import Bottleneck, split
from secateur.surgery.low_rank.separable import alternating, from_mean_tap, product, stirred


def parts_of(rows, taps, columns, rank, seed=0):
    source = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, rank, generator=source, dtype=torch.float64) for size in (rows, taps, columns))


def rotated(**options):
    torch.manual_seed(0)
    x = torch.randn(6, 4, 9, 9, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, **options), nn.ReLU(), nn.Conv2d(6, 2, 1)).double()
    return x, sc.eigendamage(model, x, sc.Budget(params=0.8), data=[x], loss="mse", layers=["0"], repair="none").model


def test_orthogonal_products_are_found_at_once():
    rows, taps, columns = parts_of(6, 9, 5, 4)
    taps = taps.abs()  # the mean tap has them all
    exact = torch.linalg.qr(rows)[0], taps, torch.linalg.qr(columns)[0]
    core = product(exact)
    found = from_mean_tap(core)
    torch.testing.assert_close(product(found), core)


def test_alternating_finds_products_that_are_there():
    core = product(parts_of(8, 9, 7, 3))
    found = alternating(core, parts_of(8, 9, 7, 3, seed=1), 2000, tolerance=0.0)
    assert (core - product(found)).norm() < 1e-6 * core.norm()


@pytest.mark.parametrize("seed", range(5))
def test_the_error_never_grows(seed):
    core = torch.randn(5, 9, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    begin = from_mean_tap(core)
    errors = [float((core - product(alternating(core, begin, n, 0.0))).norm()) for n in (0, 1, 2, 5, 20, 80)]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors)) and errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("how", ["cp", "svd"])
def test_the_layer_is_the_products_and_as_small_as_they_are(how):
    x, small = rotated()
    made = sc.separate(small, how)
    first, core, last = made[0]
    rank = min(small[0].core.weight.shape[:2])
    assert core.groups == rank and core.weight.shape == (rank, 1, 3, 3)
    assert sum(p.numel() for p in made[0].parameters()) == rank * (4 + 9 + 6) + 6
    one = product((last.weight.flatten(1), core.weight.flatten(1).mT, first.weight.flatten(1).mT))
    torch.testing.assert_close(
        nn.functional.conv2d(x, one.mT.reshape(6, 4, 3, 3), last.bias, stride=2, padding=1), made[0](x)
    )
    lengths = [
        last.weight.flatten(1).norm(dim=0),
        core.weight.flatten(1).norm(dim=1),
        first.weight.flatten(1).norm(dim=1),
    ]
    torch.testing.assert_close(lengths[0], lengths[1])
    torch.testing.assert_close(lengths[0], lengths[2])


def test_a_core_of_one_tap_stays_what_it_was():
    torch.manual_seed(0)
    x = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 2, 1)).double()
    small = sc.eigendamage(model, x, sc.Budget(params=0.7), data=[x], loss="mse").model
    torch.testing.assert_close(sc.separate(small, "svd")(x), small(x))


def test_alternating_is_nearer_than_the_mean_tap():
    x, small = rotated()
    near, far = ((sc.separate(small, how)(x) - small(x)).norm() for how in ("cp", "svd"))
    assert near < far


def test_it_is_saved_loaded_exported_and_not_rotated_again(tmp_path):
    small = sc.eigendamage(network(), X[:2], sc.Budget(macs=0.5), data=DATA, loss=LOSS).model
    made = sc.separate(small).eval()
    assert [next(iter(step)) for step in sc.record(made)] == ["eigendamage", "separate"]
    sc.save(made, tmp_path)
    assert torch.equal(sc.load(tmp_path, network).eval()(X), made(X))
    exported = torch.export.export(made, (X[:2],)).module()
    torch.testing.assert_close(exported(X[:2]), made(X[:2]))
    again = sc.eigendamage(made, X[:2], sc.Budget(params=0.95), data=DATA, loss=LOSS, repair="none").model
    assert all(torch.equal(again.state_dict()[n], t) for n, t in made.state_dict().items() if n.startswith("3."))


def test_rotations_that_stay_fixed_stay_fixed():
    small = sc.eigendamage(network(), X[:2], sc.Budget(macs=0.5), data=DATA, loss=LOSS, train_rotations=False).model
    made = sc.separate(small)
    wanted = {name: p.requires_grad for name, p in small.named_parameters()}
    assert not all(wanted.values())
    for name, p in made.named_parameters():  # what was no layer of its own was a part of the core
        assert p.requires_grad is wanted.get(name, True)


def test_products_that_begin_at_zero_are_woken():
    """One column that is not zero: six products can be as near as the singular values allow."""
    column = torch.randn(8, 9, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    core = torch.cat([column, torch.zeros(8, 9, 5, dtype=torch.float64)], 2)
    best = torch.linalg.svdvals(column[..., 0])[6:].norm()
    asleep = alternating(core, from_mean_tap(core), 200)
    awake = alternating(core, stirred(from_mean_tap(core)), 200)
    assert (core - product(awake)).norm() <= 1.001 * best < 0.3 * (core - product(asleep)).norm()
    assert (awake[1].norm(dim=0) > 0).all() and (asleep[1].norm(dim=0) > 1e-9).sum() == 1


def test_nothing_is_drawn_from_the_users_random_state():
    model = network()
    before = torch.get_rng_state()
    small = sc.eigendamage(model, X[:2], sc.Budget(macs=0.5), data=DATA, loss=LOSS).model
    sc.separate(small)
    assert torch.equal(torch.get_rng_state(), before)


def test_bottlenecks_of_a_bottleneck_are_merged_when_separable_too():
    made = sc.separate(sc.eigendamage(network(), X[:2], sc.Budget(macs=0.5), data=DATA, loss=LOSS).model).eval()
    nested = copy.deepcopy(made)
    for name in ("0", "3"):
        if isinstance(made[int(name)], Bottleneck) and made[int(name)].core.groups > 1:
            rank = made[int(name)].core.in_channels
            eye = nn.Conv2d(rank, rank, 1, bias=False).double()
            with torch.no_grad():
                eye.weight.copy_(torch.eye(rank)[..., None, None])
            nested[int(name)][1] = Bottleneck(eye, made[int(name)].core, copy.deepcopy(eye))
            break
    else:
        pytest.fail("no separable bottleneck")
    merged = sc.merge_bases(nested).eval()
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in made.parameters())
    torch.testing.assert_close(merged(X), made(X))


def test_a_bottleneck_at_two_places_stays():
    _, small = rotated()
    twice = nn.ModuleList([small[0], small[0]])
    with pytest.raises(sc.SecateurError, match="no convolutional bottleneck"):
        sc.separate(twice)


def test_bad_input_is_told():
    _, small = rotated()
    with torch.no_grad():
        small[0].core.weight[0, 0] = torch.nan
    with pytest.raises(sc.SecateurError, match="not finite"):
        sc.separate(small)
    with pytest.raises(sc.SecateurError, match="no convolutional bottleneck"):
        sc.separate(network())
    with pytest.raises(sc.SecateurError, match="did you mean 'cp'"):
        sc.separate(network(), "cpd")
    with pytest.raises(sc.SecateurError, match="a whole number from 0"):
        sc.separate(network(), sweeps=1.5)


def test_a_core_of_one_product_has_its_rotations():
    """A single channel goes in, so that the bottleneck needed no rotation there."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 6, 3, padding=1, bias=False).double()
    basis = eigenbasis_of(kronecker_factors(nn.Sequential(layer), [X[:, :1]], "mse", bias=False)["0"])
    model = nn.Sequential(split(layer, basis, torch.arange(3), torch.arange(1)))
    assert list(model[0]._modules) == ["1", "2"]
    made = sc.separate(model)
    assert [tuple(part.weight.shape) for part in made[0]] == [(1, 1, 1, 1), (1, 1, 3, 3), (6, 1, 1, 1)]
    whole = model[0].core.weight.detach().flatten(2).mT
    wanted = product(alternating(whole, from_mean_tap(whole), 100))
    core = torch.einsum("or,rki->oki", model[0][1].weight.detach().flatten(1), wanted)
    by_hand = nn.functional.conv2d(X[:, :1], core.mT.reshape(6, 1, 3, 3), padding=1)
    torch.testing.assert_close(made(X[:, :1]), by_hand, rtol=1e-4, atol=1e-6)
