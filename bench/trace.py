"""Trace, plan and cut against torch-pruning, side by side in one run on one thread.

Both remove, by weight magnitude, half of the channels of every layer but the classifier's outputs. Ours is ``trace``,
``score``, ``allocate`` and ``cut``; theirs the building of a ``MagnitudePruner`` and its ``step``. Prints a table,
writes ``bench/results/trace.json``::

    python bench/trace.py --size 224 --repeats 3
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc
from networks import ZOO, DenseNet, ResNet

RESULTS = Path(__file__).parent / "results" / "trace.json"
SLOW = 20.0  # seconds after which one repeat is enough


class CountOperations(TorchDispatchMode):
    """Count the operations that a tracer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one call and run it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, x: Tensor) -> int:
    """Count the operations of one forward."""
    with torch.no_grad(), CountOperations() as counter:
        model(x)
    return counter.count


def ours(model: nn.Module, x: Tensor) -> nn.Module:
    """Halve every group by magnitude with secateur; the model stays as it was."""
    graph = sc.trace(model, x)
    scores = sc.score(model, graph, "magnitude")
    return sc.cut(model, sc.allocate(graph, scores, sc.Budget(channels=0.5), strategy="uniform"))


def theirs(model: nn.Module, x: Tensor) -> nn.Module:
    """Halve every group by magnitude with torch-pruning, in place."""
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    importance = tp.importance.MagnitudeImportance(p=1)
    pruner = tp.pruner.MagnitudePruner(model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[classifier])
    pruner.step()
    return model


def timed(prune: Callable[[nn.Module, Tensor], nn.Module], model: nn.Module, x: Tensor) -> tuple[float, int]:
    """Seconds of one call on a copy of the model, and the parameters that are left."""
    model = copy.deepcopy(model)
    start = time.perf_counter()
    small = prune(model, x)
    seconds = time.perf_counter() - start
    small(x)  # what came out must run
    return seconds, sum(parameter.numel() for parameter in small.parameters())


def compare(name: str, size: int, repeats: int) -> dict[str, Any]:
    """Time both on one network, turn by turn."""
    torch.manual_seed(0)
    model, x = ZOO[name]().eval(), torch.randn(1, 3, size, size)
    row: dict[str, Any] = {"network": name, "operations": operations(model, x), "params": {"before": _params(model)}}
    seconds: dict[str, list[float]] = {"secateur": [], "torch_pruning": []}
    for repeat in range(repeats):
        for tool, prune in (("secateur", ours), ("torch_pruning", theirs)):
            if tool in row.get("fails", {}) or (repeat and seconds[tool][0] > SLOW):
                continue
            try:
                elapsed, row["params"][tool] = timed(prune, model, x)
            except Exception as error:
                row.setdefault("fails", {})[tool] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            seconds[tool].append(elapsed)
    row["seconds"] = seconds
    row["median"] = {tool: statistics.median(values) for tool, values in seconds.items() if values}
    if len(row["median"]) == 2:
        row["ratio"] = row["median"]["torch_pruning"] / row["median"]["secateur"]
    return row


def linearity(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Our seconds per operation on the deepest network of each family over those on the shallowest: 1 is linear."""
    per_family: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        per_operation = row["median"]["secateur"] / row["operations"]
        if not row["network"].partition("-")[2].isdigit():
            continue
        per_family.setdefault(row["network"].split("-")[0], []).append((row["operations"], per_operation))
    return {family: max(points)[1] / min(points)[1] for family, points in per_family.items() if len(points) > 1}


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    params, median = row["params"], row["median"]
    if "ratio" not in row:
        found = "".join(f"{median[tool]:>10.3f}" if tool in median else f"{'fails':>10}" for tool in row["seconds"])
        return f"{row['network']:<14}{row['operations']:>6}{found}{'':>9}{params['before']:>12,}  {row['fails']}"
    once = " (1 repeat)" if len(row["seconds"]["torch_pruning"]) == 1 else ""
    return (
        f"{row['network']:<14}{row['operations']:>6}{median['secateur']:>10.3f}{median['torch_pruning']:>10.3f}"
        f"{row['ratio']:>8.1f}x{params['before']:>12,}{params['secateur']:>12,}{params['torch_pruning']:>12,}{once}"
    )


def main() -> None:
    """Run the whole comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(ZOO), help=f"of {', '.join(ZOO)}")
    parser.add_argument("--size", type=int, default=224, help="height and width of the example image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for prune in (ours, theirs):  # imports and first-call costs belong to neither
        for small in (ResNet((1, 1, 1, 1)), DenseNet((1, 1, 1, 1))):
            timed(prune, small.eval(), torch.randn(1, 3, 64, 64))

    print(f"{'network':<14}{'ops':>6}{'ours s':>10}{'t-p s':>10}{'ratio':>9}{'params':>12}{'ours':>12}{'t-p':>12}")
    rows = []
    for name in args.networks:
        rows.append(compare(name, args.size, args.repeats))
        print(show(rows[-1]), flush=True)
    ratio, linear = statistics.median(row["ratio"] for row in rows if "ratio" in row), linearity(rows)
    print(f"median ratio {ratio:.1f}x; seconds per operation, deepest over shallowest: {linear}")

    machine = {"torch": torch.__version__, "torch_pruning": "1.6.1", "cpu": platform.machine(), "threads": 1}
    setting = {"size": args.size, "repeats": args.repeats, "removed": "half of every group, by L1 magnitude"}
    result = {"setting": setting, "machine": machine, "median_ratio": ratio, "linearity": linear, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
