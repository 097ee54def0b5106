"""Packed layers against dense ones: measured speed-up over the reduction of coefficients; 1 is linear.

Layers are timed as they stand in a chain (what they read is gathered, what they write is not), whole networks as
``pack`` leaves them, always against the dense one in turn, so that what else the machine does strikes both. Where
the dense layer is faster it stays, and the row says so: its speed-up is 1. Patterns of single layers are drawn at
random: time does not depend on where the blocks are. By default, glibc gives large tensors back to the system and is
given them anew, which costs dense and packed layers alike; the environment variables below keep them, and rows say
which it was. Rows that are there are not run again::

    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
    python bench/packed.py layers networks --threads 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import secateur as sc
from rows import Rows
from secateur.lab.models.registry import build, example_input
from secateur.measure.counting import counted
from secateur.surgery.blocks.packing import WINNING_SHARE, milliseconds, moved, orders_of, packed
from secateur.surgery.blocks.pattern import Pattern, blocks_for
from secateur.surgery.permute import moves, permuted

RESULTS = Path(__file__).parent / "results" / "packed.json"
WIDTHS = (256, 512, 1024, 2048, 4096)
MAPS = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels and size of the images, as in a VGG for 32 x 32 pixels
BATCHES = (1, 32, 256)
KEEPS = (0.5, 0.25, 0.125)
LAYOUTS = ("bundles", "diagonal")
NETWORKS = ("vgg16_bn", "resnet20")
TARGETS = {"linear": 0.95, "convolution": 0.85, "network": 0.7}


def drawn(m: int, n: int, keep: float, layout: str) -> Pattern:
    """A pattern at random, of as many blocks as there are by default."""
    rng, count = np.random.default_rng(0), blocks_for(keep, m) if layout == "bundles" else round(1 / keep)
    rows = rng.permutation(m).reshape(count, -1)
    if layout == "diagonal":
        columns = rng.permutation(n).reshape(count, -1)
    else:
        columns = np.stack([rng.permutation(n)[: int(keep * n)] for _ in range(count)])
    return Pattern((m, n), np.sort(rows), np.sort(columns), layout)


def layer(kind: str, width: int, size: int, keep: float, layout: str, batch: int, repeats: int) -> dict[str, Any]:
    """A layer in a chain: its times dense and packed."""
    torch.manual_seed(0)
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8)), torch.randn(batch, width)
    else:
        model = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 1))
        x = torch.randn(batch, width, size, size)
    patterns = {"0": drawn(width, width, keep, layout)}
    graph = sc.trace(model, x[:1])
    orders = orders_of(graph, patterns)
    model = permuted(model, graph, orders)
    own = moved("0", patterns["0"], moves(graph, orders))
    ways = {"blocks": packed(model[0], own, at_once=False), "at_once": packed(model[0], own, at_once=True)}
    assert all(made.order is None for made in ways.values())
    return judged(milliseconds({"dense": model[0], **ways}, x, repeats), 1 / keep)


def judged(times: dict[str, float], reduction: float) -> dict[str, Any]:
    """What ``pack`` would choose, and how much of the reduction it turns into speed."""
    best = min((name for name in times if name != "dense"), key=times.__getitem__)
    chosen = best if times[best] < WINNING_SHARE * times["dense"] else "dense"
    speedup = times["dense"] / times[chosen]
    return {"ms": times, "chosen": chosen, "speedup": speedup, "reduction": reduction, "ratio": speedup / reduction}


def network(name: str, keep: float, layout: str, batch: int, repeats: int) -> dict[str, Any]:
    """A whole network as ``pack`` leaves it."""
    torch.manual_seed(0)
    model = build(name).eval()
    x = torch.randn(batch, *example_input(name)[1:])
    pivoted = sc.pivot(model, x, keep, layout=layout).model
    small = sc.pack(pivoted, x)
    all_packed = sc.pack(pivoted, x[:1], way="at_once")
    times = milliseconds({"dense": model, "packed": small}, x, repeats)
    macs = {key: counted(m, x[:1])["macs"] for key, m in (("dense", model), ("packed", all_packed))}
    done = json.loads(sc.record(small)[-1]["pack"])
    chosen = "packed" if done["layers"] else "dense"  # then both are the same, whatever their times say
    row = {"ms": times, "chosen": chosen, "packed": len(done["layers"]), "dense": len(done["patterns"])}
    speedup, reduction = times["dense"] / times[chosen], macs["dense"] / macs["packed"]
    return row | {"speedup": speedup, "reduction": reduction, "ratio": speedup / reduction}


def report(rows: list[dict[str, Any]]) -> None:
    """Medians against the targets, and whatever was slower than dense."""
    for kind, target in TARGETS.items():
        for threads in sorted({r["threads"] for r in rows}):
            own = [r for r in rows if r["kind"] == kind and r["threads"] == threads and r["keep"] > 0.2]
            if kind == "linear":
                own = [r for r in own if r["width"] >= 1024]
            for layout in LAYOUTS:
                ratios = [r["ratio"] for r in own if r["layout"] == layout]
                if ratios:
                    found = f"{statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
                    print(f"{kind:12} {threads} threads, {layout:9} {found}, target {target}, {len(ratios)} rows")
    slower = [r for r in rows if r["speedup"] < 1]
    print(f"slower than dense: {len(slower)} of {len(rows)} rows")
    for r in slower:
        print("  ", {k: r[k] for k in ("kind", "width", "keep", "layout", "batch", "threads", "speedup") if k in r})


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["layers", "networks"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    kept = Rows(given.out, margin=WINNING_SHARE)
    cases: list[dict[str, Any]] = []
    if "layers" in given.what:
        cases += [{"kind": "linear", "width": width, "size": 1} for width in WIDTHS]
        cases += [{"kind": "convolution", "width": width, "size": size} for width, size in MAPS]
    if "networks" in given.what:
        cases += [{"kind": "network", "width": name} for name in NETWORKS]
    keeps = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} <= set(os.environ)
    for threads in given.threads:
        torch.set_num_threads(threads)
        for case, batch, keep, layout in product(cases, given.batches, given.keeps, LAYOUTS):
            key = {**case, "batch": batch, "keep": keep, "layout": layout, "threads": threads}
            key["memory"] = "kept" if keeps else "default"
            if kept.has(key):
                continue
            if case["kind"] == "network":
                row = network(case["width"], keep, layout, batch, given.repeats)
            else:
                row = layer(case["kind"], case["width"], case["size"], keep, layout, batch, given.repeats)
            kept.add(key | row)
            print(key, row["chosen"], f"{row['speedup']:.2f} of {row['reduction']:.1f}: {row['ratio']:.2f}", flush=True)
    report(kept.rows)


if __name__ == "__main__":
    main()
