"""Directional pruning at once against magnitude and Taylor: same budgets, same images, nothing trained afterwards.

``radial`` is the closed form of structured directional pruning, ``valley`` ours, in which what stays makes up for what
goes; ``taylor + consumers`` has Taylor's choice of channels with the same making up, to tell the two apart. ``+ refit``
fits the cut network to the original, layer by layer; ``one lambda`` is the published rule, the same strength for all
channels, where the others weigh what a channel frees of the budget. How flat is flat (``SHARE``, soft) was chosen on
held-out images of LeNet-5, seed 0. Rows that are there are not run again::

    python bench/directional.py lenet5 resnet20 --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

import secateur as sc
from oneshot import HERE, Make, Setting, run

SHARE = 0.99
METHODS = (
    "magnitude", "magnitude + refit", "taylor", "taylor + consumers", "taylor + refit", "selection", "radial", "valley",
    "valley + refit", "valley, one lambda + refit",
)  # fmt: skip
SETTINGS = {
    "lenet5": Setting("mnist", 100, 10_000, {"params": (0.4, 0.2, 0.1), "macs": (0.5, 0.3, 0.2)}),
    "resnet20": Setting("cifar10", 25, 2_500, {"params": (0.6, 0.4), "macs": (0.6, 0.4)}),
}


def makers(
    model: nn.Module, inputs: torch.Tensor, images: Any, batches: int, seed: int, wanted: set[str]
) -> Iterator[tuple[str, Make]]:
    """Every wanted method, as a function from a budget to a smaller network."""
    graph = sc.trace(model, inputs)
    seen = list(islice(images, batches))

    def method(name: str, scores: Any, move: Callable[[Any], nn.Module] | None = None) -> tuple[str, Make]:
        def make(budget: sc.Budget) -> nn.Module:
            plan = sc.allocate(graph, scores, budget, strategy="threshold" if "one lambda" in name else "global")
            small = sc.cut(model if move is None else move(plan), plan)
            if name.endswith("refit"):
                sc.refit(model, small, plan, seen)
            return small

        return name, make

    if wanted & {"magnitude", "magnitude + refit"}:
        scores = sc.score(model, graph, "magnitude")
        yield from (method(name, scores) for name in ("magnitude", "magnitude + refit") if name in wanted)
    if wanted & {"taylor", "taylor + consumers", "taylor + refit"}:
        scores = sc.score(model, graph, "taylor", data=seen, loss_fn="cross_entropy")
        yield from (method(name, scores) for name in ("taylor", "taylor + refit") if name in wanted)
        if "taylor + consumers" in wanted:
            factors = sc.kronecker_factors(model, seen)
            yield method("taylor + consumers", scores, partial(obs_update, model, factors))
    if wanted & set(METHODS[5:]):
        flat = sc.null_space_projector(model, seen, "cross_entropy", share=SHARE, soft=True)
        scores = sc.score(model, graph, "directional", flat=flat)
        if "selection" in wanted:
            yield method("selection", scores)
        for name in METHODS[6:]:
            if name in wanted:
                mode = "radial" if name == "radial" else "valley"
                yield method(name, scores, partial(directed, model, flat, mode))


def obs_update(model: nn.Module, factors: Any, plan: sc.Plan) -> nn.Module:
    """What stays of the consumers makes up for what goes."""
    return sc.compensated(model, plan, factors, at="consumers")


def directed(model: nn.Module, flat: Any, mode: str, plan: sc.Plan) -> nn.Module:
    """Where the pruning along the valley ends."""
    return sc.directed(model, plan, flat, mode=mode)


if __name__ == "__main__":
    run(__doc__ or "", HERE / "results" / "directional.json", SETTINGS, METHODS, makers, share=SHARE)
