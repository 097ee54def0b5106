"""Budgets in milliseconds of ONNX Runtime, and what the answer takes when it is measured anew.

LeNet-5, ResNet-20 and VGG-16 (random weights), one example, one thread, magnitude, 60 % of what the whole network
takes. The answer and the whole network are then timed anew, in turn (:func:`secateur.compare_latency`)::

    python bench/milliseconds.py
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

import secateur as sc
from rows import Rows
from secateur.lab.models.registry import build, example_input

HERE = Path(__file__).parent
BACKEND, PART, SAMPLES = "onnxruntime", 0.6, 16


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "milliseconds.json")
    parser.add_argument("--networks", nargs="+", default=["lenet5", "resnet20", "vgg16_bn"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = Rows(given.out)
    for name in given.networks:
        if rows.has({"network": name}):
            continue
        torch.manual_seed(0)
        model, x = build(name).eval(), torch.randn(example_input(name))
        before = sc.compare_latency({"whole": model}, x, backends=BACKEND, threads=1).timings[0].median_ms
        budget = sc.Budget(latency_ms=PART * before, backend=BACKEND)
        settings = sc.LatencySettings(samples=SAMPLES, threads=1, backend=BACKEND)
        result = sc.prune(model, x, budget, criterion="magnitude", latency=settings)
        again = sc.compare_latency({"whole": model, "cut": result.model}, x, backends=BACKEND, threads=1, turns=15)
        whole, cut = again.timings
        row = {"network": name, "allowed_ms": PART * before, "whole_ms": whole.median_ms, "ms": cut.median_ms}
        rows.add(row | {"of_allowed": cut.median_ms / (PART * before), "macs": result.after.macs / result.before.macs})
        print(rows.rows[-1], flush=True)


if __name__ == "__main__":
    main()
