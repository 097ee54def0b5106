"""Reading a plan off the weights: the channels that training has driven to exact zero."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from secateur._internal.errors import SecateurError
from secateur.plan import Plan, make_plan
from secateur.tracing.graph import ChannelGraph, fingerprint


def zero_channels(model: nn.Module, graph: ChannelGraph, *, approximate: bool = False) -> Plan:
    """The plan that removes every channel that is exactly zero at all its producers.

    Args:
        model: the traced model, with the weights to read.
        graph: its graph.
        approximate: also look at groups whose removal changes more than the removed channels.

    Returns:
        A plan; a group too many of whose channels are dead keeps its first ones (``group.least``, mostly one).

    Raises:
        SecateurError: the graph is another model's.
    """
    if fingerprint(model) != graph.fingerprint:
        raise SecateurError("zero_channels: the graph was traced from another model; trace this one")
    alive = np.zeros(1 + max(int(a.channels.max(initial=0)) for a in graph.axes), dtype=bool)
    tensors = dict(model.named_parameters())
    for axis in {(a.name, a.dim): a for g in graph.groups for a in g.producers}.values():
        tensor = tensors[axis.name].detach()
        others = [d for d in range(tensor.ndim) if d != axis.dim]
        nonzero = torch.any(tensor != 0, dim=others) if others else tensor != 0
        alive[axis.channels[nonzero.cpu().numpy()]] = True
    removed = {}
    for group in graph.groups:
        if not group.exact and not approximate:
            continue
        dead = np.flatnonzero(~alive[group.channels])
        removed[group.name] = dead[max(0, group.least - (len(group) - len(dead))) :].tolist()
    return make_plan(graph, removed, approximate=approximate)
