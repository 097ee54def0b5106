"""EigenDamage on whole models: what is left whole and why, transformers, what the model keeps of its state."""

from __future__ import annotations

import copy
import json
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from odd_layers import Standardised
from secateur._internal.workload import Workload
from secateur.curvature.eigenbasis import eigenbasis_of
from secateur.methods.contract import METHODS
from secateur.methods.eigendamage import EigenDamage
from secateur.plan import Plan
from secateur.surgery.low_rank.bottleneck import Bottleneck, bottlenecked
from secateur.tracing.graph import fingerprint

BIG = sc.Budget(params=0.95)


class Padding(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 2, 0, 2)))


class Noisy(nn.Conv2d):
    """A convolution that is one in eval mode only."""

    def forward(self, x):
        return super().forward(x) * (1.5 if self.training else 1.0)


class Adapted(nn.Conv2d):
    """A convolution with a second one beside it, which begins at zero."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.beside = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return super().forward(x) + self.beside * x.mean()


def images(kind, **options):
    """A network with one layer of some kind; the layer has most of the parameters."""
    torch.manual_seed(0)
    given = {"padding": 0 if kind is Padding else 1, **options}
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), kind(16, 32, 3, **given), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    x = torch.randn(24, 3, 8, 8)
    return model, x, [(x, torch.arange(24) % 4)]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Standardised, "not its weight times its input"),
        (Padding, "not its weight times its input"),
        (Noisy, "not its weight times its input"),
        (Adapted, "more parameters"),
    ],
)
def test_a_layer_that_is_more_than_its_weight_stays_whole_and_is_told(kind, why):
    model, x, data = images(kind)
    result = sc.eigendamage(model, x[:2], BIG, data=data, loss="cross_entropy")
    assert why in result.facts["left whole"]["2"]
    assert type(result.model[2]) is kind
    assert isinstance(result.model[4], Bottleneck) or isinstance(result.model[0], Bottleneck)
    without = sc.eigendamage(model, x[:2], BIG, data=data, loss="cross_entropy", exclude="2")
    with torch.no_grad():
        wanted, given = model.eval()(x), result.model.eval()(x)
        assert torch.equal(given, without.model.eval()(x))
    assert float((given - wanted).norm()) < 0.3 * float(wanted.norm())
    assert result.after.params <= 0.95 * result.before.params


def test_a_budget_does_not_count_on_layers_that_stay_whole():
    """Before any data are asked for, and by what could really go."""
    model, x, _ = images(Standardised)

    class Data:
        def __iter__(self):
            raise AssertionError("data were asked for")

    with pytest.raises(sc.InfeasibleBudget, match=r"params=0.3 .*feasible are"):
        sc.eigendamage(model, x[:2], sc.Budget(params=0.3), data=Data(), loss="cross_entropy", layers=["2", "0"])
    plain, *_ = images(nn.Conv2d)
    EigenDamage(layers=("2", "0")).check(plain, x[:2], sc.Budget(params=0.7))
    with pytest.raises(sc.InfeasibleBudget):
        EigenDamage(layers=("2", "0")).check(model, x[:2], sc.Budget(params=0.7))


def test_a_weight_that_is_used_elsewhere_stays():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            hidden = self.b(self.a(x).relu()).relu()
            return self.head(hidden + torch.stack([self.a.weight]).sum((0, 2)))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(32, 16)
    result = sc.eigendamage(model, x[:2], sc.Budget(params=0.8), data=[(x, torch.arange(32) % 4)], loss="cross_entropy")
    assert "used outside" in result.facts["left whole"]["a"]
    assert isinstance(result.model.b, Bottleneck)


def test_layers_with_hooks_and_frozen_ones_keep_them():
    model, x, data = images(nn.Conv2d)
    model[0].requires_grad_(False)
    model[2].register_forward_hook(lambda *_: None)
    model[4].forward = lambda x: nn.Conv2d.forward(model[4], x)
    with pytest.raises(sc.NothingToPrune, match="0: its weight does not require gradients; 2: it has hooks"):
        sc.eigendamage(model, x[:2], BIG, data=data, loss="cross_entropy")
    del model[4].forward
    model[4].bias.requires_grad_(False)
    result = sc.eigendamage(model, x[:2], BIG, data=data, loss="cross_entropy")
    assert set(result.facts["left whole"]) == {"0", "2", "8"}
    made = result.model[4]
    assert [made.bias.requires_grad, made.core.weight.requires_grad] == [False, True]


# -------------------------------------------------------------------------------------------------------- transformers


def transformer(layers=2, **options):
    torch.manual_seed(0)
    given = {"d_model": 16, "nhead": 2, "dim_feedforward": 64, "batch_first": True, **options}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**given), layers, enable_nested_tensor=True)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(16, 3)

        def forward(self, x, padding=None):
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, :5].mean(1))  # the rest is padding

    x, y = torch.randn(12, 7, 16), torch.arange(12) % 3
    return Reader(), x, y


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_transformer_encoder_becomes_smaller_and_runs_in_every_mode(norm_first, activation):
    model, x, y = transformer(norm_first=norm_first, activation=activation)
    padding = torch.zeros(12, 7, dtype=torch.bool)
    padding[:, 5:] = True
    batches = [({"x": x, "padding": padding}, y)]
    inputs = {"x": x[:2], "padding": padding[:2]}
    result = sc.eigendamage(model, inputs, sc.Budget(params=0.7), data=batches, loss="cross_entropy")
    small = result.model
    assert {name.rpartition(".")[2] for name in result.facts["bottlenecks"]} == {"linear1", "linear2"}
    assert "its own forward does not run" in result.facts["left whole"]["encoder.layers.0.self_attn.out_proj"]
    assert result.after.params == sum(p.numel() for p in small.parameters()) <= 0.7 * result.before.params
    assert result.after.macs < result.before.macs
    small.eval()
    for given in ({"x": x}, {"x": x, "padding": padding}):
        slow = small(**given)  # with gradients there is no fast path
        with torch.no_grad():
            torch.testing.assert_close(small(**given), slow, rtol=1e-4, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(small(**given), slow, rtol=1e-4, atol=1e-5)
    F.cross_entropy(small.train()(x, padding), y).backward()
    assert all(p.grad is not None for name, p in small.named_parameters() if "linear1" in name)


def test_a_single_encoder_layer_that_is_saved_loaded_and_exported(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)

    model, x = make(), torch.randn(12, 7, 16)
    result = sc.eigendamage(
        model, x[:2], sc.Budget(params=0.7), data=[(x, x.flip(0))], loss="mse", layers=["linear1", "linear2"]
    )
    assert isinstance(result.model.linear1, Bottleneck)
    assert not result.facts["left whole"]
    sc.save(result.model, tmp_path)
    again = sc.load(tmp_path, make).eval()
    result.model.eval()
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
        exported = torch.export.export(result.model, (x[:2],)).module()
        torch.testing.assert_close(exported(x[:2]), result.model(x[:2]), rtol=1e-4, atol=1e-5)


def test_what_a_bottleneck_says_of_its_weight_has_the_shape_and_no_data():
    result = sc.eigendamage(*images(nn.Conv2d)[:2], BIG, data=images(nn.Conv2d)[2], loss="cross_entropy")
    for name in result.facts["bottlenecks"]:
        made = result.model.get_submodule(name)
        whole = images(nn.Conv2d)[0].get_submodule(name)
        assert made.weight.shape == whole.weight.shape
        assert made.weight.is_meta
        assert made.weight.dtype == whole.weight.dtype
        assert made.bias is made[-1].bias
    with pytest.raises(RuntimeError):
        F.linear(torch.zeros(2, 3), made.weight.flatten(1)) + 1.0 * torch.zeros(2, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_it_is_still_scripted_compiled_and_traced():
    model, x, data = images(nn.Conv2d)
    small = sc.eigendamage(model, x[:2], BIG, data=data, loss="cross_entropy").model.eval()
    with torch.no_grad():
        for other in (torch.jit.script(small), torch.compile(small, backend="eager", fullgraph=True)):
            torch.testing.assert_close(other(x), small(x))


def test_layers_that_the_python_around_them_looks_at_stay_and_the_others_do_not():
    class Looks(nn.Module):
        def __init__(self, mode) -> None:
            super().__init__()
            self.mode = mode
            self.a, self.b, self.head = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)

        def forward(self, x):
            if self.mode == "attribute" or (self.mode == "training" and self.training):
                x = x[:, : self.b.in_features]
            x = self.a(x).relu()
            if self.mode == "kind" and not isinstance(self.b, nn.Linear):
                return self.head(x)
            return self.head(self.b(x).relu())

    x = torch.randn(32, 16)
    for mode, why in (
        ("attribute", "does not run in eval mode"),
        ("training", "does not run in training mode"),
        ("kind", "computes something else"),
    ):
        torch.manual_seed(0)
        model = Looks(mode)
        result = sc.eigendamage(
            model, x[:2], sc.Budget(params=0.95), data=[(x, torch.arange(32) % 4)], loss="cross_entropy"
        )
        assert why in result.facts["left whole"]["b"]
        assert set(result.facts["bottlenecks"]) == {"a"}
        result.model.train()(x)


# -------------------------------------------------------------------------------------------------- state and contract


class Counts(nn.Module):
    """Counts its forwards, drops out, calls its layers by keyword, draws, writes into its input, and has hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.norm, self.drop = nn.BatchNorm1d(32), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.norm.register_forward_hook(lambda *_: None)

    def forward(self, x, scale=1.0):
        self.calls += 1
        x = self.norm(self.a(input=x.mul_(scale))).relu() + 1e-6 * torch.randn(32)
        random.random(), np.random.rand()
        return self.head(input=self.drop(self.b(input=x).relu()))


@pytest.mark.parametrize("ekfac", [False, True])
def test_the_model_the_inputs_and_the_random_states_come_back(ekfac):
    torch.manual_seed(0)
    model = Counts().train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    x, y = torch.randn(24, 12), torch.arange(24) % 3
    inputs, data = {"x": x[:4].clone(), "scale": 2.0}, [({"x": x, "scale": 2.0}, y)]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules, hooks = dict(model.named_modules()), dict(model.norm._forward_hooks)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    result = sc.eigendamage(model, inputs, sc.Budget(params=0.7), data=data, loss="cross_entropy", ekfac=ekfac)
    assert set(result.facts["bottlenecks"]) <= {"a", "b"} and result.facts["bottlenecks"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert dict(model.norm._forward_hooks) == hooks
    assert model.training and model.drop.training
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight)) and model.a.weight.grad is None
    assert torch.equal(inputs["x"], x[:4])
    assert result.model.calls == 0
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert states[:2] == after[:2] and torch.equal(states[2], after[2])


def test_it_is_a_registered_method_with_facts_that_json_can_hold():
    model, x, data = images(nn.Conv2d)
    method = METHODS.make(
        {"name": "eigendamage", "fisher": "exact", "separable": "cp", "exclude": [nn.Linear], "repair": "none"}
    )
    method.check(model, x[:2], sc.Budget(params=0.5))
    work = Workload(model, data, "cross_entropy")
    result = method.apply(model, x[:2], sc.Budget(params=0.5), work)
    json.dumps(result.facts)
    assert result.facts["chosen"]["method"]["name"] == "eigendamage"
    assert result.facts["separated"] and result.plan is None
    assert result.facts["forwards"] == len(data)
    assert all(result.model.get_submodule(name).core.groups > 1 for name in result.facts["separated"])
    first = method.before_last().apply(model, x[:2], sc.Budget(params=0.5), work)
    assert "separated" not in first.facts
    with pytest.raises(sc.SecateurError, match="no layer that can become a bottleneck is a convolution"):
        EigenDamage(separable="svd", layers=("8",)).check(model, x[:2], sc.Budget(params=0.999))


# ------------------------------------------------------------- bottlenecks that came from elsewhere, of any three sizes


def made_by_hand(inward, columns, rows, outward):
    torch.manual_seed(0)
    parts = {"0": nn.Linear(inward, columns, bias=False), "1": nn.Linear(columns, rows, bias=False)}
    bottle = Bottleneck(OrderedDict(parts | {"2": nn.Linear(rows, outward)}))
    model = nn.Sequential(nn.Linear(12, inward), nn.ReLU(), bottle, nn.ReLU(), nn.Linear(outward, 4)).eval()
    x = torch.randn(48, 12)
    return model, x, [(x, torch.arange(48) % 4)]


@pytest.mark.parametrize("fraction", [0.95, 0.9, 0.7, 0.5])
@pytest.mark.parametrize(
    "sizes", [(32, 20, 20, 8), (8, 20, 20, 32), (32, 32, 32, 32), (32, 24, 32, 32), (32, 24, 20, 32)]
)
def test_a_bottleneck_of_any_sizes_becomes_smaller(sizes, fraction):
    model, x, data = made_by_hand(*sizes)
    budget = sc.Budget(params=fraction, round_to=1)
    result = sc.eigendamage(model, x[:2], budget, data=data, loss="cross_entropy", layers=["2"])
    before = sum(p.numel() for p in model.parameters())
    after = sum(p.numel() for p in result.model.parameters())
    assert after <= fraction * before and after == result.after.params
    assert (
        after > (0.4 if max(sizes[1:3]) == 32 else 0.85) * fraction * before
    )  # a rotation that keeps all goes at once
    assert result.model[2](torch.randn(3, sizes[0])).shape == (3, sizes[3])


def test_two_layers_that_become_three_are_fitted():
    torch.manual_seed(0)
    two = Bottleneck(OrderedDict({"0": nn.Linear(32, 24, bias=False), "1": nn.Linear(24, 32)}))
    with torch.no_grad():  # of low rank, nearly
        u, s, v = torch.linalg.svd(two[1].weight, full_matrices=False)
        s[4:] *= 0.05
        two[1].weight.copy_(u * s @ v)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), two, nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(200, 12)
    basis = eigenbasis_of(sc.kronecker_factors(model, [x], "mse", bias=False)["2.1"])
    plain = bottlenecked(model, {"2": basis}, {"2": (torch.arange(24, 32), torch.arange(4, 24))})
    with torch.no_grad():  # in the eigenbasis of these inputs the core would be the least squares already
        plain[2].core.weight.add_(0.1 * torch.randn(8, 20))
    fitted = copy.deepcopy(plain)
    left = sc.refit(model, fitted, Plan({}, {}, fingerprint(model)), [x])
    assert not left and len(fitted[2]) == 3 and not torch.equal(plain[2][1].weight, fitted[2][1].weight)
    with torch.no_grad():
        wanted = model(x)
        far = [float((m(x) - wanted).square().mean()) for m in (plain, fitted)]
    assert far[1] < 0.8 * far[0]


def test_the_published_rule_leaves_alone_what_would_not_become_smaller():
    torch.manual_seed(1)
    layers = [
        nn.Linear(12, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    ]
    model, x = nn.Sequential(*layers), torch.randn(48, 12)
    with torch.no_grad():
        model[4].weight.mul_(0.01)
        model[2].weight.mul_(10)
    result = sc.eigendamage(
        model, x[:2], sc.Budget(params=0.95), data=[(x, torch.arange(48) % 4)], loss="cross_entropy", rule="threshold",
        repair="none", layers=["2", "4"],
    )  # fmt: skip
    assert type(result.model[2]) is nn.Linear and set(result.facts["bottlenecks"]) == {"4"}
