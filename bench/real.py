"""Networks that others trained, pruned without training, by data alone: their own metric and the time.

A row a network, method, budget and seed; the seed draws the data that prune. ``secateur`` and ``secateur.hybrid`` are
:func:`secateur.prune` and :func:`secateur.hybrid` with nothing but inputs; ``magnitude`` takes the same part of every
group, ``+refit`` fits the rest to the original. ``taylor``, torch-pruning and torch-kirigami get labels too, and the
largest network within the budget by bisection of what they take instead of MACs; of what is not refitted the batch
norms are re-estimated where the same images bear that out (by accuracy, or by the whole's outputs where there are no
labels). Latency is timed for the first seed: whole and cut in turn, batch of the example inputs, one thread
(:func:`secateur.compare_latency`). Rows that are there are not run again; a killed run goes on::

    python -m pip install --no-deps --target bench/.real -r bench/real.txt
    python bench/real.py                                   # all: hours on two cores
    python bench/real.py cifar-resnet20 minilm --seeds 0
    python bench/real.py --table
    python bench/real.py --told                            # a story before and after
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from peers import Images, better_norms, gradients_of, torch_pruning
from real_networks import HERE, NETWORKS, Network, told
from rows import Row, Rows
from secateur.measure.counting import counted
from secateur.result import frozen_data
from tables import cell

RESULTS = HERE / "results" / "real.json"
PAGE, BEGIN, END = HERE.parent / "docs" / "results.md", "<!-- real: written by bench/real.py -->", "<!-- real: end -->"
UNITS = {"macs": "MACs", "params": "parameters"}
BACKENDS = ("eager", "onnxruntime")


def smaller(name: str, of: Network, budget: sc.Budget, batches: list[Any], images: Images) -> nn.Module:
    """What a method leaves of a network."""
    model, inputs = of.model, of.inputs
    data = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    labelled = isinstance(batches[0], tuple)
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if name == "secateur":
        return sc.prune(model, inputs, budget, data=data).model
    if name == "secateur.hybrid":
        return sc.hybrid(model, inputs, budget, data=data).model
    if name in ("magnitude", "taylor"):
        given = {"data": batches, "loss": "cross_entropy"} if name == "taylor" else {}
        small = sc.prune(model, inputs, budget, criterion=name, strategy="uniform", repair="none", **given).model
        return small if not norms else better_norms(small, batches) if labelled else nearer_norms(model, small, data)
    if name == "magnitude+refit":
        return sc.prune(
            model, inputs, budget, data=data, criterion="magnitude", strategy="uniform", repair="refit"
        ).model
    peer, criterion, *scope = name.split("/")
    macs = int((budget.macs or 1.0) * counted(model, inputs)["macs"])
    if peer == "torch-pruning":
        return better_norms(torch_pruning(criterion, scope[0], model, inputs, images, macs), batches)
    return better_norms(kirigami(criterion, model, inputs, images, macs), batches)


@torch.no_grad()
def nearer_norms(whole: nn.Module, small: nn.Module, data: list[Any]) -> nn.Module:
    """The network with its norms re-estimated, if its outputs on the same inputs are nearer to the whole's so."""
    other = copy.deepcopy(small)
    sc.recalibrate(other, data, batches=len(data))
    wanted = [whole(x) for x in data]

    def distance(one: nn.Module) -> float:
        return sum(float((one(x) - y).square().sum()) for x, y in zip(data, wanted, strict=True))

    return min((small.eval(), other.eval()), key=distance)


def kirigami(criterion: str, model: nn.Module, inputs: Any, images: Images, macs: int) -> nn.Module:
    """The largest network that torch-kirigami gives within so many MACs, by bisection of its budget of parameters."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Greedy, GroupMagnitude, ParameterBudget, Pruner, WeightTaylor

    gradients = gradients_of(model, images) if criterion == "taylor" else {}

    def made(params: int) -> nn.Module:
        small = copy.deepcopy(model).eval()
        for name, p in small.named_parameters():
            p.grad = gradients[name].clone() if gradients else None
        pruner = Pruner(small, graph=DependencyGraph.build(small, args=(inputs,)))
        metric = WeightTaylor() if criterion == "taylor" else GroupMagnitude(p=2)
        pruner.prune(pruner.discover_candidates(), budget=ParameterBudget(max_params=params), strategy=Greedy(metric))
        for p in small.parameters():
            p.grad = None
        return small

    full = counted(model, inputs)
    near = macs / full["macs"]
    low, high, best = max(near - 0.15, 0.02), min(near + 0.15, 1.0), None
    for _ in range(5):  # a plan takes half a minute of a ResNet-20
        fraction = (low + high) / 2
        small = made(int(fraction * full["params"]))
        if counted(small, inputs)["macs"] <= macs:
            low, best = fraction, small
        else:
            high = fraction
    if best is None:
        raise sc.SecateurError("torch-kirigami: no network within the budget was found")
    return best


def latency(of: Network, small: nn.Module) -> Row:
    """How many times as fast as the whole it is, by backend, and the quartiles."""
    found = sc.compare_latency({"whole": of.model, "cut": small}, of.inputs, backends=BACKENDS, threads=1)
    rows = {(row["backend"], row["model"]): row for row in found.as_data()}
    return {
        backend: rows[backend, "cut"].get("why") or [
            round(rows[backend, "cut"][name], 3) for name in ("speed_up", "speed_up_low", "speed_up_high")
        ]
        for backend in BACKENDS
    }  # fmt: skip


def one(name: str, of: Network, seeds: list[int], methods: list[str], rows: Rows) -> None:
    """The rows of a network that are missing."""
    full = counted(of.model, of.inputs)
    for seed in seeds:
        key: Row = {"network": name, "seed": seed, "method": "whole", "fraction": 1.0}
        if not rows.has(key):
            keep(rows, key | {"unit": of.unit, "macs": 1.0, "params": 1.0} | of.measure(of.model, seed))
        batches: list[Any] = []
        for fraction in of.fractions:
            for method in of.methods:
                key = {"network": name, "seed": seed, "method": method, "fraction": fraction}
                if method not in methods or rows.has(key):
                    continue
                if not batches:
                    batches = of.data(seed)
                    images = Images(batches)
                start = time.perf_counter()
                try:
                    budget = sc.Budget(**{of.unit: of.part(fraction)})
                    small = smaller(method, of, budget, batches, images).eval()
                except sc.SecateurError as error:
                    keep(rows, key | {"unit": of.unit, "refused": str(error).split(":")[0]})
                    continue
                row = key | {"unit": of.unit, "seconds": round(time.perf_counter() - start, 1)}
                row |= {unit: n / full[unit] for unit, n in counted(small, of.inputs).items()}
                row |= of.measure(small, seed)
                if seed == 0 and "/" not in method and method != "taylor":
                    row["latency"] = latency(of, small)
                keep(rows, row)


def keep(rows: Rows, row: Row) -> None:
    """Write a row, and show it."""
    rows.add(row)
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def page(name: str, of_rows: list[Row], about: dict[str, Any]) -> str:
    """A network's table, and what was frozen in it."""
    metric, unit, _ = about["metric"]
    rows = [r for r in of_rows if r["network"] == name]
    seeds = sorted({r["seed"] for r in rows})
    whole = [r["metric"] for r in rows if r["method"] == "whole"]
    fractions = sorted({r["fraction"] for r in rows if r["method"] != "whole"}, reverse=True)
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"] != "whole"))
    of = UNITS[rows[0]["unit"]]
    lines = [
        f"**{name}**: {about['about']}. {metric[0].upper()}{metric[1:]}{f' ({unit})' if unit else ''}; "
        f"whole {cell(whole, 1, 2)}; {len(seeds)} seed{'s' * (len(seeds) > 1)}.",
        "",
        f"| method | {' | '.join(f'{100 * f:g} % of the {of}' for f in fractions)} | MACs, parameters (%) at "
        f"{100 * fractions[-1]:g} % | times as fast there: eager, ONNX Runtime | seconds |",
        "|---" * (len(fractions) + 4) + "|",
    ]
    for method in methods:
        own = [r for r in rows if r["method"] == method]
        cells = []
        for fraction in fractions:
            at = [r for r in own if r["fraction"] == fraction]
            refused = next((r["refused"] for r in at if "refused" in r), None)
            cells.append(refused or cell([r["metric"] for r in at if "metric" in r], len(seeds), 2))
        last = next((r for r in own if r["fraction"] == fractions[-1] and "metric" in r), None)
        sizes = f"{100 * last['macs']:.1f}, {100 * last['params']:.1f}" if last else "-"
        timed = next((r["latency"] for r in own if r["fraction"] == fractions[-1] and "latency" in r), None)
        shown = ", ".join(_ratio(timed[b]) for b in BACKENDS) if timed else "-"
        seconds = [r["seconds"] for r in own if "seconds" in r]
        took = f"{statistics.median(seconds):.0f}" if seconds else "-"
        lines.append(f"| `{method}` | {' | '.join(cells)} | {sizes} | {shown} | {took} |")
    lines += ["", f"Frozen: {about['advice']}", ""]
    for found in about["frozen"]:
        axes, more = ", ".join(f"`{axis}`" for axis in found["some"]), found["axes"] - len(found["some"])
        lines.append(
            f"- {found['positions']:,} positions, {axes}{f' and {more} more' if more else ''}: {found['reason']} "
            f"(`{found['operation']}`); to do: {found['advice']}"
        )
    return "\n".join([*lines, ""])


def _ratio(found: Any) -> str:
    return found if isinstance(found, str) else f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"


def stories_before_and_after() -> str:
    """The story that the Llama tells, whole and cut."""
    of = NETWORKS["stories260k"]()
    batches = of.data(0)
    lines = [f"whole: {told(of.model)}", ""]
    for fraction in of.fractions:
        small = smaller("secateur", of, sc.Budget(params=of.part(fraction)), batches, Images(batches)).eval()
        lines += [f"{fraction:.0%} of the parameters without embeddings: {told(small)}", ""]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="these alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the pages of what is there")
    parser.add_argument("--write", action="store_true", help="put them into docs/results.md")
    parser.add_argument("--told", action="store_true", help="print a story before and after")
    given = parser.parse_args()
    if unknown := set(given.networks) - set(NETWORKS):
        parser.error(f"no such network: {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = Rows(given.out, machine=platform.processor() or platform.machine(), torch=torch.__version__)
    if given.told:
        print(stories_before_and_after())
        return
    make: Callable[[], Network]
    for name, make in ((name, NETWORKS[name]) for name in ([] if given.table or given.write else given.networks)):
        of = make()
        about = rows.fact("about", {})
        frozen = frozen_data(sc.trace(of.model, of.inputs).frozen, most=3)
        known = {"about": of.about, "metric": of.metric, "advice": of.advice, "frozen": frozen}
        rows.state(about=about | {name: known})
        one(name, of, given.seeds, given.methods or list(of.methods), rows)
    about = rows.fact("about", {})
    there = [n for n in given.networks if any(r["network"] == n and r["method"] != "whole" for r in rows.rows)]
    pages = "\n".join(page(name, rows.rows, about[name]) for name in there)
    print(pages)
    if given.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{pages}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
