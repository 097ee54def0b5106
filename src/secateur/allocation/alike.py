"""Groups that end with equally many channels, and so are one group to whoever chooses widths.

A configuration of transformers has one number for the widths of all its layers, and so has a serving engine. The k-th
channel to go of one group goes together with the k-th of every group that is alike, whichever position it has there. So
these channels have one name: in the graph that a strategy sees they are channels of one group, which counts, costs and
is tried as all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from secateur._internal.errors import SecateurError, unknown
from secateur.tracing.graph import Axis, ChannelGraph, ChannelGroup, role

Alike = bool | str | Sequence[str]
"""All groups whose layers have one name, none, or those that a pattern of names means; one or several."""


def check_alike(alike: Any) -> None:
    """Raise if it does not say which groups are alike."""
    listed = [alike] if isinstance(alike, str) else alike
    named = isinstance(listed, (list, tuple)) and listed and all(isinstance(p, str) and p for p in listed)
    if not isinstance(alike, bool) and not named:
        raise SecateurError(
            f"Budget(alike={alike!r}): True, which is all groups whose layers have one name, or patterns of names of "
            "groups, such as ['*.mlp.gate_proj'], are expected"
        )


def classes(graph: ChannelGraph, alike: Alike) -> list[list[int]]:
    """The indices of groups that are alike, in the order of the first of each; most groups may be alone.

    Args:
        graph: the channel graph.
        alike: see :class:`secateur.Budget`.

    Raises:
        SecateurError: a pattern that names no group, or a group that two patterns name.
    """
    if not alike:
        return [[i] for i in range(len(graph.groups))]
    if alike is True:
        roles = [role(group.name) for group in graph.groups]
    else:
        roles = _matched(graph, [alike] if isinstance(alike, str) else alike)
    found: dict[tuple[str, int], list[int]] = {}
    for i, (group, own) in enumerate(zip(graph.groups, roles, strict=True)):
        found.setdefault((own, len(group)), []).append(i)
    return list(found.values())


def _matched(graph: ChannelGraph, patterns: Sequence[str]) -> list[str]:
    """The pattern that names each group; of others something of their own."""
    roles = [f"#{i}" for i in range(len(graph.groups))]
    for pattern in patterns:
        meant = [i for i, group in enumerate(graph.groups) if fnmatchcase(group.name, pattern)]
        if not meant:
            raise unknown("group in alike", pattern, [group.name for group in graph.groups])
        for i in meant:
            if roles[i] in patterns and roles[i] != pattern:
                raise SecateurError(
                    f"Budget(alike=...): both {roles[i]!r} and {pattern!r} mean group {graph.groups[i].name!r}; let "
                    "one pattern mean all that are to be alike"
                )
            roles[i] = pattern
    return roles


def common_stops(members: Sequence[Sequence[int]], stops: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The widths that every class may be given, of those that the groups may."""
    found = []
    for first, *others in members:
        common = [width for width in stops[first].tolist() if all(width in stops[i] for i in others)]
        found.append(np.array(common, dtype=np.int64))
    return found


def left_alone(graph: ChannelGraph, alike: Alike, reasons: Mapping[str, str]) -> dict[str, str]:
    """Groups that are left alone, and those that are alike to one of them -> why."""
    found = dict(reasons)
    for members in classes(graph, alike):
        names = [graph.groups[i].name for i in members]
        for first in [name for name in names if name in reasons][:1]:
            for name in names:
                found.setdefault(name, f"alike to {first!r}, which is left alone: {reasons[first]}")
    return found


@dataclass(frozen=True, eq=False)
class Tied:
    """A graph in which channels of groups that are alike are one, and what is known of them.

    Attributes:
        graph: the original one.
        members: by group of :attr:`tied` the indices of the original's, see :func:`classes`.
        orders: by name of the original's groups the positions of their channels in the order of their removal; groups
            without one stay whole.
    """

    graph: ChannelGraph
    members: Sequence[Sequence[int]]
    orders: Mapping[str, np.ndarray]

    @cached_property
    def tied(self) -> ChannelGraph:
        """The graph in which every class is one group, with the first one's name and positions."""
        graph = self.graph
        if len(self.members) == len(graph.groups):
            return graph
        names = np.arange(1 + max(int(axis.channels.max(initial=0)) for axis in graph.axes))
        for first, *others in self.members:
            one = graph.groups[first]
            for other in (graph.groups[i] for i in others):
                names[other.channels[self._order(other)]] = one.channels[self._order(one)]
        axes = {(axis.name, axis.dim): replace(axis, channels=names[axis.channels]) for axis in graph.axes}

        def renamed(some: Sequence[Axis]) -> tuple[Axis, ...]:
            return tuple(axes.get((a.name, a.dim)) or replace(a, channels=names[a.channels]) for a in some)

        groups = []
        for members in self.members:
            own = [graph.groups[i] for i in members]
            of: dict[str, Any] = {
                name: renamed([axis for group in own for axis in getattr(group, name)])
                for name in ("producers", "consumers", "carried", "constants")
            }
            exact, reason = all(g.exact for g in own), next((g.reason for g in own if not g.exact), "")
            least = max(group.least for group in own)
            groups.append(replace(own[0], exact=exact, reason=reason, least=least, **of))
        return replace(
            graph,
            groups=tuple(groups),
            axes=tuple(axes.values()),
            multiplicity=csr_matrix(graph.multiplicity @ self._together),
            norms=tuple((path, norm, names[channels]) for path, norm, channels in graph.norms),
        )

    def _order(self, group: ChannelGroup) -> np.ndarray:
        return self.orders.get(group.name, np.arange(len(group)))

    @property
    def _together(self) -> csr_matrix:
        """Which groups are of which class, [groups, classes]."""
        at = np.concatenate([np.asarray(own, dtype=np.int64) for own in self.members])
        of = np.repeat(np.arange(len(self.members)), [len(own) for own in self.members])
        ones = np.ones(len(at), dtype=np.int64)
        return csr_matrix((ones, (at, of)), shape=(len(self.graph.groups), len(self.members)))

    @cached_property
    def of(self) -> np.ndarray:
        """The class of every group, int64 [groups]."""
        found = np.zeros(len(self.graph.groups), dtype=np.int64)
        for i, own in enumerate(self.members):
            found[list(own)] = i
        return found

    def summed(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What is known of the groups of each class, added up, by the first one's name; of some classes nothing is."""
        groups = self.graph.groups
        return {
            groups[own[0]].name: np.sum([values[groups[i].name] for i in own], axis=0)
            for own in self.members
            if all(groups[i].name in values for i in own)
        }

    def removed(self, gone: Sequence[int]) -> dict[str, list[int]]:
        """By name the positions that go, if so many channels of every class do."""
        names = [(group, int(gone[i])) for group, i in zip(self.graph.groups, self.of, strict=True)]
        return {group.name: self._order(group)[:n].tolist() for group, n in names if n > 0}


class TiedTime:
    """How long networks take, by the widths of classes.

    Args:
        timed: what knows it by the widths of groups.
        of: the class of every group.
    """

    def __init__(self, timed: Any, of: np.ndarray) -> None:
        self.timed, self.of = timed, of

    def ms(self, widths: np.ndarray) -> np.ndarray:
        """See :class:`secateur.LatencyModel`."""
        found: np.ndarray = self.timed.ms(widths[..., self.of])
        return found

    def slope(self, widths: np.ndarray) -> np.ndarray:
        """See :class:`secateur.LatencyModel`."""
        return np.bincount(self.of, self.timed.slope(widths[..., self.of]), minlength=len(widths))

    def key(self) -> str:
        """See :class:`secateur.LatencyModel`."""
        key: str = self.timed.key()
        return f"{key} {self.of.tolist()}"
