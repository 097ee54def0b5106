"""How labels flow through operations that only move positions: views, permutations, concatenation, slices, padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from secateur.tracing.call import Call, Result, merge
from secateur.tracing.labels import Dim, Labelled, lasting, vanishing
from secateur.tracing.rules.table import rule, unknown_operation


def _labelled(call: Call) -> Labelled:
    labelled = call.of(call.first())
    assert labelled is not None
    return labelled


@rule("t")
def _t(call: Call) -> Result:
    labelled = _labelled(call)
    return Labelled(labelled.dims[::-1], labelled.weight)


@rule("transpose")
def _transpose(call: Call) -> Result:
    labelled, dims = _labelled(call), list(_labelled(call).dims)
    if dims:
        a, b = (call.arg(n) % len(dims) for n in ("dim0", "dim1"))
        dims[a], dims[b] = dims[b], dims[a]
    return Labelled(tuple(dims), labelled.weight)


@rule("permute")
def _permute(call: Call) -> Result:
    labelled = _labelled(call)
    return Labelled(tuple(labelled.dims[d % len(labelled.dims)] for d in call.arg("dims")), labelled.weight)


@rule("unsqueeze")
def _unsqueeze(call: Call) -> Result:
    labelled = _labelled(call)
    at = call.arg("dim") % (len(labelled.dims) + 1)
    return Labelled((*labelled.dims[:at], None, *labelled.dims[at:]), labelled.weight)


@rule("squeeze")
def _squeeze(call: Call) -> Result:
    labelled, x = _labelled(call), call.first()
    dim = call.arg("dim")
    ndim, after = len(labelled.dims), call.results()[0].ndim  # an in-place squeeze has changed x already
    axes = range(ndim) if dim is None else (dim if isinstance(dim, (list, tuple)) else (dim,))
    if call.writes or x.ndim != ndim:
        return unknown_operation(call) if after != ndim else labelled
    gone = {d % ndim for d in axes if x.shape[d] == 1} if ndim else set()
    for d in gone:
        call.freeze(labelled.dims[d], "is squeezed away")
    return Labelled(tuple(ids for d, ids in enumerate(labelled.dims) if d not in gone), labelled.weight)


@rule("expand")
def _expand(call: Call) -> Result:
    labelled, x, shape = _labelled(call), call.first(), call.results()[0].shape
    return Labelled(merge(call, [(labelled, x.shape)], shape, "any"), labelled.weight)


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
    labelled, before, after = _labelled(call), call.first().shape, call.results()[0].shape
    if not labelled.has_labels:
        return Labelled((None,) * len(after), labelled.weight)
    if len(after) > 2 or before[:1] != after[:1]:  # not a plain flattening: sizes may come from another tensor
        for ids in labelled.dims:
            call.placed(ids)
    dims: list[Dim] = []
    i = j = 0
    while i < len(before) or j < len(after):
        if i < len(before) and j < len(after) and before[i] == after[j]:
            dims.append(labelled.dims[i])
            i, j = i + 1, j + 1
        elif i < len(before) and before[i] == 1:
            call.freeze(labelled.dims[i], "is viewed away")
            i += 1
        elif j < len(after) and after[j] == 1:
            dims.append(None)
            j += 1
        else:
            i2, j2 = _block(before, after, i, j)
            last = i2 == len(before)
            dims += _reblock(call, labelled.dims[i:i2], before[i:i2], after[j:j2], weight=labelled.weight, last=last)
            i, j = i2, j2
    return Labelled(tuple(dims), labelled.weight)


def _block(before: Sequence[int], after: Sequence[int], i: int, j: int) -> tuple[int, int]:
    """The ends of the smallest blocks of dims from ``i`` and ``j`` on that hold equally many positions."""
    left, right, i, j = before[i], after[j], i + 1, j + 1
    while left != right:
        if left < right:
            left, i = left * before[i], i + 1
        else:
            right, j = right * after[j], j + 1
    return i, j


def _reblock(
    call: Call, dims: Sequence[Dim], before: Sequence[int], after: Sequence[int], *, weight: bool, last: bool
) -> list[Dim]:
    """Labels of a block of dims viewed in another shape.

    A dim with labels that is merged with fixed ones repeats its labels. A dim that is split so that its labels vary
    along several new dims cannot keep them all: for feature maps the innermost new dim is the unit, and the others are
    tied (channel shuffle). A split of the last dim of a tensor is a split into heads, which is not cut.
    """
    present = [d for d, ids in enumerate(dims) if ids is not None]
    if not present:
        return [None] * len(after)
    if len(present) > 1:
        keep = max(present, key=lambda d: before[d])
        for d in present:
            call.placed(dims[d])
            if d != keep:
                call.freeze(dims[d], "is merged with another dim of channels")
        present = [keep]
    only = present[0]
    ids = dims[only]
    assert ids is not None
    shape = [1] * len(before)
    shape[only] = before[only]
    block = np.broadcast_to(ids.reshape(shape), before).reshape(after)
    vary = [d for d in range(len(after)) if (block != block.take([0], axis=d)).any()]
    if len(vary) > 1 and (weight or last):
        call.freeze(ids, "is split into several dims (heads are not cut)")
        return [None] * len(after)
    unit = vary[-1] if vary else max(range(len(after)), key=lambda d: after[d])
    line = np.moveaxis(block, unit, 0).reshape(after[unit], -1)
    if len(vary) > 1:
        call.labels.unite(line[:, :1], line[:, 1:])
    result: list[Dim] = [None] * len(after)
    result[unit] = vanishing(line[:, 0], line.min(1) > 0)  # what is tied vanishes only if all of it does
    return result


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
    labelled, axis = _labelled(call), call.arg("dim", 0) % call.first().ndim
    sizes = [part.shape[axis] for part in call.results()]
    ids = labelled.dims[axis]
    parts: list[Dim] = [None] * len(sizes)
    if ids is not None:
        cuts = np.split(ids, np.cumsum(sizes)[:-1])
        if len(set(sizes)) == 1:
            for other in cuts[1:]:
                call.labels.unite(cuts[0], other)
        else:
            call.placed(ids)
            for part in cuts[1:-1]:
                call.moved(ids, part)
        parts = list(cuts)
    return [Labelled((*labelled.dims[:axis], part, *labelled.dims[axis + 1 :]), labelled.weight) for part in parts]


@rule("slice narrow")
def _slice(call: Call) -> Result:
    labelled, axis = _labelled(call), call.arg("dim", 0) % call.first().ndim
    ids, size = labelled.dims[axis], call.first().shape[axis]
    if ids is None:
        return labelled
    if call.base == "narrow":
        start = call.arg("start")
        cut = slice(start, start + call.arg("length"))
    else:
        cut = slice(call.arg("start"), call.arg("end"), call.arg("step", 1))
    part = ids
    if len(range(*cut.indices(size))) != size:
        part = ids[cut]
        call.placed(ids)
        start, stop, step = cut.indices(size)
        if step > 1 or (start > 0 and stop < size):
            call.moved(ids, part if step == 1 else ids)
    return Labelled((*labelled.dims[:axis], part, *labelled.dims[axis + 1 :]), labelled.weight)


@rule("select unbind")
def _select(call: Call) -> Result:
    labelled, axis = _labelled(call), call.arg("dim", 0) % call.first().ndim
    call.freeze(labelled.dims[axis], "single positions are picked out")
    result = Labelled((*labelled.dims[:axis], *labelled.dims[axis + 1 :]), labelled.weight)
    return [result] * len(call.results())


@rule("index index_select")
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
    return Labelled(tuple(None if d in used else ids for d, ids in enumerate(labelled.dims)), labelled.weight)


def _index_freely(call: Call, labelled: Labelled, used: Sequence[int], out: Tensor) -> Result:
    """Several or many-dimensional indices: labels survive only on dims after leading indexed ones."""
    if used != list(range(len(used))):
        return unknown_operation(call)
    for d in used:
        call.freeze(labelled.dims[d], "is picked by index")
    rest = labelled.dims[len(used) :]
    return Labelled((*(None,) * (out.ndim - len(rest)), *rest), labelled.weight)


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
