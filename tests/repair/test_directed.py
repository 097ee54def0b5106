"""Where structured directional pruning leaves the weights: closed forms, the quadratic valley, real networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.repair.directed import Directed, directed_weights
from secateur.scoring.directional import Directions
from secateur.scoring.sums import by_group

DOUBLE = torch.float64
G = torch.Generator().manual_seed(0)
X = torch.randn(60, 6, dtype=DOUBLE, generator=G)
Y = torch.randint(0, 3, (60,), generator=G)
BASES = {"exact": {}, "lanczos": {"k": 20}, "kfe": {"soft": True}}


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


def loss(model):
    with torch.no_grad():
        return float(F.cross_entropy(model(X), Y))


def case(basis):
    model = trained()
    graph = sc.trace(model, X[:2])
    flat = sc.null_space_projector(model, [(X, Y)], "cross_entropy", basis=basis, **BASES[basis])
    scores = by_group(graph, Directions(model, graph, flat).strength())
    plan = sc.allocate(graph, scores, sc.Budget(channels=0.87, round_to=1), strategy="threshold")
    return model, graph, flat, scores, plan


def directed(model, plan, flat, **options):
    """The model with the weights of full size."""
    moved = copy.deepcopy(model)
    moved.load_state_dict({**moved.state_dict(), **directed_weights(model, plan, flat, **options)})
    return moved


@pytest.mark.parametrize("basis", BASES)
def test_radial_is_the_closed_form(basis):
    model, graph, flat, strength, plan = case(basis)
    s = sc.directional_scores(model, graph, flat)
    moved = directed(model, plan, flat, mode="radial")
    reached = [strength[name][list(positions)] for name, positions in plan.removed.items()]
    size = float(torch.cat(reached).max())
    for name in ("0", "2"):
        layer, new = model.get_submodule(name), moved.get_submodule(name)
        whole, got = (torch.cat([m.weight, m.bias[:, None]], 1).detach() for m in (layer, new))
        factor = 1 - size * s[name] / whole.norm(dim=1)
        kept = [i for i in range(len(whole)) if i not in plan.removed.get(name, [])]
        for i in kept:
            torch.testing.assert_close(got[i], whole[i] * (factor[i] if factor[i] > 0 else 1.0))
        for i in set(range(len(whole))) - set(kept):
            assert factor[i] <= 1e-9, "what goes is what the strength reaches"
    assert torch.equal(moved[4].weight, model[4].weight)


@pytest.mark.parametrize(("s", "expected"), [(-1.0, 3.0), (0.0, 2.0), (0.5, 1.5), (2.0, 0.0)])
def test_the_closed_form_is_the_minimiser(s, expected):
    """Of ``1/2 (r - 2)^2 + s r`` (lambda = 1) over radii ``r >= 0``, by brute force; for s < 0 the channel grows."""
    radii = torch.linspace(0, 5, 50_001, dtype=DOUBLE)
    best = radii[(0.5 * (radii - 2) ** 2 + s * radii).argmin()]
    torch.testing.assert_close(best, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=1e-4)
    assert max(0.0, 1 - s / 2) * 2 == pytest.approx(expected)


@pytest.mark.parametrize("basis", BASES)
def test_valley_loses_less_than_the_plain_cut(basis):
    model, _, flat, _, plan = case(basis)
    small = sc.cut(directed(model, plan, flat), plan)
    assert loss(sc.cut(model, plan)) > loss(small) > loss(model) - 1e-3
    radial = sc.cut(directed(model, plan, flat, mode="radial"), plan)
    assert loss(small) < loss(radial)


def test_in_a_singular_quadratic_the_valley_is_kept_and_radial_leaves_it():
    """A linear network sees the product of its layers only: whole directions of its weights are exactly flat."""
    torch.manual_seed(0)
    x = torch.randn(40, 2, dtype=DOUBLE)
    model = nn.Sequential(nn.Linear(2, 6, bias=False), nn.Linear(6, 1, bias=False)).double()
    model[1].requires_grad_(False)  # quadratic in the rest
    y = model(x).detach()
    graph = sc.trace(model, x[:2])
    flat = sc.null_space_projector(model, [(x, y)], "mse", basis="exact", share=1 - 1e-9)
    assert flat.facts["steep"] == 2
    scores = by_group(graph, Directions(model, graph, flat).strength())
    plan = sc.allocate(graph, scores, sc.Budget(channels=0.5, round_to=1), strategy="threshold")

    def rise(mode, **options):
        return error(directed(model, plan, flat, mode=mode, **options))

    def error(whole):
        with torch.no_grad():
            return float((sc.cut(whole, plan)(x) - y).square().mean())

    plain = error(model)
    assert rise("valley", damping=0) < 1e-15 * plain
    assert rise("valley", shift=1.0, damping=0) < 1e-15 * plain
    assert rise("radial") > 1e-3 * plain


def test_what_goes_stays_as_it_was_until_it_goes():
    for basis in BASES:
        model, graph, flat, _, plan = case(basis)
        for mode in ("valley", "radial"):
            moved = directed(model, plan, flat, mode=mode)
            small = sc.cut(moved, plan)
            assert sc.check(moved, small, plan, X[:4]) < 1e-10
            if mode == "valley" and flat.side == "consumers":
                axes = [(n, 1, plan.slices[n][1]) for n in ("2.weight", "4.weight") if 1 in plan.slices[n]]
            else:
                axes = [(a.name, a.dim, p) for n, p in plan.removed.items() for a in graph.group(n).producers]
            assert axes
            for name, dim, positions in axes:
                at = torch.tensor(list(positions))
                one, other = (dict(m.named_parameters())[name].index_select(dim, at) for m in (model, moved))
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("basis", BASES)
def test_the_repair_writes_these_weights_into_the_smaller_model(basis):
    model, graph, flat, _, plan = case(basis)
    scores = sc.score(model, graph, sc.Directional(basis=basis, **BASES[basis]), data=[(X, Y)], loss="cross_entropy")
    assert sc.allocate(graph, scores, sc.Budget(channels=0.87, round_to=1), strategy="threshold") == plan
    small = sc.cut(model, plan)
    facts = sc.apply_repair(
        model, small, plan, Directed(basis=basis, **BASES[basis]), data=[(X, Y)], loss="cross_entropy"
    )
    assert facts["flat"] == flat.facts
    wanted = sc.cut(directed(model, plan, flat), plan)
    for one, two in zip(small.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(one, two)


def test_bad_input_is_told():
    model, graph, flat, _, plan = case("kfe")
    with pytest.raises(SecateurError, match="did you mean 'valley'"):
        directed(model, plan, flat, mode="vally")
    with pytest.raises(SecateurError, match=r"shift=1.5: a number in \[0, 1\]"):
        directed(model, plan, flat, shift=1.5)
    with pytest.raises(SecateurError, match="no graph"):
        directed(model, sc.Plan.from_json(plan.to_json()), flat)
    assert graph.groups
