"""Gradual pruning against one-shot pruning at equal MACs and epochs, and what a step of it costs.

``accuracy``: every method starts from the same trained network, ends with the same widths (the same share of every
group, which meets the budget) and has as many epochs: one-shot magnitude fine-tunes in all of them; IncReg, GReg-1
and SPP prune in the first half at a constant learning rate, and fine-tune in the second.
``cost``: a training step of a ResNet-20 with the handle over one without, in turn in one run. Rows that are there are
not run again; a training that was stopped goes on from its checkpoints (``--work``)::

    python bench/gentle.py accuracy cost --networks lenet5
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
from torch.nn import functional as F

import secateur as sc
from rows import Rows
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build, example_input
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gentle.json"
BATCH = 128
SETTINGS: dict[str, dict[str, Any]] = {
    "lenet5": {"data": "mnist", "epochs": 6, "lr": 0.01, "augment": False, "every": 2},
    "resnet8": {"data": "cifar10", "epochs": 6, "lr": 0.02, "augment": True, "every": 2},
    "resnet20": {"data": "cifar10", "epochs": 6, "lr": 0.02, "augment": True, "every": 2},
}
STRATEGY = "uniform"  # as in the papers; by magnitude, "global" leaves blocks of a ResNet with a single channel
MACS = (0.5, 0.25)
HANDLES: dict[str, Any] = {
    "increg": lambda *a, every, seed, **k: sc.IncReg(*a, rate=0.02, limit=1.0, every=every, **k),
    "greg1": lambda *a, every, seed, **k: sc.GReg(*a, rate=0.02, limit=1.0, every=every, **k),
    "spp": lambda *a, every, seed, **k: sc.SPP(*a, rate=0.05, every=every, seed=seed, **k),
}
METHODS = ("magnitude", *HANDLES)


def train(name: str, model: nn.Module, epochs: int, schedule: str, seed: int, work: Path, *handles: Any) -> Any:
    """A part of a training; returns the handles, which were made for its optimizer."""
    setting = SETTINGS[name]
    data = load(setting["data"], validation=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting["lr"], momentum=0.9, weight_decay=5e-4)
    batches = data.loader("train", BATCH, shuffle=True, augment=setting["augment"], seed=seed)
    attached = [make(optimizer) for make in handles]
    fit(
        model, optimizer, batches, epochs=epochs, schedule=schedule, progress=False, checkpoint_dir=work,
        after_step=attached, channels_last=True,
    )  # fmt: skip
    return attached


def one(name: str, method: str, macs: float, seed: int, work: Path) -> dict[str, Any]:
    """One method on one network, from the trained network to the fine-tuned small one."""
    setting = SETTINGS[name]
    model, inputs = build(name), torch.zeros(example_input(name))
    model.load_state_dict(load_file(HERE / "checkpoints" / f"{name}_{setting['data']}_seed{seed}.safetensors"))
    graph, budget, epochs = sc.trace(model, inputs), sc.Budget(macs=macs, round_to=1), setting["epochs"]
    row: dict[str, Any] = {
        "network": name,
        "method": method,
        "macs": macs,
        "seed": seed,
        **setting,
        "strategy": STRATEGY,
    }
    if method == "magnitude":
        plan = sc.allocate(graph, sc.score(model, graph, "magnitude"), budget, strategy=STRATEGY)
    else:
        make = HANDLES[method]
        (handle,) = train(
            name, model, epochs // 2, "constant", seed, work / "prune",
            lambda optimizer: make(
                model, graph, optimizer, budget=budget, every=setting["every"], seed=seed, strategy=STRATEGY
            ),
        )  # fmt: skip
        row["steps"] = handle.steps
        handle.detach()
        plan = handle.plan()
    small = sc.cut(model, plan)
    rest = epochs if method == "magnitude" else epochs - epochs // 2
    train(name, small, rest, "one_cycle", 100 + seed, work / "tune")  # other batches than those of the pruning
    data = load(setting["data"], validation=0.1)
    for split in ("validation", "test"):
        row[split] = accuracy(small, data.loader(split, 500))
    return row | {"remaining": graph.macs(plan) / graph.macs(), "widths": graph.kept(plan).tolist()}


def cost(steps: int = 20) -> dict[str, Any]:
    """Seconds of a training step with an update in it, ResNet-20, batch 128; medians of steps in changing order.

    Ten steps go before, so that SPP masks up to half of the channels that shall go.
    """
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    loops: dict[str, Any] = {}
    for name in ("plain", *HANDLES):
        model = build("resnet20")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        graph = sc.trace(model, x[:1])
        given = {"budget": sc.Budget(macs=0.5, round_to=1), "every": 1, "seed": 0}
        loops[name] = (model, optimizer, None if name == "plain" else HANDLES[name](model, graph, optimizer, **given))
    times: dict[str, list[float]] = {name: [] for name in loops}
    order = list(loops)
    for step in range(steps + 10):
        for name in order:
            model, optimizer, handle = loops[name]
            start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if handle is not None:
                handle.step()
            if step >= 10:
                times[name].append(time.perf_counter() - start)
        order = order[1:] + order[:1]
    ratios = {n: [a / b for a, b in zip(times[n], times["plain"], strict=True)] for n in HANDLES}
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "quartiles": {name: statistics.quantiles(values)[::2] for name, values in ratios.items()},
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds."""
    for key in sorted({(r["network"], -r["macs"], METHODS.index(r["method"])) for r in rows}):
        own = [r for r in rows if (r["network"], -r["macs"], METHODS.index(r["method"])) == key]
        test = [100 * r["test"] for r in own]
        spread = statistics.stdev(test) if len(test) > 1 else 0.0
        found = f"{statistics.mean(test):.2f} ± {spread:.2f}"
        print(f"{key[0]:10} {-key[1]:.0%} {METHODS[key[2]]:10} {len(own)} seeds {found}")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["accuracy", "cost"])
    parser.add_argument("--networks", nargs="+", default=["lenet5"], choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--macs", nargs="+", type=float, default=list(MACS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/gentle"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = Rows(given.out)
    if "cost" in given.what:
        found = cost()
        kept.state(cost=found)
        print(found)
    if "accuracy" in given.what:
        for name in given.networks:
            for seed in given.seeds:
                for macs in given.macs:
                    for method in given.methods:
                        key = {"network": name, "method": method, "macs": macs, "seed": seed}
                        key |= SETTINGS[name] | {"strategy": STRATEGY}
                        if kept.has(key):
                            continue
                        work = given.work / f"{name}-{method}-{macs:g}-{seed}"
                        row = one(name, method, macs, seed, work)
                        kept.add(row)
                        print(row, flush=True)
        report(kept.rows)


if __name__ == "__main__":
    main()
