"""Directional pruning at once against magnitude and Taylor: same budgets, same images, nothing trained afterwards.

``radial`` is the closed form of structured directional pruning, ``valley`` ours, in which what stays makes up for what
goes; ``taylor + consumers`` has Taylor's choice of channels with the same making up, to tell the two apart. How flat is
flat (``SHARE``, soft) was chosen on held-out images of LeNet-5, seed 0. Rows that are there are not run again::

    python bench/directional.py lenet5 resnet20 --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

import secateur as sc
from oneshot import HERE, Make, Setting, run

SHARE = 0.99
METHODS = ("magnitude", "taylor", "taylor + consumers", "selection", "radial", "valley")
SETTINGS = {
    "lenet5": Setting("mnist", 100, 10_000, {"params": (0.4, 0.2, 0.1), "macs": (0.5, 0.3, 0.2)}),
    "resnet20": Setting("cifar10", 25, 2_500, {"params": (0.8, 0.6, 0.4), "macs": (0.8, 0.6, 0.4)}),
}


def makers(
    model: nn.Module, inputs: torch.Tensor, images: Any, batches: int, seed: int, wanted: set[str]
) -> Iterator[tuple[str, Make]]:
    """Every wanted method, as a function from a budget to a smaller network."""
    graph = sc.trace(model, inputs)
    seen = list(islice(images, batches))
    if "magnitude" in wanted:
        yield "magnitude", _plain(model, graph, sc.score(model, graph, "magnitude"))
    if wanted & {"taylor", "taylor + consumers"}:
        scores = sc.score(model, graph, "taylor", data=seen, loss_fn="cross_entropy")
        if "taylor" in wanted:
            yield "taylor", _plain(model, graph, scores)
        if "taylor + consumers" in wanted:
            factors = sc.kronecker_factors(model, seen)

            def made_up(budget: sc.Budget, scores: Any = scores) -> nn.Module:
                plan = sc.allocate(graph, scores, budget)
                return sc.cut(sc.compensated(model, plan, factors, at="consumers"), plan)

            yield "taylor + consumers", made_up
    if wanted & {"selection", "radial", "valley"}:
        flat = sc.flat_projector(model, seen, "cross_entropy", share=SHARE, soft=True)
        strength = sc.score(model, graph, "directional", flat=flat)
        if "selection" in wanted:
            yield "selection", _plain(model, graph, strength)
        for mode in ("radial", "valley"):
            if mode in wanted:

                def moved(budget: sc.Budget, mode: str = mode) -> nn.Module:
                    plan = sc.allocate(graph, strength, budget)
                    return sc.cut(sc.directed(model, plan, flat, mode=mode), plan)

                yield mode, moved


def _plain(model: nn.Module, graph: sc.ChannelGraph, scores: Any) -> Make:
    return lambda budget: sc.cut(model, sc.allocate(graph, scores, budget))


if __name__ == "__main__":
    run(__doc__ or "", HERE / "results" / "directional.json", SETTINGS, METHODS, makers, share=SHARE)
