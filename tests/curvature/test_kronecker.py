"""Kronecker factors against exact oracles in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur._internal.workload import Workload
from secateur.curvature import layers
from secateur.curvature.fisher import Fisher
from secateur.curvature.kronecker import factors_of, kronecker_factors
from secateur.curvature.layers import FORMS, Layer, input_products, input_samples, output_products, output_samples

# name -> (layer, shape of its input)
LAYERS = {
    "linear": (nn.Linear(5, 4), (3, 5)),
    "linear on tokens": (nn.Linear(5, 4, bias=False), (3, 6, 5)),
    "linear without a batch": (nn.Linear(5, 4), (5,)),
    "1-D": (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7)),
    "2-D": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 6)),
    "2-D without bias": (nn.Conv2d(3, 4, (3, 2), bias=False), (2, 3, 5, 6)),
    "3-D": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
    "strided": (nn.Conv2d(3, 4, 3, stride=(2, 3), padding=(2, 1)), (2, 3, 7, 8)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=(2, 1), padding=1), (2, 3, 7, 8)),
    "same, of even size": (nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 5, 6)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 6)),
    "circular": (nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 6)),
    "grouped": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 4, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, stride=2, groups=4), (2, 4, 7, 5)),
    "1x1": (nn.Conv2d(3, 4, 1), (2, 3, 4, 4)),
    "without a batch": (nn.Conv2d(3, 4, 3), (3, 5, 5)),
    "larger than its input": (nn.Conv1d(2, 3, 5, padding=2), (2, 2, 2)),
}
CASES = [(name, form) for name in LAYERS for form in FORMS]


def case(name, form):
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    return Layer("it", copy.deepcopy(module).double(), form), torch.randn(shape, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_table_times_the_samples_is_the_layer(name, form):
    layer, x = case(name, form)
    y = layer.module(x)
    samples = input_samples(layer, x)
    by_hand = torch.einsum("gbpkc,grkc->gbpr", samples, layer.table())
    torch.testing.assert_close(by_hand, output_samples(layer, y.detach()), rtol=1e-10, atol=1e-10)
    weight, bias = layer.weights(layer.table())
    assert torch.equal(weight, layer.module.weight) and (bias is None) == (layer.module.bias is None)
    assert bias is None or torch.allclose(bias, layer.module.bias)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("small", [1, 2**18])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_products_are_the_sums_over_all_samples(name, form, small, monkeypatch):
    monkeypatch.setattr(layers, "SMALL", small)  # parts of the batch of one example, and the batch whole
    layer, x = case(name, form)
    samples = input_samples(layer, x).flatten(1, 3)
    products, count = input_products(layer, x)
    torch.testing.assert_close(products, samples.mT @ samples, rtol=1e-10, atol=1e-10)
    assert count == samples.shape[1]
    g = torch.randn_like(layer.module(x))
    rows = output_samples(layer, g).flatten(1, 2)
    torch.testing.assert_close(output_products(layer, g), rows.mT @ rows, rtol=1e-10, atol=1e-10)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(4 * 9, 5), nn.ReLU(inplace=True), nn.Linear(5, 3),
    ).double()  # fmt: skip


X = torch.randn(7, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 1])


def by_autograd(model, x, y, loss):
    """Inputs, and gradients at the outputs, of every layer, one example after the other."""
    seen = {}
    model = copy.deepcopy(model).eval()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, []).append((i[0], o)))
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    for i in range(len(x)):
        count = {name: len(pairs) for name, pairs in seen.items()}
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        for name, pairs in seen.items():
            for j in range(count.get(name, 0), len(pairs)):
                a, o = pairs[j]
                pairs[j] = (a.detach(), torch.autograd.grad(value, o, retain_graph=True)[0])
    return seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_factors_are_the_averages_over_examples_whatever_the_batches(form, size):
    model = network()
    data = [(X[i : i + size], Y[i : i + size]) for i in range(0, 7, size)]
    factors = kronecker_factors(model, data, "cross_entropy", fisher="empirical", form=form)
    assert list(factors) == ["0", "3", "7", "9"] and factors.examples == 7 and not factors.skipped
    for name, pairs in by_autograd(model, X, Y, F.cross_entropy).items():
        layer = factors[name].layer
        a = torch.cat([input_samples(layer, a).flatten(1, 3) for a, _ in pairs], 1)
        torch.testing.assert_close(factors[name].a, a.mT @ a / a.shape[1], rtol=1e-9, atol=1e-12)
        g = torch.cat([output_samples(layer, g).flatten(1, 2) for _, g in pairs], 1)
        torch.testing.assert_close(factors[name].g, g.mT @ g / 7, rtol=1e-9, atol=1e-12)


def test_for_one_example_of_a_linear_it_is_the_exact_fisher():
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(1, 4, dtype=torch.float64), torch.tensor([2])
    factors = kronecker_factors(model, [(x, y)], "cross_entropy", fisher="empirical")[""]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    gradient = torch.cat([grads[0], grads[1][:, None]], 1).flatten()
    torch.testing.assert_close(
        torch.kron(factors.g[0], factors.a[0]), torch.outer(gradient, gradient), rtol=1e-10, atol=1e-12
    )


def test_drawn_targets_give_the_true_fisher():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(50, 4, dtype=torch.float64)
    p = model(x).softmax(-1).detach()
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    drawn = kronecker_factors(model, [x], "cross_entropy", samples=400)[""].g[0]
    torch.testing.assert_close(drawn, exact, rtol=0, atol=0.02)
    normal = kronecker_factors(model, [(x, None)], "mse", samples=400)[""].g[0]
    torch.testing.assert_close(normal, torch.eye(3, dtype=torch.float64), rtol=0, atol=0.05)


def test_the_exact_fisher_needs_no_draws():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(50, 4, dtype=torch.float64)
    p = model(x).softmax(-1).detach()
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    torch.testing.assert_close(kronecker_factors(model, [x], "cross_entropy", fisher="exact")[""].g[0], exact)
    normal = kronecker_factors(model, [x[:20], x[20:]], "mse", fisher="exact")[""].g[0]
    torch.testing.assert_close(normal, torch.eye(3, dtype=torch.float64))
    drawn = kronecker_factors(network(), [X], "cross_entropy", samples=500)["0"].g
    torch.testing.assert_close(
        kronecker_factors(network(), [X], "cross_entropy", fisher="exact")["0"].g, drawn, rtol=0.3, atol=1e-3
    )


def test_the_loss_may_be_ones_own_and_its_scale_counts_squared():
    model, x = network(), X

    class Doubled:
        def __call__(self, outputs, targets):
            return 2 * F.cross_entropy(outputs, targets)

        def sample(self, outputs, generator):
            return torch.multinomial(outputs.detach().float().softmax(-1), 1, generator=generator).squeeze(1)

    one, two = kronecker_factors(model, [x], "cross_entropy"), kronecker_factors(model, [x], Doubled())
    for name in one:
        torch.testing.assert_close(two[name].g, 4 * one[name].g)
        torch.testing.assert_close(two[name].a, one[name].a)


def test_the_same_seed_gives_the_same_draws():
    one, same, other = (kronecker_factors(network(), [X], "cross_entropy", seed=s) for s in (0, 0, 1))
    assert torch.equal(one["0"].g, same["0"].g) and not torch.equal(one["0"].g, other["0"].g)


def state(model):
    plain = [(id(m), m.training, len(m._forward_hooks)) for m in model.modules()]
    return (
        plain,
        [(id(p), p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        torch.get_rng_state(),
    )


def same(one, other):
    assert one[0] == other[0]
    for a, b in zip(one[1], other[1], strict=True):
        assert a[:3] == b[:3] and torch.equal(a[3], b[3])
    assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True)) and torch.equal(one[3], other[3])


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_stays_as_it_was_even_when_the_pass_fails(fail):
    model = network().train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    before = state(model)
    data = [X, X[:, :1]] if fail else [X, X]
    if fail:
        with pytest.raises(sc.SecateurError, match=r"batch 1 .*does not fit the model"):
            kronecker_factors(model, data, "cross_entropy")
    else:
        kronecker_factors(model, data, "cross_entropy")
    same(before, state(model))


class Shared(nn.Module):
    """A module that is called twice, and a weight that two modules hold."""

    def __init__(self):
        super().__init__()
        self.twice, self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.other.bias = self.one.bias
        self.never = nn.Linear(3, 3)

    def forward(self, x):
        return self.other(self.one(self.twice(self.twice(x).tanh()).tanh()).tanh())


def test_shared_weights_see_all_their_places():
    torch.manual_seed(0)
    model, x, y = Shared().double(), torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    factors = kronecker_factors(model, [(x, y)], "cross_entropy", fisher="empirical")
    assert set(factors) == {"twice", "one"}
    assert "one" in factors.skipped["other"] and "never reached" in factors.skipped["never"]
    seen = by_autograd(model, x, y, F.cross_entropy)
    for name, of in (("twice", ["twice"]), ("one", ["one", "other"])):
        pairs = [pair for n in of for pair in seen[n]]
        a = torch.cat([F.pad(a, (0, 1), value=1) for a, _ in pairs])
        g = torch.cat([g for _, g in pairs])
        torch.testing.assert_close(factors[name].a[0], a.T @ a / 12)
        torch.testing.assert_close(factors[name].g[0], g.T @ g / 6)


def test_half_precision_is_added_up_in_single():
    model = nn.Linear(4, 3).to(torch.bfloat16)
    factors = kronecker_factors(model, [torch.randn(5, 4, dtype=torch.bfloat16)], "cross_entropy")[""]
    assert factors.a.dtype == factors.g.dtype == torch.float32


def test_some_positions_stand_for_all():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)), torch.randn(20, 3, 12, 12)
    model(x)
    every, some = (kronecker_factors(model, [x], "cross_entropy", form="full", positions=p)["0"].a for p in (None, 500))
    assert 0 < (every - some).norm() / every.norm() < 0.3


BAD = {
    "empty": (lambda: kronecker_factors(network(), [], "cross_entropy"), "loader is empty"),
    "no such layer": (lambda: kronecker_factors(network(), [X], "cross_entropy", layers=["1"]), "'1' is no linear"),
    "no layer": (lambda: kronecker_factors(nn.ReLU(), [X], "cross_entropy"), "no linear or convolution"),
    "form": (lambda: kronecker_factors(network(), [X], "cross_entropy", form="whole"), "'channel' or 'full'"),
    "fisher": (lambda: kronecker_factors(network(), [X], "cross_entropy", fisher="true"), "'sampled'"),
    "samples": (lambda: kronecker_factors(network(), [X], "cross_entropy", samples=0), "from 1 on"),
    "several of one": (
        lambda: kronecker_factors(network(), [X], "cross_entropy", fisher="empirical", samples=2), "draws nothing"),
    "exact for what is not known": (
        lambda: kronecker_factors(network(), [(X, Y)], lambda o, t: o.sum(), fisher="exact"), "is known for"),
    "no targets": (
        lambda: kronecker_factors(network(), [X], "cross_entropy", fisher="empirical"), "batch 0 has none: give pairs"),
    "no loss": (lambda: kronecker_factors(network(), [(X, Y)]), "loss= is needed"),
    "loss by name": (lambda: kronecker_factors(network(), [X], "crossentropy"), "did you mean 'cross_entropy'"),
    "a loss that is no number": (
        lambda: kronecker_factors(network(), [(X, Y)], lambda o, t: o, fisher="empirical"), "one number as a tensor"),
    "a loss without a gradient": (
        lambda: kronecker_factors(network(), [(X, Y)], lambda o, t: o.detach().sum(), fisher="empirical"),
        "must depend on the outputs"),
    "NaN activations": (lambda: kronecker_factors(network(), [X * float("nan")], "cross_entropy"), "(loss|batch 0)"),
    "infinite activations": (
        lambda: kronecker_factors(nn.Sequential(nn.Linear(2, 2), nn.Hardtanh(), nn.Linear(2, 2)),
                                  [torch.full((1, 2), float("inf"))], "cross_entropy"), "not finite|nan|loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name):
    call, message = BAD[name]
    with pytest.raises(sc.SecateurError, match=message):
        call()


def test_inputs_may_come_out_of_another_network():
    torch.manual_seed(0)
    before, model = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    whole = before(torch.randn(15, 8))
    data = [(whole[i : i + 5], torch.arange(5) % 3) for i in (0, 5, 10)]
    one, two = (kronecker_factors(model, data, "cross_entropy") for _ in range(2))
    assert torch.equal(one["0"].a, two["0"].a) and before.weight.grad is None


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.b(self.a(x).relu()).float()


def test_sums_keep_their_precision_under_autocast():
    torch.manual_seed(0)
    data = [(torch.randn(5, 8), torch.arange(5) % 3) for _ in range(3)]
    found = kronecker_factors(Mixed(), data, "cross_entropy")
    x = torch.cat([x for x, _ in data])
    assert found["a"].a.dtype == found["b"].a.dtype == found["b"].g.dtype == torch.float32
    torch.testing.assert_close(found["a"].a[0, :8, :8], x.T @ x / 15, rtol=1e-5, atol=1e-6)


class Routed(nn.Module):
    """A part of the examples each; none for the second, at times."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 3), nn.Linear(8, 3), nn.Conv1d(1, 3, 8)

    def forward(self, x):
        first = x[:, 0] > 0
        parts = torch.cat([self.a(x[first]), self.b(x[~first])])
        return parts + torch.cat([self.c(x[~first].unsqueeze(1)).squeeze(2), parts[: int(first.sum())] * 0])


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_may_see_no_example_of_a_batch(form):
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    x[:, 0] = torch.tensor([1.0, 2, 3, -1, 1, 1])
    data = [(x[:3], torch.arange(3)), (x[3:], torch.arange(3))]
    found = kronecker_factors(Routed().double(), [(x.double(), y) for x, y in data], "cross_entropy", form=form)
    seen = x[3:4].double()
    torch.testing.assert_close(found["b"].a[0, :8, :8], seen.T @ seen)


def test_a_graph_that_is_gone_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    kept = {}

    def remember(_, __, output):
        kept["state"] = (output + kept.get("state", 0)).tanh()
        return kept["state"]

    model[1].register_forward_hook(remember)
    with pytest.raises(sc.SecateurError, match="no gradient of batch 1 can be found"):
        kronecker_factors(model, [(torch.randn(3, 4), torch.arange(3) % 2) for _ in range(3)], "cross_entropy")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("linear without a batch", "without a batch")])
def test_full_form_holds_the_channel_form(name):
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    model, x = nn.Sequential(copy.deepcopy(module)).double(), torch.randn(shape, dtype=torch.float64)
    full = kronecker_factors(model, [x], "mse", form="full")["0"].channel_form()
    own = kronecker_factors(model, [x], "mse", form="channel", bias=False)["0"]
    torch.testing.assert_close(full.a, own.a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(full.g, own.g, rtol=1e-9, atol=1e-12)
    assert full.layer.table().shape == own.layer.table().shape


def test_what_was_measured_of_more_layers_is_not_measured_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    work = Workload(model, [torch.randn(8, 5)], "mse")
    every = factors_of(work, Fisher(), form="full", layers=["0", "2", "4"])
    before = work.forwards
    some = factors_of(work, Fisher(), form="full", layers=["2"])
    assert work.forwards == before and some.examples == every.examples
    assert list(some) == ["2"] and some["2"] is every["2"]
    factors_of(work, Fisher(seed=1), form="full", layers=["2"])
    factors_of(work, Fisher(), form="channel", layers=["2"])
    assert work.forwards == before + 2
