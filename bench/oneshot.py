"""What the benches of one-shot methods share: networks, budgets, rows that are measured once and kept."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import secateur as sc
from rows import Row, Rows
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build, example_input
from secateur.measure.accuracy import accuracy
from secateur.measure.counting import counted

HERE = Path(__file__).parent
BATCH = 128
Make = Callable[[sc.Budget], nn.Module]
Makers = Callable[[nn.Module, torch.Tensor, Any, int, int, set[str]], Iterator[tuple[str, Make]]]
"""``makers(model, inputs, images, batches, seed, wanted)`` -> each wanted method, a function from budget to network."""


def smaller(method: str, model: nn.Module, inputs: torch.Tensor, fraction: float, data: Sequence[Any]) -> nn.Module:
    """What a method leaves of a model within such a part of its parameters, before any training.

    ``secateur`` and ``secateur.hybrid`` are the defaults with data alone; all others go channel by channel, with the
    exact Fisher where they want one, C-OBS and Kron-OBS with their compensation.
    """
    if method == "secateur":
        return sc.prune(model, inputs, sc.Budget(params=fraction), data=data).model
    if method == "secateur.hybrid":
        return sc.hybrid(model, inputs, sc.Budget(params=fraction), data=data).model
    given: dict[str, Any] = {"data": data, "loss": "cross_entropy"}
    exact, budget = {"batches": len(data), "fisher": "exact"}, sc.Budget(params=fraction, round_to=1)
    if method == "eigendamage":
        return sc.eigendamage(model, inputs, budget, **given, fisher="exact", repair="none").model
    if method == "magnitude":  # as in the papers; by norms, "global" leaves blocks of a ResNet with a single channel
        return sc.prune(
            model, inputs, budget, **given, criterion="magnitude", strategy="uniform", repair="none"
        ).model  # fmt: skip
    repair: Any = sc.Compensate(**exact) if method in ("obs", "kron_obs") else "none"
    criterion = sc.CRITERIA.make(method, exact)
    return sc.prune(model, inputs, budget, **given, criterion=criterion, strategy="global", repair=repair).model


@dataclass(frozen=True)
class Setting:
    """How one network is measured.

    Attributes:
        data: the data set.
        batches: batches of training images that a method sees.
        tested: how many test images are looked at, the first ones.
        fractions: unit -> the budgets.
        round_to: of the budgets.
    """

    data: str
    batches: int
    tested: int
    fractions: dict[str, tuple[float, ...]]
    round_to: int | str = 1


def checkpoint(name: str, setting: Setting, seed: int) -> Path:
    """The weights that a network begins with."""
    return HERE / "checkpoints" / f"{name}_{setting.data}_seed{seed}.safetensors"


def one(
    name: str, seed: int, setting: Setting, methods: Sequence[str], makers: Makers, done: set[tuple[Any, ...]]
) -> Iterator[Row]:
    """The rows of one network that are missing."""
    data = load(setting.data, validation=0.1)  # as the networks were trained
    model, inputs = build(name), torch.zeros(example_input(name))
    model.load_state_dict(load_file(checkpoint(name, setting, seed)))
    model.eval()
    full = counted(model, inputs)
    images = data.loader("train", BATCH, shuffle=True, seed=seed)
    test = list(islice(data.loader("test", 500), setting.tested // 500))
    norms = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    missing = {
        m: [(u, f) for u, all_of in setting.fractions.items() for f in all_of if (name, seed, m, u, f) not in done]
        for m in methods
    }
    if (name, seed, "dense", "params", 1.0) not in done:
        yield {
            "network": name, "seed": seed, "method": "dense", "unit": "params", "fraction": 1.0,
            "macs": 1.0, "params": 1.0, "test": accuracy(model, test),
        }  # fmt: skip
    wanted = {m for m, left in missing.items() if left}
    for method, make in makers(model, inputs, images, setting.batches, seed, wanted):
        for unit, fraction in missing[method]:
            row: Row = {"network": name, "seed": seed, "method": method, "unit": unit, "fraction": fraction}
            start = time.perf_counter()
            try:
                small = make(sc.Budget(**{unit: fraction}, round_to=setting.round_to)).eval()
            except sc.SecateurError as error:
                yield {**row, "refused": str(error).split(":")[0]}
                continue
            row["seconds"] = round(time.perf_counter() - start, 3)
            row |= {u: n / full[u] for u, n in counted(small, inputs).items()}
            row["test"] = accuracy(small, test)
            if norms:
                sc.recalibrate(small, images, batches=setting.batches)
                row["test_recalibrated"] = accuracy(small, test)
            yield row


def run(
    about: str, results: Path, settings: Mapping[str, Setting], methods: Sequence[str], makers: Makers, **facts: Any
) -> None:
    """Run what is missing and keep every row as soon as it is there."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(settings))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(methods), choices=list(methods), metavar="METHOD")
    parser.add_argument("--out", type=Path, default=results)
    given = parser.parse_args()
    torch.set_num_threads(1)
    of = {name: {"images": BATCH * s.batches, "tested": s.tested} for name, s in settings.items()}
    kept = Rows(given.out, settings=of, **facts, note="CIFAR-10 is stored as JPEG")
    for name in given.networks:
        for seed in given.seeds:
            if not checkpoint(name, settings[name], seed).exists():
                print(f"{name}, seed {seed}: was not trained", flush=True)
                continue
            done = {(r["network"], r["seed"], r["method"], r["unit"], r["fraction"]) for r in kept.rows}
            for row in one(name, seed, settings[name], given.methods, makers, done):
                kept.add(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
