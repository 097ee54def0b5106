"""One operation as a rule sees it: its arguments by the names of the schema, and the labels that its tensors carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from secateur.tracing.labels import Dim, Ids, Labelled, Labels, lasting, vanishing

BROADCAST = "one position is broadcast over others"
Result = Labelled | Sequence[Labelled] | None
"""What a rule returns: the labels of one result, or of the first results in order, or nothing."""
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
    """An operation that was run.

    Args:
        labels: the table.
        lookup: gives the labels of a tensor.
        func: the ATen operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: what it returned.
        at_work: tells the module whose forward runs, by its path.
        name_of: tells the name of a parameter or buffer.

    Attributes:
        labels: the table, to which a rule adds facts.
        op: the operation's name without namespace, e.g. ``add_``.
        base: the name of its out-of-place twin: ``add``.
        overload: which of several signatures it has.
        writes: whether it changes an argument.
        out: what it returned.
        at_work: tells the module whose forward runs, and its path.
        name_of: tells the name of a parameter or buffer, None for any other tensor.
        before: shape and strides that the first argument had, where the operation changes these in place.
    """

    def __init__(
        self,
        labels: Labels,
        lookup: Callable[[Tensor], Labelled],
        func: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        out: Any,
        at_work: Callable[[], tuple[str, nn.Module | None]] = lambda: ("", None),
        name_of: Callable[[Tensor], str | None] = lambda _: None,
    ) -> None:
        self.labels = labels
        self._lookup = lookup
        self._arguments, self.op, self.base, self.writes, self.overload = _signature(func)
        self._args = args
        self._kwargs = kwargs
        self.out = out
        self.at_work = at_work
        self.name_of = name_of
        self.before: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by the name in the schema. If it was not given, the schema's default; else ``default``."""
        if name not in self._arguments:
            return default
        position, value = self._arguments[name]
        if position < len(self._args):
            return self._args[position]
        return self._kwargs.get(name, value)

    def first(self) -> Any:
        """The first argument, whatever its name."""
        return self._args[0]

    def of(self, tensor: Tensor | None) -> Labelled | None:
        """The labels of a tensor, one array a dim; None for no tensor."""
        return self.labels.settled(self._lookup(tensor)) if tensor is not None else None

    def open(self, tensor: Tensor) -> Labelled:
        """The labels of a tensor, among them those that vary along several dims."""
        return self._lookup(tensor)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, in order; lists are opened."""
        found: list[Tensor] = []
        for value in (*self._args, *self._kwargs.values()):
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                found.extend(v for v in value if isinstance(v, Tensor))
        return found

    def results(self) -> list[Tensor]:
        """All tensors that it returned."""
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
        """The channels with these labels cannot be removed, because of this operation."""
        self.labels.freeze(ids, self.op, reason)

    def placed(self, ids: Dim) -> None:
        """This operation treats these labels by position or by size. Either may come from another tensor."""
        if ids is not None:
            self.labels.places.append(ids)

    def moved(self, ids: Dim, kept: Dim) -> None:
        """This operation keeps some of these labels, perhaps elsewhere, by their positions.

        A probe must be able to tell the kept positions apart. It cannot where positions are tied, since they have one
        label, or fixed, since they have none: a wrong position would look right. Leaving out one end needs no such
        care: there the right number of positions is the right positions.
        """
        if ids is not None and kept is not None:
            self.labels.moved.append((ids, kept, self.op))

    def freeze_all(self, reason: str) -> None:
        """The channels of all inputs cannot be removed, because of this operation."""
        for tensor in self.tensors():
            for ids in self._lookup(tensor).arrays:
                self.freeze(ids, reason)


def merge(
    call: Call, operands: Sequence[tuple[Labelled, Sequence[int]]], shape: Sequence[int], zero: str
) -> tuple[Dim, ...]:
    """The labels of a broadcast result. Aligned positions get one label.

    Args:
        call: the operation.
        operands: labels and shape of each tensor.
        shape: shape of the result.
        zero: when the result vanishes with the channel: ``"any"`` if one operand that vanishes is enough (a product),
            ``"all"`` if every operand must (a sum), ``"lose"`` if it never does.
    """
    dims: list[Dim] = []
    for d, size in enumerate(shape):
        present: list[Dim] = []
        absent = False
        for labelled, own in operands:
            at = d - (len(shape) - len(own))
            if at < 0 or at in labelled.free:
                absent = absent or not labelled.zero
            elif own[at] == 1 and size != 1:
                call.freeze(labelled.dims[at], BROADCAST)
                absent = absent or not labelled.zero
            else:
                present.append(labelled.dims[at])
        dims.append(_merge_dim(call, present, absent, zero))
    return tuple(dims)


def free_dims(operands: Sequence[tuple[Labelled, Sequence[int]]], shape: Sequence[int]) -> frozenset[int]:
    """The dims of a broadcast result along which one value is copied; operands and shape as for :func:`merge`."""
    if not any(labelled.free for labelled, _ in operands):
        return frozenset()
    found = set()
    for d, size in enumerate(shape):
        places = [(labelled, own, d - (len(shape) - len(own))) for labelled, own in operands]
        if size > 1 and all(at < 0 or at in labelled.free or own[at] == 1 for labelled, own, at in places):
            found.add(d)
    return frozenset(found)


def _merge_dim(call: Call, present: Sequence[Dim], absent: bool, zero: str) -> Dim:
    labelled = [ids for ids in present if ids is not None]
    if not labelled:
        return None
    if len(labelled) < len(present):
        for ids in labelled:
            call.freeze(ids, "meets a tensor whose positions are fixed")
        return None
    first: Ids = labelled[0]
    for other in labelled[1:]:
        call.labels.unite(first, other)
    if zero == "lose":
        return lasting(first)
    if zero == "all" and absent:
        return lasting(first)
    if len(labelled) == 1:
        return first
    keep = first > 0
    for other in labelled[1:]:
        keep = keep & (other > 0) if zero == "all" else keep | (other > 0)
    return first if (keep == (first > 0)).all() else vanishing(first, keep)
