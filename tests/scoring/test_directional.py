"""Scores of structured directional pruning against their definition, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.curvature.null_space import NullSpaceProjector
from secateur.scoring.directional import Directions
from secateur.scoring.sums import by_group

DOUBLE = torch.float64
X = torch.randn(6, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


class Given(NullSpaceProjector):
    """``P_0`` as a matrix over all parameters."""

    side = "producers"

    def __init__(self, model, matrix) -> None:
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.matrix, self.facts = matrix, {}

    def project(self, vector: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = torch.cat([vector.get(n, torch.zeros(s, dtype=DOUBLE)).flatten() for n, s in self.shapes.items()])
        parts = (self.matrix @ x).split([s.numel() for s in self.shapes.values()])
        return {n: part.view(s) for part, (n, s) in zip(parts, self.shapes.items(), strict=True)}

    def complete(self, moved, fixed, *, damping=1e-3):
        return dict(moved)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()


def size(model):
    return sum(p.numel() for p in model.parameters())


def projector(model, rank, seed=0):
    """On a random subspace of this dimension."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size(model), rank, dtype=DOUBLE, generator=generator))[0]
    return Given(model, basis @ basis.T)


def by_hand(model, flat):
    """``s_g`` channel by channel."""
    layers = [model[0], model[2]]
    units = []
    for layer in layers:
        whole = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        units.append(whole / whole.norm(dim=1, keepdim=True))
    vector = {}
    for name, unit in zip(("0", "2"), units, strict=True):
        vector |= {f"{name}.weight": unit[:, :-1], f"{name}.bias": unit[:, -1]}
    eta = flat.project(vector)
    found = []
    for name, unit in zip(("0", "2"), units, strict=True):
        whole = torch.cat([eta[f"{name}.weight"], eta[f"{name}.bias"][:, None]], 1)
        found.append((unit * whole).sum(1))
    return torch.cat(found)


def values(model, graph, flat):
    return torch.cat(list(sc.directional_scores(model, graph, flat).values()))


def strengths(model, graph, flat):
    """What the criterion gives with this projector."""
    return by_group(graph, Directions(model, graph, flat).strength())


@pytest.mark.parametrize("rank", [1, 5, 20, 40])
def test_it_is_the_definition_and_keeps_the_invariants(rank):
    model = network()
    graph, flat = sc.trace(model, X), projector(model, rank)
    s = values(model, graph, flat)
    torch.testing.assert_close(s, by_hand(model, flat), rtol=1e-10, atol=1e-12)
    unit = Directions(model, graph, flat).unit
    eta = flat.project(unit)
    torch.testing.assert_close(s.sum(), sum((t**2).sum() for t in eta.values()), rtol=1e-10, atol=1e-12)
    many = len(s) ** 0.5
    assert (1 - many) / 2 <= s.min()
    assert s.max() <= (1 + many) / 2
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for p in scaled.parameters():
            p.mul_(3.7)
    torch.testing.assert_close(values(scaled, graph, flat), s, rtol=1e-10, atol=1e-12)


def test_all_flat_is_group_lasso_and_all_steep_moves_nothing():
    model = network()
    graph, eye = sc.trace(model, X), torch.eye(size(model), dtype=DOUBLE)
    torch.testing.assert_close(values(model, graph, Given(model, eye)), torch.ones(7, dtype=DOUBLE))
    assert not values(model, graph, Given(model, 0 * eye)).any()
    norms = torch.cat([torch.cat([m.weight, m.bias[:, None]], 1).norm(dim=1) for m in (model[0], model[2])]).detach()
    torch.testing.assert_close(torch.cat(list(strengths(model, graph, Given(model, eye)).values())), norms)
    assert torch.cat(list(strengths(model, graph, Given(model, 0 * eye)).values())).isinf().all()


def test_channels_of_one_element_are_directional_pruning():
    """``s_j = sign(theta_j) (P_0 sign(theta))_j`` (arXiv 2006.09358)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, 6, bias=False), nn.Tanh(), nn.Linear(6, 2)).double()
    graph, flat = sc.trace(model, X[:, :1]), projector(model, 7)
    sign = model[0].weight.detach().sign()
    expected = (sign * flat.project({"0.weight": sign})["0.weight"]).squeeze(1)
    torch.testing.assert_close(values(model, graph, flat), expected, rtol=1e-10, atol=1e-12)


def test_the_two_dimensional_cases():
    # H = a a^T over the two rows of the first weight
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    graph = sc.trace(model, X[:, :1])
    for theta, a, expected in (
        ((2.0, 1.0), (1.0, 0.0), (0.0, 1.0)),
        ((2.0, 1.0), (0.5**0.5, 0.5**0.5), (0.0, 0.0)),
        ((2.0, -1.0), (0.5**0.5, 0.5**0.5), (1.0, 1.0)),
    ):
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor(theta)[:, None])
        direction = torch.tensor([*a, 0.0, 0.0], dtype=DOUBLE)
        flat = Given(model, torch.eye(4, dtype=DOUBLE) - torch.outer(direction, direction))
        s = values(model, graph, flat)
        torch.testing.assert_close(s, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_a_residual_stream_shares_one_norm():
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.one(x).relu()
            return self.head(x + self.two(x))

    torch.manual_seed(0)
    model = Stream().double()
    graph = sc.trace(model, X)
    flat = Given(model, torch.eye(size(model), dtype=DOUBLE))
    (strength,) = strengths(model, graph, flat).values()
    rows = torch.cat([torch.cat([m.weight, m.bias[:, None]], 1) for m in (model.one, model.two)], 1)
    torch.testing.assert_close(strength, rows.norm(dim=1).detach())


def test_a_channel_that_is_zero_goes_first():
    model = network()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0
    graph = sc.trace(model, X)
    s = sc.directional_scores(model, graph, projector(model, 20))["0"]
    assert s[1] == 0
    strength = strengths(model, graph, projector(model, 20))["0"]
    assert strength[1] == 0
    assert (strength[[0, 2, 3]] > 0).all()


def test_bad_input_is_told():
    model = network()
    graph = sc.trace(model, X)
    with pytest.raises(SecateurError, match="needs data="):
        sc.score(model, graph, "directional")
    nothing = Given(model, torch.eye(size(model), dtype=DOUBLE))
    nothing.shapes = {"4.weight": model[4].weight.shape}
    with pytest.raises(SecateurError, match="no exact group"):
        sc.directional_scores(model, graph, nothing)
    other = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with pytest.raises(SecateurError, match=r"another model: '0.weight' has shape \[4, 5\] there and \[6, 5\] here"):
        sc.directional_scores(other, sc.trace(other, X), projector(model, 3))
