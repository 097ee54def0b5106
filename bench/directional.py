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
from itertools import islice
from typing import Any

import torch
from torch import nn

import secateur as sc
from oneshot import HERE, Make, Setting, run
from secateur.repair.compensate import compensated_weights
from secateur.repair.contract import copy_remaining

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

    def method(
        name: str, scores: Any, move: Callable[[nn.Module, sc.Plan], Any] = lambda small, plan: None
    ) -> tuple[str, Make]:
        def make(budget: sc.Budget) -> nn.Module:
            plan = sc.allocate(graph, scores, budget, strategy="threshold" if "one lambda" in name else "global")
            small = sc.cut(model, plan)
            move(small, plan)
            if name.endswith("refit"):
                sc.refit(model, small, plan, seen)
            return small

        return name, make

    if wanted & {"magnitude", "magnitude + refit"}:
        scores = sc.score(model, graph, "magnitude")
        yield from (method(name, scores) for name in ("magnitude", "magnitude + refit") if name in wanted)
    if wanted & {"taylor", "taylor + consumers", "taylor + refit"}:
        scores = sc.score(model, graph, "taylor", data=seen, loss="cross_entropy")
        yield from (method(name, scores) for name in ("taylor", "taylor + refit") if name in wanted)
        if "taylor + consumers" in wanted:
            factors = sc.kronecker_factors(model, seen, "cross_entropy")

            def make_up(small: nn.Module, plan: sc.Plan) -> None:
                copy_remaining(compensated_weights(model, plan, factors, at="consumers"), small, plan)

            yield method("taylor + consumers", scores, make_up)
    if wanted & set(METHODS[5:]):
        work = sc.Workload(model, seen, "cross_entropy")  # the projector is found once, for scores and repairs
        scores = sc.Directional(share=SHARE, soft=True).scores(graph, work)
        if "selection" in wanted:
            yield method("selection", scores)
        for name in METHODS[6:]:
            if name in wanted:
                directed = sc.Directed(mode="radial" if name == "radial" else "valley", share=SHARE, soft=True)

                def along(small: nn.Module, plan: sc.Plan, directed: sc.Directed = directed) -> None:
                    directed.apply(model, small, plan, work)

                yield method(name, scores, along)


if __name__ == "__main__":
    run(__doc__ or "", HERE / "results" / "directional.json", SETTINGS, METHODS, makers, share=SHARE)
