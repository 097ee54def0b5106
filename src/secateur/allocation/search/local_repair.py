"""The layers that read channels, fitted to make up for those that go; nothing else of the network moves.

To second order the best that a layer can do when it loses columns is known in closed form, from the second moments of
its inputs (:func:`secateur.curvature.obs_update.obs_update_columns`). Tried widths are then judged as the repair
``"refit"`` would leave them, nearly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from secateur._internal.errors import CannotMeasure
from secateur._internal.workload import Workload
from secateur.allocation.problem import Problem
from secateur.curvature.fisher import Fisher, quiet_kind
from secateur.curvature.kronecker import Factors, factors_of
from secateur.curvature.obs_update import obs_update_columns
from secateur.curvature.projections import projections
from secateur.curvature.readers import POSITIONS, layer_of, readers

DAMPING = 1e-3
KEPT = 16
"""Weights that are kept of each layer, for widths that come again."""


class LocalRepair:
    """Weights that make up for channels that go.

    Args:
        work: the model and the data.
        problem: which channels the items are.

    Attributes:
        left: layers that read channels and stay as they are -> why.
    """

    def __init__(self, work: Workload, problem: Problem) -> None:
        graph = problem.meter.graph
        how = Fisher(quiet_kind(work.loss))  # of its outputs, which do not matter here; a criterion may have both
        with projections(work.model):
            reading, names = readers(work.model, graph)
            factors, skipped = _measured(work, how, names)
        self.left: dict[str, str] = {}
        self._layers: dict[str, tuple[Factors, list[tuple[int, Tensor]]]] = {}
        self._known: dict[str, OrderedDict[bytes, dict[str, Tensor]]] = {}
        for index, order in problem.orders.items():
            group = graph.groups[index]
            for axis in group.consumers:
                if layer_of(axis) not in reading[group.name]:
                    self.left[axis.name] = "no plain linear or convolution reads with it"
            for path, places in reading[group.name].items():
                if path not in factors:
                    self.left[path] = skipped.get(path, "it was not measured")
                elif factors[path].layer.groups > 1:
                    self.left[path] = "it is grouped"
                elif places.shape[0] != len(group):
                    self.left[path] = "it reads some channels at more places than others"
                else:
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
            given = torch.zeros(factors.layer.inputs, dtype=torch.bool)
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
        layer, module = factors.layer, factors.layer.module
        found = {layer.parameter("weight"): weight.to(module.weight)}
        if bias is not None:
            found[layer.parameter("bias")] = bias.to(module.bias)
        known[key] = found
        if len(known) > KEPT:
            known.popitem(last=False)
        return found


def _measured(work: Workload, how: Fisher, names: Sequence[str]) -> tuple[Mapping[str, Factors], Mapping[str, str]]:
    """The factors of layers, and why others have none."""
    if not names:
        return {}, {}
    try:
        found = factors_of(work, how, form="full", layers=names, positions=POSITIONS)
    except CannotMeasure as error:
        return {}, dict.fromkeys(names, str(error))
    return found, found.skipped
