"""The linears and convolutions that read channels, and at which columns of their weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from secateur.curvature.layers import module_of, reads_by
from secateur.tracing.graph import Axis, ChannelGraph, ChannelGroup

POSITIONS = 512
"""So many positions of each batch tell enough of the inputs of what reads channels."""


def readers(model: nn.Module, graph: ChannelGraph) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """What reads every group (see :func:`readers_of`), by the groups' names; and the names of all these layers."""
    dims = {path: reads_by(module) for path, module in model.named_modules()}
    layers = {path: dim for path, dim in dims.items() if dim is not None}
    reading = {group.name: readers_of(group, layers) for group in graph.groups}
    return reading, sorted({path for paths in reading.values() for path in paths})


def layer_of(axis: Axis) -> str:
    """The module that computes with a weight."""
    return module_of(axis.name)


def readers_of(group: ChannelGroup, layers: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The layers that read a group, and the positions of every channel among their inputs, [channels, positions].

    ``layers`` says for each path which dim of the weight its inputs are.

    Where a layer reads some channels at more positions than others, these are listed one after the other.
    """
    found = {}
    for axis in group.consumers:
        if axis.dim == layers.get(layer_of(axis)):
            order = np.argsort(group.channels)
            at = np.flatnonzero(np.isin(axis.channels, group.channels))
            which = order[np.searchsorted(group.channels[order], axis.channels[at])]
            alike = len(np.unique(np.bincount(which, minlength=len(group)))) == 1
            sorted_at = at[np.argsort(which, kind="stable")]
            found[layer_of(axis)] = sorted_at.reshape(len(group), -1) if alike else sorted_at
    return found
