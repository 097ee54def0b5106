"""The table: ATen operation -> how names flow. Pointwise operations, contractions, norms, reductions, pooling.

Each rule gets a :class:`~secateur.trace.call.Call`, adds what must be equal, frozen or inexact to the table of names
and
returns the names of the results. Operations that only move positions are in ``layout.py``. An operation without a rule
freezes every name it meets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import numpy as np
from torch import Tensor

from secateur.trace.call import Call, Result, Rule, merge
from secateur.trace.names import Dim, Named, anonymous, lasting, vanishing

RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations (their out-of-place names, separated by blanks)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


# ---------------------------------------------------------------------------------------------------- pointwise


def _pointwise(call: Call, operands: Iterable[Tensor], zero: str) -> Named:
    tensors = list(operands)
    named = [call.of(t) or anonymous(t.ndim, weight=True) for t in tensors]
    dims = merge(call, [(n, t.shape) for n, t in zip(named, tensors, strict=True)], call.results()[0].shape, zero)
    weight = all(n.weight for n in named)
    for n in named:
        for ids in n.dims if n.weight else ():
            if not weight:
                call.names.mark("producer", ids)
    if weight:
        for n, t in zip(named[1:], tensors[1:], strict=True):
            for back in range(1, min(t.ndim, tensors[0].ndim) + 1):
                call.names.alias(named[0].dims[-back], n.dims[-back])
    return Named(dims, weight)


def _is_zero(value: object) -> bool:
    return isinstance(value, (int, float)) and value == 0


@rule(
    "abs neg relu gelu silu tanh sqrt sin sinh asin tan atan asinh erf expm1 log1p sign sgn floor ceil round trunc "
    "leaky_relu elu celu selu mish hardswish hardshrink softshrink clone detach alias contiguous _to_copy lift_fresh "
    "lift_fresh_copy lift zero nan_to_num zeros_like to dropout square frac deg2rad rad2deg isnan isinf positive"
)
def _keeps(call: Call) -> Result:
    return _pointwise(call, [call.first()], "any")


@rule(
    "sigmoid exp exp2 log log2 log10 softplus cos cosh acos rsqrt reciprocal hardsigmoid erfc logical_not bitwise_not "
    "ones_like full_like rand_like randn_like empty_like fill isfinite"
)
def _loses(call: Call) -> Result:
    return _pointwise(call, [call.first()], "lose")


@rule("log_sigmoid_forward")
def _loses_first(call: Call) -> Result:
    return [_pointwise(call, [call.first()], "lose")]


@rule("hardtanh clamp clamp_min clamp_max")
def _clamp(call: Call) -> Result:
    low = call.arg("min_val" if call.base == "hardtanh" else "min")
    high = call.arg("max_val" if call.base == "hardtanh" else "max")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return _pointwise(call, call.tensors(), "lose")
    keeps = (low is None or low <= 0) and (high is None or high >= 0)
    return _pointwise(call, [call.first()], "any" if keeps else "lose")


@rule("threshold")
def _threshold(call: Call) -> Result:
    # y = x where x > threshold, else value
    keeps = _is_zero(call.arg("value")) or call.arg("threshold") < 0
    return _pointwise(call, [call.first()], "any" if keeps else "lose")


@rule("add sub rsub maximum minimum fmax fmin")
def _sums(call: Call) -> Result:
    tensors = call.tensors()
    scalar = call.arg("other")
    if len(tensors) == 1 and not isinstance(scalar, Tensor):
        return _pointwise(call, tensors, "any" if _is_zero(scalar) else "lose")
    return _pointwise(call, tensors, "all")


@rule("mul logical_and bitwise_and")
def _products(call: Call) -> Result:
    return _pointwise(call, call.tensors(), "any")


@rule("div true_divide floor_divide remainder fmod")
def _quotients(call: Call) -> Result:
    tensors = call.tensors()
    below = call.arg("other")
    if not isinstance(below, Tensor):
        return _pointwise(call, [call.first()], "any")
    over = call.of(below)
    if over is not None:
        for ids in over.dims:
            if ids is not None and (ids > 0).any():
                call.freeze(ids[ids > 0], "divides by a channel that may be zero")
    return _pointwise(call, tensors, "any")


@rule("pow")
def _power(call: Call) -> Result:
    exponent = call.arg("exponent")
    if isinstance(exponent, (int, float)) and exponent > 0:
        return _pointwise(call, [call.first()], "any")
    return _pointwise(call, call.tensors(), "lose")


@rule(
    "eq ne lt le gt ge logical_or logical_xor bitwise_or bitwise_xor atan2 bernoulli uniform normal exponential random"
)
def _compares(call: Call) -> Result:
    return _pointwise(call, call.tensors(), "lose")


@rule("where")
def _where(call: Call) -> Result:
    values = [t for t in (call.arg("self"), call.arg("other")) if isinstance(t, Tensor)]
    if call.overload not in {"self", "ScalarSelf", "ScalarOther", "Scalar"}:
        return _unknown(call)
    numbers = [v for v in (call.arg("self"), call.arg("other")) if not isinstance(v, Tensor)]
    result = _pointwise(call, [call.arg("condition"), *values], "lose")
    if all(_is_zero(v) for v in numbers) and values:
        kept = merge(call, [(call.of(v) or anonymous(v.ndim, weight=True), v.shape) for v in values],
                     call.results()[0].shape, "all")  # fmt: skip
        dims = tuple(
            ids if ids is None or k is None or len(k) != len(ids) else vanishing(ids, k > 0)
            for ids, k in zip(result.dims, kept, strict=True)
        )
        return Named(dims, result.weight)
    return result


@rule("masked_fill")
def _masked_fill(call: Call) -> Result:
    value = call.arg("value")
    return _pointwise(call, [call.first(), call.arg("mask")], "lose" if not _is_zero(value) else "any")


@rule("copy")
def _copy(call: Call) -> Result:
    target, source = call.first(), call.arg("src")
    shape = call.results()[0].shape
    into, given = (call.of(t) or anonymous(t.ndim, weight=True) for t in (target, source))
    merged = merge(call, [(given, source.shape), (into, target.shape)], shape, "lose")
    alone = merge(call, [(given, source.shape)], shape, "all")
    dims = tuple(
        m
        if m is None or into_ids is None
        else vanishing(into_ids, a > 0 if a is not None else np.zeros(len(m), dtype=bool))
        for m, a, into_ids in zip(merged, alone, into.dims, strict=True)
    )
    if not given.weight:
        return Named(dims, weight=False)
    return Named(dims, into.weight)


@rule("_prelu_kernel prelu")
def _prelu(call: Call) -> Result:
    x, slope = call.tensors()
    named = [call.of(t) or anonymous(t.ndim, weight=True) for t in (x, slope)]
    for ids in named[1].dims:
        call.names.mark("carried", ids)
    dims = merge(call, [(n, t.shape) for n, t in zip(named, (x, slope), strict=True)], call.results()[0].shape, "any")
    own = [None if ids is None or x_ids is None else vanishing(ids, x_ids > 0)
           for ids, x_ids in zip(dims, named[0].dims, strict=True)]  # fmt: skip
    return Named(tuple(own), named[0].weight)


@rule("glu")
def _glu(call: Call) -> Result:
    named, axis = call.of(call.first()), call.arg("dim", -1) % call.first().ndim
    assert named is not None
    dims = list(named.dims)
    ids = dims[axis]
    if ids is not None:
        half = len(ids) // 2
        call.names.unite(ids[:half], ids[half:])
        dims[axis] = ids[:half]
    return Named(tuple(dims), named.weight)


# -------------------------------------------------------------------------------------------------- contractions


def _inner(call: Call, left: Dim, right: Dim, *, left_weight: bool, right_weight: bool) -> None:
    """Two dims are summed against each other: equal names, and one side must vanish."""
    names = call.names
    if left is not None and right is not None:
        names.unite(left, right)
    else:
        call.freeze(left, "is contracted with fixed positions")
        call.freeze(right, "is contracted with fixed positions")
    if right_weight and not left_weight:
        names.read(left, call.op)
        names.mark("consumer", right)
    elif left_weight and not right_weight:
        names.read(right, call.op)
        names.mark("consumer", left)
    elif left_weight:
        names.read(right, call.op)
        names.mark("consumer", left)
        names.mark("producer", right)
    elif left is not None and right is not None and ((left < 0) & (right < 0)).any():
        names.inexact(left[(left < 0) & (right < 0)], f"{call.op} contracts a channel that is not zero on either side")


def _produce(call: Call, named: Named, *dims: Dim) -> None:
    for ids in dims if named.weight else ():
        call.names.mark("producer", ids)


def _matmul(call: Call, a: Tensor, b: Tensor, batch: int) -> Named:
    left, right = call.of(a), call.of(b)
    assert left is not None and right is not None
    shared: tuple[Dim, ...] = ()
    if batch:
        heads = [(Named(n.dims[:batch], n.weight), t.shape[:batch]) for n, t in ((left, a), (right, b))]
        shared = merge(call, heads, a.shape[:batch], "any")
    _inner(call, left.dims[-1], right.dims[-2], left_weight=left.weight, right_weight=right.weight)
    rows, inner, columns = left.dims[-2], right.dims[-2], right.dims[-1]
    weight = left.weight and right.weight
    if not weight:
        _produce(call, left, rows, *left.dims[:batch])
        _produce(call, right, columns, *right.dims[:batch])
    if left.weight and not right.weight:
        inner = left.dims[-1]
    sizes = [(ids, n) for ids, n in zip(shared, a.shape[:batch], strict=True)]
    call.names.term(1, *sizes, (rows, a.shape[-2]), (inner, a.shape[-1]), (columns, b.shape[-1]))
    return Named((*shared, rows, columns), weight)


def _plus_bias(call: Call, product: Named, bias: Tensor) -> Named:
    added = call.of(bias)
    assert added is not None
    shape = call.results()[0].shape
    dims = merge(call, [(product, shape), (added, bias.shape)], shape, "all")
    if not product.weight:
        _produce(call, added, *added.dims)
    return Named(dims, product.weight and added.weight)


@rule("mm bmm")
def _mm(call: Call) -> Result:
    a, b = call.tensors()
    return _matmul(call, a, b, a.ndim - 2)


@rule("addmm baddbmm")
def _addmm(call: Call) -> Result:
    bias, a, b = call.tensors()
    return _plus_bias(call, _matmul(call, a, b, a.ndim - 2), bias)


@rule("mv dot addmv")
def _mv(call: Call) -> Result:
    *bias, a, b = call.tensors()
    left, right = call.of(a), call.of(b)
    assert left is not None and right is not None
    _inner(call, left.dims[-1], right.dims[0], left_weight=left.weight, right_weight=right.weight)
    if not right.weight:
        _produce(call, left, *left.dims[:-1])
    product = Named(left.dims[:-1], left.weight and right.weight)
    return _plus_bias(call, product, bias[0]) if bias else product


@rule("convolution _convolution convolution_overrideable")
def _convolution(call: Call) -> Result:
    x, w, b = call.arg("input"), call.arg("weight"), call.arg("bias")
    groups, transposed = call.arg("groups"), call.arg("transposed")
    data, weight = call.of(x), call.of(w)
    assert data is not None and weight is not None
    for ids in weight.dims[2:]:
        call.freeze(ids, "kernel position")
    for ids in data.dims[2:]:
        call.freeze(ids, "is a spatial position")
    names, channels, first, second = call.names, data.dims[1], weight.dims[0], weight.dims[1]
    space = x.shape[2:] if transposed else call.results()[0].shape[2:]
    factor = x.shape[0] * prod(space) * prod(w.shape[2:])
    names.term(factor, (first, w.shape[0]), (second, w.shape[1]))

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
        outer = merge(call, [(Named((outer,), weight=False), (len(outer),)), (bias, b.shape)], (len(outer),), "all")[0]
        _produce(call, bias, bias.dims[0])
        batch = lasting(batch)
    elif b is not None:
        call.freeze((call.of(b) or anonymous(1, weight=True)).dims[0], "meets fixed positions")
    return Named((batch, outer, *(None,) * (x.ndim - 2)), data.weight and weight.weight)


def _grouped(
    call: Call, channels: Dim, first: Dim, second: Dim, groups: int, *, transposed: bool, shape: Iterable[int]
) -> Dim:
    """Grouped convolution: the unit is the whole group if it reads one channel, else the offset within all groups.

    Returns the names of the output channels; ``first`` and ``second`` are the names of the weight's first two dims.
    """
    names, (rows, columns, *_) = call.names, tuple(shape)
    per_input = rows // groups if transposed else columns
    if per_input == 1:  # depthwise: every channel has its own filters
        call.freeze(second, "kernel position")
        if channels is None or first is None:
            call.freeze(channels, "depthwise convolution of fixed positions")
            call.freeze(first, "depthwise convolution of fixed positions")
            return None
        names.unite(channels[:, None], first.reshape(groups, -1))
        outer = np.repeat(first, columns) if transposed else first
        return vanishing(outer, (outer > 0) | (np.repeat(channels, len(outer) // groups) > 0))

    if first is not None:
        table = first.reshape(groups, -1)
        names.unite(table[:1], table[1:])
    inner = first if transposed else second
    names.read(channels, call.op)
    names.mark("consumer", inner)
    if channels is None or inner is None:
        call.freeze(channels, "is contracted with fixed positions")
        call.freeze(inner, "is contracted with fixed positions")
    else:
        offsets = channels.reshape(groups, per_input)
        names.unite(offsets[:1], offsets[1:])
        names.unite(offsets if transposed else offsets[0], inner.reshape(groups, -1) if transposed else inner)
    if transposed:
        return None if second is None else np.tile(second, groups)
    return first


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable"
)
def _attention(call: Call) -> Result:
    q, k, v = (call.arg(n) for n in ("query", "key", "value"))
    names = [call.of(t) for t in (q, k, v)]
    for named in names:
        for ids in named.dims if named is not None else ():
            call.freeze(ids, "attention heads are not cut")
    *batch, length, depth = q.shape
    call.names.term(prod(batch) * length * k.shape[-2] * (depth + v.shape[-1]))
    return None


@rule("embedding")
def _embedding(call: Call) -> Result:
    weight, index = call.of(call.arg("weight")), call.of(call.arg("indices"))
    assert weight is not None and index is not None
    call.freeze(weight.dims[0], "rows of a table are looked up by number")
    for ids in index.dims:
        call.freeze(ids, "is used as an index")
    _produce(call, weight, weight.dims[1])
    return Named((*(None,) * len(index.dims), weight.dims[1]), weight.weight and index.weight)


# --------------------------------------------------------------------------------------------------------- norms


def _affine(call: Call, ids: Dim, *, zero: bool) -> Dim:
    """Unite a normalised dim with the norm's own tensors; zero: whether the plain normalised value vanishes."""
    scale = None
    for argument in ("weight", "bias", "running_mean", "running_var"):
        tensor = call.arg(argument)
        named = call.of(tensor)
        if named is None:
            continue
        own = named.dims[0]
        if ids is None or own is None:
            call.freeze(own, "normalises fixed positions")
            call.freeze(ids, "is normalised by fixed positions")
            continue
        call.names.unite(ids, own)
        if named.weight:
            call.names.mark("carried" if argument.startswith("running") else "producer", own)
        if argument == "weight":
            scale = own
    if ids is None:
        return None
    if scale is not None:
        return vanishing(ids, scale > 0)
    return vanishing(ids, ids > 0) if zero else lasting(ids)


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm _batch_norm_with_update _batch_norm_no_update batch_norm_with_update"
)
def _batch_norm(call: Call) -> Result:
    named = call.of(call.arg("input"))
    assert named is not None
    for d, ids in enumerate(named.dims):
        if d != 1:
            call.freeze(ids, "batch norm takes its statistics over it")
    own_statistics = call.arg("running_mean") is None or bool(call.arg("training", default=False))
    dims = [None] * len(named.dims)
    return [Named((dims[0], _affine(call, named.dims[1], zero=own_statistics), *dims[2:]), named.weight)]


@rule("native_layer_norm _fused_rms_norm")
def _layer_norm(call: Call) -> Result:
    named = call.of(call.arg("input"))
    assert named is not None
    over = len(call.arg("normalized_shape"))
    kind = "layer norm" if call.base == "native_layer_norm" else "root-mean-square norm"
    dims = [*named.dims]
    tensors = [call.of(call.arg(a)) for a in ("weight", "bias")]
    scale = tensors[0] is not None
    for back in range(1, over + 1):
        ids = dims[-back]
        present = [n.dims[-back] for n in tensors if n is not None]
        for own in present:
            if ids is None or own is None:
                call.freeze(own, "normalises fixed positions")
                call.freeze(ids, "is normalised by fixed positions")
            else:
                call.names.unite(ids, own)
                call.names.mark("producer", own)
        if ids is not None:
            call.names.inexact(ids, f"{kind} takes its statistics over it")
            keeps = scale or kind != "layer norm"
            dims[-back] = vanishing(ids, np.full(len(ids), keeps))
    if tensors[1] is not None:
        dims[: len(dims) - over] = [lasting(ids) for ids in dims[: len(dims) - over]]
    return [Named(tuple(dims), named.weight)]


@rule("native_group_norm")
def _group_norm(call: Call) -> Result:
    named, groups = call.of(call.arg("input")), call.arg("group")
    assert named is not None
    for d, ids in enumerate(named.dims):
        if d != 1:
            call.freeze(ids, "group norm takes its statistics over it")
    ids = named.dims[1]
    if ids is not None and groups < len(ids):
        offsets = ids.reshape(groups, -1)
        call.names.unite(offsets[:1], offsets[1:])
        call.names.inexact(ids, "group norm takes its statistics over it")
    out = _affine(call, ids, zero=ids is not None and groups == len(ids))
    return [Named((None, out, *(None,) * (len(named.dims) - 2)), named.weight)]


# ------------------------------------------------------------------------------------------ reductions and pooling


def _axes(call: Call) -> set[int]:
    ndim = call.first().ndim
    dim = call.arg("dim")
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return set(range(ndim))
    return {d % ndim for d in (dim if isinstance(dim, (list, tuple)) else (dim,))} if ndim else set()


def _reduce(call: Call, reduced: Callable[[Dim], None], *, keeps: bool) -> Named:
    named = call.of(call.first())
    assert named is not None
    axes, keep = _axes(call), bool(call.arg("keepdim", default=False))
    dims: list[Dim] = []
    for d, ids in enumerate(named.dims):
        if d in axes:
            reduced(ids)
            dims += [None] if keep else []
        else:
            dims.append(ids if keeps else lasting(ids))
    return Named(tuple(dims), named.weight)


@rule("sum")
def _sum(call: Call) -> Result:
    return _reduce(call, lambda ids: call.names.read(ids, "sum"), keeps=True)


@rule("mean amax amin var std var_mean std_mean prod logsumexp")
def _statistics(call: Call) -> Result:
    reason = f"{call.base} is taken over it"
    keeps = call.base not in {"logsumexp"}
    named = _reduce(call, lambda ids: call.names.inexact(ids, reason), keeps=keeps)
    return [named] * len(call.results()) if len(call.results()) > 1 else named


@rule("linalg_vector_norm norm")
def _norm(call: Call) -> Result:
    if call.arg("ord", call.arg("p")) not in {None, 1, 2, float("inf")}:
        return _unknown(call)
    return _reduce(call, lambda ids: call.names.read(ids, call.op), keeps=True)


@rule("any all argmax argmin max min median")
def _selects(call: Call) -> Result:
    if len(call.tensors()) > 1 or call.arg("dim") is None:
        return _pointwise(call, call.tensors(), "all") if len(call.tensors()) > 1 else _unknown(call)
    named = _reduce(call, lambda ids: call.freeze(ids, "is searched for an extreme"), keeps=False)
    return [named] * len(call.results())


@rule("_softmax _log_softmax softmax log_softmax _safe_softmax")
def _softmax(call: Call) -> Result:
    named = call.of(call.first())
    assert named is not None
    axis = call.arg("dim") % max(1, call.first().ndim)
    call.names.inexact(named.dims[axis], "softmax is taken over it")
    return Named(tuple(lasting(ids) for ids in named.dims), named.weight)


def _spatial(call: Call, count: int) -> Result:
    named = call.of(call.first())
    assert named is not None
    for ids in named.dims[-count:]:
        call.freeze(ids, "is a spatial position")
    result = Named((*named.dims[:-count], *(None,) * count), named.weight)
    return [result] * len(call.results())


for _n, _spaces in enumerate(("1d", "2d", "3d"), start=1):
    for _name in (
        f"avg_pool{_spaces} max_pool{_spaces} max_pool{_spaces}_with_indices _adaptive_avg_pool{_spaces} "
        f"adaptive_avg_pool{_spaces} adaptive_max_pool{_spaces} upsample_nearest{_spaces} "
        f"_upsample_nearest_exact{_spaces} "
        f"reflection_pad{_spaces} replication_pad{_spaces}"
    ).split():
        RULES[_name] = lambda call, count=_n: _spatial(call, count)  # type: ignore[misc]
RULES["upsample_linear1d"] = lambda call: _spatial(call, 1)
for _name in ["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]:
    RULES[_name] = lambda call: _spatial(call, 2)
RULES["upsample_trilinear3d"] = lambda call: _spatial(call, 3)


# ------------------------------------------------------------------------------------------------------ constants


@rule("zeros ones full new_zeros new_ones new_full empty new_empty scalar_tensor")
def _constant(call: Call) -> Result:
    """A tensor filled with one value has no positions of its own: it takes the names it meets."""
    out = call.results()[0]
    dims = [call.names.fresh(n) if n > 1 else None for n in out.shape]
    if not call.base.endswith("zeros"):
        return Named(tuple(lasting(ids) for ids in dims), weight=True)
    return Named(tuple(dims), weight=True)


@rule("arange linspace eye randn rand randint randperm tril_indices triu_indices")
def _numbers(call: Call) -> Result:
    return anonymous(call.results()[0].ndim, weight=True)


def _unknown(call: Call) -> Result:
    call.freeze_all(f"no rule knows the operation {call.op}")
    return None


unknown_operation: Rule = _unknown
