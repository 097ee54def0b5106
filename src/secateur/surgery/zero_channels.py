"""Reading a plan off the weights: the channels that training has driven to exact zero."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from secateur._internal.errors import SecateurError
from secateur.plan import Plan, make_plan
from secateur.tracing.graph import ChannelGraph, fingerprint
from secateur.tracing.selection import Exclude, excluded


def zero_channels(model: nn.Module, graph: ChannelGraph, *, exclude: Exclude = (), approximate: bool = False) -> Plan:
    """The plan that removes every channel that is exactly zero at all its producers.

    Args:
        model: the traced model, with the weights to read.
        graph: its graph.
        exclude: what keeps its channels: patterns of group names or module paths, modules, or types of modules.
        approximate: also look at groups whose removal changes more than the removed channels.

    Returns:
        A plan; a group too many of whose channels are zero keeps its first ones (``group.least``, mostly one).

    Raises:
        SecateurError: the graph is another model's.
    """
    if fingerprint(model) != graph.fingerprint:
        raise SecateurError("zero_channels: the graph was traced from another model; trace this one")
    without = excluded(model, graph, exclude, frozen=False)
    return zero_plan(
        dict((*model.named_parameters(), *model.named_buffers())), graph, without=without, approximate=approximate
    )


def zero_plan(
    parameters: Mapping[str, Tensor], graph: ChannelGraph, *, without: Mapping[str, str], approximate: bool = False
) -> Plan:
    """:func:`zero_channels` of parameters by name.

    Args:
        parameters: those of the traced model, and its buffers. Without these, groups that have constants stay whole.
        graph: its graph.
        without: groups that stay whole -> why.
        approximate: also look at groups that are not exact.
    """
    alive = np.zeros(1 + max(int(a.channels.max(initial=0)) for a in graph.axes), dtype=bool)
    for axis in {(a.name, a.dim): a for g in graph.groups for a in (*g.producers, *g.constants)}.values():
        if axis.name not in parameters:
            continue
        tensor = parameters[axis.name].detach()
        others = [d for d in range(tensor.ndim) if d != axis.dim]
        nonzero = torch.any(tensor != 0, dim=others) if others else tensor != 0
        alive[axis.channels[nonzero.cpu().numpy()]] = True
    skipped = dict(without)
    skipped |= {g.name: f"not exact: {g.reason}" for g in graph.groups if not g.exact and not approximate}
    for group in graph.groups:
        for axis in group.constants:
            if axis.name not in parameters:
                skipped.setdefault(group.name, f"its channels are not zero without {axis.name}, which is not trained")
    removed = {}
    for group in graph.groups:
        if group.name in skipped:
            continue
        zero = np.flatnonzero(~alive[group.channels])
        removed[group.name] = zero[max(0, group.least - (len(group) - len(zero))) :].tolist()
    return make_plan(graph, removed, skipped=skipped, approximate=approximate)
