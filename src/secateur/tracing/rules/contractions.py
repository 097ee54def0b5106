"""How labels flow through contractions: inner axes become one, outer axes pass, kernel positions freeze."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

import numpy as np
from torch import Tensor

from secateur.tracing.call import Call, Result, merge
from secateur.tracing.labels import Dim, Labelled, lasting, unlabelled, vanishing
from secateur.tracing.rules.table import rule, unknown_operation


def _inner(call: Call, left: Dim, right: Dim, *, left_weight: bool, right_weight: bool) -> None:
    """Two dims are summed against each other: their labels become equal, and one side must vanish."""
    labels = call.labels
    if left is not None and right is not None:
        labels.meet(left, right)
    else:
        call.freeze(left, "is contracted with fixed positions")
        call.freeze(right, "is contracted with fixed positions")
    if right_weight and not left_weight:
        labels.read(left, call.op)
        labels.mark("consumer", right)
    elif left_weight and not right_weight:
        labels.read(right, call.op)
        labels.mark("consumer", left)
    elif left_weight:
        labels.read(right, call.op)
        labels.mark("consumer", left)
        labels.mark("producer", right)
    elif left is not None and right is not None and ((left < 0) & (right < 0)).any():
        labels.approximate(
            left[(left < 0) & (right < 0)], f"{call.op} contracts a channel that is not zero on either side"
        )


def _produce(call: Call, labelled: Labelled, *dims: Dim) -> None:
    for ids in dims if labelled.weight else ():
        call.labels.mark("producer", ids)


def _as_data(call: Call, labelled: Labelled) -> Labelled:
    """What was computed from parameters alone, as a layer takes it: its own parameters produce it."""
    _produce(call, labelled, *labelled.dims)
    return replace(labelled, weight=False)


def _matmul(call: Call, a: Tensor, b: Tensor, batch: int) -> Labelled:
    left, right = call.of(a), call.of(b)
    assert left is not None and right is not None
    shared: tuple[Dim, ...] = ()
    if batch:
        heads = [(Labelled(n.dims[:batch], n.weight), t.shape[:batch]) for n, t in ((left, a), (right, b))]
        shared = merge(call, heads, a.shape[:batch], "any")
    if left.weight and right.weight and right.turned:  # a linear layer on what the model has learnt: no longer a weight
        left = _as_data(call, left)
    _inner(call, left.dims[-1], right.dims[-2], left_weight=left.weight, right_weight=right.weight)
    rows, inner, columns = left.dims[-2], right.dims[-2], right.dims[-1]
    weight = left.weight and right.weight
    if not weight:
        _produce(call, left, rows, *left.dims[:batch])
        _produce(call, right, columns, *right.dims[:batch])
    if left.weight and not right.weight:
        inner = left.dims[-1]
    sizes = [(ids, n) for ids, n in zip(shared, a.shape[:batch], strict=True)]
    call.labels.term(1, *sizes, (rows, a.shape[-2]), (inner, a.shape[-1]), (columns, b.shape[-1]))
    return Labelled((*shared, rows, columns), weight)


@rule("_grouped_mm")
def _grouped_mm(call: Call) -> Result:
    """Rows [rows, inner] are sorted by expert, each of which has a weight of its own [experts, inner, columns]."""
    x, w, bias = call.first(), call.arg("mat2"), call.arg("bias")
    data, weight = call.of(x), call.of(w)
    if x.ndim != 2 or w.ndim != 3 or data is None or weight is None or bias is not None:
        return unknown_operation(call)
    call.freeze(data.dims[0], "is sorted by expert")
    call.freeze(weight.dims[0], "is an expert that is looked up by number")
    _inner(call, data.dims[1], weight.dims[1], left_weight=data.weight, right_weight=weight.weight)
    if not (data.weight and weight.weight):
        _produce(call, weight, weight.dims[2])
    call.labels.term(x.shape[0], (weight.dims[1], w.shape[1]), (weight.dims[2], w.shape[2]))
    return Labelled((None, weight.dims[2]), data.weight and weight.weight)


def _plus_bias(call: Call, product: Labelled, bias: Tensor) -> Labelled:
    added = call.of(bias)
    assert added is not None
    shape = call.results()[0].shape
    dims = merge(call, [(product, shape), (added, bias.shape)], shape, "all")
    if not product.weight:
        _produce(call, added, *added.dims)
    return Labelled(dims, product.weight and added.weight)


@rule("mm bmm")
def _mm(call: Call) -> Result:
    a, b = call.tensors()
    return _matmul(call, a, b, a.ndim - 2)


@rule("addmm baddbmm")
def _addmm(call: Call) -> Result:
    bias, a, b = call.tensors()
    return _plus_bias(call, _matmul(call, a, b, a.ndim - 2), bias)


@rule("dot vdot")
def _dot(call: Call) -> Result:
    a, b = call.tensors()
    both = [call.of(a), call.of(b)]
    if all(each is not None and each.weight for each in both):  # a number that scales whole weights, in spectral norm
        for each in both:
            for ids in each.dims if each is not None else ():
                call.labels.approximate(ids, f"{call.op} of weights is taken over it")
    return _mv(call)


@rule("mv addmv")
def _mv(call: Call) -> Result:
    *bias, a, b = call.tensors()
    left, right = call.of(a), call.of(b)
    assert left is not None and right is not None
    _inner(call, left.dims[-1], right.dims[0], left_weight=left.weight, right_weight=right.weight)
    if not right.weight:
        _produce(call, left, *left.dims[:-1])
    inner = (left if left.weight else right).dims[-1 if left.weight else 0]
    call.labels.term(1, *zip(left.dims[:-1], a.shape[:-1], strict=True), (inner, b.shape[0]))
    product = Labelled(left.dims[:-1], left.weight and right.weight)
    return _plus_bias(call, product, bias[0]) if bias else product


@rule("_trilinear")
def _trilinear(call: Call) -> Result:
    """``nn.Bilinear``: ``y[b, o] = sum_ij first[b, i] weight[o, i, j] second[b, j]``; each operand lacks some dims."""
    labelled: list[list[Dim]] = []
    sizes: list[list[int]] = []
    absent = object()
    for name, without in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        tensor = call.arg(name)
        own = call.of(tensor)
        assert own is not None
        dims, shape = list(own.dims), list(tensor.shape)
        for d in sorted(call.arg(without)):
            dims.insert(d, absent)  # type: ignore[arg-type]
            shape.insert(d, 1)
        labelled.append(dims)
        sizes.append(shape)
    weights = [of.weight for of in map(call.of, (call.arg("i1"), call.arg("i2"), call.arg("i3"))) if of is not None]
    if weights != [False, True, False]:
        call.labels.term(prod(map(max, *sizes)))
        return unknown_operation(call)
    found: list[Dim] = []
    counted: list[tuple[Dim, int]] = []
    for d, (a, w, b) in enumerate(zip(*labelled, strict=True)):
        size = max(shape[d] for shape in sizes)
        data = [ids for ids in (a, b) if ids is not absent]
        if d in call.arg("sumdim"):
            _inner(call, data[0], w, left_weight=False, right_weight=True)
            counted.append((w, size))
            continue
        if w is not absent:
            call.labels.mark("producer", w)
            found.append(w)
        else:
            whole = [(Labelled((ids,), weight=False), (size,)) for ids in data]
            found += merge(call, whole, (size,), "any")
        counted.append((found[-1], size))
    call.labels.term(1, *counted)
    return Labelled(tuple(found), weight=False)


@rule("convolution _convolution convolution_overrideable")
def _convolution(call: Call) -> Result:
    x, w, b = call.arg("input"), call.arg("weight"), call.arg("bias")
    groups, transposed = call.arg("groups"), call.arg("transposed")
    data, weight = call.of(x), call.of(w)
    assert data is not None and weight is not None
    if data.weight:
        data = _as_data(call, data)
    for ids in weight.dims[2:]:
        call.freeze(ids, "kernel position")
    for ids in data.dims[2:]:
        call.freeze(ids, "is a spatial position")
    labels, channels, first, second = call.labels, data.dims[1], weight.dims[0], weight.dims[1]
    space = x.shape[2:] if transposed else call.results()[0].shape[2:]
    factor = x.shape[0] * prod(space) * prod(w.shape[2:])
    labels.term(factor, (first, w.shape[0]), (second, w.shape[1]))

    if groups == 1:
        outer, inner = (second, first) if transposed else (first, second)
        _inner(call, channels, inner, left_weight=data.weight, right_weight=weight.weight)
    else:
        outer = _grouped(call, channels, first, second, groups, transposed=transposed, shape=w.shape)
    _produce(call, weight, outer if groups == 1 or not transposed else (first if w.shape[0] == groups else second))
    batch = data.dims[0]
    if b is not None and outer is not None:
        bias = call.of(b)
        assert bias is not None
        outer = merge(call, [(Labelled((outer,), weight=False), (len(outer),)), (bias, b.shape)], (len(outer),), "all")[
            0
        ]
        _produce(call, bias, bias.dims[0])
        batch = lasting(batch)
    elif b is not None:
        call.freeze((call.of(b) or unlabelled(1, weight=True)).dims[0], "meets fixed positions")
    return Labelled((batch, outer, *(None,) * (x.ndim - 2)), data.weight and weight.weight)


def _grouped(
    call: Call, channels: Dim, first: Dim, second: Dim, groups: int, *, transposed: bool, shape: Iterable[int]
) -> Dim:
    """Grouped convolution: the unit is the whole group if it reads one channel, else the offset within all groups.

    Returns the labels of the output channels; ``first`` and ``second`` are the labels of the weight's first two dims.
    """
    labels, (rows, columns, *_) = call.labels, tuple(shape)
    per_input = rows // groups if transposed else columns
    if per_input == 1:  # depthwise: every channel has its own filters
        call.freeze(second, "kernel position")
        if channels is None or first is None:
            call.freeze(channels, "depthwise convolution of fixed positions")
            call.freeze(first, "depthwise convolution of fixed positions")
            return None
        labels.unite(channels[:, None], first.reshape(groups, -1))
        outer = np.repeat(first, columns) if transposed else first
        return vanishing(outer, (outer > 0) | (np.repeat(channels, len(outer) // groups) > 0))

    if first is not None:
        table = first.reshape(groups, -1)
        labels.unite(table[:1], table[1:])
    inner = first if transposed else second
    labels.read(channels, call.op)
    labels.mark("consumer", inner)
    if channels is None or inner is None:
        call.freeze(channels, "is contracted with fixed positions")
        call.freeze(inner, "is contracted with fixed positions")
    else:
        offsets = channels.reshape(groups, per_input)
        labels.unite(offsets[:1], offsets[1:])
        labels.unite(offsets if transposed else offsets[0], inner.reshape(groups, -1) if transposed else inner)
    if transposed:
        return None if second is None else np.tile(second, groups)
    return first


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable"
)
def _attention(call: Call) -> Result:
    """``softmax(Q K^T scale + mask) V``: heads pass, what is summed over is gone, the values' channels come out."""
    tensors = [call.arg(n) for n in ("query", "key", "value")]
    labelled = [call.of(t) for t in tensors]
    q, k, v = (n if n is not None else unlabelled(t.ndim, weight=True) for n, t in zip(labelled, tensors, strict=True))
    for ids in (q.dims[-2], k.dims[-2], v.dims[-2]):
        call.freeze(ids, "is a place in a sequence")
    if call.arg("scale") is None:
        for ids in (q.dims[-1], k.dims[-1]):
            call.freeze(ids, "sets the scale of attention")
    _inner(call, q.dims[-1], k.dims[-1], left_weight=False, right_weight=False)
    shape, ndim = tensors[0].shape, tensors[0].ndim
    heads = [(Labelled(n.dims[:-2], n.weight), t.shape[:-2]) for n, t in zip((q, k, v), tensors, strict=True)]
    heads[1:] = [_for_every_query(call, shape[:-2], *pair) for pair in heads[1:]]
    mask = call.arg("attn_mask", call.arg("attn_bias"))
    if mask is not None:
        given = call.of(mask) or unlabelled(mask.ndim, weight=True)
        for ids in given.dims[-2:]:
            call.freeze(ids, "is a place in a sequence")
        heads.insert(1, (Labelled(given.dims[:-2], given.weight), mask.shape[:-2]))
    shared = list(merge(call, heads, shape[:-2], "any"))
    values = heads[-1][0].dims
    for d, (ids, own) in enumerate(zip(list(shared), values, strict=True)):
        if ids is not None:  # zero queries and keys give no zero result; a head of values that serves all others stays
            shared[d] = vanishing(ids, own > 0) if own is not None and len(own) == len(ids) else lasting(ids)
    sizes = [(ids, n) for ids, n in zip(shared, shape[:-2], strict=True)]
    length, others = shape[-2], tensors[1].shape[-2]
    for ids, depth in ((q.dims[-1], shape[-1]), (v.dims[-1], tensors[2].shape[-1])):
        call.labels.term(length * others, *sizes, (ids, depth))
    dims = (*shared, None, v.dims[-1])
    assert len(dims) == ndim
    return [Labelled(dims, all(n.weight for n in (q, k, v)))]


def _for_every_query(
    call: Call, wanted: Sequence[int], labelled: Labelled, shape: Sequence[int]
) -> tuple[Labelled, Sequence[int]]:
    """Heads of keys or values, of which each serves several heads of queries."""
    if not shape or shape[-1] == wanted[-1] or shape[-1] == 1:
        return labelled, shape
    ids = labelled.dims[-1]
    times = wanted[-1] // shape[-1]
    return Labelled((*labelled.dims[:-1], None if ids is None else np.repeat(ids, times)), labelled.weight), wanted


@rule("mkldnn_rnn_layer _cudnn_rnn miopen_rnn")
def _recurrent(call: Call) -> Result:
    """A recurrent layer as one kernel, which models that need values are traced with: counted, and left whole."""
    call.freeze_all("a recurrent layer that runs as one kernel is not cut")
    x = call.arg("input")
    weights = call.arg("weight") or (call.arg("weight0"), call.arg("weight1"))
    call.labels.term(prod(x.shape[:-1]) * sum(w.numel() for w in weights if w.ndim == 2))
    return None


@rule("_cdist_forward _euclidean_dist")
def _distance(call: Call) -> Result:
    """Distances of the rows of two tables: zero coordinates of both add nothing."""
    a, b = call.arg("x1"), call.arg("x2")
    left, right = call.of(a), call.of(b)
    assert left is not None and right is not None
    x, y = left.dims[-1], right.dims[-1]
    if x is None or y is None:
        call.freeze(x, "is compared with fixed positions")
        call.freeze(y, "is compared with fixed positions")
    else:
        call.labels.unite(x, y)
        for ids in (x, y):
            call.labels.read(ids, call.op)
    for n, own in ((left, x), (right, y)):
        if n.weight and not (left.weight and right.weight):
            _produce(call, n, *n.dims[:-1], own)
    shared = [(Labelled(n.dims[:-2], n.weight), t.shape[:-2]) for n, t in ((left, a), (right, b))]
    batch = merge(call, shared, call.results()[0].shape[:-2], "lose")
    dims = (*batch, lasting(left.dims[-2]), lasting(right.dims[-2]))
    return Labelled(dims, left.weight and right.weight)


@rule("embedding_bag _embedding_bag _embedding_bag_forward_only")
def _embedding_bag(call: Call) -> Result:
    weight = call.of(call.arg("weight"))
    assert weight is not None
    call.freeze(weight.dims[0], "rows of a table are looked up by number")
    for tensor in call.tensors()[1:]:
        for ids in (call.of(tensor) or unlabelled(tensor.ndim, weight=True)).dims:
            call.freeze(ids, "is used as an index")
    _produce(call, weight, weight.dims[1])
    return [Labelled((None, weight.dims[1]), weight=False)]


@rule("embedding")
def _embedding(call: Call) -> Result:
    weight, index = call.of(call.arg("weight")), call.of(call.arg("indices"))
    assert weight is not None and index is not None
    call.freeze(weight.dims[0], "rows of a table are looked up by number")
    for ids in index.dims:
        call.freeze(ids, "is used as an index")
    _produce(call, weight, weight.dims[1])
    return Labelled((*(None,) * len(index.dims), weight.dims[1]), weight.weight and index.weight)
