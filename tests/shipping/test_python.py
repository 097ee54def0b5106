"""Files of plain PyTorch: they read like what a person writes, need nothing else, and compute the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from shipped_networks import IDS, NETWORKS
from torch import nn

import secateur as sc

ALONE = """
import runpy, sys
for name in ("secateur", "safetensors", "onnx", "onnxruntime", "scipy", "transformers"):
    sys.modules[name] = None
runpy.run_path("small.py", run_name="__main__")
"""


def checked_elsewhere(folder):
    """What the file says of itself where PyTorch alone is."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE], cwd=folder, capture_output=True, text=True, check=False
    )


def loaded(path):
    """What the file gives."""
    space = {"__file__": str(path), "__name__": "small"}
    exec(compile(path.read_text(), str(path), "exec"), space)
    return space["load"]()


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_the_same_and_needs_pytorch_alone(name, tmp_path, untouched):
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    model = sc.prune(make().eval(), x, sc.Budget(params=0.6)).model
    with untouched(model):
        done = sc.export(model, tmp_path / "small.py", x)
    assert max(done.apart.values()) < 1e-6
    assert set(done.apart) == {"example", "others", "one"}
    text = done.path.read_text()
    assert "import secateur" not in text
    (weights,) = tmp_path.glob("small.*.safetensors")
    assert weights.name in text
    assert done.bytes == weights.stat().st_size + len(text.encode())
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (done.path, weights):
        file.rename(moved / file.name)
    run = checked_elsewhere(moved)
    assert run.returncode == 0, run.stderr
    assert "largest difference to what was recorded: 0.0e+00" in run.stdout


def test_other_weights_are_noticed(tmp_path):
    make, x = NETWORKS["u-net"]
    sc.export(make().eval(), tmp_path / "small.py", x)
    (weights,) = tmp_path.glob("small.*.safetensors")
    tensors = load_file(weights)
    tensors["deep.weight"] += 0.5
    save_file(tensors, weights)
    run = checked_elsewhere(tmp_path)
    assert run.returncode == 1
    assert "largest difference" in run.stdout


def test_widths_are_numbers_and_paths_are_the_models(tmp_path):
    torch.manual_seed(0)
    make, x = NETWORKS["separable"]
    model = sc.prune(make().eval(), x, sc.Budget(params=0.5)).model
    path = sc.export(model, tmp_path / "small.py", x).path
    text = path.read_text()
    width = model.body[0].out_channels
    assert f"self.body[3] = nn.Conv2d({width}, {width}, kernel_size=(3, 3)" in text
    assert "x = self.body[0](x)" in text
    assert "return {'classes': " in text
    assert "class Separable(nn.Module):" in text
    again = loaded(path)
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in model.state_dict().items()
    }
    with torch.no_grad():
        assert torch.equal(again(x)["boxes"], model(x)["boxes"])


def test_layers_in_sequence_are_written_as_such(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2)).eval()
    path = sc.export(model, tmp_path / "small.py", torch.randn(2, 3)).path
    assert "    return nn.Sequential(\n        nn.Sequential(\n            nn.Linear(in_features=3" in path.read_text()
    x = torch.randn(5, 3)
    with torch.no_grad():
        assert torch.equal(loaded(path)(x), model(x))


class Peculiar(nn.Module):
    """Whatever is seldom: tied weights, lists of parameters, odd names, nested inputs, tuples, slices, new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight
        self.scales = nn.ParameterList(torch.rand(8) for _ in range(2))
        self.parts = nn.ModuleDict({"a-b": nn.Linear(8, 8), "class": nn.Linear(8, 8)})
        self.register_buffer("shift", torch.rand(8), persistent=False)
        self.wide = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, batch, lambda_, *, flag=True):
        x = self.embed(batch["ids"]) * self.scales[0] + self.scales[1] - self.shift
        x = self.parts["a-b"](x) + self.parts["class"](x)[:, :1]
        x = self.wide(x.double()).float()
        places = torch.arange(x.shape[1], device=x.device)[None, :, None] / 2 ** torch.ones(1)
        x = (x + places + lambda_[0] * lambda_[1][:, None, None]).masked_fill(x > 1, float("-inf")).exp()
        values, at = x.max(-1)
        return [values, (at, self.head(x[:, 1:]))], x[:, -1] if flag else None


def test_what_is_seldom_is_written_too(tmp_path):
    torch.manual_seed(0)
    model = Peculiar().eval()
    x = ({"ids": IDS}, [torch.rand(()), torch.rand(4)])
    done = sc.export(model, tmp_path / "small.py", x, dynamic={"batch": [0], "lambda_": []})
    assert max(done.apart.values()) < 1e-6
    (weights,) = tmp_path.glob("small.*.safetensors")
    tensors = load_file(weights)
    assert len({"embed.weight", "head.weight"} & set(tensors)) == 1
    assert tensors["wide.weight"].dtype == torch.float64
    again = loaded(done.path)
    with torch.no_grad():
        (values, (at, scores)), last = again(IDS, *x[1])
        (values_, (at_, scores_)), last_ = model(*x)
    for one, other in ((values, values_), (at, at_), (scores, scores_), (last, last_)):
        assert torch.equal(one, other)


class Counting(nn.Module):
    """Counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x + self.count


@torch.library.custom_op("secateur_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


class Custom(nn.Module):
    """An operation of one's own."""

    def forward(self, x):
        return twice(x)


def test_an_operation_that_pytorch_does_not_have_is_refused(tmp_path):
    with pytest.raises(sc.SecateurError, match="no operation of plain PyTorch"):
        sc.export(Custom().eval(), tmp_path / "small.py", torch.rand(2, 3))
    assert not list(tmp_path.iterdir())


def test_what_the_forward_changes_of_the_model_it_changes_still(tmp_path):
    model, x = Counting().eval(), torch.rand(2, 3)
    again = loaded(sc.export(model, tmp_path / "small.py", x).path)
    assert model.count == 0
    for _ in range(2):
        assert torch.equal(again(x), model(x))
    assert again.count == model.count == 2


def test_weights_of_an_earlier_file_go(tmp_path):
    model = nn.Linear(3, 2).eval()
    for _ in range(2):
        sc.export(model, tmp_path / "small.py", torch.randn(2, 3))
    (tmp_path / "small.mine.safetensors").write_bytes(b"")
    sc.export(model, tmp_path / "small.py", torch.randn(2, 3))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert len(names) == 3
    assert "small.mine.safetensors" in names


class Says(nn.Module):
    """A forward of a few words, beside a layer."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.said = nn.Linear(4, 4), forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *given, **named):
        return self.said(self, *given, **named)


class Positions(nn.Module):
    """Adds to a sequence what a table has, which ends."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(8, 4))

    def forward(self, x):
        return x + self.table[: x.shape[1]]


class Upwards(nn.Module):
    """A layer that is called with more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1)

    def forward(self, x):
        return self.up(x, output_size=(10, 10))


class Scaled(nn.Sequential):
    """A sequence with something of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU())
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return super().forward(x) * self.scale


def hooked():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, out: out * 3)
    return model


def odd_names():
    layers = nn.ModuleDict({"a-b": nn.Linear(4, 4), "01": nn.Linear(4, 4), "512": nn.Linear(4, 4)})
    weights = nn.ParameterDict({"c-d": nn.Parameter(torch.rand(4)), "0": nn.Parameter(torch.rand(4))})

    def forward(m, x):
        return m.layers["a-b"](x) + m.layers["01"](x) * m.weights["c-d"] + m.layers["512"](x) * m.weights["0"]

    return Says(forward, layers=layers, weights=weights)


def gaps():
    listed = nn.ParameterList(torch.rand(4) for _ in range(3))
    return Says(lambda m, x: m.lin(x) * m.listed[0] + m.listed[2], listed=listed)


X4 = torch.randn(3, 4)
SELDOM = {
    "a negative base": (Says(lambda m, x: m.lin(x) * (-2.0) ** x), torch.randint(0, 4, (3, 4)).float()),
    "more than its input": (Upwards(), torch.randn(2, 2, 5, 5)),
    "a hook": (hooked(), X4),
    "a sequence with more": (Scaled(), X4),
    "odd names": (odd_names(), X4),
    "gaps in a list": (gaps(), X4),
    "no parameter": (Says(lambda m, x: x * 2), X4),
    "a path called check": (Says(lambda m, x: m.check(x), check=nn.Linear(4, 4)), X4),
    "names of Python": (Says(lambda m, float, lambda_: m.lin(float).masked_fill(lambda_ > 0, -torch.inf).exp()), {
        "float": X4, "lambda_": X4}),
    "whole numbers that are a parameter": (
        Says(lambda m, x: m.lin(x) + m.order, order=nn.Parameter(torch.arange(4), requires_grad=False)), X4),
    "an index that is called None": (
        Says(lambda m, x: m.lin(x)[:, m.NoneIdx], NoneIdx=nn.Buffer(torch.tensor([1, 0]))), X4),
}  # fmt: skip


@pytest.mark.parametrize("name", SELDOM)
def test_what_a_review_found(name, tmp_path):
    model, x = SELDOM[name]
    model = model.eval()
    done = sc.export(model, tmp_path / "small.py", x, dynamic=name not in ("more than its input", "names of Python"))
    assert max(done.apart.values()) < 1e-6
    again = loaded(done.path)
    with torch.no_grad():
        given = x.values() if isinstance(x, dict) else (x,)
        expected = model(**x) if isinstance(x, dict) else model(x)
        torch.testing.assert_close(again(*given), expected, equal_nan=True)
    assert checked_elsewhere(tmp_path).returncode == 0


def test_a_table_that_ends_is_tried_within_its_length(tmp_path):
    x = torch.randn(3, 6, 4)
    done = sc.export(Positions(), tmp_path / "small.py", x, dynamic={"x": {0: "batch", 1: "length_of_x"}})
    assert set(done.apart) == {"example", "others", "one"}


def test_what_is_trained_on_is_tied_and_frozen_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    again = loaded(sc.export(model.eval(), tmp_path / "small.py", X4).path)
    assert again[0].weight is again[2].weight
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    ends = []
    for one in (model, again):
        optimizer = torch.optim.Adam([p for p in one.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(X4).square().mean().backward()
            optimizer.step()
        ends.append(one.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


REFUSED = {
    "control flow": Says(lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))),
    "a dtype": Says(lambda m, x: m.lin(x).to(torch.complex128)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_plain_text_is_one_message(name, tmp_path):
    with pytest.raises(sc.SecateurError, match=r"export to \.pt2 or \.onnx, which can hold it"):
        sc.export(REFUSED[name].eval(), tmp_path / "small.py", X4)
    assert not list(tmp_path.iterdir())
