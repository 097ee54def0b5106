"""One operation as a rule sees it: its arguments by their schema names, and the names its tensors carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from secateur.tracing.labels import Dim, Ids, Labelled, Labels, lasting, vanishing

BROADCAST = "one position is broadcast over others"
Result = Labelled | Sequence[Labelled] | None
Rule = Callable[["Call"], Result]


@cache
def _signature(func: Any) -> tuple[dict[str, tuple[int, Any]], str, str, bool, str]:
    arguments = {
        a.name: (i, a.default_value if a.has_default_value() else None) for i, a in enumerate(func._schema.arguments)
    }
    name = func._schema.name.removeprefix("aten::")
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return arguments, name, base, writes, str(func._overloadname)


class Call:
    """An executed operation.

    Attributes:
        names: the table to add facts to.
        op: the operation's name without namespace, e.g. ``add_``.
        base: the name of its out-of-place twin: ``add``.
        overload: which of several signatures it is.
        writes: whether it changes an argument.
        out: what it returned.
    """

    def __init__(
        self,
        names: Labels,
        lookup: Callable[[Tensor], Labelled],
        func: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        out: Any,
    ) -> None:
        self.names = names
        self._lookup = lookup
        self._arguments, self.op, self.base, self.writes, self.overload = _signature(func)
        self._args = args
        self._kwargs = kwargs
        self.out = out

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name, with the schema's default."""
        if name not in self._arguments:
            return default
        position, value = self._arguments[name]
        if position < len(self._args):
            return self._args[position]
        return self._kwargs.get(name, value)

    def first(self) -> Any:
        """The first argument, whatever it is called."""
        return self._args[0]

    def of(self, tensor: Tensor | None) -> Labelled | None:
        """Labels of a tensor, or None for no tensor."""
        return self._lookup(tensor) if tensor is not None else None

    def tensors(self) -> list[Tensor]:
        """All tensor arguments in order, lists opened."""
        found: list[Tensor] = []
        for value in (*self._args, *self._kwargs.values()):
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                found.extend(v for v in value if isinstance(v, Tensor))
        return found

    def results(self) -> list[Tensor]:
        """All tensors returned."""
        if isinstance(self.out, Tensor):
            return [self.out]
        if isinstance(self.out, (list, tuple)):
            return [v for v in self.out if isinstance(v, Tensor)]
        return []

    def scalars(self) -> list[float]:
        """The plain numbers among the arguments."""
        given = (*self._args, *self._kwargs.values())
        return [v for v in given if isinstance(v, (int, float)) and not isinstance(v, bool)]

    def freeze(self, ids: Dim, reason: str) -> None:
        """These names cannot be removed, because of this operation."""
        self.names.freeze(ids, self.op, reason)

    def placed(self, ids: Dim) -> None:
        """These names are treated by position or by size, which may be another tensor's."""
        if ids is not None:
            self.names.places.append(ids)

    def moved(self, ids: Dim, kept: Dim) -> None:
        """Of these names some are kept, perhaps elsewhere, by their places: a probe must be able to tell those apart.

        Positions that are tied have one name, and fixed ones have none: there a wrong one would look right. Leaving out
        one end needs no such care, for what is right in number is right.
        """
        if ids is not None and kept is not None:
            self.names.moved.append((ids, kept, self.op))

    def freeze_all(self, reason: str) -> None:
        """No name on any input can be removed, because of this operation."""
        for tensor in self.tensors():
            for ids in self._lookup(tensor).dims:
                self.freeze(ids, reason)


def merge(
    call: Call, operands: Sequence[tuple[Labelled, Sequence[int]]], shape: Sequence[int], zero: str
) -> tuple[Dim, ...]:
    """Labels of a broadcast result: aligned positions become one.

    Args:
        call: the operation.
        operands: names and shape of each tensor operand.
        shape: shape of the result.
        zero: ``"any"`` if one vanishing operand makes the result vanish (a product), ``"all"`` if every operand must (a
            sum), ``"lose"`` if it never does.
    """
    dims: list[Dim] = []
    for d, size in enumerate(shape):
        present: list[Dim] = []
        absent = False
        for named, own in operands:
            at = d - (len(shape) - len(own))
            if at < 0:
                absent = True
            elif own[at] == 1 and size != 1:
                call.freeze(named.dims[at], BROADCAST)
                absent = True
            else:
                present.append(named.dims[at])
        dims.append(_merge_dim(call, present, absent, zero))
    return tuple(dims)


def _merge_dim(call: Call, present: Sequence[Dim], absent: bool, zero: str) -> Dim:
    named = [ids for ids in present if ids is not None]
    if not named:
        return None
    if len(named) < len(present):
        for ids in named:
            call.freeze(ids, "meets a tensor whose positions are fixed")
        return None
    first: Ids = named[0]
    for other in named[1:]:
        call.names.unite(first, other)
    if zero == "lose":
        return lasting(first)
    if zero == "all" and absent:
        return lasting(first)
    if len(named) == 1:
        return first
    keep = first > 0
    for other in named[1:]:
        keep = keep & (other > 0) if zero == "all" else keep | (other > 0)
    return first if (keep == (first > 0)).all() else vanishing(first, keep)
