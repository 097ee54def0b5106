"""What a model's Python remembers of its widths: found where a cut skeleton fails, and tried under the proof.

A forward that views its heads by ``self.num_heads`` fails where heads are gone. The operation that fails tells the
widths that are met there; a whole number of the same value, on the module whose forward runs or on one around it, is
set to what is left, and kept if the run then gets further. No name decides, and no list of names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from torch import nn

from secateur.tracing.labels import Ids
from secateur.tracing.op_log import Operation, OpLog
from secateur.tracing.slices import Memory, Value, numbers


class Recollection(NamedTuple):
    """A number of the model's Python, and the labels whose number it is.

    Attributes:
        path: of the module.
        attribute: where it is.
        value: what is there, see :class:`secateur.tracing.slices.Memory`.
        place: of the number in it.
        ids: the labels.
    """

    path: str
    attribute: str
    value: Value
    place: int
    ids: Ids

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells numbers apart."""
        return self.path, self.attribute, self.place

    def memory(self, channel_of: Ids) -> Memory:
        """The same with channels."""
        return Memory(self.path, self.attribute, self.value, self.place, channel_of[np.abs(self.ids)])


class Found(NamedTuple):
    """A recollection, and where in the op log it was found: the result, its dim, the step in the search of modules."""

    what: Recollection
    result: int
    dim: int
    step: int


def candidates(module: nn.Module, operation: Operation, channel_of: Ids, known: Callable[[str], bool]) -> list[Found]:
    """The numbers that may be what an operation's widths come from, in the order of :func:`_around`.

    Args:
        module: the whole model.
        operation: an entry of the first run's log, with labels.
        channel_of: the channel of every label.
        known: whether ``path.attribute`` is known already.
    """
    if operation.place is None:
        return []
    dims = [
        (r, d, ids)
        for r, each in enumerate(operation.labels)
        for d, ids in enumerate(each)
        if ids is not None and channel_of[np.abs(ids)].any()
    ]
    modules = dict(module.named_modules())
    found = []
    for step, path in enumerate(_around(operation.place.path, modules)):
        for attribute, value, place, number in numbers(modules[path]):
            if known(f"{path}.{attribute}" if path else attribute):
                continue
            for r, d, ids in dims:
                own = _of_number(ids, number, channel_of)
                if own is not None:
                    found.append(Found(Recollection(path, attribute, value, place, own), r, d, step))
                    break
    return found


def _of_number(ids: Ids, number: int, channel_of: Ids) -> Ids | None:
    """The labels whose number it is: all of a dim, or one of each channel (the heads, or the groups, of a dim)."""
    if len(ids) == number:
        return ids
    channels, first = np.unique(channel_of[np.abs(ids)], return_index=True)
    return ids[np.sort(first)] if len(channels) == number and (channels > 0).all() else None


def alike(module: nn.Module, log: OpLog, at: int, found: Found, channel_of: Ids) -> Iterator[Recollection]:
    """The same number of other modules of the kind, where the same line of the model's code does the same.

    Args:
        module: the whole model.
        log: the first run's.
        at: the entry where it was found.
        found: what was.
        channel_of: the channel of every label.
    """
    modules, place = dict(module.named_modules()), log[at].place
    kind = type(modules[found.what.path])
    for other in log:
        if other.place is None or place is None or other.name != log[at].name or other.place[1:] != place[1:]:
            continue
        path = list(_around(other.place.path, modules))[found.step : found.step + 1]
        if not path or type(modules[path[0]]) is not kind or found.result >= len(other.labels):
            continue
        dims = other.labels[found.result]
        ids = dims[found.dim] if found.dim < len(dims) else None
        if ids is None or not channel_of[np.abs(ids)].any():
            continue
        for attribute, value, spot, number in numbers(modules[path[0]]):
            own = _of_number(ids, number, channel_of)
            if own is not None and (attribute, spot) == (found.what.attribute, found.what.place):
                yield Recollection(path[0], attribute, value, spot, own)


def _around(path: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The paths of a module, of all around it, from the inside, and of those in it, whose numbers it may read."""
    yield from _outwards(path)
    for name, _ in modules[path].named_children():
        yield f"{path}.{name}" if path else name


def _outwards(path: str) -> Iterator[str]:
    """The paths of a module and of all around it, from the inside."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""
