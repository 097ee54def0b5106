"""Criteria against exact oracles in float64, and that nothing of the model changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.scoring.contract import CRITERIA


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5),
    ).double()  # fmt: skip


X = torch.randn(7, 3, 6, 6, dtype=torch.float64)
BATCHES = [(X[:4], torch.tensor([0, 1, 2, 3])), (X[4:], torch.tensor([4, 0, 1]))]


@pytest.fixture
def model():
    return network()


@pytest.fixture
def graph(model):
    return sc.trace(model, X)


def test_magnitude_is_the_filter_norm(model, graph):
    for p in (1, 2):
        scores = sc.score(model, graph, sc.Magnitude(p=p, normalize=False))
        assert torch.allclose(scores["0"], model[0].weight.detach().flatten(1).norm(p=p, dim=1))
        assert torch.allclose(scores["4"], model[4].weight.detach().flatten(1).norm(p=p, dim=1))
    relative = sc.score(model, graph, "magnitude")
    assert all(torch.allclose(s.mean(), torch.ones((), dtype=s.dtype)) for s in relative.values())


def test_coupled_filters_add_up():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    model = Sum().double()
    scores = sc.score(model, sc.trace(model, torch.randn(1, 3).double()), sc.Magnitude(normalize=False))
    wanted = model.a.weight.detach().norm(dim=1) + model.b.weight.detach().norm(dim=1)
    assert torch.allclose(scores["a"], wanted)


def test_bn_scale_is_the_absolute_scale(model, graph):
    with torch.no_grad():
        model[1].weight.normal_()
    scores = sc.score(model, graph, "bn_scale")
    assert set(scores) == {"0"}
    assert torch.equal(scores["0"], model[1].weight.detach().abs())
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(sc.SecateurError, match="no group has a norm"):
        sc.score(plain, sc.trace(plain, torch.randn(1, 3)), "bn_scale")


def test_taylor_is_the_derivative_along_a_common_gate(model, graph):
    """Scale everything that writes a channel by a gate: |dL/dgate| at 1, by central differences."""
    scores = sc.score(model, graph, "taylor", data=BATCHES, loss=F.cross_entropy)
    tensors = dict(model.named_parameters())
    model.eval()
    model[1].train()
    for group in graph.groups:
        for position in range(len(group)):
            channel, total = group.channels[position], 0.0
            for x, y in BATCHES:
                losses = []
                for gate in (1 + 1e-6, 1 - 1e-6):
                    with torch.no_grad():
                        before = {a.name: tensors[a.name].clone() for a in group.producers}
                        for axis in group.producers:
                            where = torch.from_numpy(axis.channels == channel)
                            tensors[axis.name].index_copy_(
                                axis.dim, where.nonzero()[:, 0], before[axis.name][where] * gate
                            )
                        losses.append(F.cross_entropy(model(x), y).item())
                        for name, old in before.items():
                            tensors[name].copy_(old)
                total += abs(losses[0] - losses[1]) / 2e-6
            assert scores[group.name][position].item() == pytest.approx(total / 2, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("criterion", CRITERIA.names())
def test_the_model_stays_as_it_was(model, graph, criterion):
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    model[3].eval()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    sc.score(model, graph, criterion, data=BATCHES, loss=F.cross_entropy)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))
    assert model[0].weight.grad is None


def test_chance_is_the_same_for_the_same_seed(model, graph):
    first, second, other = (sc.score(model, graph, sc.Random(seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["0"], other["0"])


@dataclass(frozen=True)
class Given:
    """Whatever it was made with."""

    answer: Any

    def scores(self, graph, work):
        return self.answer


def test_a_criterion_of_ones_own(model, graph):
    @dataclass(frozen=True)
    class Same:
        value: float = 1.0

        def scores(self, graph, work):
            assert work.model is model
            return {g.name: torch.full((len(g),), self.value) for g in graph.groups}

    assert sc.score(model, graph, Same(value=3.0))["0"].tolist() == [3.0] * 8
    assert sc.score(model, graph, Same)["0"].tolist() == [1.0] * 8
    with pytest.raises(sc.SecateurError, match="unknown option of criterion 'magnitude' 'power'"):
        sc.score(model, graph, {"name": "magnitude", "power": 2})


BAD = {
    "unknown": ({"criterion": "tailor"}, "did you mean 'taylor'"),
    "no data": ({"criterion": "taylor"}, "needs data="),
    "empty loader": ({"criterion": "taylor", "data": [], "loss": F.cross_entropy}, "empty"),
    "wrong shape": (
        {"criterion": "taylor", "data": [(X[:, :2], BATCHES[0][1])], "loss": F.cross_entropy},
        "does not fit the model",
    ),
    "no targets": ({"criterion": "taylor", "data": [X], "loss": F.cross_entropy}, "a tensor of targets is expected"),
    "NaN loss": (
        {"criterion": "taylor", "data": BATCHES, "loss": lambda o, t: o.sum() * float("nan")},
        "loss of batch 0 is nan",
    ),
    "a norm": ({"criterion": {"name": "magnitude", "p": 3}}, "1 or 2"),
    "one number": ({"criterion": Given({"0": 3.0})}, "8 numbers are due"),
    "words": ({"criterion": Given({"0": ["low"] * 8})}, "no numbers"),
    "no dict": ({"criterion": Given([1.0] * 8)}, "gives a dict"),
    "not a number": ({"criterion": Given({"0": [float("nan")] * 8})}, "with NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_at_the_door(model, graph, name):
    options, message = BAD[name]
    with pytest.raises(sc.SecateurError, match=message):
        sc.score(model, graph, **options)


def test_a_criterion_may_give_plain_numbers(model, graph):
    scores = sc.score(model, graph, Given({"0": [8, 7, 6, 5, 4, 3, 2, 1]}))
    assert sc.allocate(graph, scores, sc.Budget(channels=0.9)).removed["0"] == [6, 7]


class Scaled(nn.Module):
    """Two inputs, positional or by keyword."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, scale):
        return self.net(x * scale)


@pytest.mark.parametrize("pack", [lambda x, s: (x, s), lambda x, s: {"x": x, "scale": s}], ids=["tuple", "dict"])
def test_taylor_takes_every_form_of_inputs(pack):
    torch.manual_seed(0)
    model, one = Scaled(), torch.ones((), dtype=torch.float64)
    graph = sc.trace(model, pack(X, one))
    batches = [(pack(x, one), t) for x, t in BATCHES]
    scores = sc.score(model, graph, "taylor", data=batches, loss=F.cross_entropy)
    plain = sc.score(model.net, sc.trace(model.net, X), "taylor", data=BATCHES, loss=F.cross_entropy)
    assert torch.allclose(scores["net.0"], plain["0"], rtol=1e-12)


def test_a_graph_of_another_model_is_refused(graph):
    with pytest.raises(sc.SecateurError, match="another model"):
        sc.score(nn.Linear(3, 3), graph)
