"""Export: what is written runs without the model's class, and gives what the model gives."""

from __future__ import annotations

import builtins
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import torch
from shipped_networks import IDS, IMAGES, NETWORKS, Separable, Tagger, UNet
from torch import nn

import secateur as sc
from secateur._internal.errors import CannotMeasure
from secateur.measure.backends import ready
from secateur.measure.latency import latency
from secateur.shipping import parity
from secateur.shipping.programs import Exportable

TARGETS = ["small.onnx", "small.pt2"]
EVERY = [*TARGETS, "small.py"]


@pytest.fixture(params=NETWORKS)
def small(request):
    torch.manual_seed(0)
    make, x = NETWORKS[request.param]
    model = make().eval()
    return sc.prune(model, x, sc.Budget(params=0.6)).model, x


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_written_gives_what_the_model_gives(small, name, tmp_path, untouched):
    model, x = small
    with untouched(model):
        done = sc.export(model, tmp_path / name, x)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert done.bytes == (tmp_path / name).stat().st_size
    assert done.apart is not None
    assert set(done.apart) == {"example", "others", "one"}
    assert max(done.apart.values()) < 1e-4
    assert all(0 in dims for dims in done.free.values())
    text = str(done)
    assert name in text
    assert "largest difference" in text


def test_onnx_runs_in_onnx_runtime_with_other_batches_and_lengths(tmp_path):
    torch.manual_seed(0)
    model = sc.prune(Tagger().eval(), IDS, sc.Budget(params=0.6)).model
    done = sc.export(model, tmp_path / "small.onnx", IDS)
    assert done.facts["inputs"] == ["ids"]
    assert done.facts["outputs"] == ["output"]
    assert "LSTM" in done.facts["operators"]
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    other = torch.randint(0, 30, (3, 11))
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"ids": other.numpy()})[0], model(other), rtol=1e-3, atol=1e-5)


def test_a_program_runs_where_neither_the_class_nor_secateur_is(tmp_path):
    torch.manual_seed(0)
    model = sc.prune(Separable().eval(), IMAGES, sc.Budget(macs=0.5)).model
    sc.export(model, tmp_path / "small.pt2", IMAGES)
    torch.save({"x": IMAGES, "y": {k: v.detach() for k, v in model(IMAGES).items()}}, tmp_path / "recorded.pt")
    code = (
        "import sys, torch; sys.modules['secateur'] = None\n"
        "given = torch.load('recorded.pt'); found = torch.export.load('small.pt2').module()(given['x'])\n"
        "assert all(torch.allclose(found[k], v, atol=1e-5) for k, v in given['y'].items())"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


def test_an_earlier_file_is_replaced_and_a_failure_leaves_it(tmp_path, monkeypatch):
    model, path = nn.Linear(4, 3).eval(), tmp_path / "sub" / "small.onnx"
    sc.export(model, path, torch.randn(2, 4))
    before = path.read_bytes()
    sc.export(nn.Linear(4, 5).eval(), path, torch.randn(2, 4))
    after = path.read_bytes()
    assert before != after
    monkeypatch.setattr(parity, "ALLOWED", {torch.float32: -1.0})
    with pytest.raises(sc.SecateurError, match=r"output 0 is .* away from the model's .* nothing was written"):
        sc.export(model, path, torch.randn(2, 4))
    assert path.read_bytes() == after
    assert [file.name for file in path.parent.iterdir()] == ["small.onnx"]
    assert sc.export(model, path, torch.randn(2, 4), check=False).apart is None


def test_large_weights_are_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.shipping.onnx.OWN_FILE", 1000)
    for _ in range(2):  # what belonged to the former is gone
        done = sc.export(nn.Linear(64, 64).eval(), tmp_path / "small.onnx", torch.randn(2, 64))
        (weights,) = tmp_path.glob("*.data")
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["small.onnx", weights.name])
        assert done.bytes > 64 * 64 * 4
    (tmp_path / "small.mine.onnx.data").write_text("not of an export")
    sc.export(nn.Linear(4, 3).eval(), tmp_path / "small.onnx", torch.randn(2, 4))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.mine.onnx.data", "small.onnx"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_compared_by_what_they_can_say(dtype, tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype).eval()
    done = sc.export(model, tmp_path / "small.onnx", torch.randn(3, 8, dtype=dtype))
    assert done.apart is not None
    assert max(done.apart.values()) < (1e-6 if dtype == torch.float64 else 3e-2)


def test_what_cannot_be_free_is_fixed_and_told(tmp_path):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x).sum(1) + torch.arange(2)

    done = sc.export(Fixed().eval(), tmp_path / "small.pt2", torch.randn(2, 4))
    assert done.free == {"x": []}
    assert sc.export(nn.Linear(4, 3).eval(), tmp_path / "other.pt2", torch.randn(2, 4), dynamic=False).free == {
        "input": []
    }


def test_a_batch_of_one_is_no_fixed_batch(tmp_path):
    done = sc.export(nn.Conv2d(3, 4, 3).eval(), tmp_path / "small.onnx", torch.randn(1, 3, 8, 8))
    assert done.free == {"input": [0]}


@dataclass
class Outputs:
    """What PyTorch's exporters do not know."""

    scores: torch.Tensor


class Odd(nn.Module):
    """Outputs in a dataclass, or a branch on a value."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 3), kind

    def forward(self, x):
        y = self.linear(x)
        if self.kind == "branch" and bool(y.sum() > 0):
            y = -y
        return Outputs(y) if self.kind == "dataclass" else y


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (Odd("branch"), {}, r"torch.export cannot follow the forward of Odd .* Branches on values must be"),
        (Odd("dataclass"), {}, r"torch.export cannot follow the forward of Odd .* outputs= chooses among them"),
        (nn.Linear(4, 3), {"example_inputs": torch.ones(2, 4, dtype=torch.int64)}, "does not run on these example"),
        (nn.Linear(4, 3), {"example_inputs": torch.ones(2, 5)}, "does not run on these example inputs"),
        (nn.Linear(4, 3), {"example_inputs": {}}, "a tensor, a tuple or a dict of them is expected; there is none"),
        (nn.Linear(4, 3), {"to": "onxn"}, "unknown to 'onxn': did you mean 'onnx'"),
        (nn.Linear(4, 3), {"opset": 0}, "opset=0"),
        ("model", {}, "an nn.Module of Python is expected, a str was given"),
    ],
    ids=lambda v: v.kind if isinstance(v, Odd) else "",
)
def test_what_cannot_be_exported_is_told_and_nothing_is_written(model, given, message, name, tmp_path):
    with pytest.raises(sc.SecateurError, match=message):
        sc.export(model, tmp_path / name, **{"example_inputs": torch.randn(2, 4), **given})
    assert not [*tmp_path.iterdir()]


def test_outputs_choose_and_bad_paths_are_told(tmp_path):
    model = Odd("dataclass").eval()
    done = sc.export(model, tmp_path / "small.onnx", torch.randn(2, 4), outputs=lambda y: {"scores": y.scores})
    assert done.facts["outputs"] == ["scores"]
    with pytest.raises(sc.SecateurError, match=r"ends with .onnx or .pt2 or .py or .txt is expected, or to= one of"):
        sc.export(model, tmp_path / "small.bin", torch.randn(2, 4))
    (tmp_path / "file").write_text("")
    with pytest.raises(sc.BadFile, match=r"small\.pt2 cannot be written"):
        sc.export(nn.Linear(4, 3), tmp_path / "file" / "small.pt2", torch.randn(2, 4))
    with pytest.raises(sc.BadFile, match="is a folder; give a file"):
        sc.export(nn.Linear(4, 3), tmp_path, torch.randn(2, 4), to="onnx")


@pytest.mark.parametrize("name", [*EVERY, "small.txt"])
def test_what_cannot_be_written_or_is_not_the_same_is_one_message(name, tmp_path, monkeypatch):
    model, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(sc.BadFile, match="cannot be"):
        sc.export(model, tmp_path / "file" / name, x)
    with pytest.raises(sc.BadFile, match="is a folder; give a file"):
        (tmp_path / name).mkdir()
        sc.export(model, tmp_path / name, x)
    (tmp_path / name).rmdir()
    if name != "small.txt":  # which is not compared
        monkeypatch.setattr(parity, "ALLOWED", {torch.float32: -1.0})
        with pytest.raises(sc.SecateurError, match=r"output 0 is .* away from the model's .* nothing was written"):
            sc.export(model, tmp_path / name, x)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_missing_is_named(package, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    match = rf"needs the package {package}: pip install 'secateur\[onnx\]'"
    with pytest.raises(sc.SecateurError, match=match):
        sc.export(nn.Linear(4, 3), tmp_path / "small.onnx", torch.randn(2, 4))
    assert not [*tmp_path.iterdir()]


@dataclass
class Scored:
    """What a forward gives in an object, as those of transformers do."""

    logits: torch.Tensor


def test_inputs_by_name_may_come_in_any_order_and_outputs_be_chosen(tmp_path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

        def forward(self, ids, mask=None, **more):
            return Scored(self.head(self.embed(ids) * mask[..., None]))

    model, given = Named().eval(), {"mask": torch.rand(2, 5), "ids": torch.randint(0, 9, (2, 5))}
    for name in EVERY:
        done = sc.export(model, tmp_path / name, given, outputs=lambda y: y.logits)
        assert list(done.free) == ["ids", "mask"]
    with ready(Two().eval(), {"b": torch.full((2, 3), 9.0), "a": torch.zeros(2, 3)}, "onnxruntime") as forward:
        assert {name: float(array.max()) for name, array in forward.given().items()} == {"a": 0.0, "b": 9.0}
    with pytest.raises(sc.SecateurError, match="it does not take what the forward returns, a Scored"):
        sc.export(model, tmp_path / "small.onnx", given, outputs=lambda y: y.scores)
    with pytest.raises(sc.SecateurError, match="a function is expected"):
        sc.export(model, tmp_path / "small.onnx", given, outputs="logits")
    with pytest.raises(sc.SecateurError, match="there is a NoneType without one"):
        sc.export(model, tmp_path / "small.onnx", given, outputs=lambda y: None)


class Two(nn.Module):
    """Two inputs of one shape."""

    def forward(self, a, b):
        return a - 2 * b


def test_a_single_example_and_ranges_of_sizes(tmp_path):
    class Branches(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.linear, self.kind = nn.Linear(4, 3), kind

        def forward(self, x):
            y = self.linear(x)
            if self.kind == "one":
                return y if x.shape[0] == 1 else y - y.mean(0)
            return 2 * y if x.shape[0] > 4 else y

    one = sc.export(Branches("one").eval(), tmp_path / "a.onnx", torch.randn(1, 4))
    assert one.free == {"x": []}  # it does another thing for one alone, so it is fixed, and told why
    assert "on the one inputs output 0 is" in one.facts["fixed"]
    assert "all are fixed, for with free ones: export: on the one inputs" in str(one)
    many = sc.export(Branches("many").eval(), tmp_path / "b.pt2", torch.randn(7, 4), check=False)
    assert many.facts["sizes"] == {"batch": "5 to any"}
    assert "batch: 5 to any" in str(many)


def test_what_gives_no_number_cannot_be_compared(tmp_path):
    with pytest.raises(sc.SecateurError, match="gives no finite number on these inputs, so nothing can be compared"):
        sc.export(Two().eval(), tmp_path / "small.pt2", (torch.full((2, 3), torch.nan), torch.zeros(2, 3)))
    assert not [*tmp_path.iterdir()]


def test_a_state_whose_batch_is_no_first_dim(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 5, batch_first=True)

        def forward(self, x, state):
            return self.gru(x, state)[0]

    for name in EVERY:
        assert sc.export(Recurrent().eval(), tmp_path / name, (torch.randn(1, 6, 4), torch.randn(1, 1, 5))).apart


def test_neither_the_random_state_nor_the_examples_are_given_away(tmp_path):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + 0 * torch.rand_like(x)

    x, state = torch.randn(2, 4), torch.get_rng_state()
    sc.export(Noisy(), tmp_path / "small.pt2", x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.export.load(tmp_path / "small.pt2").example_inputs is None


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_reduced_precision_opsets_and_what_onnx_runtime_cannot_run(tmp_path):
    model = nn.Sequential(nn.Linear(8, 3)).to(torch.bfloat16).eval()
    assert sc.export(model, tmp_path / "small.pt2", torch.randn(2, 8, dtype=torch.bfloat16)).apart
    with pytest.raises(sc.SecateurError, match="does not run on the example inputs"):
        sc.export(model, tmp_path / "small.onnx", torch.randn(2, 8, dtype=torch.bfloat16))
    with pytest.raises(CannotMeasure, match="backend='onnxruntime': it cannot run this model"):
        latency(model, torch.randn(2, 8, dtype=torch.bfloat16), backend="onnxruntime")
    assert sc.export(nn.Linear(4, 3).eval(), tmp_path / "a.onnx", torch.randn(2, 4), opset=21).facts["opset"] == 21
    with pytest.raises(sc.SecateurError, match=r"export\(opset=9\): this graph cannot be said in it; give 18"):
        sc.export(nn.Linear(4, 3).eval(), tmp_path / "b.onnx", torch.randn(2, 4), opset=9)
    with pytest.raises(sc.SecateurError, match=r"an nn\.Module of Python is expected, a .*Module was given"):
        sc.export(torch.jit.script(nn.Linear(4, 3)), tmp_path / "c.onnx", torch.randn(2, 4))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "small.pt2"]


def test_distances_are_in_units_of_what_is_usual():
    huge = torch.finfo(torch.float32).min
    assert parity.apart_from(torch.tensor([huge, 1.0, 2.0]), torch.tensor([huge, 9.0, -9.0])) > 1
    assert parity.apart_from(torch.tensor([-torch.inf, 1.0, 2.0]), torch.tensor([-torch.inf, 1.0, 2.0])) == 0
    assert parity.apart_from(torch.tensor([1, 2]), torch.tensor([1.9, 2.9])) == 1
    assert parity.apart_from(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])) > 1
    assert parity.apart_from(torch.zeros(3), torch.tensor([0, 0, 1e-3])) > 1
    assert parity.apart_from(torch.tensor([1 + 1j]), torch.tensor([1 + 2j])) == 1


def test_masks_are_drawn_from_their_own_numbers():
    mask = torch.zeros(3, 4).masked_fill(torch.rand(3, 4) < 0.5, -torch.inf)
    what = Exportable(nn.Identity(), (mask, torch.zeros(3, 0)), {})
    (drawn, empty), _ = parity.others(what, (), 0)
    assert set(drawn.unique().tolist()) <= {0.0, -torch.inf}
    assert empty.shape == (3, 0)


def test_a_checkpoint_of_another_backend_is_not_taken(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    graph, x = sc.trace(model, torch.randn(2, 8)), torch.randn(2, 8)
    path, settings = tmp_path / "clock.json", {"samples": 4, "threads": 1}
    clock = sc.measure_latency(model, graph, sc.LatencySettings(**settings, backend="onnxruntime", checkpoint=path))
    assert clock.backend == "onnxruntime"
    with pytest.raises(sc.SecateurError, match=r"was measured in another place, \{'backend': 'onnxruntime'\}"):
        sc.measure_latency(model, graph, sc.LatencySettings(**settings, checkpoint=path))
    eager = sc.measure_latency(model, graph, sc.LatencySettings(**settings))
    scores = sc.score(model, graph, "magnitude")
    with pytest.raises(sc.SecateurError, match="it times with 'eager'"):
        sc.allocate(graph, scores, sc.Budget(latency_ms=9.0, backend="onnxruntime"), latency=eager)
    both = sc.Budget(macs=0.7, latency_ms=1000.0, backend="onnxruntime")
    given = sc.LatencySettings(**settings, backend="onnxruntime")
    assert (
        sc.prune(model, x, both, latency=given).after.macs <= 0.7 * sc.prune(model, x, both, latency=clock).before.macs
    )


@pytest.mark.parametrize("name", EVERY)
def test_free_sizes_are_those_that_are_named(name, tmp_path):
    torch.manual_seed(0)
    model, x = UNet().eval(), torch.randn(2, 1, 8, 8)
    done = sc.export(model, tmp_path / name, x, dynamic={"x": [2, 3]})
    assert list(done.free.values()) == [[2, 3]]
    assert set(done.apart) == {"example", "others"}
    assert not {"batch", "fixed"} & set(done.facts["sizes"]) | {"fixed"} & set(done.facts)
    named = sc.export(model, tmp_path / name, x, dynamic={"x": {0: "batch", 2: "height"}})
    assert list(named.free.values()) == [[0, 2]]
    assert set(named.facts["sizes"]) == {"batch", "height"}
    assert set(named.apart) == {"example", "others", "one"}


class Summed(nn.Module):
    """Two inputs that share a size, which is not the first in one."""

    def forward(self, first, second):
        return first + second.transpose(0, 1)


def test_sizes_of_one_name_are_one(tmp_path):
    x = {"first": torch.rand(4, 3), "second": torch.rand(3, 4)}
    dynamic = {"first": {0: "batch", 1: "length"}, "second": {0: "length", 1: "batch"}}
    done = sc.export(Summed(), tmp_path / "small.pt2", x, dynamic=dynamic)
    assert set(done.apart) == {"example", "others", "one"}
    single = {"first": torch.rand(1, 3), "second": torch.rand(3, 1)}  # doubled along the batch of each
    assert list(sc.export(Summed(), tmp_path / "small.pt2", single, dynamic=dynamic).free.values()) == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        (3, "True, False, or the dims"),
        ({"x": 0}, "True, False, or the dims"),
        ({"y": [0]}, r"unknown input in export\(dynamic=...\) 'y'"),
        ({"x": [7]}, "has dims 0 to 3, 7 was given"),
        ({"x": {0: "size", 2: "size"}}, "sizes of one name are one"),
    ],
)
def test_dims_that_are_none_are_refused(dynamic, words, tmp_path):
    with pytest.raises(sc.SecateurError, match=words):
        sc.export(UNet(), tmp_path / "small.onnx", torch.randn(2, 1, 8, 8), dynamic=dynamic)
    assert not list(tmp_path.iterdir())
