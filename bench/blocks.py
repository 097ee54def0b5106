"""Dense blocks at once, nothing trained: what fitting them to the original brings (``sc.pivot(..., data=...)``).

Networks that were trained before, a part ``keep`` of every layer in the default's blocks, 1,024 training images for
the repair, the whole test set; CIFAR-10 is stored as JPEG. Rows that are there are not run again::

    python bench/blocks.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file

import secateur as sc
from oneshot import HERE, Setting, checkpoint
from rows import Row, Rows
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build, example_input
from secateur.measure.accuracy import accuracy

SETTINGS = {name: Setting(data, 8, 10_000, {}) for name, data in (
    ("lenet_300_100", "mnist"), ("lenet5", "mnist"), ("resnet20", "cifar10"),
)}  # fmt: skip
KEEP = (0.5, 0.25, 0.125)
REPAIRS = ("none", "recalibrate", "refit")


def table(rows: list[Row]) -> None:
    """Mean and spread over seeds, as Markdown."""
    print(f"| | {' | '.join(f'keep={keep:g}' for keep in KEEP)} |\n|---|{'---|' * len(KEEP)}")
    for name in SETTINGS:
        for repair in REPAIRS:
            cells = []
            for keep in KEEP:
                of = {"network": name, "repair": repair, "keep": keep}
                found = [100 * r["test"] for r in rows if all(r[k] == v for k, v in of.items())]
                cells += [f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"] if len(found) > 1 else []
            if cells:
                print(f"| {name}, `{repair}` | {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "blocks.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = Rows(given.out, images=1024, tested=10_000, note="CIFAR-10 is stored as JPEG")
    for name, setting in SETTINGS.items():
        data = load(setting.data, validation=0.1)
        for seed in given.seeds:
            model, inputs = build(name), torch.zeros(example_input(name))
            model.load_state_dict(load_file(checkpoint(name, setting, seed)))
            model.eval()
            images = list(islice(data.loader("train", 128, shuffle=True, seed=seed), setting.batches))
            for keep in KEEP:
                for repair in REPAIRS if name == "resnet20" else ("none", "refit"):
                    row: Row = {"network": name, "seed": seed, "keep": keep, "repair": repair}
                    if kept.has(row):
                        continue
                    start = time.perf_counter()
                    result = sc.pivot(model, inputs, keep, data=images, repair=repair)
                    row["seconds"] = round(time.perf_counter() - start, 2)
                    row["params"] = result.after.params / result.before.params
                    row["test"] = accuracy(result.model, data.loader("test", 500))
                    kept.add(row)
                    print(row, flush=True)
    table(kept.rows)


if __name__ == "__main__":
    main()
