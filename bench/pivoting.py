"""Accuracy with dense blocks, between single weights (more freedom) and whole channels (less), each fine-tuned alike.

All methods start from the same trained network and have as many epochs, on the same batches. Blocks and single weights
leave ``keep`` of every layer but the first convolution and the head, at once, by magnitude; ``gradual`` finds its
blocks bit by bit in the first half of the epochs. ``channels`` removes channels by magnitude, the same share of every
group, down to the MACs that the packed network has. Rows that are there are not run again::

    python bench/pivoting.py lenet_300_100 lenet5 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur as sc
from rows import Rows
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build, example_input
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy
from secateur.measure.counting import counted
from secateur.methods.layer_selection import excluded_layers
from secateur.surgery.blocks.pivots import eligible, energy, patterns_of, pivoted

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "pivoting.json"
BATCH = 128
SETTINGS: dict[str, dict[str, Any]] = {
    "lenet_300_100": {"data": "mnist", "epochs": 8, "lr": 0.05, "augment": False, "whole": ["head"]},
    "lenet5": {"data": "mnist", "epochs": 4, "lr": 0.02, "augment": False, "whole": ["conv1", "head"]},
    "resnet8": {"data": "cifar10", "epochs": 6, "lr": 0.05, "augment": True, "whole": ["conv", "head"]},
}
KEEPS = (0.25,)
METHODS = ("weights", "8 bundles", "bundles", "bundles, Fisher", "gradual", "diagonal", "growth", "channels")


class Weights:
    """A handle that keeps single weights at zero."""

    def __init__(self, model: nn.Module, names: list[str], keep: float) -> None:
        self.masks: list[tuple[Tensor, Tensor]] = []
        for name in names:
            weight: Any = model.get_submodule(name).weight
            size = weight.detach().abs().flatten()
            mask = torch.zeros_like(size)
            mask[size.topk(int(keep * len(size))).indices] = 1
            self.masks.append((weight, mask.view_as(weight)))
        self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Zero again."""
        for weight, mask in self.masks:
            weight.mul_(mask)


def one(name: str, method: str, keep: float, seed: int) -> dict[str, Any]:
    """One method on one network, from the trained network to the fine-tuned one."""
    setting = SETTINGS[name]
    data = load(setting["data"], validation=0.1)
    batches = data.loader("train", BATCH, shuffle=True, augment=setting["augment"], seed=seed)
    model, inputs = build(name), torch.zeros(example_input(name))
    model.load_state_dict(load_file(HERE / "checkpoints" / f"{name}_{setting['data']}_seed{seed}.safetensors"))
    model.eval()
    row: dict[str, Any] = {"network": name, "method": method, "keep": keep, "seed": seed, **setting}
    layout = method if method in ("diagonal", "growth") else "bundles"
    factors = None
    if "Fisher" in method:
        some = [
            batch for _, batch in zip(range(50), data.loader("train", BATCH, shuffle=True, seed=seed), strict=False)
        ]
        factors = sc.kronecker_factors(model, some, "cross_entropy")
    names, _ = eligible(model, keep, layout, excluded_layers(model, setting["whole"]))
    count = 8 if method.startswith("8") else None  # by default there are 1 / keep
    patterns = patterns_of(model, names, keep, layout=layout, blocks=count, factors=factors)
    blocks = pivoted(model, patterns, {})
    macs = counted(sc.pack(blocks, inputs, way="at_once"), inputs)["macs"] / counted(model, inputs)["macs"]
    handle: Any = None
    if method == "weights":
        handle = Weights(model, list(patterns), keep)
    elif method == "channels":
        graph = sc.trace(model, inputs)
        plan = sc.allocate(
            graph, sc.score(model, graph, "magnitude"), sc.Budget(macs=macs, round_to=1), strategy="uniform"
        )
        model = sc.cut(model, plan)
    elif method == "gradual":
        updates = max(1, setting["epochs"] * len(batches) // 20)
        handle = sc.Pivoting(model, keep, every=updates, times=10, exclude=setting["whole"])
    else:
        row["captured"] = {n: p.captured(energy(model.get_submodule(n))) for n, p in patterns.items()}
        model = blocks
        handle = sc.Pivoting(model, patterns=patterns)
    row["validation_before"] = accuracy(model, data.loader("validation", 500))
    optimizer = torch.optim.SGD(model.parameters(), lr=setting["lr"], momentum=0.9, weight_decay=5e-4)
    fit(
        model, optimizer, batches, epochs=setting["epochs"], schedule="one_cycle", progress=False,
        after_step=[] if handle is None else [handle], channels_last=True,
    )  # fmt: skip
    model.eval()
    if isinstance(handle, sc.Pivoting):
        small = sc.pack(model, inputs, handle.patterns, way="at_once")
        row["same"] = abs(accuracy(small, data.loader("test", 500)) - accuracy(model, data.loader("test", 500)))
    row["macs"] = macs if method != "channels" else counted(model, inputs)["macs"] / graph.macs()
    return row | {split: accuracy(model, data.loader(split, 500)) for split in ("validation", "test")}


def report(rows: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds."""
    for name, keep in sorted({(r["network"], r["keep"]) for r in rows}):
        for method in METHODS:
            own = [r for r in rows if (r["network"], r["keep"], r["method"]) == (name, keep, method)]
            if own:
                test = [100 * r["test"] for r in own]
                spread = statistics.stdev(test) if len(test) > 1 else 0.0
                macs = statistics.mean(r["macs"] for r in own)
                print(
                    f"{name:14} {keep:g} {method:16} {len(own)} seeds {statistics.mean(test):.2f} ± {spread:.2f}, "
                    f"{macs:.1%} of the MACs"
                )


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=["lenet_300_100", "lenet5"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = Rows(given.out, note="CIFAR-10 is stored as JPEG")
    for name in given.networks:
        for keep in KEEPS:
            for seed in given.seeds:
                for method in given.methods:
                    key = {"network": name, "method": method, "keep": keep, "seed": seed} | SETTINGS[name]
                    if kept.has(key):
                        continue
                    row = one(name, method, keep, seed)
                    kept.add(row)
                    print({k: row[k] for k in ("network", "method", "seed", "macs", "test")}, flush=True)
    report(kept.rows)


if __name__ == "__main__":
    main()
