"""Eight bits after pruning: accuracy and milliseconds of dense, pruned, quantised, and both, in ONNX Runtime.

ResNet-20 (CIFAR-10, stored as JPEG) and a small vision transformer (MNIST), three seeds each, half of the MACs by the
default of :func:`secateur.prune` with 3,200 training images, nothing trained. ``dynamic`` quantises weights, and
activations as they come; ``static`` activations by ranges that 512 training images have (QDQ, per channel). One thread,
batches of 1 and 32, all networks in turn (``pip install -e '.[bench]'``)::

    python bench/int8.py
    python bench/int8.py --table
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import secateur as sc
from rows import Rows
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build
from secateur.measure.backends import Forward
from secateur.measure.latency import in_turn
from secateur.shipping.onnx import session_of

HERE = Path(__file__).parent
CASES = {"resnet20": "cifar10", "small_vit": "mnist"}
BATCHES, REPEATS, TURNS = (1, 32), 40, 9
KINDS = ("float", "dynamic", "static")


def quantised(path: Path, images: Tensor) -> dict[str, Path]:
    """The file itself, and what ONNX Runtime makes of it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.each: Iterator[dict[str, Any]] = ({name: part.numpy()} for part in images.split(64))

        def get_next(self) -> Any:
            return next(self.each, None)

    found = {"float": path, **{kind: path.with_name(f"{path.stem}_{kind}.onnx") for kind in KINDS[1:]}}
    ready = path.with_name(f"{path.stem}_ready.onnx")
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    name = session_of(path).get_inputs()[0].name
    quantize_dynamic(str(ready), str(found["dynamic"]), weight_type=QuantType.QUInt8)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}  # what x86 has instructions for
    quantize_static(str(ready), str(found["static"]), Reader(name), per_channel=True, **types)
    return found


def accuracy(session: Any, batches: Any) -> float:
    """The share that a session has right."""
    name = session.get_inputs()[0].name
    right = total = 0
    for x, y in batches:
        right += int((session.run(None, {name: x.numpy()})[0].argmax(1) == y.numpy()).sum())
        total += len(y)
    return right / total


def milliseconds(sessions: dict[Any, Any], shape: tuple[int, ...]) -> dict[Any, np.ndarray]:
    """The medians of every turn, [turns], by name."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    forwards = [_forward(session, x) for session in sessions.values()]
    times = np.median(in_turn(forwards, None, REPEATS, 3, TURNS), axis=2)
    return dict(zip(sessions, times, strict=True))


def _forward(session: Any, x: np.ndarray) -> Forward:
    name = session.get_inputs()[0].name
    return Forward(lambda: x, lambda given: session.run(None, {name: given}), torch.device("cpu"))


def measured(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """All rows of a network."""
    data = load(CASES[name], validation=0.0)
    model = build(name)
    model.load_state_dict(load_file(HERE / "checkpoints" / f"{name}_{CASES[name]}_seed{seed}.safetensors"))
    images = [x for x, _ in islice(data.loader("train", 64, shuffle=True), 50)]
    x = images[0][:2]
    models = {"dense": model.eval(), "pruned": sc.prune(model, x, sc.Budget(macs=0.5), data=images).model.eval()}
    with TemporaryDirectory() as folder:
        files = {}
        for which, one in models.items():
            done = sc.export(one, Path(folder) / f"{which}.onnx", x)
            for kind, path in quantised(done.path, torch.cat(images[:8])).items():
                files[which, kind] = path
        sessions = {key: session_of(path, threads=1) for key, path in files.items()}
        times = {batch: milliseconds(sessions, (batch, *x.shape[1:])) for batch in BATCHES}
        for (which, kind), session in sessions.items():
            row: dict[str, Any] = {"network": name, "seed": seed, "which": which, "kind": kind}
            row |= {"bytes": files[which, kind].stat().st_size, "test": accuracy(session, data.loader("test", 500))}
            for batch in BATCHES:
                own = times[batch][which, kind]
                row[f"ms_{batch}"] = float(np.median(own))
                row[f"faster_{batch}"] = float(np.median(times[batch]["dense", "float"] / own))
            yield row


def median(rows: list[dict[str, Any]], what: str) -> float:
    """Over seeds."""
    return float(statistics.median(row[what] for row in rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds."""
    lines = ["| network | | accuracy | kB | 1 at a time | 32 at a time |", "|---|---|---|---|---|---|"]
    for name in CASES:
        for which in ("dense", "pruned"):
            for kind in KINDS:
                own = [r for r in rows if (r["network"], r["which"], r["kind"]) == (name, which, kind)]
                if own:
                    test = [100 * r["test"] for r in own]
                    spread = f" ± {statistics.stdev(test):.1f}" if len(test) > 1 else ""
                    size = statistics.mean(r["bytes"] for r in own) / 1000
                    cells = [f"{median(own, f'ms_{b}'):.2f} ms, {median(own, f'faster_{b}'):.2f}x" for b in BATCHES]
                    accuracies = f"{statistics.mean(test):.1f}{spread}"
                    lines.append(f"| {name} | {which}, {kind} | {accuracies} | {size:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = Rows(given.out, note="CIFAR-10 is stored as JPEG")
    for name in () if given.table else CASES:
        for seed in given.seeds:
            if not rows.has({"network": name, "seed": seed}):
                for row in measured(name, seed):
                    rows.add(row)
                print(name, seed, "done", flush=True)
    print(table(rows.rows))


if __name__ == "__main__":
    main()
