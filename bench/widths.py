"""What each part of a search for widths adds to the widths of least predicted rise: equal numbers of forwards.

Channels within a group go by ``schur`` (by how far the outputs move), what stays is fitted again (``refit``); nothing
is trained, widths are single channels. ``global`` looks at the predicted rises alone; ``sensitivity`` measures them;
``random``, ``bandit`` and ``duels`` begin from what sensitivity finds with a third of the forwards and try
combinations with the rest. While widths are tried the layers that read what goes make up for it, but not in
the bandit: there that was measured too (``bandit, repaired``), brought nothing and was taken out. All see the same
3,200 training images; rows that are there are not run again::

    python bench/widths.py lenet5 resnet20 --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

import secateur as sc
from oneshot import HERE, Make, Setting, run
from search import Random

METHODS = ("global", "sensitivity", "random", "bandit", "duels")
EVALUATIONS = 1000
SETTINGS = {
    "lenet5": Setting("mnist", 25, 10_000, {"macs": (0.5, 0.3)}),
    "resnet20": Setting("cifar10", 25, 10_000, {"macs": (0.5, 0.3)}),
}


def makers(
    model: nn.Module, inputs: torch.Tensor, images: Any, batches: int, seed: int, wanted: set[str]
) -> Iterator[tuple[str, Make]]:
    """Every wanted way to choose widths, as a function from a budget to a smaller network."""
    fixed = list(islice(images, batches))
    given = {"evaluations": EVALUATIONS, "seed": seed}
    ways: dict[str, Any] = {
        "global": "global", "sensitivity": sc.Sensitivity(**given), "random": Random(**given, start="sensitivity"),
        "bandit": sc.Bandit(**given), "duels": sc.Bandit(dueling=True, **given),
    }  # fmt: skip
    for name in METHODS:
        if name not in wanted:
            continue

        def make(budget: sc.Budget, way: Any = ways[name]) -> nn.Module:
            return sc.prune(
                model, inputs, budget, data=fixed, loss="cross_entropy", criterion=sc.Schur(fisher="outputs"),
                strategy=way, repair="refit",
            ).model  # fmt: skip

        yield name, make


if __name__ == "__main__":
    run(__doc__ or "", HERE / "results" / "widths.json", SETTINGS, METHODS, makers, evaluations=EVALUATIONS)
