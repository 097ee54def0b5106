"""The published headline of SDPrun: VGG-16 on CIFAR-10, pruned, without retraining (arXiv 2107.05328: 93.97 %).

Strengths ``c`` and exponents ``mu`` by seeds, and SGD (``c = 0``) with the same seed, schedule and order in the same
run. The paper's own are not public; the grid is that of gRDA's experiments (arXiv 2006.09358) times the root of a
channel's size; what is best is to be chosen by the held-out training images. One piece of work takes at most
``--minutes``, then everything is in checkpoints under ``--work``, and
the same command goes on::

    python bench/headline.py --minutes 9                              # VGG-16, the whole grid: give it a GPU
    python bench/headline.py --network resnet8 --epochs 2 --c 0 2e-3  # a trial of the script
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from rows import Rows
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build, example_input
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy

RESULTS = Path(__file__).parent / "results" / "headline.json"
BATCH = 128
KEYS = ("network", "epochs", "lr", "c", "mu", "seed")


class PauseError(Exception):
    """The time of this piece is up."""


class Clock:
    """Called after every step: ends the piece when its time is up, soon after a checkpoint was written."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def step(self) -> None:
        """Raise if the time is up."""
        if time.monotonic() > self.end:
            raise PauseError


def train(row: dict[str, Any], work: Path, clock: Clock, device: torch.device) -> dict[str, Any]:
    """One training from scratch, its cut, and what both cost and reach."""
    data = load("cifar10", validation=0.1)
    torch.manual_seed(row["seed"])
    inputs = torch.zeros(example_input(row["network"]))
    model = build(row["network"])
    graph = sc.trace(model, inputs)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = sc.SDPrun(model, graph, lr=row["lr"], c=row["c"], mu=row["mu"] or 0.6, weights="sqrt")
    batches = data.loader("train", BATCH, shuffle=True, augment=True, seed=row["seed"])
    fit(
        model, optimizer, batches, epochs=row["epochs"], schedule="grda",
        checkpoint_dir=work / "-".join(str(row[key]) for key in KEYS), every=20, after_step=[clock],
        channels_last=True,
    )  # fmt: skip
    model.eval()
    plan = sc.zero_channels(model, graph)
    small = sc.cut(model, plan)
    held_out, test = data.loader("validation", 500), data.loader("test", 500)
    images = next(iter(test))[0].to(device)
    return row | {
        "difference": sc.check(model, small, plan, images),
        "macs": graph.macs(plan) / graph.macs(), "params": graph.params(plan) / graph.params(),
        "kept": graph.kept(plan).tolist(),
        "validation": accuracy(small, held_out), "test": accuracy(small, test), "device": str(device),
    }  # fmt: skip


def report(rows: list[dict[str, Any]]) -> None:
    """The table, mean and standard deviation over seeds."""
    heads = "".join(f"{name:>16}" for name in ("MACs %", "params %", "held out %", "test %"))
    print(f"{'network':10} {'epochs':>6} {'lr':>5} {'c':>7} {'mu':>6} {'seeds':>5}{heads}")
    for key in sorted({tuple(row[k] for k in KEYS[:-1]) for row in rows}):
        own = [row for row in rows if tuple(row[k] for k in KEYS[:-1]) == key]
        cells = []
        for name in ("macs", "params", "validation", "test"):
            values = [100 * row[name] for row in own]
            cells.append(f"{statistics.mean(values):8.2f} ± {statistics.stdev(values) if len(own) > 1 else 0:4.2f}")
        print(f"{key[0]:10} {key[1]:6} {key[2]:5g} {key[3]:7g} {key[4]:6g} {len(own):5} " + " ".join(cells))


def main() -> None:
    """Run what is missing, as far as the time goes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="vgg16_bn")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--c", type=float, nargs="+", default=[0, 1e-4, 5e-4, 1e-3], help="0 is SGD")
    parser.add_argument("--mu", type=float, nargs="+", default=[0.51, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this piece of work")
    parser.add_argument("--work", type=Path, default=Path("runs/headline"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    clock = Clock(given.minutes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = Rows(given.out, batch_size=BATCH, note="CIFAR-10 is stored as JPEG")
    wanted = [
        dict(zip(KEYS, (given.network, given.epochs, given.lr, c, mu, seed), strict=True))
        for seed in given.seeds
        for c in given.c
        for mu in (given.mu if c else [0.0])  # without c there is no mu
    ]
    try:
        for row in wanted:
            if not kept.has(row):
                kept.add(train(row, given.work, clock, device))
    except PauseError:
        print(f"{given.minutes:g} minutes are over; the same command goes on")
    report(kept.rows)


if __name__ == "__main__":
    main()
