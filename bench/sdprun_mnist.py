"""SDPrun against SGD on MNIST without fine-tuning: the whole trade-off between MACs and accuracy.

Every row is one training from scratch: one seed, schedule and data order for all strengths ``c``; ``c = 0`` is SGD.
Accuracy is that of the cut network. Rows with a ``budget`` (of the MACs) are of the mode that seeks it and then holds
the threshold; ``c`` is its speed there. The strength for the recipes is chosen on the held-out training images. Rows
that are already in the results are not run again, so the bench can be stopped at any time.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from rows import Rows
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build, example_input
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy

RESULTS = Path(__file__).parent / "results" / "sdprun_mnist.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "lenet_300_100": {
        "epochs": 30,
        "lr": 0.1,
        "mu": 0.6,
        "weights": "sqrt",
        "c": [0, 0.002, 0.004, 0.006, 0.008, 0.012],
        "budgets": {0.012: [0.3, 0.2]},
    },
    "lenet5": {
        "epochs": 20,
        "lr": 0.1,
        "mu": 0.6,
        "weights": "none",
        "c": [0, 0.06, 0.11, 0.13, 0.2],
        "budgets": {},
    },
}


def train(name: str, c: float, budget: float | None, seed: int, setting: dict[str, Any]) -> dict[str, Any]:
    """One training, its cut, and what both cost and reach."""
    data = load("mnist", validation=0.1)
    torch.manual_seed(seed)
    model, inputs = build(name), torch.zeros(example_input(name))
    graph = sc.trace(model, inputs)
    optimizer = sc.SDPrun(
        model, graph, lr=setting["lr"], c=c, mu=setting["mu"], weights=setting["weights"],
        budget=None if budget is None else sc.Budget(macs=budget),
    )  # fmt: skip
    fit(
        model,
        optimizer,
        data.loader("train", 128, shuffle=True, seed=seed),
        epochs=setting["epochs"],
        schedule="grda",
        progress=False,
        channels_last=name == "lenet5",
    )
    plan = sc.zero_channels(model, graph)
    small = sc.cut(model, plan)
    return {
        "network": name, "c": c, "seed": seed, "budget": budget, "difference": sc.check(model, small, plan, inputs),
        "macs": graph.macs(plan) / graph.macs(), "params": graph.params(plan) / graph.params(),
        "widths": graph.kept(plan).tolist(),
        "validation": accuracy(small, data.loader("validation", 500)),
        "test": accuracy(small, data.loader("test", 500)),
    }  # fmt: skip


def report(rows: list[dict[str, Any]]) -> None:
    """The table, mean and standard deviation over seeds."""
    print(f"{'network':14} {'c':>7} {'budget':>7} {'seeds':>5} {'MACs %':>14} {'test %':>14} {'validation %':>14}")
    keys = sorted({(row["network"], row["c"], row.get("budget") or 1) for row in rows})
    for name, c, budget in keys:
        own = [row for row in rows if (row["network"], row["c"], row.get("budget") or 1) == (name, c, budget)]
        cells = []
        for key in ("macs", "test", "validation"):
            values = [100 * row[key] for row in own]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):8.2f} ± {spread:4.2f}")
        print(f"{name:14} {c:7g} {budget:7g} {len(own):5} " + " ".join(cells))


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = Rows(given.out, settings=SETTINGS, schedule="grda", batch_size=128)
    for seed in range(given.seeds):
        for name in given.networks:
            setting = SETTINGS[name]
            seeking = [(c, budget) for c, budgets in setting["budgets"].items() for budget in budgets]
            for c, budget in [(c, None) for c in setting["c"]] + seeking:
                if kept.has({"network": name, "c": c, "budget": budget, "seed": seed}):
                    continue
                row = train(name, c, budget, seed, setting)
                kept.add(row)
                print(row, flush=True)
    report(kept.rows)


if __name__ == "__main__":
    main()
