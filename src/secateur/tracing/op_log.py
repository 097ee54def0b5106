"""What a run computed, operation by operation, and where two runs differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from linecache import getline
from typing import NamedTuple

import numpy as np

from secateur.tracing.labels import Dim, Ids

MOVES = {"view", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice"}
"""Operations that only move positions, or, where they keep all of them, are not there."""


class Place(NamedTuple):
    """Where in the model something happens.

    Attributes:
        path: of the module whose forward runs.
        file: of the model's own code, empty if there is none (as in an ``nn.Sequential`` of PyTorch's layers).
        line: in it, from 1 on.
    """

    path: str
    file: str
    line: int

    def __str__(self) -> str:
        module = repr(self.path) if self.path else "the model"
        if not self.file:
            return f"in {module}"
        text = getline(self.file, self.line).strip()
        return f"in {module}, {self.file}:{self.line}{f': {text}' if text else ''}"


@dataclass(frozen=True, eq=False)
class Operation:
    """One entry of the op log: what an operation returned, and which numbers it was given.

    Attributes:
        name: of the operation, without namespace.
        labels: of every tensor that it returned, one entry a dim; none if nobody has read these tensors.
        shapes: of these tensors.
        numbers: the plain numbers among its arguments that enter values.
        place: where it was.
    """

    name: str
    labels: tuple[tuple[Dim, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    numbers: tuple[float, ...] = ()
    place: Place | None = None


ANY = -1
"""The size of a dim along which one value is copied: as many times as whatever it meets has positions."""
OpLog = list[Operation]
"""What a run computed, in order."""


def arrays_of(log: OpLog) -> Iterator[Ids]:
    """All arrays of labels."""
    return (ids for o in log for dims in o.labels for ids in dims if ids is not None)


def relabelled(log: OpLog, change: Callable[[Ids], Dim]) -> OpLog:
    """The same operations with other labels; arrays flow through a network by reference, so each is changed once."""
    known: dict[int, Dim] = {}

    def new(ids: Dim) -> Dim:
        if ids is None:
            return None
        if id(ids) not in known:
            known[id(ids)] = change(ids)
        return known[id(ids)]

    return [replace(o, labels=tuple(tuple(new(d) for d in dims) for dims in o.labels)) for o in log]


def with_channels(log: OpLog, channel_of: Ids) -> OpLog:
    """The same operations with every label replaced by its channel, 0 where it is frozen."""
    return relabelled(log, lambda ids: channel_of[np.abs(ids)])


def remaining(log: OpLog, gone: np.ndarray) -> OpLog:
    """The operations that a correctly cut model must show.

    Args:
        log: those of the whole model, with channels.
        gone: whether a channel goes, bool [channels + 1].
    """

    def shapes(operation: Operation) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(n if ids is None else len(ids) for ids, n in zip(dims, shape, strict=True))
            for dims, shape in zip(operation.labels, operation.shapes, strict=True)
        )

    return [replace(o, shapes=shapes(o)) for o in relabelled(log, lambda ids: ids[~gone[ids]])]


class Difference(NamedTuple):
    """Where a run is not what is due.

    Attributes:
        reason: in words.
        at: the entry of what is due.
        place: of what came, where anything did.
    """

    reason: str
    at: int
    place: Place | None


def compare(expected: OpLog, again: OpLog, agree: Callable[[Dim, Dim], bool], *, free: bool) -> Difference | None:
    """The first difference between two runs, if there is one.

    Args:
        expected: what is due.
        again: what was computed.
        agree: whether the labels of two dims are the same.
        free: whether sizes without labels may differ, as where they depend on values.
    """
    if _path(expected) == _path(again):
        return _difference(list(enumerate(expected)), again, agree, free=free)
    # what PyTorch copies or views depends on strides, and so on widths: what is computed decides
    computing = [(i, o) for i, o in enumerate(expected) if o.name not in MOVES]
    return _difference(computing, [o for o in again if o.name not in MOVES], agree, free=free)


def _difference(
    due: list[tuple[int, Operation]], came: OpLog, agree: Callable[[Dim, Dim], bool], *, free: bool
) -> Difference | None:
    for (at, want), got in zip(due, came, strict=False):
        if want.name != got.name:
            return Difference("the model's forward takes another path when widths change", at, got.place)
        if wrong := _wrong(want, got, agree, free=free):
            return Difference(wrong, at, got.place)
    if len(due) != len(came):
        at, place = due[min(len(came), len(due)) - 1][0] if due and came else 0, came[-1].place if came else None
        return Difference("the model's forward takes another path when widths change", at, place)
    return None


def _wrong(want: Operation, got: Operation, agree: Callable[[Dim, Dim], bool], *, free: bool) -> str:
    """What is wrong with an operation, in words."""
    if not want.shapes:
        return ""
    if want.shapes != got.shapes and not _fits(want, got, free=free):
        gives, due = (_words(shapes) for shapes in (got.shapes, want.shapes))
        return f"the model fixes a width: {got.name} gives {gives} where {due} is due"
    if want.numbers != got.numbers:
        return f"the model computes a number from a width: {got.name} takes {got.numbers} where {want.numbers} is due"
    for dims, others in zip(want.labels, got.labels, strict=True):
        if any(not agree(a, b) for a, b in zip(dims, others, strict=True)):
            return f"the model fixes a position: {got.name} mixes up channels"
    return ""


def _words(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def _path(log: OpLog) -> list[str]:
    return [operation.name for operation in log]


def _fits(want: Operation, got: Operation, *, free: bool) -> bool:
    """Whether the shapes of two operations agree; free: only where there are labels."""
    return len(want.shapes) == len(got.shapes) and all(
        len(a) == len(b) and all(m in (n, ANY) or (free and ids is None) for m, n, ids in zip(a, b, dims, strict=True))
        for a, b, dims in zip(want.shapes, got.shapes, want.labels, strict=True)
    )
