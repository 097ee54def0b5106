"""Kronecker factors against a plain forward and backward pass, and against curvlinops' K-FAC, side by side in one run.

Each round runs every contender once over the same batches, in turn, so that whatever else the machine does meets all;
ratios are those of the medians. Peak memory is what tensors hold during a pass, counted at PyTorch's dispatcher, beyond
the model and the batches. Prints a table, writes ``bench/results/factors.json``::

    python bench/factors.py vgg16_bn resnet20 --threads 1 2
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import secateur as sc
from secateur.curvature.kronecker import Curvature
from secateur.lab.models.registry import build, example_input

with warnings.catch_warnings():  # what it imports uses torch.jit
    warnings.simplefilter("ignore", DeprecationWarning)

RESULTS = Path(__file__).parent / "results" / "factors.json"
TARGETS = {"channel / plain": 1.5, "curvlinops / channel": 3.0, "curvlinops / full": 1.0}
Batches = list[tuple[Tensor, Tensor]]


def plain(model: nn.Module, batches: Batches) -> None:
    """Forward and backward, as a training step does them."""
    for x, y in batches:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
    model.zero_grad(set_to_none=True)


def ours(form: str, positions: int | None = None) -> Callable[[nn.Module, Batches], Any]:
    """Our factors in one form."""
    return lambda model, batches: sc.kronecker_factors(model, batches, "cross_entropy", form=form, positions=positions)


def theirs(model: nn.Module, batches: Batches) -> Any:
    """The same factors as our full form, by curvlinops, with one drawn target per example."""
    from curvlinops import KFACLinearOperator

    found = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), kernels(model), batches, fisher_type="mc", mc_samples=1,
        separate_weight_and_bias=False, check_deterministic=False, num_data=sum(len(x) for x, _ in batches),
    )  # fmt: skip
    return found.compute_kronecker_factors()


def kernels(model: nn.Module) -> list[nn.Parameter]:
    """What has factors: the parameters of linears and convolutions."""
    return [p for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters()]


CONTENDERS: dict[str, Callable[[nn.Module, Batches], Any]] = {
    "plain": plain,
    "channel": ours("channel"),
    "full": ours("full"),
    "full, 4096 positions": ours("full", 4096),
    "curvlinops": theirs,
}


class Held(TorchDispatchMode):
    """How many bytes the tensors made meanwhile hold, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def _see(self, tensors: Iterable[Any]) -> None:
        for t in tensors:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and look at what it made."""
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self._see(t for t in tree_iter(out) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given)
        return out


def held(run: Callable[[], Any]) -> tuple[int, Any]:
    """Peak bytes of a run, and what it returns."""
    with Held() as meter:
        result = run()
    return meter.peak, result


def activations(model: nn.Module, batches: Batches) -> None:
    """Forward and backward without a gradient of any parameter."""
    x, y = batches[0]
    for p in model.parameters():
        p.requires_grad_(False)
    F.cross_entropy(model(x.requires_grad_()), y).backward()
    for p in model.parameters():
        p.requires_grad_()
    x.requires_grad_(False).grad = None


def memory(model: nn.Module, batches: Batches) -> dict[str, int]:
    """Peak bytes of every contender, of one batch's activations and of the factors alone."""
    found = {"activations": held(lambda: activations(model, batches))[0]}
    for name, run in CONTENDERS.items():
        found[name], result = held(lambda run=run: run(model, batches))
        if isinstance(result, Curvature):
            found[f"{name}: factors"] = sum(4 * (f.a.numel() + f.g.numel()) for f in result.values())
    return found


def measure(model: nn.Module, batches: Batches, rounds: int) -> dict[str, list[float]]:
    """Seconds that each contender takes, a number a round."""
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds + 1):  # the first warms up
        for name, run in CONTENDERS.items():
            start = time.perf_counter()
            run(model, batches)
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """What the targets are about, of medians."""
    median = {name: statistics.median(values) for name, values in times.items()}
    return {pair: median[pair.split(" / ")[0]] / median[pair.split(" / ")[1]] for pair in TARGETS}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["vgg16_bn", "resnet20"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = []
    for name in given.networks:
        torch.manual_seed(0)
        model = build(name).eval()
        shape = example_input(name)[1:]
        batches = [(torch.randn(given.batch, *shape), torch.randint(10, (given.batch,))) for _ in range(given.batches)]
        peaks = memory(model, batches)
        print(name, {k: f"{v / 1e6:.1f} MB" for k, v in peaks.items()}, flush=True)
        for threads in given.threads:
            torch.set_num_threads(threads)
            times = measure(model, batches, given.rounds)
            row = {"network": name, "threads": threads, "seconds": times, "ratios": ratios(times), "bytes": peaks}
            rows.append(row)
            print(f"{name}, {threads} threads:", {k: round(statistics.median(v), 3) for k, v in times.items()})
            for pair, value in row["ratios"].items():
                print(f"  {pair}: {value:.2f} (target {TARGETS[pair]})", flush=True)
    result = {
        "what": f"one pass over {given.batches} batches of {given.batch}, float32, eval mode, one draw a target",
        "targets": TARGETS, "rows": rows, "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
