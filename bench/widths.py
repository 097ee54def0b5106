"""What each part of a search for widths adds to the widths of least predicted rise: equal numbers of forwards.

Channels within a group go by ``schur`` (by how far the outputs move), what stays is fitted again (``refit``); nothing
is trained, widths are single channels. ``global`` looks at the predicted rises alone; ``sensitivity`` measures them;
``random``, ``bandit`` and ``duels`` begin from what sensitivity finds with a third of the forwards and try
combinations with the rest. While widths are tried the layers that read what goes make up for it, but not where it
says ``masked``. All see the same 25 batches of 128 training images; rows that are there are not run again::

"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import secateur as sc
from rows import Rows
from search import HERE, Random
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build, example_input
from secateur.measure.accuracy import accuracy

RESULTS = HERE / "results" / "widths.json"
DATA = {"lenet5": "mnist", "resnet20": "cifar10"}
MACS = (0.5, 0.3)
METHODS = ("global", "sensitivity", "random", "bandit", "duels", "bandit, masked")
EVALUATIONS = 1000


def one(name: str, method: str, macs: float, seed: int) -> dict[str, Any]:
    """One way to choose widths on one network."""
    data = load(DATA[name], validation=0.1)
    model, inputs = build(name), torch.zeros(example_input(name))
    model.load_state_dict(load_file(HERE / "checkpoints" / f"{name}_{DATA[name]}_seed{seed}.safetensors"))
    batches = list(islice(data.loader("train", 128, shuffle=True, seed=seed), 25))
    given = {"evaluations": EVALUATIONS, "seed": seed}
    looks: dict[str, Any] = {
        "sensitivity": sc.Sensitivity(**given), "random": Random(**given, start="sensitivity"),
        "bandit": sc.Bandit(repair=True, **given), "duels": sc.Bandit(repair=True, dueling=True, **given),
        "bandit, masked": sc.Bandit(**given),
    }  # fmt: skip
    start = time.perf_counter()
    result = sc.prune(
        model.eval(), inputs, sc.Budget(macs=macs, round_to=1), data=batches, loss="cross_entropy",
        criterion=sc.Schur(fisher="outputs"), strategy=looks.get(method, method), repair="refit",
    )  # fmt: skip
    row = {"seconds": time.perf_counter() - start, "macs_left": result.after.macs / result.before.macs}
    return row | {split: accuracy(result.model, data.loader(split, 500)) for split in ("validation", "test")}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(DATA))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = Rows(given.out, note="CIFAR-10 is stored as JPEG")
    for name in given.networks:
        for seed in given.seeds:
            for macs in MACS:
                for method in given.methods:
                    key = {"network": name, "method": method, "macs": macs, "seed": seed, "evaluations": EVALUATIONS}
                    if not kept.has(key):
                        kept.add(key | one(name, method, macs, seed))
                        print(kept.rows[-1], flush=True)
    for name, macs in dict.fromkeys((r["network"], r["macs"]) for r in kept.rows):
        for method in METHODS:
            own = [100 * r["test"] for r in kept.rows if (r["network"], r["macs"], r["method"]) == (name, macs, method)]
            if own:
                spread = statistics.stdev(own) if len(own) > 1 else 0.0
                print(f"{name:9} {macs:.0%} {method:12} {statistics.mean(own):.2f} ± {spread:.2f}, {len(own)} seeds")


if __name__ == "__main__":
    main()
