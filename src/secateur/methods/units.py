"""The units that training prunes bit by bit: what they own of the parameters, their sizes and ranks, how many go.

A unit is a channel (everything that writes it, over all layers of a residual stream) or, as in the papers' im2col view,
a column of a convolution (one input channel at one tap, over all filters). Units are numbered; a number beyond the last
stands for what belongs to none. A group of units is ranked by itself: channels of a group, columns of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur._internal.errors import NothingToPrune, SecateurError, unknown
from secateur.allocation.api import allocate
from secateur.allocation.budget import Budget
from secateur.allocation.contract import Strategy
from secateur.scoring.magnitude import filter_norms
from secateur.tracing.channel_rows import along, producer_axes
from secateur.tracing.graph import Axis, ChannelGraph

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Keep = float | Mapping[str, float]
"""The fraction of its units that every group keeps, or by group."""


@dataclass(frozen=True, eq=False)
class Units:
    """Numbered units.

    Attributes:
        owned: parameters, each with the numbers of the units its elements belong to, in a shape that broadcasts.
        readers: likewise, the parameters that read the units (channels only; a column is read by nothing else).
        carried: likewise, the buffers that follow the units (running statistics).
        group_of: the group of each unit, int64 [units].
        names: the groups' names.
        to_prune: how many units of each group shall go, int64 [groups].
    """

    owned: list[tuple[nn.Parameter, Tensor]]
    readers: list[tuple[nn.Parameter, Tensor]]
    carried: list[tuple[Tensor, Tensor]]
    group_of: Tensor
    names: Sequence[str]
    to_prune: Tensor

    def __len__(self) -> int:
        return len(self.group_of)

    def sizes(self) -> Tensor:
        """The sum of the absolute values of everything a unit owns, float64 [units]."""
        total = torch.zeros(len(self) + 1, dtype=torch.float64, device=self.group_of.device)
        for p, number in self.owned:
            dims = [d for d in range(p.ndim) if number.shape[d] == 1 < p.shape[d]]
            values = p.detach().abs()
            values = values.sum(dims, keepdim=True) if dims else values  # no dims would mean all
            total.index_add_(0, number.flatten(), values.double().flatten())
        return total[:-1]

    def ranks(self, scores: Tensor, pruned: Tensor) -> Tensor:
        """The rank of each unit among those of its group that remain, 0 for the least score, int64; -1 where pruned."""
        order = torch.where(pruned, -torch.inf, scores).argsort(stable=True)
        order = order[self.group_of[order].argsort(stable=True)]  # by group, and by score within
        rank = torch.empty_like(self.group_of)
        rank[order] = torch.arange(len(self), device=order.device) - self._first()[self.group_of[order]]
        return torch.where(pruned, -1, rank - self.count(pruned)[self.group_of])

    def count(self, chosen: Tensor) -> Tensor:
        """How many units of each group are chosen, int64 [groups]."""
        return torch.bincount(self.group_of[chosen], minlength=len(self.names))

    def _first(self) -> Tensor:
        sizes = torch.bincount(self.group_of, minlength=len(self.names))
        return sizes.cumsum(0) - sizes

    def by_parameter(self, values: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter with the values of the units its elements belong to; 0 or false for those of none."""
        padded = torch.cat([values, values.new_zeros(1)])
        for p, number in self.owned:
            yield p, padded[number]

    @torch.no_grad()
    def clear(self, chosen: Tensor, optimizer: Optimizer) -> None:
        """Make units zero, and what the optimizer remembers of them."""
        for p, where in self.by_parameter(chosen):
            p.masked_fill_(where, 0)
            for value in optimizer.state.get(p, {}).values():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    value.masked_fill_(where, 0)

    def positions(self, chosen: Tensor) -> dict[str, list[int]]:
        """Group name -> positions in the group of the chosen units."""
        first = self._first()
        return {
            name: (torch.nonzero(chosen & (self.group_of == i)).flatten() - first[i]).tolist()
            for i, name in enumerate(self.names)
        }


def channel_units(model: nn.Module, graph: ChannelGraph, to_prune: Mapping[str, int]) -> Units:
    """The channels of the groups that shall lose some.

    Raises:
        SecateurError: a group that is not exact, or is written by something that is not trained.
    """
    axes = producer_axes(model, graph)
    parameters = dict(model.named_parameters())
    groups = [group for group in graph.groups if to_prune.get(group.name)]
    for group in groups:
        missing = [a.name for a in group.producers if a.name in parameters and parameters[a.name] not in axes]
        frozen = [a.name for a in group.producers if a.name in parameters and not parameters[a.name].requires_grad]
        if not group.exact or missing or frozen:
            why = group.reason if not group.exact else f"{(missing or frozen)[0]} cannot be driven to zero by training"
            raise SecateurError(f"group {group.name!r} cannot be pruned while training: {why}; exclude it")
    sizes = [len(group) for group in groups]
    highest = max((int(axis.channels.max()) for group in graph.groups for axis in group.axes), default=0)
    number = torch.full((highest + 1,), sum(sizes))
    for start, group in zip(torch.tensor([0, *sizes]).cumsum(0).tolist(), groups, strict=False):
        number[torch.from_numpy(group.channels)] = torch.arange(start, start + len(group))
    number[0] = sum(sizes)
    device = next(model.parameters()).device
    owned = [(p, along(number[ids], dim, p)) for p, (dim, ids) in axes.items() if (number[ids] < sum(sizes)).any()]

    def numbered(axes: Iterable[Axis], tensors: Mapping[str, Tensor]) -> list[tuple[Any, Tensor]]:
        return [
            (tensors[a.name], along(number[torch.from_numpy(a.channels)], a.dim, tensors[a.name]))
            for a in {(a.name, a.dim): a for a in axes}.values()
            if a.name in tensors
        ]

    readers = numbered((a for group in groups for a in group.consumers), parameters)
    carried = numbered((a for group in groups for a in group.carried), dict(model.named_buffers()))
    group_of = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(sizes, dtype=torch.int64)).to(device)
    names = [g.name for g in groups]
    return Units(owned, readers, carried, group_of, names, torch.tensor([to_prune[n] for n in names], device=device))


def column_units(model: nn.Module, to_prune: Mapping[str, float]) -> Units:
    """The columns of convolutions: input channels at taps.

    Args:
        model: the model.
        to_prune: path of a convolution -> the fraction of its columns that shall go.
    """
    layers = dict(model.named_modules())
    owned: list[tuple[nn.Parameter, Tensor]] = []
    group_of: list[int] = []
    counts: list[int] = []
    start = 0
    for i, (name, fraction) in enumerate(to_prune.items()):
        layer = layers.get(name)
        if not isinstance(layer, CONVOLUTIONS) or not isinstance(layer.weight, nn.Parameter):
            raise unknown("convolution", name, [n for n, m in layers.items() if isinstance(m, CONVOLUTIONS)])
        columns = layer.weight[0].numel()
        number = torch.arange(start, start + columns, device=layer.weight.device)
        owned.append((layer.weight, number.view(1, *layer.weight.shape[1:])))
        group_of += [i] * columns
        counts.append(min(math.ceil(fraction * columns - 1e-9), columns - 1))
        start += columns
    device = next(model.parameters()).device
    return Units(
        owned, [], [], torch.tensor(group_of, device=device), list(to_prune), torch.tensor(counts, device=device)
    )


def check_keep(keep: Keep | None) -> None:
    """Raise if these are no fractions of groups to keep."""
    shares = keep.items() if isinstance(keep, Mapping) else [("every group", keep)] if keep is not None else []
    for name, share in shares:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise SecateurError(f"keep={share!r} of {name!r}: a fraction in (0, 1] is expected")


def channels_to_prune(
    model: nn.Module,
    graph: ChannelGraph,
    budget: Budget | None,
    keep: Keep | None,
    *,
    without: Mapping[str, str],
    strategy: str | Strategy,
) -> dict[str, int]:
    """How many channels each group shall lose.

    Args:
        model: the model, as it is before.
        graph: its graph.
        budget: what may remain: the numbers are those of magnitude pruning to it; which channels go, training says.
        keep: or the fraction of its channels that every group keeps, or by group.
        without: groups that stay whole -> why.
        strategy: of :func:`secateur.allocate`, for ``budget``.

    Raises:
        NothingToPrune: every group stays whole.
        SecateurError: both or none of budget and keep, a group that is not there, a budget that cannot be met.
    """
    if (budget is None) == (keep is None):
        raise SecateurError("give either budget=, such as Budget(macs=0.5), or keep=, a fraction of every group")
    left_alone = f" ({len(without)} groups are left alone)" if without else ""
    if budget is not None:
        scores = {name: scores for name, scores in filter_norms(model, graph).items() if name not in without}
        removed = allocate(graph, scores, budget, strategy=strategy).removed
        if not removed:
            raise NothingToPrune(f"{budget}: the model is within it already; there is nothing to prune{left_alone}")
        return {name: len(positions) for name, positions in removed.items()}
    if isinstance(keep, Mapping):
        shares = graph.by_name(keep)
    else:
        shares = {group.name: float(keep or 0) for group in graph.groups if group.exact}
    found = {}
    for name, share in shares.items():
        group = graph.group(name)
        count = min(math.ceil((1 - share) * len(group) - 1e-9), len(group) - group.least)
        if count > 0 and name not in without:
            found[name] = count
    if not found:
        raise NothingToPrune(f"keep={keep!r} leaves every group whole; there is nothing to prune{left_alone}")
    return found


def columns_to_prune(
    model: nn.Module, budget: Budget | None, keep: Keep | None, *, without: Mapping[str, str]
) -> dict[str, float]:
    """Which fraction of its columns each convolution shall lose; arguments as for :func:`channels_to_prune`.

    Raises:
        NothingToPrune: every convolution stays whole.
        SecateurError: a budget, no fractions, a convolution that is not there.
    """
    if budget is not None or keep is None:
        raise SecateurError("unit='column': columns have no budget; give keep=, a fraction of every convolution")
    convolutions = [n for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS) and m.groups == 1]
    for name in keep if isinstance(keep, Mapping) else ():
        if name not in convolutions:
            raise unknown("convolution of one group", name, convolutions)
    shares = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(convolutions, keep)
    found = {name: 1 - share for name, share in shares.items() if share < 1 and name not in without}
    if not found:
        raise NothingToPrune(f"keep={keep!r} leaves every convolution whole; there is nothing to prune")
    return found
