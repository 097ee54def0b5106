"""Accuracy without fine-tuning against what remains: all one-shot methods on the networks for measurements.

Every method sees the same training images, without augmentation; what remains is set by the same budgets, once in
parameters and once in MACs. Where a network has batch norms the accuracy is also given with their statistics
re-estimated on the same images. A budget that a method cannot meet is a row with its reason. Nothing is tuned here, so
all is measured on test images. Rows that are there are not run again, so the bench can be stopped at any time::

    python bench/damage.py lenet_300_100 lenet5 resnet20 --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import secateur as sc
from oneshot import HERE, Make, Setting, run
from secateur._internal.workload import Workload
from secateur.allocation.api import allocated
from secateur.methods.eigendamage import EigenDamage
from secateur.repair.api import repaired
from secateur.repair.compensate import Compensate
from secateur.scoring.api import scored

CHANNEL = ("random", "magnitude", "taylor", "obd", "obs", "kron_obd", "kron_obs")
ROTATED = {
    "eigendamage": {"ekfac": False, "rule": "lagrangian", "repair": "none"},
    "eigendamage_ekfac": {"ekfac": True, "rule": "lagrangian", "repair": "none"},
    "eigendamage_threshold": {"ekfac": False, "rule": "threshold", "repair": "none"},
    "eigendamage_refit": {"ekfac": False, "rule": "lagrangian", "repair": "refit"},
}
MANY = {"params": (0.8, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05), "macs": (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)}
SETTINGS = {
    "lenet_300_100": Setting("mnist", 100, 10_000, MANY),
    "lenet5": Setting("mnist", 100, 10_000, MANY),
    "resnet20": Setting("cifar10", 25, 2_500, {"params": (0.8, 0.6, 0.4, 0.2), "macs": (0.8, 0.6, 0.4)}),
}


def makers(
    model: nn.Module, inputs: torch.Tensor, images: Any, batches: int, seed: int, wanted: set[str]
) -> Iterator[tuple[str, Make]]:
    """Every wanted method, as a function from a budget to a smaller network."""
    graph = sc.trace(model, inputs)
    work = Workload(model, images, "cross_entropy", inputs=inputs)
    exact: dict[str, Any] = {"batches": batches, "fisher": "exact"}  # one draw would be mostly noise
    settings: dict[str, dict[str, Any]] = {"random": {"seed": seed}, "magnitude": {}, "taylor": {"batches": batches}}
    strategy = sc.STRATEGIES.make("global")
    for name in CHANNEL:
        if name not in wanted:
            continue
        scores = scored(sc.CRITERIA.make(name, settings.get(name, exact)), graph, work)
        repairs = [Compensate(**exact)] if name in {"obs", "kron_obs"} else []

        def cut(budget: sc.Budget, scores: Any = scores, repairs: Any = repairs) -> nn.Module:
            plan = allocated(graph, scores, budget, strategy, work)
            small = sc.cut(model, plan)
            repaired(repairs, model, small, plan, work)
            return small

        yield name, cut
    for name, setting in ROTATED.items():
        if name not in wanted:
            continue
        rotated = EigenDamage(**{**setting, **exact})

        def rotate(budget: sc.Budget, method: EigenDamage = rotated) -> nn.Module:
            return method.apply(model, inputs, budget, work).model

        yield name, rotate


if __name__ == "__main__":
    run(__doc__ or "", HERE / "results" / "damage.json", SETTINGS, (*CHANNEL, *ROTATED), makers)
