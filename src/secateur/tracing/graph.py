"""The channel graph: which positions of which tensors live and die together, and what they cost.

Every size in the network is ``fixed + sum of the kept widths of some groups``, so with ``k[g]`` the kept width of group
``g`` and ``M`` the sparse matrix of multiplicities, all axis lengths are one product ``fixed + M @ k``; MACs and
parameters are sums of products of axis lengths. Nothing is run or built to count a plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from secateur._internal.errors import NothingToPrune, SecateurError, unknown
from secateur.tracing.advice import NOTHING, advice
from secateur.tracing.display import LONGEST, Cell, html_table, listed, paragraph, terminal_width, text_table, wrapped
from secateur.tracing.norms import Norm
from secateur.tracing.slices import Memory, Size, Value, patches
from secateur.tracing.weight_norms import WeightNorm

T = TypeVar("T")


@runtime_checkable
class HasRemoved(Protocol):
    """Anything that says which positions of which group go (a :class:`secateur.Plan` does)."""

    @property
    def removed(self) -> Mapping[str, Sequence[int]]:
        """Group name to sorted positions in ``group.channels``."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of one parameter or buffer.

    Attributes:
        name: qualified name of the parameter or buffer, as in ``state_dict`` (the first name if it is shared).
        dim: the axis, counted from 0.
        channels: int64 array, one channel id a position; 0 is frozen.
    """

    name: str
    dim: int
    channels: np.ndarray

    def __repr__(self) -> str:
        return f"{self.name}:{self.dim}"


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that occur on exactly the same axes, and so compete with each other.

    Attributes:
        name: module path of the first producer (with ``#2``, ``#3``... if it begins several groups).
        channels: int64 ids in the order of the first producer's rows.
        producers: axes that write the channel: zero there means that the channel is zero.
        consumers: axes that read it.
        carried: axes that merely follow (running statistics, slopes of activations).
        constants: those of them that are buffers, and must be zero, too, for the channel to be zero.
        exact: whether removing a channel that is zero at its producers changes nothing else.
        reason: why not, if not.
        least: how many channels must stay (2 where a single one sends the model's forward another way).
    """

    name: str
    channels: np.ndarray
    producers: tuple[Axis, ...]
    consumers: tuple[Axis, ...]
    carried: tuple[Axis, ...]
    exact: bool
    reason: str = ""
    least: int = 1
    constants: tuple[Axis, ...] = ()

    def __len__(self) -> int:
        return len(self.channels)

    def __repr__(self) -> str:
        exact = "exact" if self.exact else f"not exact: {self.reason}"
        return (
            f"<ChannelGroup {self.name!r}: {len(self)} channels, {exact}; written by "
            f"{listed([repr(axis) for axis in self.producers], LONGEST, 2)}>"
        )

    @property
    def positions(self) -> int:
        """How many positions of an axis each channel is, at least: more than one where channels are heads."""
        sizes = [int(np.isin(axis.channels, self.channels).sum()) for axis in self.axes]
        return max(1, min((size // len(self) for size in sizes if size), default=1))

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes, each once."""
        seen: dict[tuple[str, int], Axis] = {}
        for axis in (*self.producers, *self.consumers, *self.carried):
            seen.setdefault((axis.name, axis.dim), axis)
        return tuple(seen.values())


def role(name: str) -> str:
    """What a layer is called where it stands: ``"layers.3.mlp.gate_proj"`` is a ``"gate_proj"``."""
    path, sign, number = name.partition("#")
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[last:]) + sign + number


@dataclass(frozen=True)
class Frozen:
    """Positions of one axis that cannot be removed: the operation, the reason, the place in the model's code."""

    axis: str
    dim: int
    positions: int
    operation: str
    reason: str
    place: str = ""

    @property
    def words(self) -> str:
        """The reason, with the operation and the place."""
        return f"{self.reason} ({self.operation}{f', {self.place}' if self.place else ''})"

    @property
    def advice(self) -> str:
        """What can be done about it."""
        return advice(self.reason)


@dataclass(frozen=True, eq=False)
class Terms:
    """Sums of products of lengths: ``total = sum_t factor[t] * prod_d length[index[t, d]]`` (index -1 counts 1)."""

    factor: np.ndarray
    index: np.ndarray

    def total(self, lengths: np.ndarray) -> int:
        """The exact value for the given axis lengths."""
        return int(self.totals(lengths))

    def totals(self, lengths: np.ndarray) -> np.ndarray:
        """The exact values for axis lengths [..., axes]."""
        return self.each(lengths).sum(axis=-1)

    def each(self, lengths: np.ndarray) -> np.ndarray:
        """The summands for axis lengths [..., axes], [..., terms]."""
        return self.factor * self._columns(lengths).prod(axis=-1)

    def gradient(self, lengths: np.ndarray) -> np.ndarray:
        """D total / d length, one value an axis (float64)."""
        columns = self._columns(lengths).astype(np.float64)
        slope = np.zeros(len(lengths) + 1)
        for d in range(columns.shape[1]):
            others = np.delete(columns, d, axis=1).prod(axis=1)
            np.add.at(slope, self.index[:, d], self.factor * others)
        return slope[:-1]  # the last entry gathered index -1

    def _columns(self, lengths: np.ndarray) -> np.ndarray:
        return np.concatenate([lengths, np.ones((*lengths.shape[:-1], 1), lengths.dtype)], -1)[..., self.index]


def passing_buffers(model: nn.Module) -> set[str]:
    """The names of the buffers that are not saved: a forward may give them another shape."""
    return {
        f"{path}.{name}" if path else name
        for path, part in model.named_modules()
        for name in part._non_persistent_buffers_set
    }


def fingerprint(model: nn.Module) -> str:
    """A hash of the names and shapes of all parameters and saved buffers: the model a plan was made for."""
    passing = passing_buffers(model)
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(name, tensor) for name, tensor in tensors if name not in passing]
    text = "\n".join(sorted(f"{name}{list(tensor.shape)}" for name, tensor in tensors))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What :func:`secateur.trace` returns: the groups, what is frozen and why, and exact counts of any plan.

    It is data: it can be copied, pickled and sent to another process. Only plans from the graph that ``trace`` itself
    returned are proven as they are made; those from a copy are proven when they are cut
    (:mod:`secateur.tracing.proof`).

    Attributes:
        groups: removable groups, exact ones and approximate ones, in the order of the model's parameters.
        frozen: what cannot be removed, with reasons.
        axes: every axis of every parameter and buffer, in the model's order.
        fingerprint: hash of the traced model's names and shapes.
        sizes: what its standard modules remember of the lengths of axes.
        memories: what else its modules remember of the lengths of dims.
        norms: paths of the norms that are cut exactly, what they need for it, and the channels that they normalise.
        weight_norms: names of the lengths of normalised weights, and how these are normalised.
        attentions: paths of PyTorch's attention modules, which are others in a cut model.
        inputs: the example inputs, without their gradients; the first of them, where several were given.
        more_inputs: the others.
        notes: what else the user should know of the trace.
        attention: what goes of attention, as it was asked for.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...]
    axes: tuple[Axis, ...]
    fingerprint: str
    sizes: tuple[Size, ...] = field(repr=False)
    fixed: np.ndarray = field(repr=False)
    multiplicity: csr_matrix = field(repr=False)
    macs_terms: Terms = field(repr=False)
    params_terms: Terms = field(repr=False)
    inputs: Any = field(default=None, repr=False)
    more_inputs: tuple[Any, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)
    memories: tuple[Memory, ...] = field(default=(), repr=False)
    norms: tuple[tuple[str, Norm, np.ndarray], ...] = field(default=(), repr=False)
    weight_norms: tuple[tuple[str, WeightNorm], ...] = field(default=(), repr=False)
    attentions: tuple[str, ...] = field(default=(), repr=False)
    attention: str = field(default="heads", repr=False)

    @cached_property
    def _everywhere(self) -> tuple[np.ndarray, np.ndarray]:
        """The channels of all axes one after the other, and where each axis begins, and the last ends."""
        each = [axis.channels for axis in self.axes]
        return np.concatenate([np.zeros(0, dtype=np.int64), *each]), np.cumsum([0, *map(len, each)])

    @cached_property
    def _sliced(self) -> list[Any]:
        """The last answer of :meth:`slices`, after what was asked."""
        return []

    @cached_property
    def _index(self) -> dict[str, int]:
        return {group.name: i for i, group in enumerate(self.groups)}

    @property
    def widths(self) -> np.ndarray:
        """The number of channels of each group, before anything is removed (int64)."""
        return np.array([len(group) for group in self.groups], dtype=np.int64)

    def group(self, name: str) -> ChannelGroup:
        """The group of that name, or the one that the output channels of a layer form.

        Args:
            name: a group's name, or the path of a layer, or of one of its parameters, that writes channels of exactly
                one group.

        Raises:
            SecateurError: nothing has this name, or the layer writes channels of several groups or of none; the message
                lists them, or says why.
        """
        return self.groups[self._at(name)]

    def groups_of(self, path: str) -> tuple[ChannelGroup, ...]:
        """The groups whose channels a module, or a parameter, writes.

        Args:
            path: of a module (with all that is in it) or of a parameter; the empty path is the whole model.
        """
        return tuple(group for group in self.groups if any(_is_in(axis.name, path) for axis in group.producers))

    def by_name(self, values: Mapping[str, T]) -> dict[str, T]:
        """Values by whatever :meth:`group` takes, as values by the groups' own names.

        Raises:
            SecateurError: see :meth:`group`; two of them are one group.
        """
        found: dict[str, T] = {}
        for given, value in values.items():
            name = self.group(given).name
            if name in found:
                raise SecateurError(f"group {name!r} is named twice, once as {given!r}: name it once")
            found[name] = value
        return found

    def _at(self, name: str) -> int:
        """The index of a group."""
        if name in self._index:
            return self._index[name]
        found = self.groups_of(name) if name else ()
        if len(found) == 1:
            return self._index[found[0].name]
        if found:
            listed = ", ".join(repr(group.name) for group in found)
            raise SecateurError(
                f"group {name!r}: this layer writes channels of {len(found)} groups, {listed}: name one"
            )
        own = [axis.name for axis in self.axes if name and _is_in(axis.name, name)]
        if own:
            why = {f"{f.axis}:{f.dim} {f.reason}" for f in self.frozen if f.axis in own and f.dim == 0}
            raise SecateurError(
                f"group {name!r}: this layer writes no channel that can be removed ({'; '.join(sorted(why)[:3])})"
            )
        paths = {axis.name.rpartition(".")[0] for axis in self.axes} - {""}
        raise unknown("group", name, self._index, also=paths)

    def kept(self, plan: HasRemoved | None = None) -> np.ndarray:
        """Widths of all groups after a plan (int64), in the order of ``groups``."""
        widths = self.widths
        for name, positions in (plan.removed if plan is not None else {}).items():
            widths[self._at(name)] -= len(positions)
        return widths

    def lengths(self, widths: np.ndarray) -> np.ndarray:
        """Lengths of all counted axes if the groups have these widths, [..., groups] -> [..., axes]."""
        return self.fixed + (self.multiplicity @ widths.T).T

    def macs(self, plan: HasRemoved | None = None) -> int:
        """Multiply-accumulates of one forward on the example inputs, after a plan."""
        return self.macs_terms.total(self.lengths(self.kept(plan)))

    def params(self, plan: HasRemoved | None = None) -> int:
        """Number of parameters (buffers not counted; shared ones once), after a plan."""
        return self.params_terms.total(self.lengths(self.kept(plan)))

    def feasible(self, *, approximate: bool = False) -> dict[str, tuple[int, int]]:
        """The smallest and the largest MACs and params that any plan can reach."""
        widths = self.widths
        least = np.array([g.least if g.exact or approximate else len(g) for g in self.groups], dtype=np.int64)
        low, high = self.lengths(least), self.lengths(widths)
        return {
            "macs": (self.macs_terms.total(low), self.macs_terms.total(high)),
            "params": (self.params_terms.total(low), self.params_terms.total(high)),
        }

    def gone(self, plan: HasRemoved) -> np.ndarray:
        """Whether a channel goes, bool [channels + 1], by id."""
        ids = [self.group(name).channels[list(positions)] for name, positions in plan.removed.items()]
        gone = np.zeros(1 + int(self._everywhere[0].max(initial=0)), dtype=bool)
        if ids:
            gone[np.concatenate(ids)] = True
        return gone

    def patches(self, plan: HasRemoved) -> dict[str, tuple[Value, Value]]:
        """What modules must remember otherwise after a plan: ``path.attribute`` to its value before and after."""
        found, gone = patches(self.sizes, self.slices(plan)), self.gone(plan)
        for memory in self.memories:
            before, now = found.get(memory.key, (memory.value, memory.value))
            after = memory.after(gone, now)
            if after != before:
                found[memory.key] = (before, after)
        return found

    def narrowed(self, plan: HasRemoved) -> dict[str, Norm]:
        """The norms that lose channels, by path, and what they need for it."""
        gone = self.gone(plan)
        return {path: norm for path, norm, channels in self.norms if gone[channels].any()}

    def rescaled(self, plan: HasRemoved) -> dict[str, WeightNorm]:
        """The normalised weights whose directions lose positions, by the names of their lengths."""
        slices = self.slices(plan)
        return {name: norm for name, norm in self.weight_norms if slices.get(norm.direction, {}).keys() - {norm.dim}}

    def freed(self, plan: HasRemoved) -> tuple[str, ...]:
        """The attention modules that lose channels, by path."""
        slices = self.slices(plan)
        return tuple(path for path in self.attentions if any(_is_in(name, path) for name in slices))

    def slices(self, plan: HasRemoved) -> dict[str, dict[int, list[int]]]:
        """Removed positions by tensor name and dim: what a plan means for the weights."""
        gone = self.gone(plan)
        key = gone.tobytes()
        last = list(self._sliced)  # asked several times for each plan, perhaps by several threads
        if last[:1] == [key]:
            return {name: dict(dims) for name, dims in last[1].items()}
        result: dict[str, dict[int, list[int]]] = {}
        channels, ends = self._everywhere
        lost = gone[channels]
        total = np.concatenate([[0], np.cumsum(lost)])[ends]
        for i in np.flatnonzero(total[1:] - total[:-1]):
            axis = self.axes[i]
            result.setdefault(axis.name, {})[axis.dim] = np.flatnonzero(lost[ends[i] : ends[i + 1]]).tolist()
        self._sliced[:] = [key, result]
        return {name: dict(dims) for name, dims in result.items()}

    def summary(self, width: int | None = None) -> str:
        """The groups, what is not exact or frozen, and why, as text.

        Args:
            width: columns of the text; those of the terminal if not given. Long names and lists are shortened to it.
        """
        width = terminal_width(width)
        lines = text_table([_HEADS, *map(_row, self.groups)], width)
        lines += wrapped(self._counts(), width)
        lines += [line for note in self.notes for line in wrapped(note, width)]
        for reason, names in _by_reason((g.reason, g.name, 1) for g in self.groups if not g.exact):
            lines += ["", *paragraph(f"not exact: {reason}", [name for name, _ in names], width)]
        places: dict[str, dict[str, None]] = {}
        advised = {f"{f.reason} ({f.operation})": f.advice for f in self.frozen}
        for f in self.frozen:
            places.setdefault(f"{f.reason} ({f.operation})", {}).update({f.place: None} if f.place else {})
        frozen = ((f"{f.reason} ({f.operation})", f"{f.axis}:{f.dim}", f.positions) for f in self.frozen)
        for reason, axes in _by_reason(frozen):
            count = sum(positions for _, positions in axes)
            first = next(iter(places[reason]), "")
            more = f"; {len(places[reason]) - 1} more such places" if len(places[reason]) > 1 else ""
            told = f"frozen, {count:,} positions: {reason}{f', {first}{more}' if first else ''}"
            told += f"; to do: {advised[reason]}" if advised[reason] not in ("", NOTHING) else ""
            lines += ["", *paragraph(told, [name for name, _ in axes], width)]
        return "\n".join(lines)

    def _counts(self) -> str:
        return (
            f"{self.macs():,} MACs, {self.params():,} params, {int(self.widths.sum()):,} removable channels in "
            f"{len(self.groups)} group{'s' * (len(self.groups) != 1)}"
        )

    def __repr__(self) -> str:
        loose = sum(not group.exact for group in self.groups)
        return (
            f"<ChannelGraph: {self._counts()}{f' ({loose} not exact)' * bool(loose)}, {len(self.frozen)} frozen axes; "
            "summary() tells more>"
        )

    def _repr_html_(self) -> str:
        rows = [[cell if isinstance(cell, str) else listed(cell, LONGEST, 4) for cell in _row(g)] for g in self.groups]
        return html_table([_HEADS, *rows], self._counts(), [f"{len(self.frozen)} axes are frozen: see summary()"])


_HEADS = ("group", "width", "exact", "producers", "consumers")


def _row(group: ChannelGroup) -> tuple[Cell, ...]:
    width = f"{len(group)}" + (f" (at least {group.least})" if group.least > 1 else "")
    names = [[repr(axis) for axis in axes] for axes in (group.producers, group.consumers)]
    return group.name, width, "yes" if group.exact else "no", *names


def _by_reason(entries: Iterable[tuple[str, str, int]]) -> Iterable[tuple[str, list[tuple[str, int]]]]:
    """Reasons with all that have them, in the order in which the reasons first occur."""
    found: dict[str, list[tuple[str, int]]] = {}
    for reason, name, count in entries:
        found.setdefault(reason, []).append((name, count))
    return found.items()


def _is_in(name: str, path: str) -> bool:
    """Whether a parameter is the one of that path, or in the module of that path."""
    return not path or name == path or name.startswith(f"{path}.")


def multiplicities(axes: Sequence[np.ndarray], group_of: np.ndarray, groups: int) -> tuple[np.ndarray, csr_matrix]:
    """How often each channel of each group occurs on each axis, and how many positions of each axis are fixed.

    Args:
        axes: one int64 array of channel ids an axis.
        group_of: group index of every channel id, -1 for frozen ones.
        groups: number of groups.
    """
    sizes = np.array([len(ids) for ids in axes], dtype=np.int64)
    row = np.repeat(np.arange(len(axes)), sizes)
    column = group_of[np.concatenate(axes)] if len(axes) else np.zeros(0, dtype=np.int64)
    moving = column >= 0
    matrix = coo_matrix(
        (np.ones(int(moving.sum()), dtype=np.int64), (row[moving], column[moving])), shape=(len(axes), groups)
    ).tocsr()
    fixed = sizes - np.bincount(row[moving], minlength=len(axes))
    widths = np.bincount(group_of[group_of >= 0], minlength=groups)
    matrix.data //= widths[matrix.indices]  # all channels of a group occur equally often
    return fixed, matrix


def no_removable_channel(frozen: Sequence[Frozen], model: nn.Module) -> NothingToPrune:
    """The error for a model in which nothing can go."""
    reasons = "; ".join(sorted({f"{f.axis}:{f.dim}: {f.reason}" for f in frozen})[:5])
    computed = [name for name, module in model.named_modules() if is_parametrized(module)]
    told = dict.fromkeys(f.advice for f in frozen if f.operation != "output" and f.advice not in ("", NOTHING))
    remove = (
        f"; weights of {', '.join(computed[:3])} are computed from others in every forward: call "
        "torch.nn.utils.parametrize.remove_parametrizations(module, name) on such first"
    )
    return NothingToPrune(
        f"the model has no removable channel ({reasons or 'no parameter was used in its forward'})"
        + (remove if computed else "")
        + (f"; what can be done: {'; '.join(told)}" if told else "")
    )
