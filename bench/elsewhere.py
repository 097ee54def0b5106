"""Exports of pruned networks, tried where PyTorch and ONNX Runtime are and nothing else.

    python bench/elsewhere.py FOLDER                # writes the files, what the networks gave, and try_elsewhere.py
    EMPTY/bin/python FOLDER/try_elsewhere.py        # in a fresh environment: pip install torch onnxruntime

Seven networks at no more than 60 % of their parameters, with random weights, since the question is whether files
compute the same: ResNet-20, inverted residuals with a squeeze, a U-Net, a detection head with several outputs, BERT,
a Llama with a cache of keys and values, an LSTM tagger. What is tried has another batch, and another length where that
is free, than the inputs of the export.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.lab.models.registry import build


def block(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, a norm, an activation."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class Inverted(nn.Module):
    """An inverted residual with a squeeze and an excitation (MobileNetV3, arXiv:1905.02244)."""

    def __init__(self, width: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand, self.depthwise = block(width, inner, 1), block(inner, inner, 3, stride, inner)
        self.squeeze, self.excite = nn.Conv2d(inner, inner // 4, 1), nn.Conv2d(inner // 4, inner, 1)
        self.project = nn.Sequential(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and width == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Of [batch, width, height, width]."""
        y = self.depthwise(self.expand(x))
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x + self.project(y) if self.residual else self.project(y)


class Mobile(nn.Module):
    """Inverted residuals."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(16, 64, 24, 2), (24, 72, 24, 1), (24, 96, 40, 2), (40, 120, 40, 1)]
        self.stem, self.blocks = block(3, 16, stride=2), nn.Sequential(*(Inverted(*of) for of in widths))
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    """Three levels with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, 16), block(16, 32), block(32, 64)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)])
        self.join = nn.ModuleList([block(64, 32), block(32, 16)])
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A mask of an image."""
        seen = []
        for number, level in enumerate(self.down):
            x = level(x if number == 0 else nn.functional.max_pool2d(x, 2))
            seen.append(x)
        for up, join, skip in zip(self.up, self.join, seen[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.last(x)


class Detector(nn.Module):
    """Two scales with shared heads: classes, boxes and the best class of every place, by scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(block(3, 16, stride=2), block(16, 32, stride=2)),
            block(32, 48, stride=2),
        )
        self.lateral = nn.ModuleList([nn.Conv2d(32, 32, 1), nn.Conv2d(48, 32, 1)])
        self.tower, self.classes, self.boxes = block(32, 32), nn.Conv2d(32, 6, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """What is where."""
        fine = self.first(x)
        coarse = self.lateral[1](self.second(fine))
        fine = self.lateral[0](fine) + nn.functional.interpolate(coarse, scale_factor=2.0)
        found = [(self.classes(t), self.boxes(t).exp()) for t in map(self.tower, (fine, coarse))]
        best = torch.cat([classes.flatten(2) for classes, _ in found], 2).argmax(1)
        return {"scales": found, "best": best}


class Tagger(nn.Module):
    """A bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 32), nn.Linear(48, 7)
        self.lstm = nn.LSTM(32, 24, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every token."""
        return self.head(self.lstm(self.embed(ids))[0])


class WithCache(nn.Module):
    """A decoder that goes on from keys and values, [layers, 2, batch, heads, length, size], and gives them as well."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, past: Tensor) -> dict[str, Tensor]:
        """Logits of new tokens, and all keys and values by then."""
        cache = transformers().DynamicCache([(keys, values) for keys, values in past])
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        now = torch.stack([torch.stack([layer.keys, layer.values]) for layer in out.past_key_values.layers])
        return {"logits": out.logits, "past": now}


def transformers() -> Any:
    """The package; a torchvision that is there need not fit the PyTorch that is."""
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    return importlib.import_module("transformers")


TEXT: dict[str, Any] = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}


def bert() -> nn.Module:
    """A small BERT."""
    tf = transformers()
    return tf.BertForSequenceClassification(tf.BertConfig(**TEXT, intermediate_size=192, num_attention_heads=4))


def llama() -> nn.Module:
    """A small Llama."""
    tf = transformers()
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(**TEXT, intermediate_size=128, num_attention_heads=6, num_key_value_heads=3)
    )


@dataclass(frozen=True)
class Case:
    """A network, inputs of the export and of the trial, and how both are given.

    Attributes:
        make: the network.
        inputs: what its forward takes, by name, for a batch and a length.
        around: what is exported, if it is not the network itself.
        outputs: which of its outputs matter.
        dynamic: which sizes are free, if not the usual ones.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    around: Callable[[nn.Module], nn.Module] = field(default=lambda model: model)
    outputs: Callable[[Any], Any] | None = None
    dynamic: Any = True


def images(name: str = "x") -> Callable[[int, int], dict[str, Tensor]]:
    """Inputs that are images."""
    return lambda batch, _: {name: torch.randn(batch, 3, 32, 32)}


def ids(name: str) -> Callable[[int, int], dict[str, Tensor]]:
    """Inputs that are tokens."""
    return lambda batch, length: {name: torch.randint(0, 96, (batch, length))}


CASES = {
    "resnet20": Case(lambda: build("resnet20"), images("input")),
    "mobile": Case(Mobile, images()),
    "unet": Case(UNet, images()),
    "detector": Case(Detector, images()),
    "bert": Case(bert, ids("input_ids"), outputs=lambda out: out.logits),
    "llama": Case(
        llama,
        ids("input_ids"),
        WithCache,
        dynamic={"ids": {0: "batch", 1: "length"}, "past": {2: "batch", 4: "past"}},
    ),
    "tagger": Case(Tagger, ids("ids")),
}


def written(name: str, folder: Path) -> dict[str, Any]:
    """Export a network, and record what it gives on other inputs."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.make().eval()
    logits = (lambda out: out.logits) if name in ("bert", "llama") else None
    result = sc.prune(model, case.inputs(2, 9), sc.Budget(params=0.6), criterion="magnitude", outputs=logits)
    small = case.around(result.model).eval()

    def given(batch: int, length: int) -> dict[str, Tensor]:
        x = case.inputs(batch, length)
        if name != "llama":
            return x
        before = result.model(input_ids=x["input_ids"], use_cache=True).past_key_values.layers
        past = torch.stack([torch.stack([layer.keys, layer.values]) for layer in before]).detach()
        return {"ids": torch.randint(0, 96, (batch, length // 2)), "past": past}

    x, rows = tuple(given(2, 9).values()), {}
    for end in ("onnx", "pt2", "py"):
        done = sc.export(small, folder / f"{name}.{end}", x, outputs=case.outputs, dynamic=case.dynamic)
        assert done.apart is not None
        rows[end] = {"bytes": done.bytes, "apart": max(done.apart.values()), "free": done.free}
    length = 12 if 1 in next(iter(rows["pt2"]["free"].values())) else 9  # of an LSTM it is fixed
    other = given(3, length)
    with torch.no_grad():
        found = small(*other.values())
    found = case.outputs(found) if case.outputs is not None else found
    leaves = [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]
    torch.save({"inputs": other, "outputs": leaves}, folder / f"{name}.recorded.pt")
    return {"params": result.after.params / result.before.params, "files": rows}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    for name in CASES:
        print(name, json.dumps(written(name, folder)), flush=True)
    shutil.copy(Path(__file__).with_name("try_elsewhere.py"), folder)


if __name__ == "__main__":
    main()
