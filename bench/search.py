"""Widths by a factored bandit against other ways to share a budget, the same number of forwards for all that look.

Channels within a group go by Taylor scores for all. ``uniform``, ``global`` and ``threshold`` do not look; ``bandit``
and ``duels`` are the search; ``random`` draws combinations around uniform widths that meet the budget, tries each on
one mini-batch and the ten best on all; ``sensitivity`` tries widths of every group alone, and takes greedily what costs
the least loss for the budget that it frees. Forwards see training images, with the statistics of the mini-batch;
measured is the test accuracy of the cut network, its norms re-estimated on the same images, nothing trained
(``tuned``: after one epoch). Rows that are there are not run again. ``overhead``: what the bandit itself takes beside
the forwards, with 200 factors of eight arms::

    python bench/search.py lenet5 resnet20 --seeds 0 1 2
    python bench/search.py overhead
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import secateur as sc
from rows import Rows
from secateur._internal.workload import Needs, Workload
from secateur.allocation.problem import Problem, fill
from secateur.allocation.search.arms import ArmTable
from secateur.allocation.search.bandit_strategy import RATIOS
from secateur.allocation.search.evaluator import Evaluator, SharedBatches
from secateur.allocation.strategies import uniform_items
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build, example_input
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "search.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "lenet5": {"data": "mnist", "batch": 128, "batches": 50, "evaluations": 1000, "tuned": True},
    "resnet20": {"data": "cifar10", "batch": 64, "batches": 50, "evaluations": 1500, "tuned": False},
}
CHANNELS_LAST = ("resnet20",)  # a quarter faster; the one channel of an image of digits makes no difference
MACS = (0.5, 0.3)
METHODS = ("uniform", "global", "threshold", "random", "sensitivity", "bandit", "duels")


@dataclass(frozen=True)
class Random:
    """Combinations at random around a start that meet the budget, each on one mini-batch; ten on all.

    The start is uniform widths, or those of sensitivity, which takes a third of the evaluations.
    """

    evaluations: int
    seed: int
    start: str = "uniform"
    needs: ClassVar[Needs] = Needs(data=True, loss=True)

    def widths(self, problem: Problem, work: Workload) -> np.ndarray:
        """How many channels every group keeps."""
        first, spent = uniform_items(problem), 0
        if self.start == "sensitivity":
            spent = self.evaluations // 3
            first = problem.taken(sc.Sensitivity(evaluations=spent, seed=self.seed).widths(problem, work))
        evaluate = Evaluator(work, problem, repair=self.start == "sensitivity")
        arms = ArmTable(problem, first, RATIOS)
        rng, found = np.random.default_rng(self.seed), []
        while len(found) < self.evaluations - spent - 10 * len(evaluate.batches):
            taken = arms.taken(rng.integers(0, arms.sizes))
            if problem.meter.met(problem.widths(taken)):
                batch = int(np.random.default_rng([self.seed, len(found)]).integers(len(evaluate.batches)))
                found.append((float(evaluate.rises([(taken, batch)])[0]), len(found), fill(problem, taken)))
        best = [taken for _, _, taken in sorted(found)[:10]]
        return problem.widths(min(best, key=evaluate.everywhere))


@contextmanager
def timed_evaluations() -> Iterator[list[float]]:
    """A list that grows by the seconds of every call that evaluates widths."""
    seconds, whole = [], SharedBatches.each

    def timed(*args: Any, **given: Any) -> Any:
        begun = time.perf_counter()
        found = whole(*args, **given)
        seconds.append(time.perf_counter() - begun)
        return found

    SharedBatches.each = timed
    try:
        yield seconds
    finally:
        SharedBatches.each = whole


def overhead(factors: int = 200, evaluations: int = 800) -> dict[str, Any]:
    """Seconds of forwards and of everything else in a search over a chain of convolutions, one thread."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    for _ in range(factors - 1):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    batches = [(torch.randn(32, 3, 8, 8), torch.randint(10, (32,))) for _ in range(4)]
    graph = sc.trace(model, batches[0][0])
    scores = sc.score(model, graph, "magnitude")
    ratios = (0.4, 0.5, 0.6, 0.8, 1.0, 1.1, 1.2, 1.4)
    bandit = sc.Bandit(evaluations=evaluations, ratios=ratios, start="uniform")
    work, start = Workload(model, batches, "cross_entropy"), time.perf_counter()
    with timed_evaluations() as seconds:
        sc.allocate(graph, scores, sc.Budget(macs=0.5, round_to=1), strategy=bandit, work=work)
    forwards = sum(seconds)
    own, found = time.perf_counter() - start - forwards, work.facts["search"]
    sizes = Counter(row["group"] for row in found["table"])
    assert len(sizes) == factors and set(sizes.values()) == {8}
    ms = {"bandit": 1000 * own / found["forwards"], "forward": 1000 * forwards / found["forwards"]}
    return {"factors": factors, "arms": 8, "evaluations": found["forwards"], "share": own / forwards, "ms": ms}


def one(name: str, method: str, macs: float, seed: int) -> dict[str, Any]:
    """One method on one network."""
    setting = SETTINGS[name]
    data = load(setting["data"], validation=0.1)
    model, inputs = build(name), torch.zeros(example_input(name))
    model.load_state_dict(load_file(HERE / "checkpoints" / f"{name}_{setting['data']}_seed{seed}.safetensors"))
    model.eval()
    batches = list(islice(data.loader("train", setting["batch"], shuffle=True, seed=seed), setting["batches"]))
    if name in CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)
        batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    graph = sc.trace(model, inputs)
    scores = sc.score(model, graph, "taylor", data=batches, loss="cross_entropy")
    given = {"evaluations": setting["evaluations"], "seed": seed}
    looks = {
        "random": Random(**given), "sensitivity": sc.Sensitivity(repair=False, **given), "bandit": sc.Bandit(**given),
        "duels": sc.Bandit(dueling=True, **given),
    }  # fmt: skip
    work, start = Workload(model, batches, "cross_entropy"), time.perf_counter()
    with timed_evaluations() as seconds:
        plan = sc.allocate(
            graph, scores, sc.Budget(macs=macs, round_to=1), strategy=looks.get(method, method), work=work
        )
    row: dict[str, Any] = {"network": name, "method": method, "macs": macs, "seed": seed, **setting}
    row["seconds"] = time.perf_counter() - start
    if "search" in work.facts:
        spent = {"evaluations": sum(seconds), "bandit": row["seconds"] - sum(seconds)}
        row |= work.facts["search"] | {"spent": spent}
    small = sc.cut(model, plan)
    sc.recalibrate(small, batches)
    row |= {"remaining": graph.macs(plan) / graph.macs(), "widths": graph.kept(plan).tolist()}
    row |= {split: accuracy(small, data.loader(split, 500)) for split in ("validation", "test")}
    if setting["tuned"]:
        optimizer = torch.optim.SGD(small.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        loader = data.loader("train", 128, shuffle=True, seed=seed)
        fit(small, optimizer, loader, epochs=1, schedule="one_cycle", progress=False, channels_last=True)
        row["test_tuned"] = accuracy(small.eval(), data.loader("test", 500))
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds."""
    for name, macs in dict.fromkeys((r["network"], r["macs"]) for r in rows):
        for method in METHODS:
            own = [r for r in rows if (r["network"], r["macs"], r["method"]) == (name, macs, method)]
            for key in ("test", "test_tuned"):
                values = [100 * r[key] for r in own if key in r]
                title = f"{name:9} {macs:.0%} {method:12} {key:10}"
                if values:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    print(f"{title} {statistics.mean(values):.2f} ± {spread:.2f}, {len(values)} seeds")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    wrong = [name for name in given.networks if name not in (*SETTINGS, "overhead")]
    if wrong:
        parser.error(f"{wrong[0]}: there are {', '.join(SETTINGS)} and overhead")
    torch.set_num_threads(1)
    kept = Rows(given.out, note="CIFAR-10 is stored as JPEG")
    if "overhead" in given.networks:
        found = overhead()
        kept.state(overhead=found)
        print(found)
    for name in (name for name in given.networks if name in SETTINGS):
        for seed in given.seeds:
            for macs in MACS:
                for method in given.methods:
                    key = {"network": name, "method": method, "macs": macs, "seed": seed} | SETTINGS[name]
                    if kept.has(key):
                        continue
                    row = one(name, method, macs, seed)
                    kept.add(row)
                    print({k: row[k] for k in ("network", "method", "macs", "seed", "test", "seconds")}, flush=True)
    report(kept.rows)


if __name__ == "__main__":
    main()
