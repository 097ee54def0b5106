"""The channels of a graph as rows of the trained parameters: their norms, and shrinking them, no loop over channels.

A row is one position on the axis along which a parameter produces channels (a filter, a bias, a norm's weight). A
channel is the set of all rows with its id, over all parameters; an id of 0 is no channel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur._internal.errors import SecateurError
from secateur.tracing.graph import ChannelGroup

Axes = Mapping[nn.Parameter, tuple[int, Tensor]]  # the dim of the rows, and an int64 id for each


@runtime_checkable
class HasGroups(Protocol):
    """What the optimizer needs of a graph (a :class:`secateur.tracing.graph.ChannelGraph` is one)."""

    @property
    def groups(self) -> Iterable[ChannelGroup]:
        """The removable groups."""


def along(values: Tensor, dim: int, like: Tensor) -> Tensor:
    """One value for each position of a dim, shaped to be broadcast over a tensor, on its device."""
    return values.to(like.device).view([-1 if d == dim else 1 for d in range(like.ndim)])


def producer_axes(model: nn.Module, graph: HasGroups) -> dict[nn.Parameter, tuple[int, Tensor]]:
    """The axis of each parameter along which channels are produced: ``{parameter: (dim, ids)}``.

    Args:
        model: the traced model.
        graph: its channel graph; approximate groups are left out.

    Returns:
        Per parameter the dim and one int64 id a position; id 0 is not pruned. If a parameter produces along two dims,
        elements would belong to two channels: the first dim counts, channels on the other are pruned nowhere.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for group in graph.groups:
        for axis in group.producers if group.exact else ():
            if axis.name not in parameters:  # a buffer is not trained
                continue
            shape = parameters[axis.name].shape
            if axis.dim >= len(shape) or len(axis.channels) != shape[axis.dim]:
                raise SecateurError(
                    f"graph: axis {axis} has {len(axis.channels)} positions in the graph, but the "
                    f"parameter's shape is {list(shape)}; trace the model that is trained"
                )
            own = np.where(np.isin(axis.channels, group.channels), axis.channels, 0)
            found[axis.name][axis.dim] = np.maximum(found[axis.name].get(axis.dim, 0), own)
    second = [dims[d] for dims in found.values() for d in sorted(dims)[1:]]
    left_out = np.concatenate(second) if second else np.zeros(0, dtype=np.int64)
    axes = {}
    for name, dims in found.items():
        ids = np.where(np.isin(dims[min(dims)], left_out), 0, dims[min(dims)])
        if ids.any():
            axes[parameters[name]] = (min(dims), torch.from_numpy(ids.astype(np.int64)))
    return axes


class Channels:
    """Which row of which parameter belongs to which channel, as index tensors on the parameters' devices.

    Values by channel are vectors with one entry more, the last, for the rows that belong to none. The order is by
    part, so that the channels of a part are one slice.

    Args:
        axes: the rows of each parameter.
        parts: parameters by part, all of them in ``axes``. A channel with rows in several parts counts to the first.

    Attributes:
        parameters: all of them, in the order of the parts.
        members: the parameters of each part, as a slice.
        slices: the channels of each part, as a slice.
        on_cpu: whether all parameters are there.
        tied: pairs of parts that share channels, with one parameter of the later part that does.
        ids: the id of each channel, int64.

    """

    def __init__(self, axes: Axes, parts: Sequence[Sequence[nn.Parameter]]) -> None:
        self.parameters = [p for part in parts for p in part]
        self.members: list[slice] = []
        self.slices: list[slice] = []
        self.tied: list[tuple[int, int, nn.Parameter]] = []
        number = torch.full((1 + max((int(axes[p][1].max()) for p in self.parameters), default=0),), -1)
        home = number.clone()
        end = 0
        for i, part in enumerate(parts):
            start = end
            for p in part:
                ids = axes[p][1].unique()
                self.tied += [(j, i, p) for j in home[ids].unique().tolist() if j not in (-1, i)]
                new = ids[(home[ids] < 0) & (ids > 0)]
                end += len(new)
                home[new], number[new] = i, torch.arange(end - len(new), end)
            self.slices.append(slice(start, end))
            first = self.members[-1].stop if self.members else 0
            self.members.append(slice(first, first + len(part)))
        self.ids = torch.argsort(number, stable=True)[len(number) - end :]  # others have no number
        number[0] = end
        self.on_cpu = all(p.device.type == "cpu" for p in self.parameters)
        self._rows = [number[axes[p][1]] for p in self.parameters]
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for k, p in sorted(enumerate(self.parameters), key=lambda item: item[1].dim() == 1):
            alike[p.device, p.dtype].append(k)
        self._blocks = [
            _Block(self.parameters, [axes[p][0] for p in self.parameters], self._rows, members)
            for members in alike.values()
        ]
        device = self.parameters[0].device if self.parameters else None
        wide = torch.float64 if any(block.dtype == torch.float64 for block in self._blocks) else torch.float32
        self._zero = torch.zeros(end + 1, device=device, dtype=wide)

    def sum(self, values: Mapping[nn.Parameter, Tensor]) -> Float[Tensor, " channels"]:
        """Sum by channel of one value a row; parameters not named count 0. For what is seldom needed."""
        total = torch.zeros_like(self._zero)
        for p, rows in zip(self.parameters, self._rows, strict=True):
            if p in values:
                total.index_add_(0, rows.to(total.device), values[p].to(total))
        return total

    def size(self) -> Float[Tensor, " channels"]:
        """Number of elements, by channel."""
        pairs = zip(self.parameters, self._rows, strict=True)
        return self.sum({p: torch.full((len(rows),), p.numel() / len(rows)) for p, rows in pairs})

    def energy(self, values: Callable[[int], Tensor]) -> Float[Tensor, " channels"]:
        """Squared norm by channel of ``values(k)``, a tensor for each parameter; each is asked for once.

        The sums are in float64 if a parameter is, otherwise in float32.
        """
        total = torch.zeros_like(self._zero)
        for block in self._blocks:
            total.index_add_(0, block.index.to(total.device), block.energy(values).to(total))
        return total

    def shrink(self, share_of: Float[Tensor, " channels"], values: Sequence[Tensor]) -> None:
        """Write ``values - share * values`` into the parameters, with one share a channel."""
        for block in self._blocks:
            block.shrink(share_of, self.parameters, values)


class _Block:
    """The parameters on one device and of one dtype: norms and shares of their rows side by side, vectors last."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], dims: Sequence[int], rows: Sequence[Tensor], members: Sequence[int]
    ) -> None:
        first = parameters[members[0]]
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self.cast = None if self.dtype == first.dtype else self.dtype
        self.index = torch.cat([rows[k] for k in members]).to(first.device)
        self.norms = torch.empty(len(self.index), dtype=self.dtype, device=first.device)
        self.shares = torch.empty_like(self.norms)
        self.matrices = []
        self.vectors = [k for k in members if parameters[k].dim() == 1]
        self.lengths = [len(rows[k]) for k in self.vectors]
        end = 0
        for k in members[: len(members) - len(self.vectors)]:
            start, end = end, end + len(rows[k])
            others = [d for d in range(parameters[k].dim()) if d != dims[k]]
            along = [-1 if d == dims[k] else 1 for d in range(parameters[k].dim())]
            self.matrices.append((k, others, self.norms[start:end], self.shares[start:end].view(along)))
        self.tail = slice(end, None)

    def energy(self, values: Callable[[int], Tensor]) -> Float[Tensor, " rows"]:
        for k, others, norms, _ in self.matrices:
            if others[0] == 0:  # rows along a later dim: ten times faster on a CPU than vector_norm
                torch.sum(values(k).to(self.dtype).square(), dim=others, out=norms).sqrt_()
            else:
                torch.linalg.vector_norm(values(k), dim=others, dtype=self.cast, out=norms)
        if self.vectors:  # a row of one element is its own norm, but for the sign
            torch.cat([values(k) for k in self.vectors], out=self.norms[self.tail])
        return self.norms.square_()

    def shrink(
        self, share_of: Float[Tensor, " channels"], parameters: Sequence[nn.Parameter], values: Sequence[Tensor]
    ) -> None:
        torch.index_select(share_of.to(self.norms), 0, self.index, out=self.shares)
        for k, _, _, share in self.matrices:  # a tenth faster on a CPU than a product, and exact for shares of 0 and 1
            torch.addcmul(values[k], values[k], share, value=-1, out=parameters[k])
        if self.vectors:
            flat = torch.cat([values[k] for k in self.vectors])
            flat = torch.addcmul(flat, flat, self.shares[self.tail], value=-1)
            _copy([parameters[k] for k in self.vectors], list(flat.split(self.lengths)))


def _copy(tensors: list[Tensor], values: list[Tensor]) -> None:
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(tensors, values)
        return
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
