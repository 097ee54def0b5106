r"""Relabelling: the channels of a group in another order, everywhere, so that the network computes what it did.

For a chain ``y = W2 f(W1 x)`` in which ``f`` works channel by channel, any permutation ``pi`` of the channels is free::

    W1 <- W1[pi, :]        W2 <- W2[:, pi]        biases, norms and running statistics with W1

The channel graph knows all positions of a channel, in residual streams, depthwise convolutions and behind a flattening
too: the positions of the channel that was k-th take the contents of the channel that shall be k-th. Where a channel has
several positions on an axis, it must have them in one order everywhere; that can be told where they are as far from
each other as those of all other channels. Where they are not, as behind a roll that parts one channel's positions, the
group keeps its order. So does one of which the model treats some channels in another way, the first ``k`` say.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from secateur._internal.errors import SecateurError
from secateur.tracing.graph import Axis, ChannelGraph, ChannelGroup

Index = dict[str, dict[int, np.ndarray]]
"""Tensor name -> dim -> for each position, the old position whose contents it takes."""


def moves(graph: ChannelGraph, orders: Mapping[str, Sequence[int]]) -> Index:
    """What a relabelling means for the tensors.

    Args:
        graph: the channel graph.
        orders: group name -> the old position (in ``group.channels``) of the channel that shall be k-th, for each k.

    Raises:
        SecateurError: an unknown group, an order that is no permutation of its channels, or a group that
            :func:`keeps_its_order`.
    """
    found: Index = {}
    for name, order in orders.items():
        group = graph.group(name)
        wanted = np.asarray(order, dtype=np.int64)
        if sorted(wanted.tolist()) != list(range(len(group))):
            raise SecateurError(f"orders[{name!r}]: a permutation of the numbers below {len(group)} is expected")
        if keeps_its_order(graph, group):
            raise SecateurError(
                f"orders[{name!r}]: its channels cannot change places: the model tells them apart by where they are"
            )
        for axis in group.axes:
            index = found.setdefault(axis.name, {}).setdefault(axis.dim, np.arange(len(axis.channels)))
            places = _places(group, axis)
            index[places] = places[wanted]
    return found


def keeps_its_order(graph: ChannelGraph, group: ChannelGroup) -> bool:
    """Whether the channels of a group cannot change places."""
    parted = any((np.diff(places := _places(group, axis)) != np.diff(places[:1])).any() for axis in group.axes)
    most = int(group.channels.max()) + 1
    counted = (np.bincount(memory.channels, minlength=most)[group.channels] for memory in graph.memories)
    return parted or any(np.ptp(often) > 0 for often in counted)  # a number that counts some of them, not all alike


def _places(group: ChannelGroup, axis: Axis) -> np.ndarray:
    """The positions of every channel on an axis, [channels, positions]: all have equally many."""
    rank = np.full(int(max(axis.channels.max(), group.channels.max())) + 1, -1)
    rank[group.channels] = np.arange(len(group))
    at = np.flatnonzero(rank[axis.channels] >= 0)
    return at[np.argsort(rank[axis.channels[at]], kind="stable")].reshape(len(group), -1)


def permuted(model: nn.Module, graph: ChannelGraph, orders: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of the model with the channels of some groups in another order.

    Args:
        model: the traced model; it is left untouched.
        graph: its graph.
        orders: see :func:`moves`.
    """
    copied = copy.deepcopy(model)
    tensors = dict((*copied.named_parameters(), *copied.named_buffers()))
    with torch.no_grad():
        for name, dims in moves(graph, orders).items():
            for dim, index in dims.items():
                tensors[name].copy_(tensors[name].index_select(dim, torch.from_numpy(index).to(tensors[name].device)))
    return copied
