"""What a run computed, step by step, and where two runs differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from secateur.tracing.labels import Dim, Ids

MOVES = {"view", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze"}
"""Operations that only move positions."""


@dataclass(frozen=True, eq=False)
class Step:
    """What one operation returned: the names and shapes of its tensors; and the plain numbers it was given."""

    op: str
    names: tuple[tuple[Dim, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    numbers: tuple[float, ...] = ()


def renamed(steps: list[Step], change: Callable[[Ids], Dim]) -> list[Step]:
    """The same steps with other names; arrays flow through a network by reference, so each is changed once."""
    known: dict[int, Dim] = {}

    def new(ids: Dim) -> Dim:
        if ids is None:
            return None
        if id(ids) not in known:
            known[id(ids)] = change(ids)
        return known[id(ids)]

    return [replace(s, names=tuple(tuple(new(d) for d in dims) for dims in s.names)) for s in steps]


def final_steps(steps: list[Step], channel_of: np.ndarray) -> list[Step]:
    """The same steps with every name replaced by its channel id; a dim that is fixed throughout has no names."""

    def final(ids: Ids) -> Dim:
        channels = channel_of[np.abs(ids)]
        return channels if channels.any() else None

    return renamed(steps, final)


def remaining(steps: list[Step], gone: np.ndarray) -> list[Step]:
    """The steps that a correctly cut model must show."""

    def shapes(step: Step) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(n if ids is None else len(ids) for ids, n in zip(dims, shape, strict=True))
            for dims, shape in zip(step.names, step.shapes, strict=True)
        )

    return [replace(step, shapes=shapes(step)) for step in renamed(steps, lambda ids: ids[~gone[ids]])]


def compare(expected: list[Step], again: list[Step], agree: Callable[[Dim, Dim], bool], *, free: bool) -> str:
    """The first difference between two runs, in words, or an empty string; sizes without names may be free (values)."""
    if _path(expected) != _path(again):  # what PyTorch copies or views depends on strides, and so on widths
        expected, again = _computing(expected), _computing(again)
        if _path(expected) != _path(again):
            return "the model's forward takes another path when widths change"
    for want, got in zip(expected, again, strict=True):
        if want.shapes != got.shapes and not (free and _same_named(want, got)):
            return f"the model fixes a width: {got.op} gives {got.shapes} where {want.shapes} is due"
        if want.numbers != got.numbers:
            return f"the model computes a number from a width: {got.op} takes {got.numbers} where {want.numbers} is due"
        for dims, others in zip(want.names, got.names, strict=True):
            if any(not agree(a, b) for a, b in zip(dims, others, strict=True)):
                return f"the model fixes a position: {got.op} mixes up channels"
    return ""


def _path(steps: list[Step]) -> list[str]:
    return [step.op for step in steps]


def _computing(steps: list[Step]) -> list[Step]:
    """The steps that compute something, without those that only move positions."""
    return [step for step in steps if step.op not in MOVES]


def _same_named(want: Step, got: Step) -> bool:
    """Whether two steps' shapes agree where names are."""
    return len(want.shapes) == len(got.shapes) and all(
        len(a) == len(b) and all(m == n or ids is None for m, n, ids in zip(a, b, dims, strict=True))
        for a, b, dims in zip(want.shapes, got.shapes, want.names, strict=True)
    )
