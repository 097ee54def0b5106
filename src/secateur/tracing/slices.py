"""What the removal of positions does to a module: smaller tensors, and the sizes that standard modules remember."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._internal.errors import SecateurError

Removed = Mapping[str, Mapping[int, list[int]]]
"""Tensor name to dim to the sorted positions that go."""
Value = int | tuple[int, ...]
"""What a module remembers: a whole number, or one for each axis (``normalized_shape``)."""
Patched = Mapping[str, tuple[Value, Value]]
"""``"path.attribute"`` to its value before and after a cut."""

_CONVOLUTIONS = nn.modules.conv._ConvNd
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_BATCH_NORMS = nn.modules.batchnorm._NormBase


# ------------------------------------------------------------------------------------------------------------- tensors


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


# -------------------------------------------------------------------------------------------- sizes that are remembered


@dataclass(frozen=True)
class Size:
    """A size that a module remembers; it is proportional to the length of an axis of one of the module's tensors.

    Attributes:
        path: of the module.
        attribute: where it remembers it.
        value: what it remembers now.
        due: what it should remember for the shapes of now, one number an axis.
        tensor: name of the tensor.
        dims: the axes, one for each number.
        lengths: of these axes now.
    """

    path: str
    attribute: str
    value: Value
    due: tuple[int, ...]
    tensor: str
    dims: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def key(self) -> str:
        """``path.attribute``."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    def after(self, removed: Mapping[int, list[int]]) -> Value:
        """What it should remember once the tensor has lost these positions."""
        left = [n - len(removed.get(d, ())) for d, n in zip(self.dims, self.lengths, strict=True)]
        due = tuple(size * k // n if n else size for size, k, n in zip(self.due, left, self.lengths, strict=True))
        return due if isinstance(self.value, tuple) else due[0]


def remembered(model: nn.Module) -> tuple[Size, ...]:
    """The sizes that the standard modules of a model remember."""
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    found = []
    for path, part in model.named_modules():
        tensor, sizes = _sizes(part)
        for attribute, (dims, due) in sizes.items():
            value = _value(getattr(part, attribute, None))
            if tensor is not None and id(tensor) in names and value is not None:  # not one that is computed
                lengths = tuple(tensor.shape[d] for d in dims)
                found.append(Size(path, attribute, value, due, names[id(tensor)], dims, lengths))
    return tuple(found)


def patches(sizes: Iterable[Size], removed: Removed) -> dict[str, tuple[Value, Value]]:
    """What modules must remember once positions are gone: ``path.attribute`` to its value before and after."""
    found = {}
    for size in sizes:
        after = size.after(removed.get(size.tensor, {}))
        if size.tensor in removed and after != size.value:
            found[size.key] = (size.value, after)
    return found


@dataclass(frozen=True, eq=False)
class Memory:
    """A whole number that a module remembers, or an object that it holds, and that is the length of some dim.

    That it is one is no guess: the model's forward does not bear smaller widths without its change.

    Attributes:
        path: of the module.
        attribute: where it remembers it, ``"num_heads"`` or ``"config.num_heads"``.
        value: what it remembers now: the number, or several of which it is one.
        place: its place among these.
        channels: those of the dim, int64, one a position.
    """

    path: str
    attribute: str
    value: Value
    place: int
    channels: np.ndarray

    @property
    def key(self) -> str:
        """``path.attribute``."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    def after(self, gone: np.ndarray, before: Value) -> Value:
        """What it should remember without the channels that go, bool [channels + 1], if it was ``before`` until now."""
        left = len(self.channels) - int(gone[self.channels].sum())
        if isinstance(before, tuple):
            return (*before[: self.place], left, *before[self.place + 1 :])
        return left


def numbers(part: nn.Module) -> Iterator[tuple[str, Value, int, int]]:
    """The whole numbers that a module remembers, or a plain object that it holds.

    Yields:
        Attribute, its value, the number's place in it, and the number.
    """
    for name, value in vars(part).items():
        if isinstance(value, (int, tuple, list)):
            found = _value(value)
            for place, number in enumerate(found if isinstance(found, tuple) else (found,)):
                if number is not None:
                    yield name, found, place, number  # type: ignore[misc]
        elif not isinstance(value, (Tensor, nn.Module, dict, set, str, type)) and not callable(value):
            for inner, number in getattr(value, "__dict__", {}).items():
                if type(number) is int:
                    yield f"{name}.{inner}", number, 0, number


def patch(model: nn.Module, patched: Patched) -> None:
    """Let modules remember other sizes, in place; all are looked at before the first is changed.

    Where an object that a module holds remembers it, the module gets a copy of its own of that object.

    Raises:
        SecateurError: there is no such module, or it remembers something else.
    """
    modules = dict(model.named_modules())
    places = [_place(modules, key) for key in patched]
    for (part, names), (key, (before, after)) in zip(places, patched.items(), strict=True):
        found: Any = part
        for name in names:
            found = getattr(found, name, None)
        if _value(found) != before:
            raise SecateurError(
                f"the plan changes {key} from {before} to {after}, but it is {found!r} here: the plan is damaged, or "
                "of another model"
            )
    for (part, (*outer, name)), (_, after) in zip(places, patched.values(), strict=True):
        holder: Any = part
        for each in outer:
            own = copy.copy(getattr(holder, each))
            setattr(holder, each, own)
            holder = own
        kind = type(getattr(holder, name))
        setattr(holder, name, list(after) if kind is list and isinstance(after, tuple) else after)


def _place(modules: Mapping[str, nn.Module], key: str) -> tuple[nn.Module | None, list[str]]:
    """The module that ``path.attribute`` means, the nearest there is, and the names that lead from it to the number."""
    names = key.split(".")
    for end in range(len(names) - 1, -1, -1):
        if ".".join(names[:end]) in modules:
            return modules[".".join(names[:end])], names[end:]
    return None, names


def _value(given: Any) -> Value | None:
    """A remembered value as data, None if it is no size."""
    if isinstance(given, (tuple, list)):
        return tuple(map(int, given)) if all(type(v) is int for v in given) else None
    return given if type(given) is int else None


_Sizes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def _sizes(part: nn.Module) -> tuple[Tensor | None, _Sizes]:
    """The tensor whose shape tells a standard module's sizes, and by attribute the axes and what is due for them."""
    tensors = {**part._buffers, **part._parameters}
    if "weight" not in tensors:
        tensors |= _computed_from(part)
    if isinstance(part, (nn.RNNBase, nn.RNNCellBase)):
        first = tensors.get("weight_ih_l0", tensors.get("weight_ih"))
        return (None, {}) if first is None else (first, {"input_size": ((1,), (first.shape[1],))})
    if isinstance(part, nn.MultiheadAttention):
        first = next((t for t in (part.in_proj_weight, part.q_proj_weight) if t is not None), None)
        return first, {} if first is None else {
            "num_heads": ((0,), (part.num_heads,)),
            "embed_dim": ((1,), (first.shape[1],)),
        }
    weight = next((tensors[k] for k in ("weight", "running_mean") if tensors.get(k) is not None), None)
    if weight is None:
        return None, {}
    shape = tuple(weight.shape)
    rows: tuple[tuple[int, ...], tuple[int, ...]] = ((0,), shape[:1])
    columns = ((1,), shape[1:2])
    if isinstance(part, (_CONVOLUTIONS, nn.Linear, nn.Embedding, nn.EmbeddingBag)) and len(shape) < 2:
        return None, {}
    if isinstance(part, _CONVOLUTIONS):
        return weight, _convolution_sizes(part, shape)
    if isinstance(part, nn.Linear):
        return weight, {"in_features": columns, "out_features": rows}
    if isinstance(part, _BATCH_NORMS):
        return weight, {"num_features": rows}
    if isinstance(part, nn.GroupNorm):
        own = part.num_groups == part.num_channels  # one group a channel stays so
        return weight, {"num_channels": rows, "num_groups": rows} if own else {"num_channels": rows}
    if isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
        return weight, {"normalized_shape": (tuple(range(len(shape))), shape)}
    if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
        return weight, {"num_embeddings": rows, "embedding_dim": columns}
    if isinstance(part, nn.PReLU):
        return weight, {"num_parameters": rows}
    return None, {}


def _computed_from(part: nn.Module) -> dict[str, Tensor]:
    """The parameter that has the shape of a weight that is computed (parametrized, or by a hook of weight norm)."""
    given = part._modules.get("parametrizations")
    lists = given._modules if given is not None else {}
    originals = lists["weight"]._parameters if lists.get("weight") is not None else {}  # type: ignore[union-attr]
    candidates = (originals.get("original"), originals.get("original1"), part._parameters.get("weight_v"))
    found = [tensor for tensor in candidates if tensor is not None]
    return {"weight": found[0]} if found else {}


def _convolution_sizes(part: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> _Sizes:
    groups, (rows, columns, *_) = part.groups, shape
    inside, outside = (rows, columns * groups) if part.transposed else (columns * groups, rows)
    if groups > 1 and part.in_channels == groups:  # every channel has its own filters: groups go, offsets stay
        return {"in_channels": ((0,), (inside,)), "out_channels": ((0,), (outside,)), "groups": ((0,), (groups,))}
    inner, outer = (0, 1) if part.transposed else (1, 0)
    return {"in_channels": ((inner,), (inside,)), "out_channels": ((outer,), (outside,))}
