"""What each part of the default adds: criteria, widths and repairs, by name, on networks that were trained before.

A configuration is three names, ``criterion/strategy/repair``, channel by channel (``round_to=1``); ``outputs`` is
``schur`` by how far the outputs move and not by the loss; ``auto`` is :func:`secateur.prune` with nothing but data,
which is that, with rounded widths; EigenDamage rotates instead, ``hybrid`` does both (``hybrid/auto`` with rounded
widths). All see
the same 3,200 training images, without augmentation, and nothing is trained but where ``distill`` is named (200 steps
of 128 of the same images; ``distill_more``: of others). Settings were chosen on held-out training images; this is on
the test set. Rows that are there are not run again, so the bench can be stopped at any time::

    python bench/ablation.py resnet20 resnet8 lenet5 lenet_300_100 small_vit --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

import secateur as sc
from oneshot import HERE, Make, Setting, run

CONFIGURATIONS = (
    "auto", "outputs/global/refit",
    "magnitude/global/recalibrate", "magnitude/uniform/recalibrate", "taylor/global/recalibrate",
    "taylor/uniform/recalibrate", "kron_obs/global/none", "kron_obs/global/compensate",
    "kron_obs/global/refit", "obs/global/recalibrate", "schur/uniform/recalibrate", "schur/global/recalibrate",
    "magnitude/global/refit", "magnitude/uniform/refit", "taylor/global/refit", "taylor/uniform/refit",
    "obs/global/refit", "schur/uniform/refit", "schur/global/refit", "schur/threshold/refit", "schur/sensitivity/refit",
    "taylor/sensitivity/refit", "outputs/global/refit+distill", "outputs/global/refit+distill_more",
    "magnitude/uniform/distill", "eigendamage/none", "eigendamage/refit", "hybrid/auto", "hybrid/refit",
    "hybrid/refit+distill", "hybrid/refit+distill_more",
)  # fmt: skip
STEPS = 200
SETTINGS = {
    "lenet_300_100": Setting("mnist", 25, 10_000, {"params": (0.2, 0.1, 0.05)}),
    "lenet5": Setting("mnist", 25, 10_000, {"params": (0.13, 0.1, 0.08)}),
    "resnet8": Setting("cifar10", 25, 10_000, {"params": (0.4,), "macs": (0.5, 0.3)}),
    "resnet20": Setting("cifar10", 25, 10_000, {"params": (0.4,), "macs": (0.5, 0.3)}),
    "small_vit": Setting("mnist", 25, 10_000, {"params": (0.4,), "macs": (0.5, 0.3)}),
}


def makers(
    model: nn.Module, inputs: torch.Tensor, images: Any, batches: int, seed: int, wanted: set[str]
) -> Iterator[tuple[str, Make]]:
    """Every wanted configuration, as a function from a budget to a smaller network."""
    fixed = list(islice(images, batches))
    repairs: dict[str, Any] = {"distill": sc.Distill(steps=STEPS, seed=seed)}
    for name in CONFIGURATIONS:
        if name not in wanted:
            continue

        def make(budget: sc.Budget, name: str = name) -> nn.Module:
            given: dict[str, Any] = {}
            if name == "auto":
                budget = replace(budget, round_to="auto")
            elif name.startswith("eigendamage"):
                given = {"fisher": "exact", "repair": name.split("/")[1]}
                return sc.eigendamage(model, inputs, budget, data=fixed, loss="cross_entropy", **given).model
            elif name.startswith("hybrid"):
                rounded, after = name == "hybrid/auto", name.split("/")[1].replace("auto", "refit")
                some = [repairs.get(one, one) for one in after.split("+") if one != "distill_more"]
                budget = replace(budget, round_to="auto") if rounded else budget
                small = sc.hybrid(model, inputs, budget, data=fixed, repair=some).model
                if name.endswith("distill_more"):
                    sc.distill(model, small, None, islice(images, STEPS), steps=STEPS, seed=seed)
                return small
            else:
                criterion, strategy, after = name.split("/")
                some = [one for one in after.split("+") if one != "distill_more"]
                given = {
                    "criterion": sc.CRITERIA.make("schur", {"fisher": "outputs"})
                    if criterion == "outputs"
                    else criterion,
                    "strategy": strategy,
                    "repair": [repairs.get(one, one) for one in some],
                }
            result = sc.prune(model, inputs, budget, data=fixed, loss="cross_entropy", **given)
            if name.endswith("distill_more"):
                sc.distill(model, result.model, result.plan, islice(images, STEPS), steps=STEPS, seed=seed)
            return result.model

        yield name, make


if __name__ == "__main__":
    run(__doc__ or "", HERE / "results" / "ablation.json", SETTINGS, CONFIGURATIONS, makers)
