"""The table of labels: every position of every axis gets one, and equalities between labels are only ever added.

A label is an integer. Its absolute value says which positions live and die together. Its sign says whether the values
there *vanish with the channel*: positive where zero producers mean zero values, negative where they do not (after a
sigmoid, say). ``0`` is a frozen position. Arrays of labels flow through the network unchanged, so that equal labels
stay recognisable. Equalities are collected, and resolved once, at the end, as connected components: then every label
stands for a channel.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from secateur.tracing.norms import Norm
from secateur.tracing.weight_norms import WeightNorm

Ids = np.ndarray
"""Int64 array of labels; once equalities are resolved, of channels."""
MIXED = 2**62
"""The label of what holds several channels in a second run."""
Dim = Ids | None
"""Labels of one dim of a tensor: an array of its length, or None if all its positions are fixed."""


@dataclass(frozen=True, eq=False)
class Joint:
    """Labels that vary along several dims of a tensor, as after a split of channels into heads of some size.

    A tensor has no holes, so it can lose channels along one of these dims only; the labels along the others are tied
    then. Which one it is, is left open for as long as operations only move or pick positions.

    Attributes:
        dims: of the tensor, in order.
        table: the labels, one axis for each of these dims.
        axes: a number for each axis, which it keeps when it is moved.
    """

    dims: tuple[int, ...]
    table: Ids
    axes: tuple[int, ...]

    def at(self, dims: Iterable[int]) -> Joint:
        """The same labels on other dims, one for each of the old ones."""
        placed = list(dims)
        order = sorted(range(len(placed)), key=placed.__getitem__)
        return Joint(tuple(placed[i] for i in order), self.table.transpose(order), tuple(self.axes[i] for i in order))


@dataclass(frozen=True, eq=False)
class Labelled:
    """The labels of a tensor.

    Attributes:
        dims: one entry a dim.
        weight: True if the tensor was computed from parameters and constants only, never from the model's inputs.
        joints: labels that vary along several dims, which have no entry of their own then.
        owed: what becomes known, of frozen labels say, as soon as the values are read: a forward may want the shape
            alone, or nothing of a result.
        turned: whether it is a transposed weight, as a linear layer multiplies by.
        free: dims along which one value is copied, so that they have as many positions as whatever they meet.
        zero: whether all values are zero.
    """

    dims: tuple[Dim, ...]
    weight: bool
    joints: tuple[Joint, ...] = ()
    owed: tuple[Callable[[], None], ...] = ()
    turned: bool = False
    free: frozenset[int] = frozenset()
    zero: bool = False

    @property
    def has_labels(self) -> bool:
        """Whether any dim carries labels."""
        return bool(self.joints) or any(ids is not None for ids in self.dims)

    @property
    def arrays(self) -> list[Ids]:
        """All labels."""
        return [ids for ids in self.dims if ids is not None] + [joint.table.ravel() for joint in self.joints]


def unlabelled(ndim: int, *, weight: bool) -> Labelled:
    """A tensor all of whose positions are fixed."""
    return Labelled((None,) * ndim, weight)


@dataclass(frozen=True)
class Owner:
    """The axis of a parameter or buffer that a run of fresh labels belongs to."""

    name: str
    dim: int
    start: int
    size: int


class Unequal(NamedTuple):
    """Where labels meet, in a second run, that are not equal: the place in the model's code."""

    place: Any


class NormUse(NamedTuple):
    """A norm that takes its statistics over labels, and that can be cut exactly.

    Attributes:
        path: of the module.
        norm: what it must do when it is cut.
        ids: the labels it normalises.
    """

    path: str
    norm: Norm
    ids: Ids


class Labels:
    """Labels given so far and what is known of them.

    Args:
        resolved: whether labels are channels, as in a second run: then nothing can become equal any more.
        divisors: names of the buffers that must not become zero, as far as known.
        innermost: whether the unit of labels that vary along several dims is the innermost of these, not the outermost.
    """

    def __init__(self, *, resolved: bool = False, divisors: Iterable[str] = (), innermost: bool = False) -> None:
        self.resolved = resolved
        self.innermost = innermost
        self.divisors = set(divisors)
        self.buffers: set[str] = set()  # those that hold numbers
        self.count = 1  # 0 is frozen
        self.owners: list[Owner] = []
        self.arrays: list[Ids] = []  # the array of each owner, by reference
        self.freezes: list[tuple[Ids, str, str]] = []
        self.frozen_at: list[Any] = []  # the place in the model's code, for each of these
        self.seen: set[str] = set()  # parameters and buffers that an operation has read
        self.unequal: Unequal | None = None
        self.steered: Any = None  # the place where a value steered the model's Python
        self.here: Callable[[], Any] = lambda: None  # tells it
        self.approximations: list[tuple[Ids, str]] = []
        self.roles: dict[str, list[Ids]] = {"producer": [], "consumer": [], "carried": []}
        self.aliases: list[tuple[int, int]] = []
        self.places: list[Ids] = []  # what slices and views treat by positions and sizes, which may be another's
        self.moved: list[tuple[Ids, Ids, str]] = []  # an axis, what is kept of it by its place, and by which operation
        self.terms: list[tuple[int, tuple[Ids, ...]]] = []
        self.edges: list[tuple[Ids, Ids]] = []
        self.united_at: list[Any] = []  # the place in the model's code, for each of these
        self.norm_at: dict[str, Norm] = {}  # the norms that can be cut exactly, by their paths
        self.norms: list[NormUse] = []
        self.entering: dict[str, list[Ids]] = {}  # what comes into these norms and does not vanish with its channels
        self.weight_norms: list[tuple[str, WeightNorm]] = []  # the name of the length, and the rest of it
        self.met: list[tuple[str, str, Ids]] = []  # module, its attribute, and the labels whose number this is
        self.grouped: list[tuple[Ids, int, str | None]] = []  # what group norms normalise, in how many groups, which
        self.joints: list[Joint] = []
        self.units: set[int] = set()  # the axes of joints along which channels go
        self.picked: set[int] = set()  # those of which single positions are picked
        self._axes = 0
        self._settled: dict[int, tuple[Joint, int, Ids]] = {}

    def join(self, dims: Iterable[int], table: Ids, axes: Iterable[int | None]) -> Joint:
        """Labels that vary along several dims; an axis without a number gets one."""
        numbers = []
        for axis in axes:
            self._axes += axis is None
            numbers.append(self._axes if axis is None else axis)
        self.joints.append(Joint(tuple(dims), table, tuple(numbers)))
        return self.joints[-1]

    def settled(self, labelled: Labelled) -> Labelled:
        """The same labels, with each joint settled: the outermost dim of which nothing was picked is the unit.

        Where channels are split into heads of some size, that is the head; the innermost one is the size.
        """
        if not labelled.joints:
            return labelled
        dims = list(labelled.dims)
        for joint in labelled.joints:
            _, unit, ids = self._settled.get(id(joint)) or self._settle(joint)
            dims[joint.dims[unit]] = ids
        return Labelled(tuple(dims), labelled.weight, free=labelled.free, zero=labelled.zero)

    def _settle(self, joint: Joint, unit: int | None = None) -> tuple[Joint, int, Ids]:
        axes = list(enumerate(joint.axes))
        if unit is None:
            unit = next((i for i, axis in axes if axis in self.units), None)
        if unit is None:
            unit = next((i for i, axis in axes[:: -1 if self.innermost else 1] if axis not in self.picked), 0)
        self.units.add(joint.axes[unit])
        line = np.moveaxis(joint.table, unit, 0).reshape(joint.table.shape[unit], -1)
        self.unite(line[:, :1], line[:, 1:])
        same = (np.abs(line) == np.abs(line[:, :1])).all(1)
        mixed = self.resolved and not same.all()  # what should be tied is not: like no channel
        ids = np.where(same, line[:, 0], MIXED) if mixed else tied(joint.table, unit)
        self._settled[id(joint)] = (joint, unit, ids)
        return self._settled[id(joint)]

    def settle(self) -> None:
        """Settle, once a run is over, what no operation has: the innermost dim of which nothing was picked is the unit.

        So it is where channels are shuffled. Of the channels of a group norm whole groups go, unless all of them are
        tied then.
        """
        component = self.components()
        left = [joint for joint in self.joints if id(joint) not in self._settled]
        while open_ := [joint for joint in left if len(varying(component[np.abs(joint.table)])) > 1]:
            for joint in open_:
                free = [i for i, axis in enumerate(joint.axes) if axis not in self.picked]
                unit = next((i for i, axis in enumerate(joint.axes) if axis in self.units), None)
                self._settle(joint, unit if unit is not None else (free or [0])[-1])
            component = self.components()
            left = [joint for joint in left if id(joint) not in self._settled]
        for ids, groups, path in self.grouped:
            members = np.abs(ids).reshape(groups, -1)
            pairs = np.unique(
                np.stack([np.repeat(np.arange(groups), members.shape[1]), component[members.ravel()]]), axis=1
            )
            matrix = coo_matrix((np.ones(pairs.shape[1], dtype=np.int8), (pairs[0], pairs[1] + groups)),
                                shape=(groups + self.count,) * 2)  # fmt: skip
            if len(np.unique(connected_components(matrix, directed=False)[1][:groups])) > 1:
                self.unite(members[:, :1], members[:, 1:])
                if path is not None:
                    self.met.append((path, "num_groups", members[:, 0]))
                component = self.components()
            else:
                self.unite(members[:1], members[1:])
                self.approximate(ids, "group norm takes its statistics over it")
        self.grouped.clear()

    def along(self, joint: Joint, channel_of: Ids) -> tuple[int, Ids] | None:
        """Along which dim of a tensor a settled joint varies, and its labels there."""
        found = varying(channel_of[np.abs(joint.table)])
        return (joint.dims[found[0]], tied(joint.table, found[0])) if len(found) == 1 else None

    def fresh(self, size: int) -> Ids:
        """New labels, all different, all vanishing."""
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return ids

    def own(self, name: str, dim: int, size: int) -> Ids:
        """New labels for an axis of a parameter or buffer."""
        self.owners.append(Owner(name, dim, self.count, size))
        self.arrays.append(self.fresh(size))
        return self.arrays[-1]

    def owner(self, ids: Ids) -> Owner | None:
        """The axis that these labels were given to, if they are exactly those of one."""
        plain = np.abs(ids)
        at = bisect(self.owners, int(plain[0]), key=lambda owner: owner.start) - 1 if len(plain) else -1
        if at < 0 or not np.array_equal(plain, np.abs(self.arrays[at])):
            return None
        return self.owners[at]

    def divides(self, ids: Dim, operation: str, reason: str) -> None:
        """These labels must not become zero: they are frozen, or, where they are a buffer's, it is left as it is."""
        if ids is None or not (ids > 0).any():
            return
        owner = self.owner(ids)
        if owner is not None and owner.name in self.buffers:
            self.divisors.add(owner.name)
        else:
            self.freeze(ids[ids > 0], operation, reason)

    def unite(self, a: Ids, b: Ids) -> None:
        """Position by position, the labels of ``a`` and ``b`` are equal (both broadcast to one shape)."""
        if a is not b:
            self.edges.append((a, b))
            self.united_at.append(self.here())

    def meet(self, a: Ids, b: Ids) -> None:
        """The labels of two dims of one length are equal; a second run notes where they are not."""
        if not self.resolved:
            self.unite(a, b)
        elif self.unequal is None and not np.array_equal(np.abs(a), np.abs(b)):
            self.unequal = Unequal(self.here())

    def freeze(self, ids: Dim, operation: str, reason: str) -> None:
        """The channels with these labels cannot be removed."""
        if ids is not None and len(ids):
            self.freezes.append((ids, operation, reason))
            self.frozen_at.append(self.here())

    def approximate(self, ids: Dim, reason: str) -> None:
        """Removing the channels with these labels changes something else."""
        if ids is not None and len(ids):
            self.approximations.append((ids, reason))

    def read(self, ids: Dim, operation: str) -> None:
        """A consumer sums over these labels: exact only where the values vanish with the channel."""
        if ids is not None and (ids < 0).any():
            self.approximate(ids[ids < 0], f"{operation} reads a channel that is not zero when its producers are")

    def mark(self, role: str, ids: Dim) -> None:
        """The axes that own these labels are producers, consumers or merely carried."""
        if ids is not None and len(ids):
            self.roles[role].append(ids)

    def alias(self, a: Dim, b: Dim) -> None:
        """The axes that own these labels (all of them weights) play the same roles."""
        if a is not None and b is not None and len(a) and len(b):
            self.aliases.append((abs(int(a[0])), abs(int(b[0]))))

    def term(self, factor: int, *dims: tuple[Dim, int]) -> None:
        """Count ``factor * product of the lengths`` multiply-accumulates; a dim is its labels and its size."""
        counted = tuple(ids for ids, _ in dims if ids is not None)
        for ids, size in dims:
            if ids is None:
                factor *= size
        self.terms.append((factor, counted))

    def state(self) -> dict[str, int]:
        """How much is known by now."""
        facts = {name: len(value) for name, value in vars(self).items() if isinstance(value, list)}
        return facts | {role: len(value) for role, value in self.roles.items()}

    def forget(self, state: Mapping[str, int]) -> None:
        """Drop what was added since then (of the kinds that are given)."""
        for name, length in state.items():
            facts: list = self.roles[name] if name in self.roles else getattr(self, name)
            del facts[length:]

    def components(self) -> np.ndarray:
        """The component of every label (label 0 has one of its own)."""
        if not self.edges:
            return np.arange(self.count)
        pairs = [np.broadcast_arrays(a, b) for a, b in self.edges]
        a = np.abs(np.concatenate([p[0].ravel() for p in pairs]))
        b = np.abs(np.concatenate([p[1].ravel() for p in pairs]))
        touching = (a == 0) != (b == 0)  # one side fixed: the other is frozen
        if touching.any():
            ends = np.cumsum([0, *(p[0].size for p in pairs)])
            total = np.concatenate([[0], np.cumsum(touching)])[ends]
            for i in np.flatnonzero(np.diff(total)):
                part = slice(ends[i], ends[i + 1])
                self.freezes.append(((a + b)[part][touching[part]], "add", "meets positions that are fixed"))
                self.frozen_at.append(self.united_at[i])
        free = (a > 0) & (b > 0)
        matrix = coo_matrix((np.ones(int(free.sum()), dtype=np.int8), (a[free], b[free])), shape=(self.count,) * 2)
        return connected_components(matrix, directed=False)[1]


def varying(table: Ids) -> list[int]:
    """The axes along which a table of labels is not constant."""
    plain = np.abs(table)
    return [d for d in range(table.ndim) if (plain != plain.take([0], axis=d)).any()]


def tied(table: Ids, unit: int) -> Ids:
    """The labels along one axis of a table; what is tied along the others vanishes only if all of it does."""
    line = np.moveaxis(table, unit, 0).reshape(table.shape[unit], -1)
    return vanishing(line[:, 0], line.min(1) > 0)


def vanishing(ids: Ids, where: np.ndarray) -> Ids:
    """The same labels, positive exactly where asked."""
    return np.where(where, np.abs(ids), -np.abs(ids))


def lasting(ids: Dim) -> Dim:
    """The same labels, of values that do not vanish."""
    return None if ids is None else -np.abs(ids)
