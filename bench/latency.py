"""Budgets in milliseconds: what the fit is wrong by, and what the clock shows of the answer when it is asked again.

ResNet-20 (32 images of 32 x 32, trained, seed 0) and a ResNet-50-like network (one image of 224 x 224, random weights),
magnitude scores, widths as they come and multiples of 8. ``error`` is the fit's at the networks that it was made of,
``again`` the answer's part of the whole network's time, each timed anew by itself (the least of three medians)::

    python bench/latency.py --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import secateur as sc
from networks import resnet
from rows import Rows
from secateur.lab.models.registry import build
from secateur.measure.latency import latency

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "latency.json"
PARTS = {"resnet20": (0.7, 0.5, 0.4), "resnet50-like": (0.8, 0.65, 0.5)}  # of the latter a third takes the base alone


def resnet20() -> nn.Module:
    model = build("resnet20")
    model.load_state_dict(load_file(HERE / "checkpoints" / "resnet20_cifar10_seed0.safetensors"))
    return model


NETWORKS: dict[str, Any] = {
    "resnet20": (resnet20, (32, 3, 32, 32)),
    "resnet50-like": (lambda: resnet(50), (1, 3, 224, 224)),
}


def measured(name: str, round_to: int) -> list[dict[str, Any]]:
    """A network, its budgets."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, inputs = make().eval(), torch.randn(shape)
    graph = sc.trace(model, inputs)
    scores = sc.score(model, graph, "magnitude")
    begun = time.perf_counter()
    clock = sc.measure_latency(model, graph, sc.LatencySettings(round_to=round_to))
    took, rows = time.perf_counter() - begun, []
    for part in PARTS[name]:
        begun = time.perf_counter()
        budget = sc.Budget(latency_ms=part * clock.whole_ms, round_to=round_to)
        plan = sc.allocate(graph, scores, budget, strategy="global", latency=clock)
        seconds = time.perf_counter() - begun
        small = sc.cut(model, plan)
        whole, own = (min(latency(m, inputs)["median_ms"] for _ in range(3)) for m in (model, small))
        rows.append(
            {
                "network": name, "round_to": round_to, "threads": torch.get_num_threads(), "whole_ms": clock.whole_ms,
                "error": clock.fitted.error, "timing_seconds": took, "allowed": part, "again": own / whole,
                "fit": float(clock.fitted.ms(graph.kept(plan))) / clock.whole_ms,
                "macs": graph.macs(plan) / graph.macs(), "allocate_seconds": seconds,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    kept = Rows(given.out)
    for name in NETWORKS:
        for round_to in (1, 8):
            if kept.has({"network": name, "round_to": round_to, "threads": given.threads}):
                continue
            for row in measured(name, round_to):
                kept.add(row)
    for row in kept.rows:
        numbers = ("whole_ms", "error", "allowed", "fit", "again", "macs", "timing_seconds", "allocate_seconds")
        print(row["network"], row["round_to"], row["threads"], {name: round(row[name], 3) for name in numbers})
    print("again / allowed, median:", round(statistics.median(r["again"] / r["allowed"] for r in kept.rows), 3))


if __name__ == "__main__":
    main()
