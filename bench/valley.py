"""Whether SDPrun's solution lies in the valley of SGD's on MNIST, nothing cut and nothing retrained.

SGD and SDPrun start from the same weights and see the same batches. Between their ends a Bezier curve is trained; loss
and error are measured at 61 points of it, and of the straight line. ``LeNet-300-100``, seed 0, also gives the plane
through the curve with the ways of both trainings, and the spectrum at SGD's end. Stopped at any time, it goes on from
its checkpoints (``--work``); rows that are there are not run again::

    python bench/valley.py lenet_300_100 lenet5 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from rows import Rows
from secateur.lab.data.registry import load
from secateur.lab.landscape.mode_connectivity import along, barrier, connect, plane, steep_share
from secateur.lab.models.registry import build, example_input
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy

RESULTS = Path(__file__).parent / "results" / "valley.json"
BATCH = 128
POINTS = 61
SETTINGS: dict[str, dict[str, Any]] = {  # strengths and epochs are those of the recipes
    "lenet_300_100": {"epochs": 30, "lr": 0.1, "c": 0.006, "mu": 0.6, "weights": "sqrt", "steep": 40},
    "lenet5": {"epochs": 20, "lr": 0.1, "c": 0.13, "mu": 0.6, "weights": "none", "steep": 20},
}
CURVE = {"epochs": 10, "lr": 0.02, "momentum": 0.9, "schedule": "cosine"}
DRAWN = ("lenet_300_100", 0)


def trained(
    name: str, c: float, seed: int, data: Any, work: Path, watch: Callable[[nn.Module], None]
) -> tuple[nn.Module, Any]:
    """A network of full size, pruned channels zero, and its graph."""
    setting = SETTINGS[name]
    torch.manual_seed(seed)
    model, inputs = build(name), torch.zeros(example_input(name))
    graph = sc.trace(model, inputs)
    optimizer = sc.SDPrun(model, graph, lr=setting["lr"], c=c, mu=setting["mu"], weights=setting["weights"])
    watch(model)
    fit(
        model, optimizer, data.loader("train", BATCH, shuffle=True, seed=seed), epochs=setting["epochs"],
        schedule="grda", progress=False, channels_last=name == "lenet5", checkpoint_dir=work / f"c{c:g}",
        after_epoch=lambda: watch(model) or {},
    )  # fmt: skip
    return model.eval(), graph


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def one(name: str, seed: int, work: Path) -> dict[str, Any]:
    """Both trainings of one seed, and what lies between them."""
    data = load("mnist", validation=0.1)
    train, test = data.loader("train", 500), list(data.loader("test", 500))

    def watch(method: str, model: nn.Module) -> None:  # kept in files: a run that was stopped has seen a part alone
        if (name, seed) == DRAWN:
            path = work / method
            path.mkdir(parents=True, exist_ok=True)
            save_file(weights_of(model), path / f"{len(list(path.iterdir())):03}.safetensors")

    start, _ = trained(name, 0, seed, data, work, partial(watch, "SGD"))
    end, graph = trained(name, SETTINGS[name]["c"], seed, data, work, partial(watch, "SDPrun"))
    plan = sc.zero_channels(end, graph)
    row: dict[str, Any] = {
        "network": name, "seed": seed,
        "macs": graph.macs(plan) / graph.macs(), "params": graph.params(plan) / graph.params(),
        "difference": sc.check(end, sc.cut(end, plan), plan, test[0][0]),
        "test": {"SGD": accuracy(start, test), "SDPrun": accuracy(sc.cut(end, plan), test)},
    }  # fmt: skip
    curves = {"line": connect(start, end, train, epochs=0, progress=False)}
    batches = data.loader("train", BATCH, shuffle=True, seed=100 + seed)
    curves["curve"] = connect(start, end, batches, **CURVE, seed=seed, checkpoint_dir=work / "curve", progress=False)
    for kind, curve in curves.items():
        rows = along(start, curve, train, test, points=POINTS, progress=False)
        row[kind] = {"barrier": barrier(rows), "test_error_barrier": barrier(rows, "test_error"), "rows": rows}
    ends = [row["curve"]["rows"][i]["train_loss"] for i in (0, -1)]
    row["highest"] = max(point["train_loss"] for point in row["curve"]["rows"])
    row["allowed"] = 1.1 * max(ends) + 1e-3
    some = list(islice(data.loader("train", 500), 20))
    flat = sc.null_space_projector(start, some[:4], "cross_entropy", basis="lanczos", k=SETTINGS[name]["steep"])
    row["steep_share"] = steep_share(start, end, flat)
    row["steep_by_chance"] = (flat.count / len(flat.vectors)) ** 0.5
    row["eigenvalues"] = {"steep": flat.count, "values": flat.values.tolist()}
    if (name, seed) == DRAWN:
        seen = plane(start, curves["curve"], some, progress=False)
        row["plane"] = {"x": seen.x, "y": seen.y, "loss": seen.loss, "points": seen.points, "path": seen.path}
        row["plane"]["trainings"] = {
            method: [seen.project(load_file(path)) for path in sorted((work / method).iterdir())]
            for method in ("SGD", "SDPrun")
        }
    return row


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/valley"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = Rows(given.out, None, settings=SETTINGS, curve=CURVE, batch_size=BATCH)
    for name in given.networks:
        for seed in given.seeds:
            if not kept.has({"network": name, "seed": seed}):
                kept.add(one(name, seed, given.work / f"{name}-{seed}"))
            found = next(r for r in kept.rows if (r["network"], r["seed"]) == (name, seed))
            long = {"line", "curve", "plane", "eigenvalues"}
            print({k: v for k, v in found.items() if k not in long}, found["line"]["barrier"], flush=True)


if __name__ == "__main__":
    main()
