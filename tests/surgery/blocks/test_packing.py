"""Packing: what the masked model computes, as few gathers as can be, no layer slower, ordinary modules."""

from __future__ import annotations

import copy
import importlib
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.measure.counting import counted
from secateur.surgery.blocks.packed_layers import Packed
from secateur.surgery.blocks.pattern import LAYOUTS, Pattern
from secateur.surgery.blocks.pivots import eligible, energy, patterns_of, remembered

packing = importlib.import_module("secateur.surgery.blocks.packing")


class Residual(nn.Module):
    """Two blocks on one stream, the second through a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.up, self.back = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.wide, self.deep = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.narrow, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 8)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = x + self.back(self.up(x).relu())
        x = x + self.narrow(self.deep(self.wide(x)).relu())
        return self.head(x.relu().mean((2, 3)))


def perceptron():
    return nn.Sequential(
        nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 30), nn.ReLU(),
        nn.Linear(30, 21),
    )  # fmt: skip


def chain():
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, bias=False),
        nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 16),
    )  # fmt: skip


def lines():
    return nn.Sequential(nn.Conv1d(16, 22, 3, padding="same"), nn.ReLU(), nn.Conv1d(22, 18, 5, dilation=2))


CASES = {
    "perceptron": (perceptron, (5, 24)),
    "sequence": (perceptron, (2, 3, 24)),
    "chain": (chain, (3, 8, 6, 6)),
    "residual": (Residual, (2, 3, 6, 6)),
    "lines": (lines, (2, 16, 20)),
    "single": (lambda: nn.Linear(16, 16), (4, 16)),
}


def several(layout="bundles"):
    """Of layers as small as these there would be one block, by default."""
    return {"layout": layout} | ({} if layout == "diagonal" else {"blocks": 4})


def case(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    make, shape = CASES[name]
    model = make().to(dtype).eval()
    if name == "sequence":
        model = nn.Sequential(*(m for m in model if not isinstance(m, nn.BatchNorm1d))).eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):  # statistics that tell channels apart
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return model, torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [1 / 2, 1 / 4])
@pytest.mark.parametrize("way", ["blocks", "at_once", "fastest"])
def test_packed_is_masked(name, layout, keep, way):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model, x = case(name, dtype)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        pivoted = sc.pivot(model, x, keep, exclude=["head"] if name == "residual" else [], **several(layout)).model
        packed = sc.pack(pivoted, x, way=way)
        with torch.no_grad():
            wanted, given = pivoted(x), packed(x)
            other = pivoted(-x[:1]), packed(-x[:1])
        for a, b in ((wanted, given), other):
            assert float((a - b).abs().max()) <= tolerance * float(a.abs().max())
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        if way != "fastest":
            assert any(isinstance(m, Packed) for m in packed.modules())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(13, 11), (17, 8), (8, 19), (33, 33), (33, 18)])
@pytest.mark.parametrize("way", ["blocks", "at_once"])
def test_blocks_that_do_not_divide_a_layer_change_nothing_and_train_on_like_the_masked_one(layout, shape, way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Tanh(), nn.Linear(shape[0], 2)).double()
    x = torch.randn(4, shape[1], dtype=torch.float64)
    given = {"layout": layout, "exclude": ["2"]} | ({} if layout == "diagonal" else {"blocks": 3})
    pivoted = sc.pivot(model, x, 0.5, **given).model
    packed = sc.pack(pivoted, x, way=way)
    assert isinstance(packed[0], Packed)
    assert packed[0].order is None
    handle = sc.Pivoting(pivoted, patterns=remembered(pivoted))
    for each, hold in ((pivoted, handle.step), (packed, lambda: None)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
            hold()
    assert torch.allclose(packed(x), pivoted(x), rtol=0, atol=1e-10)


def indices(model):
    """How many operations gather or put in order."""
    layers = [m for m in model.modules() if isinstance(m, Packed)]
    return sum(m.index is not None for m in layers), sum(m.order is not None for m in layers)


@pytest.mark.parametrize("way", ["blocks", "at_once"])
def test_planted_structures_that_fit_need_no_gather_at_all(way):
    """Block-diagonal layers one after the other, shuffled between: the channels' order takes up the shuffles."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    rng = np.random.default_rng(0)
    inner = [
        np.arange(32),
        rng.permutation(32),
        rng.permutation(32),
        np.arange(32),
    ]  # at input and output there is none
    for i, layer in enumerate(model[::2]):
        whole = torch.from_numpy(np.kron(np.eye(4), np.ones((8, 8)))).float() * torch.randn(32, 32)
        layer.weight.data = whole[np.argsort(inner[i + 1])][:, np.argsort(inner[i])]
    x = torch.randn(3, 32)
    pivoted = sc.pivot(model, x, 0.25, layout="diagonal").model
    assert all(torch.equal(a, b) for a, b in zip(pivoted.parameters(), model.parameters(), strict=True))
    packed = sc.pack(pivoted, x, way=way)
    assert indices(packed) == (0, 0)
    assert torch.allclose(packed(x), model(x), atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["perceptron", "chain"])
def test_in_a_chain_only_the_ends_need_an_index_after_the_rows(name, layout):
    model, x = case(name)
    packed = sc.pack(sc.pivot(model, x, 0.25, **several(layout)).model, x, way="blocks")
    layers = [m for m in packed.modules() if isinstance(m, Packed)]
    assert all(layer.order is None for layer in layers[:-1])  # the last writes the output, whose order is the user's
    assert len(layers) >= 2


def test_in_a_residual_stream_one_of_those_that_write_it_needs_no_index():
    model, x = case("residual")
    packed = sc.pack(sc.pivot(model, x, 0.5, blocks=4, exclude=["head"]).model, x, way="blocks")
    assert packed.up.order is None
    assert packed.wide.order is None
    assert [packed.back.order is None, packed.narrow.order is None].count(True) == 1


@pytest.mark.parametrize("way", ["blocks", "at_once"])
def test_training_goes_on_with_the_gradients_of_the_masked_model(way):
    model, x = case("perceptron")
    pivoted = sc.pivot(model, x, 0.5, blocks=4).model
    packed = sc.pack(pivoted, x, way=way)
    for each in (pivoted, packed):
        each.train()
        each(x).square().sum().backward()
    wanted = sum(float((m.weight.grad * (m.weight != 0)).square().sum()) for m in pivoted if isinstance(m, nn.Linear))
    given = sum(float(m.weight.grad.square().sum()) for m in packed if isinstance(m, (nn.Linear, Packed)))
    assert given == pytest.approx(wanted, rel=1e-9)


def test_what_is_slower_stays_dense(monkeypatch):
    model, x = case("perceptron")
    pivoted = sc.pivot(model, x, 0.25).model
    for dense, expected in ((1.0, 4), (0.51, 0)):
        monkeypatch.setattr(
            packing, "milliseconds", lambda ways, _, dense=dense: {n: dense if n == "dense" else 0.5 for n in ways}
        )
        packed = sc.pack(pivoted, x)
        assert sum(isinstance(m, Packed) for m in packed.modules()) == expected
        facts = json.loads(sc.record(packed)[-1]["pack"])
        assert (len(facts["layers"]), len(facts["patterns"])) == (expected, 4 - expected)
        assert set(facts["ms"]) == {"0", "2", "5", "7"} | ({""} if expected else set())
        with torch.no_grad():
            assert torch.allclose(packed(x), pivoted(x), atol=1e-10)


def test_a_model_that_is_no_faster_as_a_whole_stays_dense(monkeypatch):
    model, x = case("perceptron")
    pivoted, after = sc.pivot(model, x, 0.25).model, packing.milliseconds

    def milliseconds(ways, x):
        after(ways, x, 1)  # they run
        return {n: 0.1 if n in ("blocks", "at_once") else 1.0 for n in ways}

    monkeypatch.setattr(packing, "milliseconds", milliseconds)
    packed = sc.pack(pivoted, x)
    assert not any(isinstance(m, Packed) for m in packed.modules())
    assert json.loads(sc.record(packed)[-1]["pack"])["layers"] == {}
    assert torch.equal(packed(x), pivoted(x))
    with torch.no_grad():
        assert torch.allclose(sc.pack(packed, x, way="blocks")(x), pivoted(x), atol=1e-10)


def test_packing_again_for_another_batch_uses_the_channels_as_they_lie_now(monkeypatch):
    model, x = case("perceptron")
    pivoted = sc.pivot(model, x, 0.5, blocks=4).model
    with monkeypatch.context() as patch:
        patch.setattr(packing, "milliseconds", lambda ways, _: {n: 0.1 if n == "dense" else 1.0 for n in ways})
        dense = sc.pack(pivoted, x)
    assert not any(isinstance(m, Packed) for m in dense.modules())
    again = sc.pack(dense, x, way="blocks")
    assert sum(isinstance(m, Packed) for m in again.modules()) == 4
    with torch.no_grad():
        assert torch.allclose(again(x), pivoted(x), atol=1e-10)
    with pytest.raises(SecateurError, match="packed already"):
        sc.pack(again, x)
    handle = sc.Pivoting(dense, patterns=remembered(dense))
    handle.step()
    with torch.no_grad():
        assert torch.allclose(dense(x), pivoted(x), atol=1e-10)


def test_weights_that_changed_outside_of_the_blocks_are_told():
    model, x = case("perceptron")
    pivoted = sc.pivot(model, x, 0.5, blocks=4).model
    with torch.no_grad():
        pivoted[2].weight += 1
    with pytest.raises(SecateurError, match="'2' have changed outside of its blocks"):
        sc.pack(pivoted, x)


def test_a_forward_that_the_example_does_not_take_computes_the_same():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 32)
            self.head, self.other = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x, other=False):
            x = self.second(self.first(x).relu()).relu()
            return self.other(x) if other else self.head(x)

    torch.manual_seed(0)
    model, x = Branches().double(), torch.randn(5, 16).double()
    pivoted = sc.pivot(model, x, 0.25, blocks=4).model
    packed = sc.pack(pivoted, x, way="blocks")
    assert json.loads(sc.record(packed)[-1]["pack"])["unread"] == ["other.weight", "other.bias"]
    with torch.no_grad():
        assert torch.allclose(packed(x), pivoted(x), atol=1e-10)
        assert torch.allclose(packed(x, other=True), pivoted(x, other=True), atol=1e-10)


def test_a_model_that_was_changed_since_is_told():
    model, x = case("perceptron")
    pivoted = sc.pivot(model, x, 0.5).model
    cut = sc.prune(pivoted, x, sc.Budget(macs=0.5), criterion="magnitude", strategy="global").model
    with pytest.raises(SecateurError, match=r"changed since it was pivoted .*pivot it again"):
        sc.pack(cut, x)


def test_low_precision_inside_of_a_model_is_no_reason_to_refuse():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))

        def forward(self, x):
            return self.body(x).double()

    model, x = Wide(), torch.randn(16, 64)
    packed = sc.pack(sc.pivot(model, x, 0.5).model, x, way="blocks")
    assert packed(x).dtype is torch.float64
    half = sc.pivot(model.half(), x.half(), 0.5).model
    assert isinstance(sc.pack(half, x.half(), way="blocks").body[0], Packed)


def test_what_is_not_finite_inside_of_the_blocks_is_no_change_outside():
    model, x = case("perceptron")
    pivoted = sc.pivot(model, x, 0.5, blocks=4).model
    weight = pivoted[2].weight.data
    weight[tuple(weight.nonzero()[0])] = torch.nan
    assert isinstance(sc.pack(pivoted, x, way="blocks")[2], Packed)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # weight_norm is on its way out
def test_a_model_that_cannot_be_copied_is_told():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 16))
    model(torch.randn(2, 16)).sum().backward()
    with pytest.raises(SecateurError, match="cannot be copied"):
        sc.pivot(model, torch.randn(2, 16), 0.5)


def test_a_model_that_is_not_the_sum_of_its_layers_is_told():
    class Doubled(nn.Linear):
        pass

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return nn.functional.linear(self.a(x), self.b.weight * 2) + self.b(x)

    x = torch.randn(3, 16)
    with pytest.raises(SecateurError, match="does a module read the weights of another"):
        sc.pack(sc.pivot(Reads(), x, 0.5).model, x, way="blocks")
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), Doubled(16, 16))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[1].forward = lambda x: 2 * nn.Linear.forward(model[1], x)
    with pytest.raises(SecateurError, match=r"0 has hooks.*1 has hooks.*2 computes its weight"):
        sc.pivot(model, x, 0.5)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(SecateurError, match="fused forward"):
        sc.pivot(layer, torch.randn(2, 3, 16), 0.5)


def test_a_layer_under_two_names_and_one_called_by_keyword_are_packed():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
            self.layers = nn.ModuleList([self.first, self.second])

        def forward(self, x):
            return self.layers[1](input=self.first(x).relu()) + self.second(self.layers[0](x))

    torch.manual_seed(0)
    model, x = Two().double(), torch.randn(3, 16, dtype=torch.float64)
    pivoted = sc.pivot(model, x, 0.5, blocks=4).model
    packed = sc.pack(pivoted, x, way="at_once")
    assert packed.first is packed.layers[0]
    assert sum(p.numel() for p in packed.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    assert torch.allclose(packed(x), pivoted(x), atol=1e-12)


def test_the_users_model_random_state_and_inputs_stay_as_they_were():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.back = nn.Linear(16, 16), nn.Linear(16, 16)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.back(self.layer(x.mul_(2)).relu() + torch.randn_like(x))

    model, x = Counts().train(), torch.randn(3, 16)
    before, given = torch.get_rng_state(), x.clone()
    packed = sc.pack(sc.pivot(model, x, 0.5, blocks=4).model, x, way="blocks")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, given)
    assert model.calls == packed.calls == 0
    assert model.training


def test_outputs_that_are_not_finite_or_rough_are_no_reason_to_refuse():
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.b(self.a(x).relu()).masked_fill(torch.arange(16) < 3, -torch.inf)

    x = torch.randn(3, 16)
    assert isinstance(sc.pack(sc.pivot(Masks(), x, 0.5).model, x, way="blocks").a, Packed)
    torch.manual_seed(0)
    deep = nn.Sequential(*(m for _ in range(11) for m in (nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)))).bfloat16()
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    assert isinstance(sc.pack(sc.pivot(deep, x, 0.5, blocks=4).model, x, way="blocks")[0], Packed)


def test_packing_never_brings_gathers():
    """What fits as it is stays as it is; of random patterns there are never more indices than without a new order."""
    rng = np.random.default_rng(0)
    model, x = case("perceptron")
    for seed in range(20):
        layout = ("growth", "bundles", "diagonal")[seed % 3]
        patterns = {}
        for name in ("0", "2", "5", "7"):
            m, n = model[int(name)].weight.shape
            rows, columns = rng.permutation(m) if seed > 5 else np.arange(m), rng.permutation(n)
            rows, count = np.r_[rows, np.full(-m % 4, m)].reshape(4, -1), n // 4
            own = columns[: 4 * count].reshape(4, count) if seed > 5 else np.arange(4 * count).reshape(4, count)
            patterns[name] = Pattern((m, n), np.sort(rows), np.sort(own), layout)
        plain = [packing.layout_of(pattern, at_once=False) for pattern in patterns.values()]
        before = sum(layout.starts is None for layout in plain), sum(not layout.ordered for layout in plain)
        after = indices(sc.pack(model, x, patterns, way="blocks"))
        assert after[0] <= before[0]
        assert after[1] <= before[1]
        assert seed > 5 or after == (0, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [1 / 2, 1 / 4])
def test_macs_are_the_part_that_stays(layout, keep):
    model, x = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3)), torch.randn(1, 16, 8, 8)
    for way in ("at_once", "blocks"):
        packed = sc.pack(sc.pivot(model, x, keep, **several(layout)).model, x, way=way)
        assert counted(packed, x)["macs"] == keep * counted(model, x)["macs"]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    for x, way in itertools.product((torch.randn(1, 64), torch.randn(3, 64)), ("at_once", "blocks")):
        packed = sc.pack(sc.pivot(model, x, keep, **several(layout)).model, x, way=way)
        assert counted(packed, x)["macs"] == keep * counted(model, x)["macs"]


@pytest.mark.parametrize("way", ["blocks", "at_once"])
@pytest.mark.parametrize("name", ["chain", "residual", "lines"])
def test_saved_and_loaded_it_is_the_same(tmp_path, name, way):
    model, x = case(name, torch.float32)
    packed = sc.pack(sc.pivot(model, x, 0.5, blocks=4).model, x, way=way)
    sc.save(packed, tmp_path)
    again = sc.load(tmp_path, lambda: case(name, torch.float32, seed=1)[0])
    assert torch.equal(again(x), packed(x))
    assert sc.record(again) == sc.record(packed)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    fresh = sc.pack(sc.pivot(model, x, 0.5, blocks=4).model, x, way=way)
    fresh.load_state_dict(packed.state_dict())


def test_a_damaged_record_is_told(tmp_path):
    model, x = case("chain", torch.float32)
    sc.save(sc.pack(sc.pivot(model, x, 0.5, blocks=4).model, x, way="blocks"), tmp_path)
    text = (tmp_path / "secateur.json").read_text()
    for old, new in (
        ('\\"blocks\\": 4', '\\"blocks\\": 0'),
        ('\\"form\\": 2', '\\"form\\": 1'),
        ('\\"starts\\"', '\\"stars\\"'),
        ('\\"rows\\"', '\\"row\\"'),
    ):
        assert old in text
        (tmp_path / "secateur.json").write_text(text.replace(old, new))
        with pytest.raises(SecateurError, match="damaged"):
            sc.load(tmp_path, lambda: case("chain", torch.float32)[0])


@pytest.mark.filterwarnings("ignore")  # of the exporters themselves
@pytest.mark.parametrize("way", ["blocks", "at_once"])
@pytest.mark.parametrize("name", ["chain", "residual", "perceptron"])
def test_it_can_be_exported_and_compiled(name, way):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator
    model, x = case(name, torch.float32)
    packed = sc.pack(sc.pivot(model, x, 0.5, blocks=4).model, x, way=way)
    with torch.no_grad():
        wanted = packed(x)
        assert torch.allclose(torch.export.export(packed, (x,)).module()(x), wanted, atol=1e-5)
        assert torch.allclose(torch.compile(packed, backend="eager", fullgraph=True)(x), wanted, atol=1e-5)
        program = torch.onnx.export(packed, (x,), dynamo=True, verbose=False)
    onnx.checker.check_model(program.model_proto)
    runner = evaluator(program.model_proto)
    (given,) = runner.run(None, {runner.input_names[0]: x.numpy()})
    assert np.abs(given - wanted.numpy()).max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("way", ["blocks", "at_once"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_linear_takes_any_number_of_vectors(layout, bias, way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 21, bias=bias), nn.ReLU(), nn.Linear(21, 2)).double()
    pivoted = sc.pivot(model, torch.zeros(3, 24, dtype=torch.float64), 0.5, exclude=["2"], **several(layout)).model
    packed = sc.pack(pivoted, torch.zeros(3, 24, dtype=torch.float64), way=way)
    for shape in ((), (1,), (1, 1), (0,), (2, 0), (5,), (2, 3)):
        x = torch.randn(*shape, 24, dtype=torch.float64)
        for each in (a := x.clone().requires_grad_(), b := x.clone().requires_grad_()):
            (pivoted if each is a else packed)(each).square().sum().backward()
        assert packed(x).shape == pivoted(x).shape
        assert torch.allclose(packed(x), pivoted(x), rtol=0, atol=1e-12)
        assert torch.allclose(b.grad, a.grad, rtol=0, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        for rows in (1, 2):
            packed.float()(torch.randn(rows, 24))


@pytest.mark.filterwarnings("ignore")  # of the exporter itself
@pytest.mark.parametrize("way", ["blocks", "at_once"])
def test_it_can_be_exported_for_any_number_of_examples(way):
    model, x = case("perceptron", torch.float32)
    packed = sc.pack(sc.pivot(model, x, 0.5, blocks=4).model, x, way=way)
    program = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for rows in (2, 5, 9):
        other = torch.randn(rows, 24)
        assert torch.allclose(program(other), packed(other), atol=1e-5)


def test_the_energy_is_that_of_magnitude_or_of_the_fisher():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)).double()
    data = [(torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.randint(0, 5, (8,)))]
    assert np.allclose(energy(model[0]), model[0].weight.detach().square().sum((2, 3)))
    factors = sc.kronecker_factors(model, data, "cross_entropy", fisher="exact")
    for name in ("0", "2"):
        a, g = factors[name].a[0].diagonal(), factors[name].g[0].diagonal()
        n = model[int(name)].weight.shape[1]
        squared = model[int(name)].weight.detach().square().reshape(*model[int(name)].weight.shape[:2], -1).sum(2)
        wanted = (squared * g[:, None] * a[:n]).numpy()
        assert np.allclose(energy(model[int(name)], factors[name]), wanted)
    full = sc.kronecker_factors(model, data, "cross_entropy", form="full")
    with pytest.raises(SecateurError, match="form='channel'"):
        energy(model[0], full["0"])
    assert set(sc.record(sc.pivot(model, data[0][0], 1.0, factors=factors).model)[-1]) == {"pivot"}


def test_with_the_fishers_energy_what_inputs_never_show_goes_first():
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    x = torch.randn(64, 16) * (torch.arange(16) < 8)  # half of the inputs are always zero
    factors = sc.kronecker_factors(model, [(x, torch.zeros(64, 8))], "mse")
    pivoted = sc.pivot(model, x, 0.5, factors=factors, blocks=1).model
    assert torch.allclose(pivoted(x), model(x), atol=1e-6)
    assert not torch.allclose(sc.pivot(model, x, 0.5, blocks=1).model(x), model(x), atol=1e-2)


def test_layers_that_cannot_have_blocks_stay_whole_and_say_why():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict(
        {
            "one": nn.Linear(16, 16), "tied": shared, "row": nn.Linear(16, 1), "few": nn.Linear(3, 16),
            "grouped": nn.Conv2d(16, 16, 3, groups=4), "circular": nn.Conv2d(16, 16, 3, padding_mode="circular"),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), "out": nn.Linear(16, 16),
        }
    )  # fmt: skip
    model["again"] = nn.Linear(16, 16)
    model["again"].weight = shared.weight
    found, skipped = eligible(model, 0.5, "bundles", {"out": "excluded"})
    assert found == ["one"]
    for name, why in {
        "tied": "shares", "again": "shares", "row": "16 leaves", "few": "fewer than 4", "grouped": "grouped",
        "circular": "circular", "normed": "computes its weight", "out": "excluded",
    }.items():  # fmt: skip
        assert why in skipped[name], name


def test_layers_that_are_not_used_stay_whole():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    model = Half()
    pivoted = sc.pivot(model, torch.zeros(1, 16), 0.5).model
    assert torch.equal(pivoted.idle.weight, model.idle.weight)
    assert "not used" in json.loads(sc.record(pivoted)[-1]["pivot"])["skipped"]["idle"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep=0: a fraction of the coefficients in \(0, 1\]"),
        ({"keep": 1.5}, r"in \(0, 1\]"),
        ({"keep": True}, r"in \(0, 1\]"),
        ({"keep": 0.5, "layout": "bundle"}, "did you mean 'bundles'"),
        ({"keep": 0.5, "blocks": 0}, "from 1 on"),
        ({"keep": 0.5, "blocks": 2, "layout": "diagonal"}, "leave it out"),
        ({"keep": 0.5, "exclude": ["nothing"]}, "layer"),
        ({"keep": 0.01}, "no layer can have blocks"),
        ({"keep": 0.4, "layout": "diagonal"}, "a half, a third, a quarter"),
        ({"keep": 0.5, "seed": -1}, "seed=-1: a whole number from 0 on"),
        ({"keep": 0.5, "factors": {"0": 1}}, "kronecker_factors"),
        ({"keep": 0.5, "factors": {}}, "kronecker_factors"),
        ({"keep": 0.5, "exclude": ["2", 5]}, r"exclude=\['2', 5\]: patterns"),
        ({"keep": 0.5, "exclude": None}, "exclude=None: patterns"),
        ({"keep": 0.5, "exclude": nn.Conv2d}, "unknown type of module in exclude 'Conv2d'"),
        ({"keep": 0.5, "exclude": nn.Linear(2, 2)}, "no module of the model"),
    ],
)
def test_bad_input_is_told(options, message):
    model, x = case("perceptron")
    with pytest.raises(SecateurError, match=message):
        sc.pivot(model, x, **options)


def test_patterns_of_another_model_and_none_at_all_are_told():
    model, x = case("perceptron")
    with pytest.raises(SecateurError, match="make some with"):
        sc.pack(model, x)
    found = patterns_of(model, eligible(model, 0.5, "bundles")[0], 0.5)
    with pytest.raises(SecateurError, match="is 32 x 24, the pattern 32 x 32"):
        sc.pack(model, x, {"0": found["2"]})
    with pytest.raises(SecateurError, match="layer"):
        sc.pack(model, x, {"9": found["2"]})
    for patterns, message in (
        ({}, "there is none"),
        ({"0": "x"}, "a pattern for each layer"),
        ((found, {}), "a pattern for"),
    ):
        with pytest.raises(SecateurError, match=message):
            sc.pack(model, x, patterns)
    for inputs in ([x], None, "a"):
        with pytest.raises(SecateurError, match=r"pivot\(example_inputs\): a tensor"):
            sc.pivot(model, inputs, 0.5)
    with pytest.raises(SecateurError, match="fails on these example inputs"):
        sc.pivot(model, x[:, :3], 0.5)
    with pytest.raises(SecateurError, match=r"a torch\.nn\.Module is expected"):
        sc.pivot("model", x, 0.5)
    with pytest.raises(SecateurError, match="way"):
        sc.pack(model, x, found, way="quick")
    wrong = Pattern((32, 24), found["0"].rows, found["0"].columns, "bundles")
    assert isinstance(sc.pack(model, x, {"0": wrong}, way="blocks")[0], Packed)
