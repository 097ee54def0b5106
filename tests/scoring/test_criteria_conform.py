"""What every criterion must do: leave the model untouched, score in full precision, know what it cannot know."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from odd_layers import ODD
from secateur.scoring.contract import CRITERIA

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 3, 6, 6, generator=G), torch.randint(0, 4, (24,), generator=G)
DATA = [(X[:16], Y[:16]), (X[16:], Y[16:])]
NAMES = CRITERIA.names()
LOOKING = [name for name in NAMES if CRITERIA.find(name).needs.data]
READERS = {"schur"}  # they judge a channel by what reads it, the others by what writes it
FISHERS = [name for name in LOOKING if name not in {"taylor", "directional"}]
WRITERS = [name for name in FISHERS if name not in READERS]


# --------------------------------------------------------------------------------------------------- nothing is touched


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_untouched(restless, untouched, name):
    graph = sc.trace(restless, X[:2])
    with untouched(restless):
        assert sc.score(restless, graph, name, data=DATA, loss="cross_entropy")


@pytest.mark.parametrize("name", LOOKING)
def test_the_model_is_left_untouched_where_the_second_batch_fails(restless, untouched, name):
    graph = sc.trace(restless, X[:2])
    for second in ((X[:4, :2], Y[:4]), (X[:4] * torch.nan, Y[:4])):
        with untouched(restless), pytest.raises(sc.BadBatch):
            sc.score(restless, graph, name, data=[DATA[0], second], loss="cross_entropy")


@pytest.mark.parametrize("name", LOOKING)
def test_a_loader_that_shuffles_leaves_the_random_state(restless, untouched, name):
    graph = sc.trace(restless, X[:2])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=12, shuffle=True)
    with untouched(restless):
        sc.score(restless, graph, name, data=loader, loss="cross_entropy")


# ------------------------------------------------------------------------------------------------------- full precision


def wide_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 500), nn.BatchNorm1d(500), nn.ReLU(), nn.Linear(500, 4)).eval()


def options_for(name):
    # the width is that of a factor, which is never inverted here; of many channels few are steep
    return {"kron_obs": sc.KronOBD(), "obs": sc.KronOBD(), "schur": {"name": "schur", "damping": 10.0}}.get(name, name)


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_a_bf16_model_are_in_full_precision(name):
    model = wide_network()
    with torch.no_grad():
        model[1].weight.normal_(1, 0.3)
    x, y = torch.randn(64, 8, generator=G), torch.randint(0, 4, (64,), generator=G)
    half = copy.deepcopy(model).bfloat16()
    rounded = copy.deepcopy(half).float()  # the very weights, for all that scores do in single precision
    found = []
    for one, data in ((half, x.bfloat16()), (rounded, x.bfloat16().float())):
        graph = sc.trace(model, x[:1])
        found.append(sc.score(one, graph, options_for(name), data=[(data, y)], loss="cross_entropy")["0"])
    assert found[0].dtype in (torch.float32, torch.float64)
    if name == "bn_scale":  # a scale is one number in bf16
        assert torch.equal(found[0], found[1])
        return
    assert len(found[0].unique()) == 500
    near = (found[0] - found[1]).norm() / found[1].norm()
    assert near < (1e-6 if name in {"magnitude", "random"} else 0.05)


# ------------------------------------------------------------------------ layers that are not their weight times inputs


class Odd(nn.Module):
    """A convolution of some kind, and a plain one."""

    def __init__(self, make) -> None:
        super().__init__()
        self.odd, self.plain, self.head = make(3, 6, 3), nn.Conv2d(6, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.plain(self.odd(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("name", [*WRITERS, "directional"])
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_plain_layer_is_left_out_and_told(kind, name):
    make, why = ODD[kind]
    torch.manual_seed(0)
    model = Odd(make).eval()
    graph = sc.trace(model, X[:1])
    scores = sc.score(model, graph, name, data=DATA, loss="cross_entropy")
    assert set(scores) == {"plain"}
    group = next(g for g in graph.groups if g.name != "plain")
    if group.exact or name != "directional":
        assert scores.skipped == {group.name: f"odd: {why}"}
    else:
        assert set(scores.skipped) == {group.name}


class OddReader(nn.Module):
    """A convolution of some kind reads what a plain one writes."""

    def __init__(self, make) -> None:
        super().__init__()
        self.plain, self.odd, self.head = nn.Conv2d(3, 6, 1), make(6, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.odd(self.plain(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("name", sorted(READERS))
@pytest.mark.parametrize("kind", ODD)
def test_what_a_layer_reads_that_is_no_plain_one_has_no_score_and_is_told(kind, name):
    make, why = ODD[kind]
    torch.manual_seed(0)
    model = OddReader(make).eval()
    graph = sc.trace(model, X[:1])
    scores = sc.score(model, graph, name, data=DATA, loss="cross_entropy")
    assert scores.skipped == {"plain": f"odd: {why}"}
    assert set(scores) == {g.name for g in graph.groups} - {"plain"}


class Elsewhere(nn.Module):
    """The weight of ``a`` is used past its forward, that of ``b`` by its forward and past it, ``c`` in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.plain = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(8, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x):
        x = F.linear(x, self.a.weight).relu()
        x = (self.b(x) + x @ self.b.weight.T).relu()
        x = (self.c(x) + F.linear(x, torch.stack([self.c.weight]).sum(0))).relu()
        return self.head(self.plain(x).relu())


@pytest.mark.parametrize("name", [*WRITERS, "directional"])
def test_a_weight_that_is_used_past_its_layers_forward_has_no_score_and_is_told(name):
    torch.manual_seed(0)
    model, x = Elsewhere().eval(), torch.randn(20, 5)
    graph = sc.trace(model, x[:2])
    data = [(x, torch.arange(20) % 4)]
    scores = sc.score(model, graph, name, data=data, loss="cross_entropy")
    assert set(scores) == {"plain"}
    assert scores.skipped == {
        "a": "a: its own forward does not run: its weight is used elsewhere",
        "b": "b: its weight is used outside of its own forward too",
        "c": "c: its weight is used outside of its own forward too",
    }
    result = sc.prune(
        model, x[:2], sc.Budget(channels=0.9), criterion=name, repair="none", data=data, loss="cross_entropy"
    )
    assert set(result.plan.removed) == {"plain"}
    assert result.plan.skipped["a"] == f"has no scores: {scores.skipped['a']}"


class Keyword(nn.Module):
    """Layers are called by keyword."""

    def __init__(self, by_keyword=True) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.by_keyword = by_keyword

    def forward(self, x):
        if not self.by_keyword:
            return self.two(self.norm(self.one(x)).relu().mean((2, 3)))
        return self.two(input=self.norm(input=self.one(input=x)).relu().mean((2, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_layers_may_be_called_by_keyword(name):
    found = []
    for by_keyword in (False, True):
        torch.manual_seed(0)
        model = Keyword(by_keyword).double().eval()
        data = [(x.double(), y) for x, y in DATA]
        found.append(sc.score(model, sc.trace(model, data[0][0][:2]), name, data=data, loss="cross_entropy"))
    assert torch.equal(found[0]["one"], found[1]["one"])


# ------------------------------------------------------------------------------------------------------- inference mode


@pytest.mark.parametrize("name", LOOKING)
def test_inference_mode_changes_nothing(restless, name):
    restless.eval()
    graph = sc.trace(restless, X[:2])
    outside = sc.score(restless, graph, name, data=DATA, loss="cross_entropy")
    with torch.inference_mode():
        data = [(x.clone(), y.clone()) for x, y in DATA]  # inference tensors, as a loader makes them here
        inside = sc.score(restless, graph, name, data=data, loss="cross_entropy")
    assert outside.keys() == inside.keys()
    assert all(torch.equal(outside[group], inside[group]) for group in outside)


@pytest.mark.parametrize("settings", [sc.Directional(basis="exact"), sc.Directional(basis="lanczos", k=5)], ids=str)
def test_second_derivatives_are_found_in_inference_mode_too(settings):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x = torch.randn(30, 5, dtype=torch.float64)
    graph = sc.trace(model, x[:2])
    with torch.inference_mode():
        inside = sc.score(model, graph, settings, data=[(x + 0, torch.arange(30) % 4)], loss="cross_entropy")
    outside = sc.score(model, graph, settings, data=[(x, torch.arange(30) % 4)], loss="cross_entropy")
    assert torch.equal(outside["0"], inside["0"])


@pytest.mark.parametrize("name", LOOKING)
def test_weights_made_in_inference_mode_are_refused_at_the_door(name):
    with torch.inference_mode():
        model = Keyword(False)
    graph = sc.trace(copy.deepcopy(model), X[:1])
    with pytest.raises(sc.SecateurError, match=r"was made in torch\.inference_mode"):
        sc.score(model, graph, name, data=DATA, loss="cross_entropy")


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("how", ["loss", "model"])
def test_a_detached_loss_is_told(name, how):
    class Detached(Keyword):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    model = Detached(False) if how == "model" else Keyword(False)
    loss = (lambda o, t: F.cross_entropy(o.detach(), t)) if how == "loss" else "cross_entropy"
    graph = sc.trace(Keyword(False), X[:1])
    settings = {"fisher": "empirical"} if name in FISHERS or name == "directional" else {}
    with pytest.raises(sc.BadBatch, match="must depend on the outputs"):
        sc.score(model, graph, {"name": name, **settings}, data=DATA, loss=loss)


# ---------------------------------------------------------------------------------------------- losses that cannot draw


@pytest.mark.parametrize("name", [*FISHERS, "directional"])
@pytest.mark.parametrize("kind", ["BCE", "NLL"])
def test_without_a_way_to_draw_targets_the_empirical_fisher_is_used_and_told(kind, name):
    torch.manual_seed(0)
    if kind == "BCE":
        model, loss, targets = Keyword(), nn.BCEWithLogitsLoss(), F.one_hot(Y, 4).float()
    else:
        model, loss, targets = nn.Sequential(Keyword(), nn.LogSoftmax(1)), nn.NLLLoss(), Y
    graph, data = sc.trace(model, X[:1]), [(X[:16], targets[:16]), (X[16:], targets[16:])]
    with pytest.warns(sc.SecateurWarning, match="cannot draw targets.*the empirical Fisher is used"):
        found = sc.score(model, graph, name, data=data, loss=loss)
    asked = sc.score(model, graph, {"name": name, "fisher": "empirical"}, data=data, loss=loss)
    assert all(torch.equal(found[group], asked[group]) for group in found)
    with pytest.warns(sc.SecateurWarning):
        result = sc.prune(model, X[:1], sc.Budget(channels=0.8), criterion=name, repair="none", data=data, loss=loss)
    assert [text for text in result.facts["notices"] if "the empirical Fisher is used" in text]


def test_nll_scores_are_those_of_cross_entropy():
    torch.manual_seed(0)
    model = Keyword()
    whole = nn.Sequential(model, nn.LogSoftmax(1))
    one = sc.score(model, sc.trace(model, X[:1]), sc.KronOBD(fisher="empirical"), data=DATA, loss="cross_entropy")
    two = sc.score(whole, sc.trace(whole, X[:1]), sc.KronOBD(fisher="empirical"), data=DATA, loss=nn.NLLLoss())
    torch.testing.assert_close(one["one"], two["0.one"])
