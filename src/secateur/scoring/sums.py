"""Sums over the producers of every channel: one reduction a tensor, one scatter for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.curvature.layers import wide
from secateur.tracing.graph import Axis, ChannelGraph


def channel_sums(
    graph: ChannelGraph, axes: Iterable[Axis], values: Callable[[Axis], Tensor | None]
) -> Float[Tensor, " channels"]:
    """Add up values over axes by channel.

    Args:
        graph: the channel graph.
        axes: axes to add over.
        values: one value for each position of an axis, or None to leave the axis out.

    Returns:
        float64 [largest channel id + 1], on the CPU.
    """
    size = 1 + max(int(a.channels.max(initial=0)) for a in graph.axes)
    found, ids = [], []
    for axis in axes:
        value = values(axis)
        if value is not None:
            found.append(value.detach().double().cpu())
            ids.append(torch.from_numpy(axis.channels))
    total = torch.zeros(size, dtype=torch.float64)
    return total.index_add_(0, torch.cat(ids), torch.cat(found)) if found else total


def producers(graph: ChannelGraph) -> list[Axis]:
    """The producer axes of all groups, each once."""
    return list({(a.name, a.dim): a for g in graph.groups for a in g.producers}.values())


def by_group(graph: ChannelGraph, values: Float[Tensor, " channels"]) -> dict[str, Tensor]:
    """Values by channel id, sorted out by group."""
    return {g.name: values[torch.from_numpy(g.channels)] for g in graph.groups}


def rows(tensor: Float[Tensor, ...], dim: int) -> Float[Tensor, " positions"]:
    """The sum over all dims but one, in float32 at least: half precision would tie what is not equal."""
    tensor = wide(tensor)
    others = [d for d in range(tensor.ndim) if d != dim]
    return tensor.sum(dim=others) if others else tensor
