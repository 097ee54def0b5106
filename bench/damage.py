"""Accuracy without fine-tuning against what remains: all one-shot methods on the networks for measurements.

Every method sees the same training images, without augmentation; what remains is set by the same budgets, once in
parameters and once in MACs. Where a network has batch norms the accuracy is also given with their statistics
re-estimated on the same images. A budget that a method cannot meet is a row with its reason. Nothing is tuned here, so
all is measured on test images. Rows that are there are not run again, so the bench can be stopped at any time::

    python bench/damage.py lenet_300_100 lenet5 resnet20 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import secateur as sc
from secateur.data import load
from secateur.eigendamage import measure_damage
from secateur.measure import accuracy
from secateur.models import build, example_input

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "damage.json"
CHANNEL = ("random", "magnitude", "taylor", "obd", "obs", "kron_obd", "kron_obs")
ROTATED = {
    "eigendamage": {"ekfac": False, "rule": "lagrangian"},
    "eigendamage_ekfac": {"ekfac": True, "rule": "lagrangian"},
    "eigendamage_threshold": {"ekfac": False, "rule": "threshold"},
}
BATCH = 128
Make = Callable[[sc.Budget], nn.Module]


@dataclass(frozen=True)
class Setting:
    """How one network is measured.

    Attributes:
        data: the data set.
        batches: batches of training images that a method sees.
        tested: how many test images are looked at, the first ones.
        fractions: unit -> the budgets.
    """

    data: str
    batches: int
    tested: int
    fractions: dict[str, tuple[float, ...]]


MANY = {"params": (0.8, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05), "macs": (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)}
SETTINGS = {
    "lenet_300_100": Setting("mnist", 100, 10_000, MANY),
    "lenet5": Setting("mnist", 100, 10_000, MANY),
    "resnet20": Setting("cifar10", 25, 2_500, {"params": (0.8, 0.6, 0.4, 0.2), "macs": (0.8, 0.6, 0.4)}),
}


def makers(
    model: nn.Module, inputs: torch.Tensor, images: Any, batches: int, seed: int, wanted: set[str]
) -> Iterator[tuple[str, Make]]:
    """Every wanted method, as a function from a budget to a smaller network."""
    graph = sc.trace(model, inputs)
    curvature = None
    passing: dict[str, Any] = {"batches": batches, "fisher": "exact"}  # one draw would be mostly noise
    for name in CHANNEL:
        if name not in wanted:
            continue
        options: dict[str, Any] = {}
        if name == "random":
            options = {"seed": seed}
        elif name in {"taylor", "obd"}:
            options = {"data": images, "loss_fn": "cross_entropy", "batches": batches}
            options |= passing if name == "obd" else {}
        elif name != "magnitude":
            curvature = curvature or sc.kronecker_factors(model, images, form="full", **passing)
            options = {"curvature": curvature}
        scores = sc.score(model, graph, name, **options)
        compensate = curvature if name in {"obs", "kron_obs"} else None

        def cut(budget: sc.Budget, scores: Any = scores, compensate: Any = compensate) -> nn.Module:
            return sc.cut(model, sc.allocate(graph, scores, budget), compensate=compensate)

        yield name, cut
    measured: dict[bool, Any] = {}
    for name, setting in ROTATED.items():
        if name not in wanted:
            continue
        ekfac = bool(setting["ekfac"])
        if ekfac not in measured:
            measured[ekfac] = measure_damage(model, inputs, data=images, ekfac=ekfac, **passing)

        def rotate(budget: sc.Budget, damages: Any = measured[ekfac], rule: Any = setting["rule"]) -> nn.Module:
            return damages.cut(budget, rule=rule)

        yield name, rotate


def counts(model: nn.Module, inputs: torch.Tensor) -> dict[str, int]:
    """MACs and parameters, as PyTorch counts them."""
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(inputs)
    return {"macs": counter.get_total_flops() // 2, "params": sum(p.numel() for p in model.parameters())}


def one(name: str, seed: int, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """The rows of one network that are missing."""
    setting = SETTINGS[name]
    data = load(setting.data, validation=0.1)  # as the networks were trained
    model, inputs = build(name), torch.zeros(example_input(name))
    model.load_state_dict(load_file(HERE / "checkpoints" / f"{name}_{setting.data}_seed{seed}.safetensors"))
    model.eval()
    full = counts(model, inputs)
    images = data.loader("train", BATCH, shuffle=True, seed=seed)
    test = list(islice(data.loader("test", 500), setting.tested // 500))
    norms = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    missing = {
        m: [(u, f) for u, all_of in setting.fractions.items() for f in all_of if (name, seed, m, u, f) not in done]
        for m in (*CHANNEL, *ROTATED)
    }
    if (name, seed, "dense", "params", 1.0) not in done:
        yield {
            "network": name, "seed": seed, "method": "dense", "unit": "params", "fraction": 1.0,
            "macs": 1.0, "params": 1.0, "test": accuracy(model, test),
        }  # fmt: skip
    wanted = {m for m, left in missing.items() if left}
    for method, make in makers(model, inputs, images, setting.batches, seed, wanted):
        for unit, fraction in missing[method]:
            row = {"network": name, "seed": seed, "method": method, "unit": unit, "fraction": fraction}
            start = time.perf_counter()
            try:
                small = make(sc.Budget(**{unit: fraction})).eval()
            except sc.SecateurError as error:
                yield {**row, "refused": str(error).split(":")[0]}
                continue
            row["seconds"] = round(time.perf_counter() - start, 3)
            row |= {u: n / full[u] for u, n in counts(small, inputs).items()}
            row["test"] = accuracy(small, test)
            if norms:
                sc.recalibrate(small, images, batches=setting.batches)
                row["test_recalibrated"] = accuracy(small, test)
            yield row


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    facts = {name: {"images": BATCH * s.batches, "tested": s.tested} for name, s in SETTINGS.items()}
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for name in given.networks:
        for seed in given.seeds:
            done = {(r["network"], r["seed"], r["method"], r["unit"], r["fraction"]) for r in rows}
            for row in one(name, seed, done):
                rows.append(row)
                text = json.dumps({"settings": facts, "note": "CIFAR-10 is stored as JPEG", "rows": rows}, indent=1)
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.with_suffix(".tmp").write_text(text)
                given.out.with_suffix(".tmp").replace(given.out)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
