"""How much faster half of the MACs is, by backend, batch and threads: networks of four kinds, every cell.

ResNet-56 and VGG-16 (32 x 32), a MobileNetV2-like network (96 x 96), a BERT-mini-like encoder (4 layers, width 256, 64
tokens); random weights, magnitude, the same fraction of every group, widths that are multiples of 8, 50 % of the MACs.
Whole and cut network in turn (:func:`secateur.compare_latency`)::

    python bench/backends.py                  # resumable; a network takes some minutes, most of them to compile
    python bench/backends.py --table
"""

from __future__ import annotations

import argparse
import platform
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from elsewhere import block, transformers
from rows import Rows
from secateur.lab.models.registry import build

HERE = Path(__file__).parent
BACKENDS, THREADS, BATCHES = ("eager", "compile", "onnxruntime"), (1, 2), (1, 32)


class Inverted(nn.Module):
    """An inverted residual (MobileNetV2, arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        layers = [block(inputs, inner, 1)] if expand > 1 else []
        self.layers = nn.Sequential(
            *layers, block(inner, inner, 3, stride, inner), nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Of [batch, width, height, width]."""
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNet(nn.Module):
    """The blocks of MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        stages = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        layers, width = [block(3, 32, 3, 2)], 32
        for expand, outputs, count, stride in stages:
            for number in range(count):
                layers.append(Inverted(width, outputs, stride if number == 0 else 1, expand))  # type: ignore[arg-type]
                width = outputs
        self.features, self.head = nn.Sequential(*layers, block(width, 1280, 1)), nn.Linear(1280, 100)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.head(self.features(x).mean((2, 3)))


class Logits(nn.Module):
    """An encoder that gives its logits alone."""

    def __init__(self) -> None:
        super().__init__()
        tf = transformers()
        self.model = tf.BertForSequenceClassification(
            tf.BertConfig(
                vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
            )
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of sequences."""
        return self.model(input_ids=ids).logits


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "resnet56": (lambda: build("resnet56"), torch.randn(2, 3, 32, 32)),
    "vgg16": (lambda: build("vgg16_bn"), torch.randn(2, 3, 32, 32)),
    "mobilenet-like": (MobileNet, torch.randn(2, 3, 96, 96)),
    "bert-mini-like": (Logits, torch.randint(0, 1000, (2, 64))),
}


def measured(name: str, backend: str, turns: int) -> list[dict[str, Any]]:
    """All settings of a network in a backend."""
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    whole = make().eval()
    budget = sc.Budget(macs=0.5, round_to=8)
    result = sc.prune(whole, x, budget, criterion="magnitude", strategy="uniform", repair="none")
    found = sc.compare_latency(
        {"whole": whole, "cut": result.model.eval()}, x, backends=backend, threads=THREADS, batches=BATCHES, turns=turns
    )
    part = result.after.macs / result.before.macs
    return [{"network": name, "macs": part, "turns": turns} | row for row in found.as_data()]


def table(rows: list[dict[str, Any]]) -> str:
    """All cells: times as fast, with the quartiles over turns."""
    cut = [row for row in rows if row["model"] == "cut"]
    heads = [f"{b} at a time, {n} thread{'s' * (n > 1)}" for b in BATCHES for n in THREADS]
    lines = [f"| network | MACs | backend | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(heads)]
    for name in NETWORKS:
        for backend in BACKENDS:
            own = {(r["batch"], r["threads"]): r for r in cut if (r["network"], r["backend"]) == (name, backend)}
            cells = [own.get((b, t)) for b in BATCHES for t in THREADS]
            shown = [
                "-" if c is None else c["why"] if c["speed_up"] is None
                else f"{c['speed_up']:.2f} ({c['speed_up_low']:.2f} to {c['speed_up_high']:.2f})"
                for c in cells
            ]  # fmt: skip
            part = next((r["macs"] for r in own.values()), float("nan"))
            lines.append(f"| {name} | {part:.1%} | {backend} | {' | '.join(shown)} |")
    found = [r["speed_up"] for r in cut if r["speed_up"] is not None]
    lines.append(f"\nmedian over {len(found)} of {len(cut)} cells: {statistics.median(found):.2f}")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "backends.json")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = Rows(given.out, machine=platform.processor() or platform.machine(), torch=torch.__version__)
    if not given.table:
        for name in given.networks:
            for backend in BACKENDS:
                if not rows.has({"network": name, "backend": backend}):
                    for row in measured(name, backend, given.turns):
                        rows.add(row)
                    print(name, backend, "done", flush=True)
    print(table(rows.rows))


if __name__ == "__main__":
    main()
