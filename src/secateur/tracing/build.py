"""From the table of labels to the channel graph: equalities become channels, channels are sorted into groups, counted.

Equal labels are one channel. A channel is frozen if one of its labels is, or if nothing writes it, or if it is the only
one of its kind. Channels that occur on the same axes form a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from secateur.tracing.graph import Axis, ChannelGraph, ChannelGroup, Frozen, Terms, multiplicities
from secateur.tracing.labels import Ids, Labels
from secateur.tracing.slices import Size

UNUSED = "is not used as a channel by the forward"
ROLES = ("producer", "consumer", "carried", "constant")
NOWHERE = np.iinfo(np.int64).max

Freeze = tuple[Ids, str, str]
"""Labels whose channels are frozen, the operation, and the reason."""


class Members(NamedTuple):
    """The channels of a group.

    Attributes:
        channels: in the order of the first producer's rows.
        first: index of the axis of the first producer.
        reason: why the group is not exact; empty if it is.
    """

    channels: Ids
    first: int
    reason: str


def build(
    labels: Labels,
    params: dict[str, int],
    fingerprint: str,
    sizes: tuple[Size, ...],
    extra: Iterable[Freeze] = (),
) -> tuple[ChannelGraph, Ids]:
    """The channel graph of a finished trace.

    Args:
        labels: the table.
        params: name of every parameter -> its number of dims. What is not in it is a buffer.
        fingerprint: of the traced model.
        sizes: what its modules remember.
        extra: further labels to freeze.

    Returns:
        The graph, and the channel of every label.
    """
    component = labels.components()
    roles = _roles(labels, params)
    freezes = [*labels.freezes, *extra, *_unused(labels, roles)]
    reason_of = _first_reason(component, [ids for ids, *_ in freezes])
    channel_of = _number(component, reason_of >= 0)
    twins = _twins(labels, channel_of)
    if twins:
        return build(labels, params, fingerprint, sizes, [*extra, *twins])

    approximate = _first_reason(component, [ids for ids, _ in labels.approximations])
    counted, terms = _counted(labels, channel_of)
    lone, groups = _sort(labels, counted, channel_of, roles, approximate)
    if lone:
        more = [(np.flatnonzero(np.isin(channel_of, channels)), "group", reason) for channels, reason in lone]
        return build(labels, params, fingerprint, sizes, [*extra, *more])

    axes = tuple(Axis(o.name, o.dim, channel_of[o.start : o.start + o.size]) for o in labels.owners)
    group_of = np.full(int(channel_of.max(initial=0)) + 1, -1)
    for i, group in enumerate(groups):
        group_of[group.channels] = i
    fixed, matrix = multiplicities(counted, group_of, len(groups))
    graph = ChannelGraph(
        groups=_make_groups(axes, groups, matrix[: len(axes)].T.tocsr(), roles),
        frozen=tuple(_frozen(labels, channel_of, reason_of, freezes)),
        axes=axes,
        fingerprint=fingerprint,
        sizes=sizes,
        fixed=fixed,
        multiplicity=matrix,
        macs_terms=terms,
        params_terms=_params_terms(labels, params),
        norms=tuple(
            (path, norm, channel_of[np.abs(ids)]) for path, norm, ids in {n.path: n for n in labels.norms}.values()
        ),
        weight_norms=tuple(dict(labels.weight_norms).items()),
    )
    return graph, channel_of


def _owner_of(labels: Labels) -> Ids:
    """The index of the axis that owns each label; -1 for the labels of constants and for label 0."""
    owner = np.full(labels.count, -1)
    for i, o in enumerate(labels.owners):
        owner[o.start : o.start + o.size] = i
    return owner


def _roles(labels: Labels, params: dict[str, int]) -> np.ndarray:
    """What each axis does, bool [axes, roles].

    Weights that are combined into one weight share the roles of the result. Where a parameter would be a producer, a
    buffer is a constant that is carried, unless it holds no numbers or must not be zero.
    """
    owner = _owner_of(labels)
    table = np.zeros((len(labels.owners), len(ROLES)), dtype=bool)
    for r, role in enumerate(ROLES[:3]):
        if labels.roles[role]:
            owners = np.unique(owner[np.abs(np.concatenate([ids.ravel() for ids in labels.roles[role]]))])
            table[owners[owners >= 0], r] = True
    pairs = [(owner[a], owner[b]) for a, b in labels.aliases if owner[a] >= 0 and owner[b] >= 0]
    changed = bool(pairs)
    while changed:  # as many rounds as weights are chained, which is few
        before = table.sum()
        for a, b in pairs:
            table[a] |= table[b]
            table[b] |= table[a]
        changed = table.sum() != before
    buffers = np.array([o.name not in params for o in labels.owners], dtype=bool)
    table[:, 2] |= buffers & table[:, 0]
    zeroed = labels.buffers - labels.divisors
    table[:, 3] = table[:, 0] & np.array([o.name in zeroed for o in labels.owners], dtype=bool)
    table[:, 0] &= ~buffers
    return table


def unused(labels: Labels, params: dict[str, int]) -> set[str]:
    """The parameters that the forward did not use as channels."""
    roles = _roles(labels, params)
    used = {labels.owners[i].name for i in np.flatnonzero(roles.any(axis=1))}
    return {name for name, ndim in params.items() if ndim} - used


def _unused(labels: Labels, roles: np.ndarray) -> list[Freeze]:
    """The axes without a role."""
    return [(labels.arrays[i], "none", UNUSED) for i in np.flatnonzero(~roles.any(axis=1))]


def _twins(labels: Labels, channel_of: Ids) -> list[Freeze]:
    """The axes of which something is kept by its position that could be mistaken for another: tied, or fixed.

    A fixed position that is alone on its axis is like no other.
    """
    found = []
    for ids, kept, operation in labels.moved:
        channels = channel_of[np.abs(ids)]
        counts = np.bincount(channels)
        if channels.any() and (counts[channel_of[np.abs(kept)]] > 1).any():
            found.append((ids, operation, "is moved by its place, beside positions that cannot be told apart"))
    return found


def _first_reason(component: Ids, concerned: Sequence[Ids]) -> Ids:
    """For every label, the index of the first entry that concerns its component; -1 for none.

    Args:
        component: of every label.
        concerned: one array of labels an entry.
    """
    first = np.full(len(component), len(concerned))
    if concerned:
        ids = np.concatenate([np.abs(each).ravel() for each in concerned])
        number = np.repeat(np.arange(len(concerned)), [each.size for each in concerned])
        np.minimum.at(first, component[ids], number)
    first[first == len(concerned)] = -1
    return first[component]


def _number(component: Ids, frozen: np.ndarray) -> Ids:
    """The channel of every label: 1, 2, 3... in the order in which parameters mention them, 0 for frozen ones."""
    component = np.where(frozen, component[0], component)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))  # label 0 comes first of all
    return rank[inverse]


def _counted(labels: Labels, channel_of: Ids) -> tuple[list[Ids], Terms]:
    """The channels on all axes that are counted (those of tensors first), and the MACs as terms over these axes."""
    arrays = list(labels.arrays)
    row = {id(a): i for i, a in enumerate(arrays)}
    width = max((len(dims) for _, dims in labels.terms), default=0)
    index = np.full((len(labels.terms), max(1, width)), -1)
    for t, (_, dims) in enumerate(labels.terms):
        for d, ids in enumerate(dims):
            if id(ids) not in row:
                row[id(ids)] = len(arrays)
                arrays.append(ids)
            index[t, d] = row[id(ids)]
    factor = np.array([f for f, _ in labels.terms], dtype=np.int64)
    return [channel_of[np.abs(a)] for a in arrays], Terms(factor, index)


def _params_terms(labels: Labels, params: dict[str, int]) -> Terms:
    """The number of parameters as terms over the axes: one term a parameter."""
    rows: dict[str, list[int]] = {name: [] for name in params}
    for i, owner in enumerate(labels.owners):
        if owner.name in rows:
            rows[owner.name].append(i)
    index = np.full((len(rows), max((len(r) for r in rows.values()), default=0) or 1), -1)
    for t, axes in enumerate(rows.values()):
        index[t, : len(axes)] = axes
    return Terms(np.ones(len(rows), dtype=np.int64), index)


def _sort(
    labels: Labels, counted: list[Ids], channel_of: Ids, roles: np.ndarray, approximate: Ids
) -> tuple[list[tuple[Ids, str]], list[Members]]:
    """Sort channels by the set of axes on which they occur.

    Every axis gets a random number of 64 bits. The sum over a channel's axes tells sets of axes apart.

    Returns:
        Channels that must be frozen first, with the reason; if there are none, the groups.
    """
    count = int(channel_of.max(initial=0)) + 1
    tags = np.random.default_rng(0).integers(1, 2**63, size=len(counted), dtype=np.uint64)
    signature = np.zeros(count, dtype=np.uint64)
    sizes = [len(a) for a in counted]
    everywhere = np.concatenate(counted) if counted else np.zeros(0, dtype=np.int64)
    np.add.at(signature, everywhere, np.repeat(tags, sizes))

    why = np.full(count, -1)  # the index of the reason for which a channel is not exact
    concerned = approximate >= 0
    why[channel_of[concerned]] = approximate[concerned]
    signature += (why >= 0).astype(np.uint64)

    owned = np.concatenate(counted[: len(labels.owners)]) if labels.owners else everywhere[:0]
    axis = np.repeat(np.arange(len(labels.owners)), sizes[: len(labels.owners)])
    producing = roles[axis, 0]
    place = np.full(count, NOWHERE)  # the first position, of all parameters, that writes a channel
    np.minimum.at(place, owned[producing], np.flatnonzero(producing))
    place[0] = NOWHERE

    channels = np.arange(1, count)
    unwritten = place[channels] == NOWHERE
    lone = [(channels[unwritten], "nothing writes it")] if unwritten.any() else []
    channels = channels[~unwritten]
    channels = channels[np.argsort(place[channels], kind="stable")]
    _, inverse, size = np.unique(signature[channels], return_inverse=True, return_counts=True)
    alone = size[inverse] == 1
    if alone.any():
        lone.append((channels[alone], "is the only one of its kind, and a layer keeps its last channel"))
    if lone:
        return lone, []
    order = np.argsort(inverse, kind="stable")
    groups = []
    for members in np.split(channels[order], np.cumsum(size)[:-1]) if len(channels) else ():
        head = members[0]
        reason = labels.approximations[why[head]][1] if why[head] >= 0 else ""
        groups.append(Members(members, int(axis[place[head]]), reason))
    groups.sort(key=lambda group: int(place[group.channels[0]]))
    return [], groups


def _make_groups(
    axes: tuple[Axis, ...], groups: list[Members], occurs: csr_matrix, roles: np.ndarray
) -> tuple[ChannelGroup, ...]:
    """The groups, named by the module of the first producer.

    Args:
        axes: of all tensors.
        groups: their channels.
        occurs: how often a channel of a group occurs on an axis, [groups, axes].
        roles: see :func:`_roles`.
    """
    taken: dict[str, int] = {}
    result = []
    for i, group in enumerate(groups):
        on = np.sort(occurs.indices[occurs.indptr[i] : occurs.indptr[i + 1]])
        path = axes[group.first].name
        path = path.rsplit(".", 1)[0] if "." in path else path
        taken[path] = taken.get(path, 0) + 1
        name = path if taken[path] == 1 else f"{path}#{taken[path]}"
        producers, consumers, carried, constants = (
            tuple(axes[a] for a in on if roles[a, r]) for r in range(len(ROLES))
        )
        result.append(
            ChannelGroup(
                name, group.channels, producers, consumers, carried, not group.reason, group.reason, constants=constants
            )
        )
    return tuple(result)


def _frozen(labels: Labels, channel_of: Ids, reason_of: Ids, freezes: Sequence[Freeze]) -> Iterable[Frozen]:
    """The frozen positions of every axis by reason; kernel positions are too plain to tell."""
    axis = _owner_of(labels)
    lost = np.flatnonzero((channel_of == 0) & (axis >= 0))
    keys, counts = np.unique(axis[lost] * len(freezes) + reason_of[lost], return_counts=True)
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        owner, (_, operation, reason) = labels.owners[key // len(freezes)], freezes[key % len(freezes)]
        if reason != "kernel position":
            at = key % len(freezes)
            place = labels.frozen_at[at] if at < len(labels.frozen_at) else None
            yield Frozen(owner.name, owner.dim, count, operation, reason, "" if place is None else str(place))
