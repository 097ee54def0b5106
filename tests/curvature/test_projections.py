"""Attention's projections, and linears whose weight has its inputs first, are measured and fitted like any linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune  # noqa: F401  # `nn.utils.prune` is not there by itself

import secateur as sc
from secateur.curvature.projections import projections
from secateur.tracing.attentions import HeadAttention


class Attentive(nn.Module):
    """Tokens through an attention to themselves, or from a query of their own."""

    def __init__(self, cross: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.attention = nn.MultiheadAttention(12, 4, batch_first=batch_first)
        self.head = nn.Linear(12, 3)
        self.cross, self.batch_first = cross, batch_first

    def forward(self, x):
        x = self.embed(x)
        x = x if self.batch_first else x.transpose(0, 1)
        query = x.flip(1) if self.cross else x
        return self.head(self.attention(query, x, x, need_weights=False)[0])


@pytest.fixture(params=[True, False], ids=["batch first", "tokens first"])
def attentive(request):
    torch.manual_seed(0)
    return Attentive(batch_first=request.param).double().eval(), torch.randn(60, 7, 5, dtype=torch.float64)


def test_projections_run_as_modules_for_a_while_and_nothing_else_changes(attentive):
    model, x = attentive
    before, keys, names = model(x), list(model.state_dict()), [name for name, _ in model.named_parameters()]
    seen = []
    with projections(model):
        assert [name for name, _ in model.named_parameters()] == names
        for name in ("in_proj", "out_proj"):
            module = model.get_submodule(f"attention.{name}")
            module.register_forward_hook(
                lambda m, args, y: seen.append(nn.functional.linear(args[0], m.weight, m.bias) - y)
            )
        with projections(model):  # also within another
            torch.testing.assert_close(model(x), before)
        assert "in_proj" in model.attention._modules
        assert len(seen) == 2
        assert not any(difference.any() for difference in seen)
    assert type(model.attention) is nn.MultiheadAttention
    assert list(model.state_dict()) == keys
    with pytest.raises(ZeroDivisionError), projections(model):
        raise ZeroDivisionError
    assert list(model.attention._modules) == ["out_proj"]


def test_a_model_that_is_an_attention_itself():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2).double().eval()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    with projections(model):
        assert type(model) is HeadAttention
        assert [name for name, _ in model.named_modules()] == ["", "out_proj", "in_proj"]
        model(x, x, x)
    assert type(model) is nn.MultiheadAttention


def test_a_head_that_others_can_say_is_restored_wholly(attentive):
    model, x = attentive
    with torch.no_grad():  # head 3 is head 1, its values twice as large
        weight, bias = model.attention.in_proj_weight, model.attention.in_proj_bias
        for part, scale in zip(range(3), (1, 1, 2), strict=True):
            one, other = (slice(12 * part + 3 * head, 12 * part + 3 * head + 3) for head in (1, 3))
            weight[other], bias[other] = scale * weight[one], scale * bias[one]
    graph = sc.trace(model, x[:2])
    plan = sc.make_plan(graph, {"attention": [3]})
    small = sc.cut(model, plan)
    assert (small(x) - model(x)).abs().max() > 1e-3
    assert sc.refit(model, small, plan, [x[:50]], damping=1e-12) == {}
    torch.testing.assert_close(small(x), model(x), rtol=1e-6, atol=1e-6)
    scores = sc.score(model, graph, sc.CRITERIA.make("schur", {"damping": 1e-9, "fisher": "outputs"}), data=[x])
    assert scores["attention"].min() < 1e-6 * scores["attention"].max()
    assert int(scores["attention"].argmin()) in (1, 3)


def test_what_goes_into_attention_is_fitted_too(attentive):
    model, x = attentive
    with torch.no_grad():
        model.embed.weight[6], model.embed.bias[6] = 2 * model.embed.weight[1], 2 * model.embed.bias[1]
    plan = sc.make_plan(sc.trace(model, x[:2]), {"embed": [6]})
    small = sc.cut(model, plan)
    assert (small(x) - model(x)).abs().max() > 1e-3
    assert sc.refit(model, small, plan, [x], damping=1e-12) == {}
    torch.testing.assert_close(small(x), model(x), rtol=1e-6, atol=1e-6)


class Both(nn.Module):
    """One attention, of one input and of several."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(5, 12), nn.MultiheadAttention(12, 4), nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.attention(y.flip(1), x, y, need_weights=False)[0])


@pytest.mark.parametrize("kind", ["cross", "both", "unbatched"])
def test_projections_of_several_inputs_are_fitted_too(kind):
    torch.manual_seed(0)
    model = Both() if kind == "both" else Attentive(cross=kind == "cross")
    model, x = model.double().eval(), torch.randn(60, 7, 5, dtype=torch.float64)
    x = x.flatten(0, 1)[:100] if kind == "unbatched" else x
    with torch.no_grad():
        model.embed.weight[6], model.embed.bias[6] = 2 * model.embed.weight[1], 2 * model.embed.bias[1]
    plan = sc.make_plan(sc.trace(model, x), {"embed": [6]})
    small = sc.cut(model, plan)
    assert (small(x) - model(x)).abs().max() > 1e-3
    assert sc.refit(model, small, plan, [x], damping=1e-12) == {}
    near = 1e-3 if kind == "both" else 1e-5  # which gets what it gave before it was fitted
    torch.testing.assert_close(small(x), model(x), rtol=near, atol=near)


def test_projections_that_are_computed_stay_and_are_told():
    torch.manual_seed(0)
    model, x = Attentive().double().eval(), torch.randn(60, 7, 5, dtype=torch.float64)
    nn.utils.prune.random_unstructured(model.attention, "in_proj_weight", 0.3)
    graph = sc.trace(model, x[:2])
    plan = sc.make_plan(graph, {graph.groups[0].name: [1]})
    left = sc.refit(model, sc.cut(model, plan), plan, [x])
    assert left == {"attention": "its weight is computed from other parameters"}


def test_projections_of_several_widths_stay_and_are_told():
    class Widths(Attentive):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 4, batch_first=True, kdim=5, vdim=5)

        def forward(self, x):
            return self.head(self.attention(self.embed(x), x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Widths().double().eval(), torch.randn(60, 7, 5, dtype=torch.float64)
    plan = sc.make_plan(sc.trace(model, x[:2]), {"embed": [2]})
    why = "its queries, keys and values are of several widths, each with a projection of its own"
    assert sc.refit(model, sc.cut(model, plan), plan, [x]) == {"attention": why}


@pytest.mark.parametrize("repair", ["compensate", sc.Compensate(at="consumers")])
def test_what_cannot_be_compensated_is_told(repair, attentive):
    model, x = attentive
    data = [(x, torch.randint(0, 3, model(x).shape[:-1]))]
    result = sc.prune(
        model, x[:2], sc.Budget(params=0.7), data=data, loss="cross_entropy", criterion="obs", repair=repair
    )
    reads = not isinstance(repair, str)
    assert set(result.facts["left whole"]) == ({"attention", "attention.out_proj"} if reads else {"attention"})


def test_a_native_transformer_loses_heads_and_stream_by_default():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)).eval()
    x = torch.randn(200, 6, 5)
    result = sc.prune(model, x[:2], sc.Budget(params=0.5), data=[x])
    assert not result.plan.skipped
    assert not result.facts.get("left whole")
    assert any("self_attn" in name for name in result.plan.removed)


class Turned(nn.Module):
    """A linear whose weight has its inputs first."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(linear.weight.detach().mT.contiguous()),
            nn.Parameter(linear.bias.detach()),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("criterion", ["schur", "obs", "kron_obd", "obd"])
def test_turned_linears_are_judged_and_fitted_as_others_are(criterion):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    turned = nn.Sequential(*(Turned(m) if isinstance(m, nn.Linear) else m for m in plain))
    x = torch.randn(300, 5, dtype=torch.float64)
    data = [(x, torch.randn(300, 3, dtype=torch.float64))]
    found = [
        sc.prune(model, x[:2], sc.Budget(params=0.6), data=data, loss="mse", criterion=criterion, repair="refit")
        for model in (plain, turned)
    ]
    assert found[0].plan.removed == found[1].plan.removed
    assert found[0].plan.removed
    assert not found[1].facts.get("left whole")
    torch.testing.assert_close(found[0].model(x), found[1].model(x))


@pytest.mark.parametrize("at", ["producers", "consumers"])
def test_turned_linears_are_compensated_as_others_are(at):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    turned = nn.Sequential(*(Turned(m) if isinstance(m, nn.Linear) else m for m in plain))
    x = torch.randn(300, 5, dtype=torch.float64)
    given = {"data": [(x, torch.randint(0, 3, (300,)))], "loss": "cross_entropy", "repair": sc.Compensate(at=at)}
    found = [sc.prune(m, x[:2], sc.Budget(params=0.6), criterion="kron_obs", **given) for m in (plain, turned)]
    assert found[0].facts["compensated"] == found[1].facts["compensated"] != []
    torch.testing.assert_close(found[0].model(x), found[1].model(x))


def test_what_looks_like_a_turned_linear_and_is_none_is_told():
    class Other(Turned):
        def forward(self, x):
            return x @ self.weight.mT + self.bias

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Other(nn.Linear(6, 6)), nn.Linear(6, 2)).double()
    x = torch.randn(100, 5, dtype=torch.float64)
    plan = sc.make_plan(sc.trace(model, x[:2]), {"0": [1]})
    left = sc.refit(model, sc.cut(model, plan), plan, [x])
    assert left == {"1": "its forward is not its weight times its input"}
