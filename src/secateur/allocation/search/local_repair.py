"""The layers that read channels, fitted to make up for those that go; nothing else of the network moves.

To second order the best that a layer can do when it loses columns is known in closed form, from the second moments of
its inputs (:func:`secateur.curvature.obs_update.obs_update_columns`). Tried widths are then judged as the repair
``"refit"`` would leave them, nearly.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from secateur._internal.workload import Workload
from secateur.allocation.problem import Problem
from secateur.curvature.fisher import Fisher
from secateur.curvature.kronecker import Factors, factors_of
from secateur.curvature.obs_update import obs_update_columns
from secateur.curvature.readers import readers

DAMPING = 1e-3
POSITIONS = 512
"""Of each batch, of a layer's inputs."""
KEPT = 16
"""Weights that are kept of each layer, for widths that come again."""


class LocalRepair:
    """Weights that make up for channels that go.

    Args:
        work: the model and the data.
        problem: which channels the items are.
    """

    def __init__(self, work: Workload, problem: Problem) -> None:
        graph = problem.meter.graph
        reading, names = readers(work.model, graph)
        factors = factors_of(work, Fisher(), form="full", layers=names, positions=POSITIONS) if names else {}
        self._layers: dict[str, tuple[Factors, list[tuple[int, Tensor]]]] = {}
        self._known: dict[str, OrderedDict[bytes, dict[str, Tensor]]] = {}
        for index, order in problem.orders.items():
            group = graph.groups[index]
            for path, places in reading[group.name].items():
                if path in factors and factors[path].layer.groups == 1 and places.shape[0] == len(group):
                    own = self._layers.setdefault(path, (factors[path], []))
                    own[1].append((index, torch.from_numpy(places.reshape(len(group), -1)[order])))
                    self._known[path] = OrderedDict()

    def weights(self, gone: np.ndarray) -> dict[str, Tensor]:
        """Parameters by name, in the shapes that they have, zero in columns that read what is gone.

        Args:
            gone: how many channels of every group go, int64 [groups].
        """
        found: dict[str, Tensor] = {}
        for path, (factors, places) in self._layers.items():
            given = torch.zeros(factors.layer.module.weight.shape[1], dtype=torch.bool)
            for group, positions in places:
                given[positions[: gone[group]].flatten()] = True
            if given.any():
                found |= self._fitted(path, factors, given)
        return found

    def _fitted(self, path: str, factors: Factors, given: Tensor) -> dict[str, Tensor]:
        known, key = self._known[path], given.numpy().tobytes()
        if key in known:
            known.move_to_end(key)
            return known[key]
        table = factors.layer.table().double()
        moved = table + obs_update_columns(factors, -table, given, DAMPING)
        weight, bias = factors.layer.weights(moved)
        module, before = factors.layer.module, f"{path}." if path else ""
        found = {f"{before}weight": weight.to(module.weight)}
        if bias is not None:
            found[f"{before}bias"] = bias.to(module.bias)
        known[key] = found
        if len(known) > KEPT:
            known.popitem(last=False)
        return found
