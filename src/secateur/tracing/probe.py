"""What a model's own Python cannot bear: a cut skeleton is run, and every tensor is compared with the first run.

The second run starts from the channels that are left. Each of its tensors must carry exactly the channels that the
first run's tensor carries, without the removed ones. A slice at a constant position, a view with a remembered width or
an index table show at the operation where they happen, even if the shapes agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product

import numpy as np
from torch import Tensor

from secateur.tracing.graph import ChannelGraph, ChannelGroup
from secateur.tracing.labels import Dim, Labels
from secateur.tracing.op_log import Operation, OpLog, Place, compare, remaining
from secateur.tracing.skeleton import Skeleton, quiet
from secateur.tracing.tracer import Watcher, attempt

Refused = tuple[ChannelGroup, str]
"""A group that must stay whole, and the reason."""


class Chosen:
    """Removed positions by group name: all of a plan that is needed here."""

    def __init__(self, removed: Mapping[str, Sequence[int]]) -> None:
        self.removed = {name: positions for name, positions in removed.items() if len(positions)}

    def of(self, groups: Iterable[ChannelGroup]) -> Chosen:
        """The part that concerns these groups."""
        return Chosen({g.name: self.removed.get(g.name, ()) for g in groups})


Run = tuple[bool, int]
"""Whether a run is in training mode, and which of the example inputs it has."""


@dataclass(frozen=True, eq=False)
class Fault:
    """Why a model does not bear a removal.

    Attributes:
        reason: in words, with the place in the model's code.
        suspects: the groups that are met there; empty if that is not known.
        at: the entry of the first run's log that came out otherwise.
        run: whether it was in training mode, and which of the example inputs it had.
    """

    reason: str
    suspects: frozenset[str]
    at: int
    run: Run


Prober = Callable[[Sequence[ChannelGroup]], Fault | None]
"""Removes channels of some groups, and says what goes wrong, if anything does."""


def mismatch(skeleton: Skeleton, log: OpLog, graph: ChannelGraph, chosen: Chosen, run: Run) -> Fault | None:
    """Why the model does not bear this removal, or None.

    Args:
        skeleton: the traced skeleton.
        log: what the first run computed, with channels for labels.
        graph: the graph with the groups.
        chosen: what to remove.
        run: how to run it.
    """
    if not chosen.removed:
        return None
    gone = graph.gone(chosen)
    left = {(a.name, a.dim): a.channels[~gone[a.channels]] for a in graph.axes}
    expected = remaining(log, gone)

    def survivors(_: Labels, name: str, tensor: Tensor) -> tuple[Dim, ...]:
        return tuple(ids if ids.any() else None for ids in (left[name, d] for d in range(tensor.ndim)))

    with quiet():
        found = attempt(
            skeleton,
            Watcher(Labels(resolved=True), expected),
            survivors,
            removed=graph.slices(chosen),
            patched=graph.patches(chosen),
            run=run,
        )
    watcher, free = found.watcher, skeleton.kind == "real"
    if found.error is not None:  # whatever the user's forward raises is the answer
        done = len(watcher.log)
        early = compare(expected[:done], watcher.log, watcher.agree, free=free)
        at = min(done, len(log) - 1) if early is None else early.at
        reason = f"the model's forward cannot bear it: {_words(found.error)}"
        return Fault(_placed(reason, found.place), _met(graph, chosen, log[at : at + 1]), at, run)
    different = compare(expected, watcher.log, watcher.agree, free=free)
    if different is None:
        unequal = watcher.labels.unequal
        if unequal is not None:
            return Fault(_placed("the model fixes a position: other channels meet", unequal.place), frozenset(), 0, run)
        return None
    at = different.at
    return Fault(_placed(different.reason, different.place), _met(graph, chosen, log[at : at + 1]), at, run)


def _placed(reason: str, place: Place | None) -> str:
    return f"{reason}, {place}" if place is not None else reason


def _met(graph: ChannelGraph, chosen: Chosen, operations: Sequence[Operation]) -> frozenset[str]:
    """Those of the groups that lose channels which operations of the first run meet."""
    arrays = [ids for o in operations for dims in o.labels for ids in dims if ids is not None]
    if not arrays:
        return frozenset()
    channels = np.unique(np.concatenate(arrays))
    return frozenset(g.name for g in map(graph.group, chosen.removed) if np.isin(g.channels, channels).any())


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def unbearable(groups: Sequence[ChannelGroup], probe: Prober) -> list[Refused]:
    """The groups that the model does not bear to lose channels of.

    One forward is enough if the model bears all. Where a run goes wrong, the operation that does says which groups it
    meets, so that few must be tried by themselves.

    Args:
        groups: candidates.
        probe: removes channels of some groups; says what goes wrong, if anything does.
    """
    bad: list[Refused] = []
    left = list(groups)
    while left:
        fault = probe(left)
        if fault is None:
            break
        suspects = [g for g in left if g.name in fault.suspects]
        found = _bisect(suspects, probe) if 0 < len(suspects) < len(left) else []
        found = found or _bisect(left, probe, fault)
        bad += found
        names = {g.name for g, _ in found}
        left = [g for g in left if g.name not in names]
    return bad


def _bisect(groups: Sequence[ChannelGroup], probe: Prober, fault: Fault | None = None) -> list[Refused]:
    """Those of the groups, each alone or all together, that the model does not bear; ``fault`` is that of all."""
    fault = fault or (probe(groups) if groups else None)
    if fault is None:
        return []
    if len(groups) == 1:
        return [(groups[0], fault.reason)]
    half = len(groups) // 2
    found = _bisect(groups[:half], probe) + _bisect(groups[half:], probe)
    return found or [(g, fault.reason) for g in groups]  # the model bears each alone, but not both


def ends(groups: Iterable[ChannelGroup]) -> Chosen:
    """The first and the last channel of each group (of two only the first), so that both ends of a slice move."""
    return Chosen({g.name: [0, len(g) - 1] if len(g) > 2 else [0] for g in groups if len(g) > 1})


def uneven(groups: Sequence[ChannelGroup]) -> Iterable[Chosen]:
    """Removals that change positions and sizes unevenly, both ends of every group among them.

    They find widths that are halved, or computed from another group's: neighbours lose as different numbers of channels
    as can be, once the one and once the other more. Two channels of each group stay at least (see :func:`lone`), so of
    two none goes.
    """
    source = np.random.default_rng(0)
    order = [(1 + source.permutation(max(len(g) - 2, 0))).tolist() for g in groups]
    ends_first = [[p for p in (0, len(g) - 1) if len(g) > 1] for g in groups]
    wide = [g for g in groups if len(g) > 2]
    counts = dict(zip((g.name for g in wide), _counts([len(g) - 2 for g in wide]), strict=True))
    for turn in range(max(map(len, counts.values()), default=0)):
        yield Chosen(
            {
                g.name: [*own, *inner][: counts[g.name][turn]]
                for g, own, inner in zip(groups, ends_first, order, strict=True)
                if g.name in counts
            }
        )


def _counts(most: Sequence[int]) -> list[tuple[int, ...]]:
    """For each group, how many channels it loses in each round: any two that are equally wide differ in one.

    Args:
        most: how many each may lose; at least one.
    """
    alike = Counter(most)
    rounds = max(next(r for r in count(2) if (n + 1) ** r > number + 1) for n, number in alike.items()) if most else 0
    ways = {n: iter(_ways(n, rounds, number)) for n, number in alike.items()}
    turned = {n: number % 2 for number, n in enumerate(alike)}  # the first of one width is cut when another's is not
    return [_turned(way) if turned[n] else way for n in most for way in [next(ways[n])]]


def _turned(way: tuple[int, ...]) -> tuple[int, ...]:
    return way[::-1] if _of_ends(way) == _of_ends(way[::-1]) else way


def _of_ends(way: tuple[int, ...]) -> bool:
    """Whether a group loses as many in each round as those that lose their ends in the first."""
    return way[0] == 2 and not any(way[1:])


_MANY = 1000


def _ways(most: int, rounds: int, number: int) -> list[tuple[int, ...]]:
    """Numbers from 0 to ``most`` for each round, not all of them 0, those that differ most first; so many at least.

    Where it can be, little goes in one round, the ends, and much in another: after a slice at a constant position what
    is left may fit by chance if much goes.
    """
    little, half = min(2, most - 1), 1 + int(max(_MANY, number + 2) ** (1 / rounds)) // 2
    numbers = [n for n in range(most + 1) if n <= half or n > most - half]
    every = [way for way in product(numbers, repeat=rounds) if any(way) and not _of_ends(way)]
    return sorted(every, key=lambda way: (min(way) < little, min(way) - max(way)))


def lone(placed: Sequence[ChannelGroup], groups: Sequence[ChannelGroup]) -> Iterable[Chosen]:
    """Removals that leave one channel, with which broadcasting and contractions take other paths.

    First of all placed groups; then, if some of these are of two channels, of those of two: until now they all lost
    one, or none. Of any two of them one is cut now and the other is not.
    """
    yield Chosen({g.name: [p for p in range(len(g)) if p != len(g) // 2] for g in placed})
    pairs = [g for g in groups if len(g) == 2] if any(len(g) == 2 for g in placed) else []
    for turn in zip(*_counts([1] * len(pairs)), strict=True):
        yield Chosen({g.name: [0] for g, cut in zip(pairs, turn, strict=True) if cut})
