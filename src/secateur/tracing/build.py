"""From the table of names to the channel graph: resolve equalities, sort channels into groups, count."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from secateur.tracing.graph import Axis, ChannelGraph, ChannelGroup, Frozen, Terms, multiplicities
from secateur.tracing.labels import Ids, Labels
from secateur.tracing.slices import Size

UNUSED = "is not used as a channel by the forward"
ROLES = ("producer", "consumer", "carried")


def build(
    names: Labels,
    params: dict[str, int],
    fingerprint: str,
    sizes: tuple[Size, ...],
    extra: Iterable[tuple[Ids, str, str]] = (),
) -> tuple[ChannelGraph, Ids]:
    """The channel graph of a finished trace.

    Args:
        names: the table.
        params: name of every parameter -> its number of dims (what is not in it is a buffer).
        fingerprint: of the traced model.
        sizes: what its modules remember.
        extra: further names to freeze, with operation and reason.

    Returns:
        The graph, and the channel id of every name.
    """
    component = names.components()
    roles = _roles(names, params)
    events = [*names.freezes, *extra, *_unused(names, roles)]
    reason_of = _first_event(component, events)
    channel_of = _number(names, component, reason_of >= 0)
    twins = _twins(names, channel_of)
    if twins:
        return build(names, params, fingerprint, sizes, [*extra, *twins])

    inexact_reason = _first_event(component, [(ids, "", reason) for ids, reason in names.approximations])
    counted, terms = _counted(names, channel_of)
    lone = _sort(names, counted, channel_of, roles, component, inexact_reason)
    drop, groups = lone
    if len(drop):  # channels that nothing writes or that have no second of their kind: frozen too
        why = {reason: np.flatnonzero(np.isin(channel_of, ids)) for ids, reason in drop}
        more = [(ids, "group", reason) for reason, ids in why.items()]
        return build(names, params, fingerprint, sizes, [*extra, *more])

    axes = tuple(Axis(o.name, o.dim, channel_of[o.start : o.start + o.size]) for o in names.owners)
    group_of = np.full(int(channel_of.max(initial=0)) + 1, -1)
    for i, (members, *_) in enumerate(groups):
        group_of[members] = i
    fixed, matrix = multiplicities(counted, group_of, len(groups))
    graph = ChannelGraph(
        groups=_make_groups(names, axes, groups, matrix[: len(axes)].T.tocsr(), roles),
        frozen=tuple(_frozen(names, channel_of, reason_of, events)),
        axes=axes,
        fingerprint=fingerprint,
        sizes=sizes,
        fixed=fixed,
        multiplicity=matrix,
        macs_terms=terms,
        params_terms=_params_terms(names, params),
    )
    return graph, channel_of


def _owner_of(names: Labels) -> Ids:
    """Index of the owning axis of every name, -1 for names of constants and of 0."""
    owner = np.full(names.count, -1)
    for i, o in enumerate(names.owners):
        owner[o.start : o.start + o.size] = i
    return owner


def _roles(names: Labels, params: dict[str, int]) -> np.ndarray:
    """Bool [axes, roles]: what each axis does; weights combined into one weight share what the result does.

    A buffer is nobody's to zero: it is carried where a parameter would be a producer.
    """
    owner = _owner_of(names)
    table = np.zeros((len(names.owners), len(ROLES)), dtype=bool)
    for r, role in enumerate(ROLES):
        if names.roles[role]:
            owners = np.unique(owner[np.abs(np.concatenate([ids.ravel() for ids in names.roles[role]]))])
            table[owners[owners >= 0], r] = True
    pairs = [(owner[a], owner[b]) for a, b in names.aliases if owner[a] >= 0 and owner[b] >= 0]
    changed = bool(pairs)
    while changed:  # as many rounds as weights are chained, which is few
        before = table.sum()
        for a, b in pairs:
            table[a] |= table[b]
            table[b] |= table[a]
        changed = table.sum() != before
    buffers = np.array([o.name not in params for o in names.owners], dtype=bool)
    table[:, 2] |= buffers & table[:, 0]
    table[:, 0] &= ~buffers
    return table


def unused(names: Labels, params: dict[str, int]) -> set[str]:
    """The parameters that the forward did not use as channels."""
    roles = _roles(names, params)
    used = {names.owners[i].name for i in np.flatnonzero(roles.any(axis=1))}
    return {name for name, ndim in params.items() if ndim} - used


def _unused(names: Labels, roles: np.ndarray) -> list[tuple[Ids, str, str]]:
    return [(names.arrays[i], "none", UNUSED) for i in np.flatnonzero(~roles.any(axis=1))]


def _twins(names: Labels, channel_of: Ids) -> list[tuple[Ids, str, str]]:
    """Axes of which something is kept by its place that could be mistaken for another: tied, or fixed.

    A fixed position alone on its axis is like no other.
    """
    found = []
    for ids, kept, operation in names.moved:
        channels, counts = channel_of[np.abs(ids)], np.bincount(channel_of[np.abs(ids)])
        if channels.any() and (counts[channel_of[np.abs(kept)]] > 1).any():
            found.append((ids, operation, "is moved by its place, beside positions that cannot be told apart"))
    return found


def _first_event(component: Ids, events: list[tuple[Ids, str, str]]) -> Ids:
    """For every name, the index of the first event that concerns its component, -1 for none."""
    first = np.full(len(component), len(events))
    if events:
        ids = np.concatenate([np.abs(e[0]).ravel() for e in events])
        number = np.repeat(np.arange(len(events)), [e[0].size for e in events])
        np.minimum.at(first, component[ids], number)
    first[first == len(events)] = -1
    return first[component]


def _number(names: Labels, component: Ids, frozen: np.ndarray) -> Ids:
    """Channel ids 1, 2, 3... in the order in which parameters mention them; 0 for frozen names."""
    labels = component.copy()
    labels[frozen] = component[0]
    unique, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(unique), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(unique))  # name 0 comes first of all
    return rank[inverse]


def _counted(names: Labels, channel_of: Ids) -> tuple[list[Ids], Terms]:
    """All axes that are counted (those of tensors first), and the MACs as terms over them."""
    arrays = list(names.arrays)
    row = {id(a): i for i, a in enumerate(arrays)}
    keep: list[Ids] = []
    width = max((len(dims) for _, dims in names.terms), default=0)
    index = np.full((len(names.terms), max(1, width)), -1)
    for t, (_, dims) in enumerate(names.terms):
        for d, ids in enumerate(dims):
            if id(ids) not in row:
                row[id(ids)] = len(arrays)
                arrays.append(ids)
                keep.append(ids)
            index[t, d] = row[id(ids)]
    factor = np.array([f for f, _ in names.terms], dtype=np.int64)
    return [channel_of[np.abs(a)] for a in arrays], Terms(factor, index)


def _params_terms(names: Labels, params: dict[str, int]) -> Terms:
    rows: dict[str, list[int]] = {name: [] for name in params}
    for i, owner in enumerate(names.owners):
        if owner.name in rows:
            rows[owner.name].append(i)
    index = np.full((len(rows), max((len(r) for r in rows.values()), default=0) or 1), -1)
    for t, axes in enumerate(rows.values()):
        index[t, : len(axes)] = axes
    return Terms(np.ones(len(rows), dtype=np.int64), index)


Sorted = tuple[Ids, int, bool, str]


def _sort(
    names: Labels, counted: list[Ids], channel_of: Ids, roles: np.ndarray, component: Ids, approximate: Ids
) -> tuple[list[tuple[Ids, str]], list[Sorted]]:
    """Channels by the set of axes they occur on.

    Returns:
        Channels to freeze with the reason, and the groups as (channels in order, first producer, exact, reason).
    """
    count = int(channel_of.max(initial=0)) + 1
    generator = np.random.default_rng(0)
    tags = generator.integers(1, 2**63, size=len(counted), dtype=np.uint64)
    signature = np.zeros(count, dtype=np.uint64)
    sizes = [len(a) for a in counted]
    everywhere = np.concatenate(counted) if counted else np.zeros(0, dtype=np.int64)
    np.add.at(signature, everywhere, np.repeat(tags, sizes))

    why = np.full(count, -1)
    concerned = approximate >= 0
    why[channel_of[concerned]] = approximate[concerned]
    signature += (why >= 0).astype(np.uint64)

    owned = np.concatenate(counted[: len(names.owners)]) if names.owners else everywhere[:0]
    axis = np.repeat(np.arange(len(names.owners)), sizes[: len(names.owners)])
    producing = roles[axis, 0]
    place = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(place, owned[producing], np.flatnonzero(producing))
    place[0] = np.iinfo(np.int64).max

    channels = np.arange(1, count)
    orphan = place[channels] == np.iinfo(np.int64).max
    drop = [(channels[orphan], "nothing writes it")] if orphan.any() else []
    channels = channels[~orphan]
    channels = channels[np.argsort(place[channels], kind="stable")]
    _, _first, inverse, size = np.unique(
        signature[channels], return_index=True, return_inverse=True, return_counts=True
    )
    alone = size[inverse] == 1
    if alone.any():
        drop.append((channels[alone], "is the only one of its kind, and a layer keeps its last channel"))
    if drop:
        return drop, []
    groups = []
    order = np.argsort(inverse, kind="stable")
    for members in np.split(channels[order], np.cumsum(size)[:-1]) if len(channels) else ():
        head = members[0]
        exact = why[head] < 0
        groups.append(
            (members, int(axis[place[head]]), bool(exact), "" if exact else names.approximations[why[head]][1])
        )
    groups.sort(key=lambda g: int(place[g[0][0]]))
    return [], groups


def _make_groups(
    names: Labels, axes: tuple[Axis, ...], groups: list[Sorted], member_axes: object, roles: np.ndarray
) -> tuple[ChannelGroup, ...]:
    taken: dict[str, int] = {}
    result = []
    for i, (members, head, exact, reason) in enumerate(groups):
        on = member_axes.indices[member_axes.indptr[i] : member_axes.indptr[i + 1]]  # type: ignore[attr-defined]
        on = np.sort(on)
        path = names.owners[head].name
        path = path.rsplit(".", 1)[0] if "." in path else path
        taken[path] = taken.get(path, 0) + 1
        name = path if taken[path] == 1 else f"{path}#{taken[path]}"
        by_role = [tuple(axes[a] for a in on if roles[a, r]) for r in range(len(ROLES))]
        result.append(ChannelGroup(name, members, by_role[0], by_role[1], by_role[2], exact, reason))
    return tuple(result)


def _frozen(names: Labels, channel_of: Ids, reason_of: Ids, events: list[tuple[Ids, str, str]]) -> Iterable[Frozen]:
    """The frozen positions of every axis by reason; kernel positions are too plain to tell."""
    axis = _owner_of(names)
    lost = np.flatnonzero((channel_of == 0) & (axis >= 0))
    keys, counts = np.unique(axis[lost] * len(events) + reason_of[lost], return_counts=True)
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        owner, (_, operation, reason) = names.owners[key // len(events)], events[key % len(events)]
        if reason != "kernel position":
            yield Frozen(owner.name, owner.dim, count, operation, reason)
