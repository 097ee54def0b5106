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
