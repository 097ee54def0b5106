"""How labels flow through operations that only move positions: views, permutations, concatenation, slices, padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from secateur.tracing.call import Call, Result, merge
from secateur.tracing.labels import Dim, Ids, Joint, Labelled, lasting, tied, vanishing, varying
from secateur.tracing.rules.table import rule, unknown_operation


def _labelled(call: Call) -> Labelled:
    labelled = call.of(call.first())
    assert labelled is not None
    return labelled


def _rearranged(labelled: Labelled, order: Sequence[int]) -> Labelled:
    """The labels of a tensor whose dims come in another order; -1 is a new dim, and what is left out has no labels."""
    joints = tuple(joint.at(order.index(d) for d in joint.dims) for joint in labelled.joints)
    turned = labelled.weight and list(order) == [1, 0] and not labelled.turned
    dims = tuple(None if d < 0 else labelled.dims[d] for d in order)
    free = frozenset(new for new, old in enumerate(order) if old in labelled.free)
    return Labelled(dims, labelled.weight, joints, turned=turned, free=free, zero=labelled.zero)


@rule("t")
def _t(call: Call) -> Result:
    labelled = call.open(call.first())
    return _rearranged(labelled, range(len(labelled.dims))[::-1])


@rule("transpose")
def _transpose(call: Call) -> Result:
    labelled = call.open(call.first())
    order = list(range(len(labelled.dims)))
    if order:
        a, b = (call.arg(n) % len(order) for n in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
    return _rearranged(labelled, order)


@rule("permute")
def _permute(call: Call) -> Result:
    labelled = call.open(call.first())
    return _rearranged(labelled, [d % len(labelled.dims) for d in call.arg("dims")])


@rule("unsqueeze")
def _unsqueeze(call: Call) -> Result:
    labelled = call.open(call.first())
    order = list(range(len(labelled.dims)))
    order.insert(call.arg("dim") % (len(labelled.dims) + 1), -1)
    return _rearranged(labelled, order)


@rule("squeeze")
def _squeeze(call: Call) -> Result:
    labelled, x = call.open(call.first()), call.first()
    dim = call.arg("dim")
    ndim, after = len(labelled.dims), call.results()[0].ndim  # an in-place squeeze has changed x already
    axes = range(ndim) if dim is None else (dim if isinstance(dim, (list, tuple)) else (dim,))
    if call.writes or x.ndim != ndim:
        return unknown_operation(call) if after != ndim else labelled
    gone = {d % ndim for d in axes if x.shape[d] == 1} if ndim else set()
    for d in gone:
        call.freeze(labelled.dims[d], "is squeezed away")
    if any(d in gone for joint in labelled.joints for d in joint.dims):
        return unknown_operation(call)
    return _rearranged(labelled, [d for d in range(ndim) if d not in gone])


@rule("expand")
def _expand(call: Call) -> Result:
    labelled, x, shape = call.open(call.first()), call.first(), call.results()[0].shape
    dims = merge(call, [(labelled, x.shape)], shape, "any")
    new = len(shape) - x.ndim
    joints = tuple(joint.at(d + new for d in joint.dims) for joint in labelled.joints)
    copied = (
        d for d, n in enumerate(shape) if n > 1 and (d < new or x.shape[d - new] == 1 or d - new in labelled.free)
    )
    return Labelled(dims, labelled.weight, joints, free=frozenset(copied), zero=labelled.zero)


@rule("repeat")
def _repeat(call: Call) -> Result:
    labelled, times = _labelled(call), call.arg("repeats")
    new = len(times) - len(labelled.dims)
    dims: list[Dim] = [None] * new
    dims += [
        ids if ids is None or n == 1 else np.tile(ids, n) for ids, n in zip(labelled.dims, times[new:], strict=True)
    ]
    return Labelled(tuple(dims), labelled.weight)


@rule("view _unsafe_view reshape _reshape_alias flatten unflatten")
def _view(call: Call) -> Result:
    if call.overload == "dtype":
        return unknown_operation(call)
    labelled, before, after = call.open(call.first()), call.first().shape, call.results()[0].shape
    if not labelled.has_labels:
        return Labelled((None,) * len(after), labelled.weight, free=_still_free(labelled, before, after))
    if len(after) > 2 or before[:1] != after[:1]:  # not a plain flattening: sizes may come from another tensor
        for ids in labelled.arrays:
            call.placed(ids)
    return replace(_View(call, labelled, before, after).labelled(), free=_still_free(labelled, before, after))


def _still_free(labelled: Labelled, before: Sequence[int], after: Sequence[int]) -> frozenset[int]:
    if not labelled.free:
        return frozenset()
    pairs = [(old, new) for old, new in _blocks(before, after) if len(old) == len(new) == 1]
    return frozenset(new[0] for old, new in pairs if old[0] in labelled.free)


class _View:
    """The labels of a tensor that is viewed in another shape.

    Dims fall into blocks, the smallest runs of dims that hold as many positions before as after. What varies along some
    dims of a block before varies along some dims of it after: along one, or along several, as heads and their sizes.

    Args:
        call: the view.
        labelled: the labels before.
        before: the shape before.
        after: the shape after.
    """

    def __init__(self, call: Call, labelled: Labelled, before: Sequence[int], after: Sequence[int]) -> None:
        self.call, self.given, self.before, self.after = call, labelled, tuple(before), tuple(after)
        self.blocks = list(_blocks(before, after))  # pairs of ranges
        self.dims: list[Dim] = [None] * len(after)
        self.joints: list[Joint] = []

    def labelled(self) -> Labelled:
        taken: set[int] = set()
        for joint in self.given.joints:
            touched = [n for n, (old, _) in enumerate(self.blocks) if any(d in old for d in joint.dims)]
            if taken.isdisjoint(touched) and not any(
                self.given.dims[d] is not None for n in touched for d in self.blocks[n][0]
            ):
                self._move(joint.dims, joint.table, joint.axes, touched)
            else:
                self._freeze(joint.table.ravel())
            taken.update(touched)
        for n, (old, new) in enumerate(self.blocks):
            present = [d for d in old if self.given.dims[d] is not None]
            if n in taken or not present:
                for d in present if n in taken else ():
                    self._freeze(self.given.dims[d])
                continue
            if len(old) == len(new) == 1:
                self.dims[new[0]] = self.given.dims[old[0]]
                continue
            if not new:
                self.call.freeze(self.given.dims[old[0]], "is viewed away")
                continue
            keep = max(present, key=lambda d: self.before[d])
            for d in present:
                if len(present) > 1:
                    self.call.placed(self.given.dims[d])
                if d != keep:
                    self._freeze(self.given.dims[d])
            ids = self.given.dims[keep]
            assert ids is not None
            self._move((keep,), ids, (None,), [n])
        return Labelled(tuple(self.dims), self.given.weight, tuple(self.joints))

    def _freeze(self, ids: Dim) -> None:
        self.call.freeze(ids, "is merged with another dim of channels")

    def _move(self, dims: Sequence[int], table: Ids, axes: Sequence[int | None], blocks: Sequence[int]) -> None:
        """Labels that vary along some of the dims of some blocks, and along no other."""
        old = [d for n in blocks for d in self.blocks[n][0]]
        new = [d for n in blocks for d in self.blocks[n][1]]
        if prod(self.before[d] for d in old) > _MOST:
            self.call.freeze(table.ravel(), f"is viewed among more than {_MOST:,} positions")
            return
        whole = table.reshape([self.before[d] if d in dims else 1 for d in old])
        whole = np.broadcast_to(whole, [self.before[d] for d in old]).reshape([self.after[d] for d in new])
        kept = {  # an axis that comes out as it went in is the same
            self.blocks[n][1][0]: axes[list(dims).index(self.blocks[n][0][0])]
            for n in blocks
            if len(self.blocks[n][0]) == len(self.blocks[n][1]) == 1 and self.blocks[n][0][0] in dims
        }
        vary = varying(whole)
        if len(vary) > 1:
            flat = whole.transpose([*vary, *(i for i in range(len(new)) if i not in vary)])
            flat = flat.reshape([*(whole.shape[i] for i in vary), -1])
            flat = vanishing(flat[..., 0], flat.min(-1) > 0)
            numbers = [kept.get(new[i]) for i in vary]
            self.joints.append(self.call.labels.join([new[i] for i in vary], flat, numbers))
            return
        unit = vary[0] if vary else max(range(len(new)), key=lambda i: self.after[new[i]])
        self.dims[new[unit]] = tied(whole, unit)


_MOST = 10**8


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The smallest runs of dims that hold equally many positions, before and after; dims of length 1 by themselves."""
    i = j = 0
    while i < len(before) or j < len(after):
        i0, j0 = i, j
        if i < len(before) and j < len(after) and before[i] == after[j]:
            i, j = i + 1, j + 1
        elif i < len(before) and before[i] == 1:
            i += 1
        elif j < len(after) and after[j] == 1:
            j += 1
        else:
            left, right, i, j = before[i], after[j], i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * before[i], i + 1
                else:
                    right, j = right * after[j], j + 1
        yield range(i0, i), range(j0, j)


@rule("cat concat concatenate")
def _cat(call: Call) -> Result:
    tensors = [t for t in call.tensors() if t.ndim != 1 or t.numel()]
    labelled = [call.of(t) for t in tensors]
    out = call.results()[0]
    axis = call.arg("dim", 0) % max(1, out.ndim)
    weight = all(n.weight for n in labelled if n is not None)
    operands = []
    for n, t in zip(labelled, tensors, strict=True):
        assert n is not None
        shape = [1 if d == axis else s for d, s in enumerate(t.shape)]
        operands.append((Labelled(tuple(None if d == axis else ids for d, ids in enumerate(n.dims)), n.weight), shape))
    dims = list(merge(call, operands, [1 if d == axis else s for d, s in enumerate(out.shape)], "all"))
    parts = [n.dims[axis] for n in labelled if n is not None]
    if any(ids is not None for ids in parts):
        dims[axis] = np.concatenate(
            [
                np.zeros(t.shape[axis], dtype=np.int64) if ids is None else ids
                for ids, t in zip(parts, tensors, strict=True)
            ]
        )
    if not weight:
        for n in labelled:
            for ids in n.dims if n is not None and n.weight else ():
                call.labels.mark("producer", ids)
    return Labelled(tuple(dims), weight)


@rule("stack")
def _stack(call: Call) -> Result:
    tensors = call.tensors()
    at = call.arg("dim", 0) % (tensors[0].ndim + 1)
    labelled = [n for n in map(call.of, tensors) if n is not None]
    dims = merge(call, [(n, t.shape) for n, t in zip(labelled, tensors, strict=True)], tensors[0].shape, "all")
    return Labelled((*dims[:at], None, *dims[at:]), all(n.weight for n in labelled))


@rule("split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk unsafe_split_with_sizes")
def _split(call: Call) -> Result:
    labelled, axis = call.open(call.first()), call.arg("dim", 0) % call.first().ndim
    sizes = [part.shape[axis] for part in call.results()]
    ends = np.cumsum(sizes)
    if _along(labelled, axis):
        return [_picked(call, labelled, axis, slice(end - n, end)) for n, end in zip(sizes, ends, strict=True)]
    ids = labelled.dims[axis]
    parts: list[Dim] = [None] * len(sizes)
    if ids is not None:
        cuts = np.split(ids, ends[:-1])
        if len(set(sizes)) == 1:
            for other in cuts[1:]:
                call.labels.unite(cuts[0], other)
        else:
            call.placed(ids)
            for part in cuts[1:-1]:
                call.moved(ids, part)
        parts = list(cuts)
    return [
        Labelled((*labelled.dims[:axis], part, *labelled.dims[axis + 1 :]), labelled.weight, labelled.joints)
        for part in parts
    ]


def _along(labelled: Labelled, axis: int) -> bool:
    """Whether something varies along this dim and others."""
    return any(axis in joint.dims for joint in labelled.joints)


def _picked(call: Call, labelled: Labelled, axis: int, which: slice | int) -> Labelled:
    """Some positions of a dim along which, among others, labels vary; of a single one the dim is gone."""
    dims, alone = list(labelled.dims), isinstance(which, int)
    joints = []
    if alone:
        del dims[axis]
    for joint in labelled.joints:
        new = [d - (alone and d > axis) for d in joint.dims if not (alone and d == axis)]
        if axis not in joint.dims:
            joints.append(joint.at(new))
            continue
        at = joint.dims.index(axis)
        call.labels.picked.add(joint.axes[at])
        table = joint.table[(slice(None),) * at + (which,)]
        if not table.size:
            continue
        axes = [number for i, number in enumerate(joint.axes) if not (alone and i == at)]
        vary = varying(table)
        if len(vary) > 1:
            joints.append(call.labels.join(new, table, axes))
        else:
            unit = vary[0] if vary else int(np.argmax(table.shape))
            dims[new[unit]] = tied(table, unit)
    return Labelled(tuple(dims), labelled.weight, tuple(joints))


@rule("slice narrow")
def _slice(call: Call) -> Result:
    labelled, axis = call.open(call.first()), call.arg("dim", 0) % call.first().ndim
    size = call.first().shape[axis]
    if call.base == "narrow":
        start = call.arg("start")
        cut = slice(start, start + call.arg("length"))
    else:
        cut = slice(call.arg("start"), call.arg("end"), call.arg("step", 1))
    if len(range(*cut.indices(size))) == size:
        return labelled
    if _along(labelled, axis):
        return _picked(call, labelled, axis, cut)
    ids = labelled.dims[axis]
    if ids is None:
        return labelled
    part = ids[cut]
    call.placed(ids)
    start, stop, step = cut.indices(size)
    if step > 1 or (start > 0 and stop < size):
        call.moved(ids, part if step == 1 else ids)
    dims = (*labelled.dims[:axis], part, *labelled.dims[axis + 1 :])
    return Labelled(dims, labelled.weight, labelled.joints, free=labelled.free, zero=labelled.zero)


@rule("select unbind")
def _select(call: Call) -> Result:
    labelled, axis = call.open(call.first()), call.arg("dim", 0) % call.first().ndim
    if _along(labelled, axis):
        if call.base == "unbind":
            return [_picked(call, labelled, axis, i) for i in range(len(call.results()))]
        return _picked(call, labelled, axis, call.arg("index"))
    result, ids = _rearranged(labelled, [d for d in range(len(labelled.dims)) if d != axis]), labelled.dims[axis]
    if ids is not None:
        result = replace(result, owed=(partial(call.labels.freeze, ids, call.op, "single positions are picked out"),))
    return [result] * len(call.results())


@rule("index _unsafe_index index_select")
def _index(call: Call) -> Result:
    labelled, x, out = _labelled(call), call.first(), call.results()[0]
    indices = call.arg("indices")
    if call.base == "index_select":
        axis = call.arg("dim") % x.ndim
        used = [axis]
    else:
        used = [d for d, i in enumerate(indices) if i is not None]
        if any(i is not None and i.ndim != 1 for i in indices) or len(used) != 1:
            return _index_freely(call, labelled, used, out)
    for d in used:
        call.freeze(labelled.dims[d], "is picked by index")
    dims = tuple(None if d in used else ids for d, ids in enumerate(labelled.dims))
    return Labelled(dims, labelled.weight, free=labelled.free - set(used), zero=labelled.zero)


def _index_freely(call: Call, labelled: Labelled, used: Sequence[int], out: Tensor) -> Result:
    """Several or many-dimensional indices, or masks: labels survive only on dims after leading indexed ones."""
    if used != list(range(len(used))):
        return unknown_operation(call)
    covered = _covered(call.arg("indices"))
    for ids in labelled.dims[:covered]:
        call.freeze(ids, "is picked by index")
    rest = labelled.dims[covered:]
    return Labelled((*(None,) * (out.ndim - len(rest)), *rest), labelled.weight)


def _covered(indices: Sequence[Tensor | None]) -> int:
    """How many dims leading indices cover: a mask as many as it has, numbers one."""
    return sum(i.ndim if i.dtype in (torch.bool, torch.uint8) else 1 for i in indices if i is not None)


def _looked_up(call: Call, tensors: Sequence[Tensor], index: Tensor, axis: int, zero: str) -> Labelled:
    """The labels of what an index picks from tensors, or puts into the first of them, along one dim.

    Along the others position meets position, where all of them have as many.
    """
    given = [call.of(t) for t in (*tensors, index)]
    shapes = [tuple(t.shape) for t in (*tensors, index)]
    labelled = [n for n in given if n is not None]
    for n, reason in zip(labelled, (*("is picked by index",) * len(tensors), "is used as an index"), strict=True):
        call.freeze(n.dims[axis], reason)
    dims: list[Dim] = []
    for d in range(len(shapes[0])):
        if d == axis:
            dims.append(None)
            continue
        sizes = {shape[d] for shape in shapes}
        operands = []
        for n in labelled:
            free = frozenset({0}) if d in n.free or (n is labelled[-1] and index.stride(d) == 0) else frozenset()
            ids = lasting(n.dims[d]) if n is labelled[-1] else n.dims[d]
            if len(sizes) > 1:  # some positions only
                call.freeze(ids, "is picked by index")
                ids = None
            operands.append((Labelled((ids,), n.weight, free=free, zero=n.zero), (max(sizes),)))
        if zero == "all":  # an index says where, not what
            whole = merge(call, operands[:-1], (max(sizes),), zero)
            merge(call, [(Labelled(whole, weight=False), (max(sizes),)), operands[-1]], (max(sizes),), "any")
            dims += whole
        else:
            dims += merge(call, operands, (max(sizes),), zero)
    weight = all(n.weight for n in labelled)
    for ids in labelled[-1].dims if labelled[-1].weight else ():
        call.labels.mark("carried", ids)
    for n in labelled[:-1]:
        for ids in n.dims if n.weight and not weight else ():
            call.labels.mark("producer", ids)
    return Labelled(tuple(dims), weight)


@rule("scatter_add scatter scatter_reduce")
def _scatter(call: Call) -> Result:
    """``y[index[i, j], j] = x[index[i, j], j] + src[i, j]`` along the first of two dims, or another reduction."""
    x, index, axis = call.first(), call.arg("index"), call.arg("dim") % max(1, call.first().ndim)
    if call.arg("src") is None:  # a number, or, of a reduction, none that is added to zero
        kept = _looked_up(call, [x], index, axis, "all")
        number = call.arg("value")
        return kept if number in (0, None) else replace(kept, dims=tuple(lasting(ids) for ids in kept.dims))
    return _looked_up(call, [x, call.arg("src")], index, axis, "all")


@rule("index_add index_copy index_reduce index_fill")
def _index_add(call: Call) -> Result:
    """``y[index[i], j] = x[index[i], j] + source[i, j]`` along the first of two dims, or another reduction."""
    x, index, axis = call.first(), call.arg("index"), call.arg("dim") % max(1, call.first().ndim)
    source = call.arg("source") if call.base != "index_fill" else None
    labelled = [n for n in map(call.of, (x, source)) if n is not None]
    if index.ndim != 1 or (source is not None and source.ndim != x.ndim):
        return unknown_operation(call)
    for n in labelled:
        call.freeze(n.dims[axis], "is picked by index")
    call.freeze((call.of(index) or Labelled((None,), weight=True)).dims[0], "is used as an index")
    around = [d for d in range(x.ndim) if d != axis]
    shape = [x.shape[d] for d in around]
    operands = []
    for n in labelled:
        free = frozenset(at for at, d in enumerate(around) if d in n.free)
        operands.append((Labelled(tuple(n.dims[d] for d in around), n.weight, free=free, zero=n.zero), shape))
    dims = list(merge(call, operands, shape, "all"))
    value = call.arg("value")
    if call.base == "index_fill" and not (isinstance(value, (int, float)) and value == 0):
        dims = [lasting(ids) for ids in dims]
    weight = all(n.weight for n in labelled)
    for n in labelled:
        for ids in n.dims if n.weight and not weight else ():
            call.labels.mark("producer", ids)
    return Labelled((*dims[:axis], None, *dims[axis:]), weight)


@rule("gather")
def _gather(call: Call) -> Result:
    """``y[i, j] = x[index[i, j], j]`` along the first of two dims: what is not looked up passes."""
    x = call.first()
    return _looked_up(call, [x], call.arg("index"), call.arg("dim") % max(1, x.ndim), "any")


@rule("index_put _index_put_impl _unsafe_index_put")
def _index_put(call: Call) -> Result:
    """Positions that are looked up by number, or by a mask, get other values: the dims after them pass."""
    x, indices, values = call.first(), call.arg("indices"), call.arg("values")
    labelled, given = _labelled(call), call.of(values)
    assert given is not None
    used = [d for d, i in enumerate(indices) if i is not None]
    covered = _covered(indices)
    if used != list(range(len(used))):
        return unknown_operation(call)
    for d in range(covered):
        call.freeze(labelled.dims[d], "is picked by index")
    rest, shape = labelled.dims[covered:], x.shape[covered:]
    own = given.dims[max(0, values.ndim - len(rest)) :]
    for ids in given.dims[: values.ndim - len(own)]:
        call.freeze(ids, "is put where an index says")
    for ids in own if given.weight and not labelled.weight else ():
        call.labels.mark("producer", ids)
    put = (Labelled(own, given.weight), values.shape[values.ndim - len(own) :])
    merged = merge(call, [(Labelled(rest, labelled.weight), shape), put], shape, "all")
    return Labelled((*(None,) * covered, *merged), labelled.weight and given.weight)


@rule("roll")
def _roll(call: Call) -> Result:
    labelled, dims = _labelled(call), list(_labelled(call).dims)
    shifts, axes = call.arg("shifts"), call.arg("dims")
    if not axes:
        return unknown_operation(call)
    for shift, axis in zip(shifts, axes, strict=True):
        ids = dims[axis]
        dims[axis] = None if ids is None else np.roll(ids, shift)
        call.placed(ids)
        call.moved(ids, ids)
    return Labelled(tuple(dims), labelled.weight)


@rule("flip")
def _flip(call: Call) -> Result:
    labelled, dims = _labelled(call), list(_labelled(call).dims)
    for axis in call.arg("dims"):
        ids = dims[axis]
        dims[axis] = None if ids is None else ids[::-1].copy()
    return Labelled(tuple(dims), labelled.weight)


@rule("constant_pad_nd")
def _pad(call: Call) -> Result:
    labelled, dims = _labelled(call), list(_labelled(call).dims)
    pad = call.arg("pad")
    for i in range(len(pad) // 2):
        axis, (before, after) = len(dims) - 1 - i, pad[2 * i : 2 * i + 2]
        ids = dims[axis]
        if ids is not None and (before or after):
            if before < 0 or after < 0:
                call.placed(ids)
            inner = ids[max(0, -before) : len(ids) - max(0, -after)]
            if before < 0 and after < 0:
                call.moved(ids, inner)
            ids = inner
            dims[axis] = np.pad(ids, (max(0, before), max(0, after)))
    if call.arg("value") not in {0, None} and any(pad):
        dims = [lasting(ids) for ids in dims]  # the border is not zero where the channel is
    return Labelled(tuple(dims), labelled.weight)


def _freeze_spatial(call: Call, labelled: Labelled) -> None:
    for ids in labelled.dims[-2:]:
        call.freeze(ids, "is a spatial position")


@rule("pixel_shuffle")
def _pixel_shuffle(call: Call) -> Result:
    labelled, x = _labelled(call), call.first()
    _freeze_spatial(call, labelled)
    ids, square = labelled.dims[-3], call.arg("upscale_factor") ** 2
    if ids is not None:
        table = ids.reshape(x.shape[-3] // square, square)
        call.labels.unite(table[:, :1], table[:, 1:])
        ids = vanishing(table[:, 0], table.min(1) > 0)
    return Labelled((*labelled.dims[:-3], ids, None, None), labelled.weight)


@rule("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Result:
    labelled, ids = _labelled(call), _labelled(call).dims[-3]
    _freeze_spatial(call, labelled)
    square = call.arg("downscale_factor") ** 2
    return Labelled((*labelled.dims[:-3], None if ids is None else np.repeat(ids, square), None, None), labelled.weight)


@rule("channel_shuffle native_channel_shuffle")
def _channel_shuffle(call: Call) -> Result:
    labelled, ids = _labelled(call), _labelled(call).dims[1]
    if ids is not None:
        table = ids.reshape(call.arg("groups"), -1)
        call.labels.unite(table[:1], table[1:])
        ids = np.ascontiguousarray(table.T).ravel()
    return Labelled((labelled.dims[0], ids, *labelled.dims[2:]), labelled.weight)


@rule("im2col")
def _im2col(call: Call) -> Result:
    labelled, out = _labelled(call), call.results()[0]
    _freeze_spatial(call, labelled)
    ids = labelled.dims[-3]
    taps = out.shape[-2] // call.first().shape[-3]
    return Labelled((*labelled.dims[:-3], None if ids is None else np.repeat(ids, taps), None), labelled.weight)


@rule("as_strided")
def _as_strided(call: Call) -> Result:
    """Where shape and steps are what they were, nothing moves; pooling says so of what it returns."""
    x = call.first()
    shape, stride = call.before or (tuple(x.shape), tuple(x.stride()))
    size, steps = tuple(call.arg("size")), tuple(call.arg("stride"))
    moved = [d for d, n in enumerate(size) if n > 1 and d < len(stride) and steps[d] != stride[d]]
    if size != shape or moved or call.arg("storage_offset"):
        return unknown_operation(call)
    return call.open(x)


@rule("col2im")
def _col2im(call: Call) -> Result:
    """Patches [.., channels * taps, places] are added up to a map: a channel goes with all of its taps."""
    labelled, out = _labelled(call), call.results()[0]
    call.freeze(labelled.dims[-1], "is a spatial position")
    ids = labelled.dims[-2]
    if ids is not None:
        table = ids.reshape(out.shape[-3], -1)
        call.labels.unite(table[:, :1], table[:, 1:])
        ids = vanishing(table[:, 0], table.min(1) > 0)
    return Labelled((*labelled.dims[:-2], ids, None, None), labelled.weight)


@rule("unfold")
def _unfold(call: Call) -> Result:
    """Windows along a dim, each in a new last dim."""
    labelled, axis = _labelled(call), call.arg("dimension") % max(1, call.first().ndim)
    call.freeze(labelled.dims[axis] if labelled.dims else None, "is seen in windows")
    dims = tuple(None if d == axis else ids for d, ids in enumerate(labelled.dims))
    return Labelled((*dims, None), labelled.weight)


@rule("_fft_r2c _fft_c2r _fft_c2c")
def _fft(call: Call) -> Result:
    labelled, ndim = _labelled(call), call.first().ndim
    axes = {d % ndim for d in call.arg("dim")}
    for d in axes:
        call.freeze(labelled.dims[d], "is transformed to frequencies")
    return Labelled(tuple(None if d in axes else ids for d, ids in enumerate(labelled.dims)), labelled.weight)


@rule("view_as_real")
def _view_as_real(call: Call) -> Result:
    labelled = _labelled(call)
    return Labelled((*labelled.dims, None), labelled.weight)


@rule("view_as_complex")
def _view_as_complex(call: Call) -> Result:
    labelled = _labelled(call)
    call.freeze(labelled.dims[-1], "is the real or the imaginary part")
    return Labelled(labelled.dims[:-1], labelled.weight)


@rule("rot90")
def _rot90(call: Call) -> Result:
    labelled, times = _labelled(call), call.arg("k") % 4
    a, b = (d % len(labelled.dims) for d in call.arg("dims"))
    dims = list(labelled.dims)
    for axis, turned in ((b, times in {1, 2}), (a, times in {2, 3})):
        ids = dims[axis]
        dims[axis] = ids[::-1].copy() if turned and ids is not None else ids
    if times % 2:
        dims[a], dims[b] = dims[b], dims[a]
    return Labelled(tuple(dims), labelled.weight)


@rule("diagonal")
def _diagonal(call: Call) -> Result:
    labelled = _labelled(call)
    axes = {call.arg(name) % len(labelled.dims) for name in ("dim1", "dim2")}
    for d in axes:
        call.freeze(labelled.dims[d], "meets another dim on a diagonal")
    return Labelled((*(ids for d, ids in enumerate(labelled.dims) if d not in axes), None), labelled.weight)


@rule("diag_embed")
def _diag_embed(call: Call) -> Result:
    labelled, out = _labelled(call), call.results()[0]
    call.freeze(labelled.dims[-1], "becomes a diagonal")
    axes = {call.arg(name) % out.ndim for name in ("dim1", "dim2")}
    left = iter(labelled.dims[:-1])
    return Labelled(tuple(None if d in axes else next(left) for d in range(out.ndim)), labelled.weight)
