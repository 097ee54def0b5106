"""Channels and bottlenecks under one budget: never predicted worse than either, and exactly within the budget."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur._internal.workload import Workload
from secateur.curvature.eigenbasis import eigenbasis_of
from secateur.curvature.kronecker import kronecker_factors
from secateur.curvature.layers import Layer
from secateur.measure.counting import counted
from secateur.methods.hybrid import Hybrid
from secateur.surgery.low_rank.bottleneck import Bottleneck


def network():
    """Its large layers have a low rank, nearly."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 16, 20), nn.ReLU(), nn.Linear(20, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for layer, rank in ((model[3], 4), (model[8], 3)):
            u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            s[rank:] *= 0.02
            layer.weight.copy_((3 * u * s @ v).view_as(layer.weight))
    return model


X = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))
DATA = [X[:24], X[24:]]


class Unread:
    """Data that nobody may ask for."""

    def __iter__(self):
        raise AssertionError("data were asked for")


@pytest.mark.parametrize(
    "limits",
    [{"params": 0.3}, {"macs": 0.4}, {"params": 0.4, "macs": 0.3}, {"params": 0.3, "round_to": 4}, {"params": 0.05}],
    ids=str,
)
def test_the_budget_is_met_in_what_is_counted(limits):
    model = network()
    before = copy.deepcopy(model.state_dict())
    result = sc.hybrid(model, X[:2], sc.Budget(**{"round_to": 1} | limits), data=DATA)
    full, real = counted(model, X[:2]), counted(result.model, X[:2])
    assert (result.after.macs, result.after.params) == (real["macs"], real["params"])
    for unit in {"params", "macs"} & limits.keys():
        assert real[unit] <= limits[unit] * full[unit]
    used = max(real[unit] / limits[unit] / full[unit] for unit in {"params", "macs"} & limits.keys())
    assert used > (0.5 if limits == {"params": 0.05} else 0.85)  # there a channel is much of what is left
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_is_chosen_is_predicted_to_be_the_least_of_all_that_was_tried():
    """With both ends among it: channels alone, as prune does, and bottlenecks alone."""
    model, budget = network(), sc.Budget(params=0.4, round_to=1)
    result = sc.hybrid(model, X[:2], budget, data=DATA)
    tried = result.facts["tried"]
    sums = [row["channels"] + row["bottlenecks"] for row in tried]
    assert len(tried) == len({row["params"] for row in tried}) >= 6
    channels, bottlenecks = tried[0], tried[-1]
    assert channels["bottlenecks"] == 0 == bottlenecks["channels"] and bottlenecks["params"] == 1
    assert 0 < tried[sums.index(min(sums))]["params"] < 1
    alone = sc.prune(model, X[:2], budget, data=DATA, criterion=sc.Schur(fisher="outputs", batches=100))
    rises = alone.scores.rises
    assert channels["channels"] == pytest.approx(
        sum(float(rises[name][len(gone)]) for name, gone in alone.plan.removed.items()), rel=1e-6
    )
    kept = {name: kept for name, (_, kept) in result.facts["widths"].items()}
    assert any(kept[g.name] < len(g) for g in alone.graph.groups) and result.facts["bottlenecks"]


def test_one_pass_over_the_data_and_one_for_the_repair():
    result = sc.hybrid(network(), X[:2], sc.Budget(params=0.4), data=DATA, repair="none")
    assert result.facts["forwards"] == len(DATA)


def test_factors_of_a_narrower_layer_are_its_own():
    """In the rows and columns that are left, if these are not fitted again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double().eval()
    x = torch.randn(64, 6, dtype=torch.float64)
    whole = kronecker_factors(model, [x], "mse", fisher="exact", form="full")["1"].channel_form()
    graph = sc.trace(model, x[:2])
    small = sc.cut(model, sc.make_plan(graph, {graph.groups[0].name: [1, 4]}))
    own = kronecker_factors(small, [x], "mse", fisher="exact", bias=False)["1"]
    stay = torch.tensor([0, 2, 3, 5, 6, 7])
    given = whole.restricted(Layer("1", small[1], biased=False), torch.arange(5), stay)
    torch.testing.assert_close(given.a, own.a)
    torch.testing.assert_close(given.g, own.g)
    torch.testing.assert_close(eigenbasis_of(given).energy().sum(), eigenbasis_of(own).energy().sum())


def test_it_is_saved_and_loaded(tmp_path):
    small = sc.hybrid(network(), X[:2], sc.Budget(params=0.4, round_to=1), data=DATA).model.eval()
    assert any(isinstance(m, Bottleneck) for m in small.modules())
    assert [next(iter(step)) for step in sc.record(small)] == ["cut", "eigendamage"]
    sc.save(small, tmp_path)
    assert torch.equal(sc.load(tmp_path, network).eval()(X), small(X))


class Residual(nn.Module):
    """Its channels are those of the input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.b(x + self.a(x))


def test_where_no_channel_can_go_there_are_bottlenecks_and_the_other_way_round():
    torch.manual_seed(0)
    x = torch.randn(40, 20)
    for model in (nn.Sequential(nn.Linear(20, 16), nn.Softmax(-1), nn.Linear(16, 16)).eval(), Residual().eval()):
        result = sc.hybrid(model, x[:2], sc.Budget(params=0.8), data=[x])
        assert result.facts["bottlenecks"] and all(a == b for a, b in result.facts["widths"].values())
    grouped = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 16, 4)
    ).eval()
    x = torch.randn(16, 4, 8, 8)
    result = sc.hybrid(grouped, x[:2], sc.Budget(params=0.6, round_to=1), data=[x])
    assert not result.facts["bottlenecks"] and any(a > b for a, b in result.facts["widths"].values())
    assert "grouped" in result.facts["left whole"]["all layers"]
    with pytest.raises(sc.NothingToPrune):
        sc.hybrid(nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4), sc.Budget(params=0.5), data=Unread())


def test_what_cannot_be_met_is_told_before_data_are_asked_for():
    with pytest.raises(sc.InfeasibleBudget, match="feasible"):
        sc.hybrid(network(), X[:2], sc.Budget(params=0.001), data=Unread())
    with pytest.raises(sc.SecateurError, match="latency"):
        Hybrid().check(network(), X[:2], sc.Budget(latency_ms=1.0))
    with pytest.raises(sc.SecateurError, match="a Budget is expected"):
        sc.hybrid(network(), X[:2], 0.5, data=Unread())
    for wrong in ({"fisher": "none"}, {"samples": 0}, {"damping": -1.0}, {"repair": "glue"}, {"exclude": 3}):
        with pytest.raises(sc.SecateurError):
            sc.hybrid(network(), X[:2], sc.Budget(params=0.5), data=Unread(), **wrong)


def test_less_than_channels_alone_can_leave():
    """A layer of which one channel must stay is still a bottleneck's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 30), nn.Softmax(-1), nn.Linear(30, 30)).eval()
    x = torch.randn(64, 30)
    with pytest.raises(sc.InfeasibleBudget):
        sc.prune(model, x[:2], sc.Budget(params=0.5, round_to=1), data=[x])
    exclude = "4"
    with pytest.raises(sc.InfeasibleBudget):
        sc.hybrid(model, x[:2], sc.Budget(params=0.5, round_to=1), data=[x], exclude=exclude)
    flat = nn.Sequential(*model, nn.ReLU(), nn.Linear(30, 3)).eval()  # whose layer 4 may become a bottleneck
    result = sc.hybrid(flat, x[:2], sc.Budget(params=0.3, round_to=1), data=[x])
    assert "4" in result.facts["bottlenecks"] and result.after.params <= 0.3 * result.before.params


def test_excluded_and_frozen_layers_stay():
    model = network()
    result = sc.hybrid(model, X[:2], sc.Budget(params=0.5), data=DATA, exclude="8", repair="none")
    assert type(result.model[8]) is nn.Linear and result.model[8].weight.shape[0] == 20
    assert "excluded" in result.facts["left whole"]["8"]


class Named(nn.Module):
    """A forward that returns a dict without logits."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        found = self.body(x)
        return {"scores": found, "doubled": 2 * found}


def test_without_a_single_output_the_loss_counts():
    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs["scores"], targets)

    pairs = [(x, torch.arange(len(x)) % 4) for x in DATA]
    result = sc.hybrid(Named().eval(), X[:2], sc.Budget(params=0.5), data=pairs)
    assert result.facts["chosen"]["method"]["fisher"] == "outputs"
    with pytest.warns(sc.SecateurWarning, match="empirical"):
        result = sc.hybrid(Named().eval(), X[:2], sc.Budget(params=0.5), data=pairs, loss=loss, fisher="sampled")
    assert result.after.params <= 0.5 * result.before.params
    result = sc.hybrid(Named().eval(), X[:2], sc.Budget(params=0.5), data=pairs, loss=loss)
    assert result.facts["chosen"]["method"]["fisher"] == "empirical"


def test_nothing_is_drawn_and_the_mode_stays():
    model = network().train()
    state = torch.get_rng_state()
    work = Workload(model, DATA, inputs=X[:2])
    Hybrid().apply(model, X[:2], sc.Budget(params=0.5), work)
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_digits_keep_more_of_what_they_are_than_with_either_move_alone():
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(20):
        for part in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    model.eval()
    data, budget = [x[:1200]], sc.Budget(params=0.15, round_to=1)
    both = sc.hybrid(model, x[:2], budget, data=data).model
    channels = sc.prune(model, x[:2], budget, data=data).model
    rotated = sc.eigendamage(model, x[:2], budget, data=data, loss="cross_entropy").model
    with torch.no_grad():
        wanted = model(x[1200:])
        far = [float((m(x[1200:]) - wanted).square().mean()) for m in (both, channels, rotated)]
    assert far[0] < 0.95 * min(far[1:]), far


class Mixer(nn.Module):
    """A linear over places, whose positions are channels."""

    def __init__(self):
        super().__init__()
        self.a, self.mix = nn.Conv1d(3, 64, 1), nn.Linear(48, 48, bias=False)
        self.b, self.c = nn.Conv1d(64, 16, 1), nn.Linear(16, 4)

    def forward(self, x):
        x = self.mix(self.a(x).relu()).relu()
        return self.c(self.b(x).relu().mean(-1))


@pytest.mark.parametrize(("macs", "least"), [(0.1, 2), (0.2, 16), (0.05, 1)])
def test_positions_of_a_layer_may_be_channels_of_another(macs, least):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 48)
    model = Mixer().eval()
    try:
        result = sc.hybrid(model, x, sc.Budget(macs=macs, at_least=least), data=[x], repair="none")
    except sc.InfeasibleBudget:
        assert least == 16  # told before any work, not found out at the end
        return
    assert counted(result.model, x)["macs"] <= macs * counted(model, x)["macs"]


def test_a_budget_of_all_gives_a_copy():
    model = Residual().eval()
    result = sc.hybrid(model, torch.randn(2, 20), sc.Budget(params=1.0), data=[torch.randn(9, 20)])
    assert result.model is not model and not result.facts["bottlenecks"]
    assert {id(p) for p in result.model.parameters()}.isdisjoint({id(p) for p in model.parameters()})


def test_what_is_feasible_is_told_in_parts_of_the_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(16, 12)
    for limit in (0.01, 1e-6):
        with pytest.raises(
            sc.InfeasibleBudget, match=rf"params={limit} asks for at most \d+ of 1,604 params; feasible"
        ):
            sc.hybrid(model, x, sc.Budget(params=limit), data=Unread())
    with pytest.raises(sc.NothingToPrune, match="excluded"):
        sc.hybrid(model, x, sc.Budget(params=0.8), data=Unread(), exclude=(nn.Linear,))


def test_again_on_its_own_result():
    """Bottlenecks become smaller."""
    model, x = Residual().eval(), torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    one = sc.hybrid(model, x[:2], sc.Budget(params=0.7, round_to=1), data=[x]).model
    two = sc.hybrid(one, x[:2], sc.Budget(params=0.6, round_to=1), data=[x])
    assert isinstance(one.a, Bottleneck) and isinstance(two.model.a, Bottleneck) and len(two.model.a) <= 3
    assert two.after.params <= 0.6 * counted(one, x[:2])["params"]


def test_tied_layers_are_measured_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())

    torch.manual_seed(0)
    x = torch.randn(40, 12)
    result = sc.hybrid(Tied().eval(), x[:2], sc.Budget(params=0.9, round_to=1), data=[x], repair="none")
    assert result.facts["forwards"] == 1 and result.after.params <= 0.9 * result.before.params


def test_what_keeps_its_channels_is_told():
    class Odd(nn.Module):
        """Channels of ``a`` are read by no layer that can be judged."""

        def __init__(self):
            super().__init__()
            self.a, self.scale = nn.Linear(12, 16), nn.Parameter(torch.randn(16, 5))
            self.b, self.c = nn.Linear(5, 24), nn.Linear(24, 3)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu() @ self.scale).relu())

    torch.manual_seed(0)
    x = torch.randn(40, 12)
    result = sc.hybrid(Odd().eval(), x[:2], sc.Budget(params=0.8, round_to=1), data=[x])
    assert "has no scores" in result.facts["skipped"]["a"]
    assert result.facts["widths"]["a"] == [16, 16]


def test_a_model_that_cannot_be_traced_has_bottlenecks_alone_and_that_is_told(monkeypatch):
    def refuse(*_, **__):
        raise sc.SecateurError("its forward asks for the time")

    monkeypatch.setattr("secateur.methods.hybrid.trace", refuse)
    with pytest.warns(
        sc.SecateurWarning, match="bottlenecks alone, since the model cannot be traced: its forward asks"
    ):
        result = sc.hybrid(network(), X[:2], sc.Budget(params=0.7, round_to=1), data=DATA)
    assert result.facts["bottlenecks"] and not result.facts["widths"]


def test_much_of_a_budget_that_rounding_leaves_is_told():
    told = [
        sc.hybrid(network(), X[:2], sc.Budget(params=0.7, round_to=n), data=DATA, repair="none").facts["remarks"]
        for n in (8, 1)
    ]
    assert "of what the budget allows: Budget(round_to=1) would use more" in told[0][0] and not told[1]
