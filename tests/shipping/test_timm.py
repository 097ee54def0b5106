"""Pruned models as timm keeps them: a line of shapes, and weights, which timm's reader makes of the original."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur as sc
from secateur._internal.errors import BadFile
from secateur.shipping.timm import read_pruned


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    ).eval()  # fmt: skip


X = torch.randn(2, 3, 8, 8)


def adapted(model, text):
    """A reader as timm's is: layers anew, with the shapes of the text."""
    shapes = dict(part.split(":") for part in text.split("***"))
    small = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            out, inputs, *_ = eval(shapes[f"{name}.weight"])
            groups = out if module.groups > 1 else 1
            small[int(name)] = nn.Conv2d(
                out if groups > 1 else inputs, out, module.kernel_size, module.stride, module.padding, groups=groups
            )
        elif isinstance(module, nn.BatchNorm2d):
            small[int(name)] = nn.BatchNorm2d(*eval(shapes[f"{name}.weight"]))
        elif isinstance(module, nn.Linear):
            small[int(name)] = nn.Linear(*eval(shapes[f"{name}.weight"])[::-1])
    return small


def test_what_is_written_is_read_as_timm_reads_it(tmp_path, monkeypatch, untouched):
    small = sc.prune(network(), X, sc.Budget(macs=0.5)).model
    with untouched(small):
        for _ in range(2):
            done = sc.export(small, tmp_path / "net.txt", X)
    text = (tmp_path / "net.txt").read_text()
    assert text.startswith(f"0.weight:[{small[0].out_channels}, 3, 3, 3]***0.bias:[")
    (weights,) = tmp_path.glob("*.safetensors")
    assert done.bytes == weights.stat().st_size + len(text)
    assert load_file(weights).keys() == small.state_dict().keys()
    module = types.ModuleType("timm.models._prune")
    module.adapt_model_from_string = adapted
    for name, fake in (("timm", types.ModuleType("timm")), ("timm.models", types.ModuleType("models"))):
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setitem(sys.modules, "timm.models._prune", module)
    with torch.no_grad():
        assert torch.equal(read_pruned(network(), tmp_path / "net.txt")(X), small(X))
    with pytest.raises(BadFile, match="and its weights beside"):
        read_pruned(network(), tmp_path / "other.txt")


def test_arguments_that_mean_nothing_are_refused(tmp_path):
    for wrong in ({"outputs": lambda y: y}, {"opset": 18}, {"dynamic": False}):
        with pytest.raises(sc.SecateurError, match="mean nothing here"):
            sc.export(network(), tmp_path / "net.txt", X, **wrong)
    for name in ("net.pt2", "net.py"):
        with pytest.raises(sc.SecateurError, match="opset= mean nothing here"):
            sc.export(network(), tmp_path / name, X, opset=18)
    assert not list(tmp_path.iterdir())


def test_layers_that_timm_does_not_make_anew_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 1))
    graph = sc.trace(model, X)
    small = sc.cut(model, sc.make_plan(graph, {graph.groups[-1].name: [0]}))
    with pytest.raises(sc.SecateurError, match=r"which timm does not make anew; leave it whole \(exclude=\)"):
        sc.export(small, tmp_path / "net.txt", X)
    assert not list(tmp_path.iterdir())
