"""What the removal of positions does to a module: smaller tensors, and the sizes that standard modules remember."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Removed = Mapping[str, Mapping[int, list[int]]]
"""Tensor name to dim to the sorted positions that go."""

_CONVOLUTIONS = nn.modules.conv._ConvNd
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_BATCH_NORMS = nn.modules.batchnorm._NormBase


def kept_positions(size: int, removed: list[int], device: torch.device | str = "cpu") -> Tensor:
    """The positions of an axis of that size that stay (int64)."""
    keep = np.ones(size, dtype=bool)
    keep[removed] = False
    return torch.from_numpy(np.flatnonzero(keep)).to(device)


def sliced(tensor: Tensor, removed: Mapping[int, list[int]]) -> Tensor:
    """A copy of the tensor without these positions, in its memory format."""
    left = tensor
    for dim, positions in removed.items():
        left = left.index_select(dim, kept_positions(tensor.shape[dim], positions, tensor.device))
    format = _CHANNELS_LAST.get(tensor.ndim)
    if format is not None and tensor.is_contiguous(memory_format=format) and not tensor.is_contiguous():
        left = left.contiguous(memory_format=format)
    return left


def shrunk(tensor: Tensor, removed: Mapping[int, list[int]]) -> Tensor:
    """An uninitialised tensor of the shape that :func:`sliced` would give: enough where nobody looks at values."""
    shape = list(tensor.shape)
    for dim, positions in removed.items():
        shape[dim] -= len(positions)
    return tensor.new_empty(shape)


def shrink(
    module: nn.Module, removed: Removed, take: Callable[[Tensor, Mapping[int, list[int]]], Tensor] = sliced
) -> Undo:
    """Replace the tensors of a module, in place, by what remains of them; shared tensors stay shared.

    Standard modules get their remembered sizes (``out_channels``, ``groups``, ``num_features``...) from the new shapes.

    Args:
        module: the module to change.
        removed: what goes, by the tensors' names in ``module``.
        take: how a tensor is made smaller.

    Returns:
        What is needed to change it back.
    """
    names = {id(t): n for n, t in (*module.named_parameters(), *module.named_buffers())}
    new: dict[int, Tensor] = {}
    undo = Undo()
    for part in module.modules():
        touched = False
        for table in (part._parameters, part._buffers):
            for key, tensor in table.items():
                if tensor is None or names[id(tensor)] not in removed:
                    continue
                touched = True
                if id(tensor) not in new:
                    smaller = take(tensor.detach(), removed[names[id(tensor)]])
                    if isinstance(tensor, nn.Parameter):
                        smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
                    new[id(tensor)] = smaller
                undo.entries.append((table, key, tensor))
        if touched:
            undo.attributes.extend((part, key, getattr(part, key)) for key in _sizes(part))
    try:
        for table, key, tensor in undo.entries:
            table[key] = new[id(tensor)]
        for part, _, _ in undo.attributes:
            for key, value in _sizes(part).items():
                setattr(part, key, value)
    except Exception:
        undo()
        raise
    undo.replaced = {names[i]: t for i, t in new.items()}
    return undo


class Undo:
    """How to change a shrunk module back; ``replaced`` holds the new tensors by name."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, str, Tensor]] = []
        self.attributes: list[tuple[nn.Module, str, Any]] = []
        self.replaced: dict[str, Tensor] = {}

    def __call__(self) -> None:
        """Put everything back."""
        for table, key, tensor in self.entries:
            table[key] = tensor
        for part, key, value in self.attributes:
            setattr(part, key, value)


def remember_sizes(module: nn.Module) -> None:
    """Set the sizes that standard modules remember to those of the tensors they hold."""
    for part in module.modules():
        for key, value in _sizes(part).items():
            if getattr(part, key) != value:
                setattr(part, key, value)


def _sizes(part: nn.Module) -> dict[str, Any]:
    """The sizes a standard module remembers, computed from the shapes it holds now."""
    tensors = {**part._buffers, **part._parameters}
    if isinstance(part, nn.RNNBase):
        first = tensors.get("weight_ih_l0")
        return {} if first is None else {"input_size": first.shape[1]}
    weight = next((tensors[k] for k in ("weight", "running_mean") if tensors.get(k) is not None), None)
    if weight is None:
        return {}
    shape = tuple(weight.shape)
    if isinstance(part, (_CONVOLUTIONS, nn.Linear, nn.Embedding)) and len(shape) < 2:
        return {}
    if isinstance(part, _CONVOLUTIONS):
        return _convolution_sizes(part, shape)
    if isinstance(part, nn.Linear):
        return {"in_features": shape[1], "out_features": shape[0]}
    if isinstance(part, _BATCH_NORMS):
        return {"num_features": shape[0]}
    if isinstance(part, nn.GroupNorm):
        own = part.num_groups == part.num_channels  # one group a channel stays so
        return {"num_channels": shape[0], "num_groups": shape[0] if own else part.num_groups}
    if isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": shape}
    if isinstance(part, nn.Embedding):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(part, nn.PReLU):
        return {"num_parameters": shape[0]}
    return {}


def _convolution_sizes(part: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> dict[str, Any]:
    groups = part.groups
    rows, columns = shape[:2]
    if groups > 1 and part.in_channels == groups:  # every channel has its own filters: groups go, offsets stay
        groups = rows if part.transposed else rows * groups // part.out_channels
    inside, outside = (rows, columns * groups) if part.transposed else (columns * groups, rows)
    return {"in_channels": inside, "out_channels": outside, "groups": groups}
