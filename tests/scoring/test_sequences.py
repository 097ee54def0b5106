"""Losses of sequences, and weights that are used at several places, against exact oracles in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.curvature.kronecker import kronecker_factors
from secateur.scoring.contract import CRITERIA

G = torch.Generator().manual_seed(0)
TOKENS, LABELS = torch.randint(0, 9, (10, 6), generator=G), torch.randint(0, 5, (10, 6), generator=G)
LOOKING = [name for name in CRITERIA if CRITERIA.find(name).needs.data]


class Tagger(nn.Module):
    """A class for every token: logits [batch, time, classes], or all positions one below the other."""

    def __init__(self, flat=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.one, self.two = nn.Embedding(9, 8), nn.Linear(8, 7), nn.Linear(7, 5)
        self.flat = flat
        self.double()

    def forward(self, ids):
        logits = self.two(self.one(self.table(ids)).tanh())
        return logits.flatten(0, 1) if self.flat else logits


def empirical(name):
    return name if name == "taylor" else {"name": name, "fisher": "empirical"}


@pytest.mark.parametrize("ignored", [False, True], ids=["all", "some ignored"])
@pytest.mark.parametrize("name", LOOKING)
def test_scores_of_sequences_are_those_of_their_flattened_logits(name, ignored):
    labels = torch.where(LABELS == 3, -100, LABELS) if ignored else LABELS
    found = []
    for flat in (False, True):
        model = Tagger(flat)
        data = [(TOKENS[i : i + 5], labels[i : i + 5].flatten() if flat else labels[i : i + 5]) for i in (0, 5)]
        graph = sc.trace(model, TOKENS[:2])
        found.append(sc.score(model, graph, empirical(name), data=data, loss="cross_entropy")["one"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-15)


def test_factors_of_sequences_see_every_token_as_a_position():
    model = Tagger().double()
    seen = {}
    model.two.register_forward_hook(lambda m, i, o: seen.update(x=i[0], y=o))
    value = F.cross_entropy(model(TOKENS).flatten(0, 1), LABELS.flatten(), reduction="sum")
    (slope,) = torch.autograd.grad(value, seen["y"])
    found = kronecker_factors(model, [(TOKENS, LABELS)], "cross_entropy", fisher="empirical")["two"]
    rows = slope.flatten(0, 1)
    torch.testing.assert_close(found.g[0], rows.T @ rows / 10)
    drawn = kronecker_factors(model, [(TOKENS, LABELS)], "cross_entropy", samples=3000)["two"].g[0]
    p = seen["y"].detach().flatten(0, 1).softmax(1)
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).sum(0) / 10
    torch.testing.assert_close(drawn, exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", LOOKING)
def test_a_column_against_a_row_of_values_is_refused_with_both_shapes(name):
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)), torch.randn(12, 5)
    graph = sc.trace(model, x[:2])
    with pytest.raises(sc.BadBatch, match=r"outputs \[12, 1\] and targets \[12\] must have one shape"):
        sc.score(model, graph, empirical(name), data=[(x, x[:, 0])], loss="mse")


# ------------------------------------------------------------------------------------------------ shared weights


class Shared(nn.Module):
    """Two halves of the input go through a layer that runs twice, and through two that hold one weight."""

    def __init__(self, biases=1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.one, self.other = nn.Linear(3, 5), nn.Linear(3, 6), nn.Linear(3, 6)
        self.other.weight = self.one.weight
        if biases == 1:
            self.other.bias = self.one.bias
        self.read, self.mix, self.head = nn.Linear(5, 7), nn.Linear(6, 7), nn.Linear(7, 4)
        self.double()

    def forward(self, x):
        left, right = x[:, :3], x[:, 3:]
        a = self.read(self.twice(left).tanh() * self.twice(right).tanh())
        return self.head((a + self.mix(self.one(left).tanh() + self.other(right).relu())).tanh())


@pytest.mark.parametrize("batch", [4, 10])
def test_obd_sums_the_gradients_of_all_uses_before_it_squares_them(batch):
    model, x, y = Shared(), torch.randn(10, 6, dtype=torch.float64, generator=G), torch.arange(10) % 4
    graph = sc.trace(model, x[:2])
    data = [(x[i : i + batch], y[i : i + batch]) for i in range(0, 10, batch)]
    scores = sc.score(model, graph, sc.OBD(fisher="empirical"), data=data, loss="cross_entropy")
    assert {"twice", "one"} <= {a.name.split(".")[0] for g in graph.groups if g.name in scores for a in g.producers}
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one, label in zip(x, y, strict=True):
        value = F.cross_entropy(model(one[None]), label[None])
        for (name, p), slope in zip(
            model.named_parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True
        ):
            squares[name] += 0.5 * slope.square() * p.detach().square() / 10
    rise = {n: squares[f"{n}.weight"].sum(1) + squares[f"{n}.bias"] for n in ("twice", "one", "read", "mix")}
    for group in graph.groups:
        if group.name in scores:
            layers = {a.name.split(".")[0] for a in group.producers}
            torch.testing.assert_close(scores[group.name], sum(rise[layer] for layer in layers))


@pytest.mark.parametrize("name", ["obd", "kron_obd", "kron_obs", "obs", "directional"])
def test_layers_that_share_a_weight_but_no_bias_are_left_out_and_told(name):
    model, x = Shared(biases=2), torch.randn(20, 6, dtype=torch.float64)
    graph = sc.trace(model, x[:2])
    scores = sc.score(model, graph, name, data=[(x, torch.arange(20) % 4)], loss="cross_entropy")
    assert scores.skipped == {"one": "one: another layer shares its weight or its bias, but not both"}
    assert set(scores) == {g.name for g in graph.groups} - {"one"}


class Frozen(nn.Module):
    """A part runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, x):
        with torch.no_grad():
            x = self.one(x).relu()
        return self.head(self.two(x).relu())


@pytest.mark.parametrize("name", ["obd", "kron_obd", "kron_obs", "obs", "directional"])
def test_a_layer_that_no_gradient_reaches_has_no_score_and_is_told(name):
    model, x = Frozen(), torch.randn(20, 5)
    graph = sc.trace(model, x[:2])
    scores = sc.score(model, graph, name, data=[(x, torch.arange(20) % 4)], loss="cross_entropy")
    assert set(scores) == {"two"}
    assert scores.skipped == {"one": "one: no gradient of the loss reaches it"}
