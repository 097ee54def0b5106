"""Whether the channels that training has driven to zero meet a budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set

import numpy as np
import torch
from torch import Tensor, nn

from secateur._internal.errors import SecateurError
from secateur.allocation.budget import AUTO, Budget, Meter
from secateur.tracing.graph import ChannelGraph


class BudgetMonitor:
    """Counts zero channels against a budget.

    Args:
        model: the traced model.
        graph: its graph.
        budget: what may remain.
        without: groups that stay whole.

    Raises:
        InfeasibleBudget: a budget that cannot be met.
        SecateurError: one that rounds widths.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, budget: Budget, without: Collection[str]) -> None:
        if not isinstance(budget, Budget):
            raise SecateurError(f"budget={budget!r}: a Budget is expected, for instance Budget(macs=0.5)")
        if budget.round_to not in (1, AUTO) or budget.at_least != 1:
            raise SecateurError(
                "Budget(round_to=..., at_least=...): widths come from the training here, channel by channel; give "
                "macs=, params= or channels= alone"
            )
        budget.refuse_alike("widths that come from the training")
        self.graph = graph
        self.meter = Meter(graph, budget)
        self.prunable = [g.exact and g.name not in without for g in graph.groups]
        smallest = [g.least if can else len(g) for g, can in zip(graph.groups, self.prunable, strict=True)]
        self.meter.check_feasible(np.array(smallest, dtype=np.int64), approximate=False)
        self.least_widths = np.array([g.least for g in graph.groups], dtype=np.int64)
        self.names = {p: name for name, p in model.named_parameters()}

    def replace_parameters(self, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Go on with the parameters of a cut model."""
        self.names = {replaced.get(p, p): name for p, name in self.names.items()}

    def groups_of(self, pruned: Set[nn.Parameter], ids: Tensor) -> Tensor:
        """The group of each channel, as an index; the number of groups for those that do not count.

        A group counts if all that writes it is pruned: otherwise its channels are never wholly zero.

        Args:
            pruned: the parameters that are driven to zero.
            ids: int64 channel ids.
        """
        known = {self.names[p] for p in pruned if p in self.names}
        none = len(self.graph.groups)
        group_of = torch.full((1 + int(ids.max()) if len(ids) else 1,), none)
        for number, (group, can) in enumerate(zip(self.graph.groups, self.prunable, strict=True)):
            if can and all(axis.name in known for axis in group.producers):
                channels = torch.from_numpy(group.channels)
                group_of[channels[channels < len(group_of)]] = number
        return group_of[ids]

    def is_met(self, zero: Tensor, group_of: Tensor) -> bool:
        """Whether the network without its zero channels is within the budget.

        Args:
            zero: bool, by channel; what has been cut off is not among them.
            group_of: int64, by channel, from :meth:`groups_of`.
        """
        alive = torch.bincount(group_of[~zero], minlength=len(self.least_widths) + 1)[:-1].cpu().numpy()
        counted = np.isin(np.arange(len(self.least_widths)), group_of.unique().cpu().numpy())
        return self.meter.met(np.where(counted, np.maximum(alive, self.least_widths), self.graph.widths))
