"""What widths made for kernels cost and bring: accuracy, and a forward in ONNX Runtime beside the whole network.

ResNet-20, CIFAR-10 as JPEG, the default of :func:`secateur.prune` with 3,200 training images, nothing trained. One
image, one thread, all networks in turn (``pip install -e '.[bench]'``)::

    python bench/rounding.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import secateur as sc
from oneshot import HERE
from rows import Rows
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build
from secateur.measure.accuracy import accuracy

MACS, ROUND_TO, REPEATS = (0.7, 0.5, 0.3), (1, "auto", 8), 300


def session(model: nn.Module, x: torch.Tensor, folder: str, name: str) -> Any:
    """The network in ONNX Runtime, on one thread."""
    import onnxruntime

    path = str(Path(folder) / f"{name}.onnx")
    torch.onnx.export(model.eval(), (x,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def times(sessions: dict[str, Any], x: torch.Tensor) -> dict[str, float]:
    """Median milliseconds of a forward of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(REPEATS):
        for name, one in sessions.items():
            start = time.perf_counter()
            one.run(None, {one.get_inputs()[0].name: x.numpy()})
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(all_of) for name, all_of in taken.items()}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "rounding.json")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, data, x = Rows(given.out, note="CIFAR-10 is stored as JPEG"), load("cifar10"), torch.randn(1, 3, 32, 32)
    for seed in given.seeds:
        if rows.has({"seed": seed}):
            continue
        model = build("resnet20")
        model.load_state_dict(load_file(HERE / "checkpoints" / f"resnet20_cifar10_seed{seed}.safetensors"))
        images = [x for x, _ in islice(data.loader("train", 64, shuffle=True), 50)]
        found: dict[str, Any] = {}
        with TemporaryDirectory() as folder:
            sessions = {"whole": session(model, x, folder, "whole")}
            for macs in MACS:
                for round_to in ROUND_TO:
                    result = sc.prune(model, x, sc.Budget(macs=macs, round_to=round_to), data=images)
                    name = f"{macs} {round_to}"
                    found[name] = {"seed": seed, "macs": macs, "round_to": round_to} | {
                        "test": accuracy(result.model.eval(), data.loader("test", 500))
                    }
                    sessions[name] = session(result.model, x, folder, name.replace(" ", "_"))
            taken = times(sessions, x)
        for name, row in found.items():
            rows.add({**row, "ms": taken[name], "faster": taken["whole"] / taken[name]})
            print(row, f"{taken['whole'] / taken[name]:.2f}x", flush=True)


if __name__ == "__main__":
    main()
