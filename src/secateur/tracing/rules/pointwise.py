"""How labels flow through pointwise operations: aligned positions become one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from torch import Tensor

from secateur.tracing.call import Call, Result, free_dims, merge
from secateur.tracing.labels import Dim, Labelled, unlabelled, vanishing
from secateur.tracing.rules.table import rule, unknown_operation


def pointwise(call: Call, given: Iterable[Tensor], zero: str) -> Labelled:
    """Labels of a pointwise result of these operands; ``zero`` as for :func:`secateur.tracing.call.merge`."""
    tensors = list(given)
    labelled = [call.of(t) or unlabelled(t.ndim, weight=True) for t in tensors]
    operands, shape = [(n, t.shape) for n, t in zip(labelled, tensors, strict=True)], call.results()[0].shape
    dims = merge(call, operands, shape, zero)
    weight = all(n.weight for n in labelled)
    for n in labelled:
        for ids in n.dims if n.weight else ():
            if not weight:
                call.labels.mark("producer", ids)
    if weight:
        for n, t in zip(labelled[1:], tensors[1:], strict=True):
            for back in range(1, min(t.ndim, tensors[0].ndim) + 1):
                call.labels.alias(labelled[0].dims[-back], n.dims[-back])
    return Labelled(dims, weight, free=free_dims(operands, shape))


def _is_zero(value: object) -> bool:
    return isinstance(value, (int, float)) and value == 0


@rule(
    "abs neg relu gelu silu tanh sqrt sin sinh asin tan atan asinh erf expm1 log1p sign sgn floor ceil round trunc "
    "leaky_relu elu celu selu mish hardswish hardshrink softshrink erfinv atanh signbit fix "
    "conj_physical _conj _neg_view resolve_conj resolve_neg rrelu  clone detach alias contiguous _to_copy lift_fresh "
    "lift_fresh_copy lift zero nan_to_num to dropout square frac deg2rad rad2deg isnan isinf positive"
)
def _keeps(call: Call) -> Result:
    labelled = call.open(call.first())
    if labelled.joints and call.first().shape == call.results()[0].shape:
        return labelled
    kept = pointwise(call, [call.first()], "any")
    return replace(kept, zero=True) if labelled.zero or call.base == "zero" else kept


@rule(
    "sigmoid exp exp2 softplus cos cosh acos acosh hardsigmoid erfc logical_not bitwise_not "
    "sinc i0 special_i0e angle isneginf isposinf "
    "rand_like randn_like randint_like fill isfinite"
)
def _loses(call: Call) -> Result:
    return pointwise(call, [call.first()], "lose")


def _not_at_zero(call: Call) -> None:
    labelled = call.of(call.first())
    for ids in labelled.dims if labelled is not None else ():
        call.labels.divides(ids, call.op, "is not finite where a channel is zero")


@rule("log log2 log10 rsqrt reciprocal digamma lgamma logit polygamma")
def _loses_and_breaks(call: Call) -> Result:
    _not_at_zero(call)
    return pointwise(call, [call.first()], "lose")


@rule("log_sigmoid_forward")
def _loses_first(call: Call) -> Result:
    return [pointwise(call, [call.first()], "lose")]


@rule("hardtanh clamp clamp_min clamp_max")
def _clamp(call: Call) -> Result:
    low = call.arg("min_val" if call.base == "hardtanh" else "min")
    high = call.arg("max_val" if call.base == "hardtanh" else "max")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return pointwise(call, call.tensors(), "lose")
    keeps = (low is None or low <= 0) and (high is None or high >= 0)
    return pointwise(call, [call.first()], "any" if keeps else "lose")


@rule("threshold")
def _threshold(call: Call) -> Result:
    # y = x where x > threshold, else value
    keeps = _is_zero(call.arg("value")) or call.arg("threshold") < 0
    return pointwise(call, [call.first()], "any" if keeps else "lose")


@rule("add sub rsub maximum minimum fmax fmin hypot complex")
def _sums(call: Call) -> Result:
    tensors = call.tensors()
    scalar = call.arg("other")
    if len(tensors) == 1 and not isinstance(scalar, Tensor):
        return pointwise(call, tensors, "any" if _is_zero(scalar) else "lose")
    return pointwise(call, tensors, "all")


@rule("mul logical_and bitwise_and ldexp")
def _products(call: Call) -> Result:
    if len(call.tensors()) == 1:
        return _keeps(call)
    return pointwise(call, call.tensors(), "any")


@rule("div true_divide floor_divide remainder fmod")
def _quotients(call: Call) -> Result:
    tensors = call.tensors()
    below = call.arg("other")
    if not isinstance(below, Tensor):
        return _keeps(call)
    over = call.of(below)
    if over is not None:
        for ids in over.dims:
            call.labels.divides(ids, call.op, "divides by a channel that may be zero")
    return pointwise(call, tensors, "any")


@rule("pow")
def _power(call: Call) -> Result:
    exponent = call.arg("exponent")
    if isinstance(exponent, (int, float)) and exponent > 0:
        return pointwise(call, [call.first()], "any")
    if isinstance(call.first(), Tensor):
        _not_at_zero(call)
    return pointwise(call, call.tensors(), "lose")


@rule(
    "eq ne lt le gt ge logical_or logical_xor bitwise_or bitwise_xor atan2 bernoulli uniform normal exponential random "
    "logaddexp logaddexp2 heaviside copysign nextafter gcd lcm"
)
def _compares(call: Call) -> Result:
    return pointwise(call, call.tensors(), "lose")


def _whole(call: Call, tensor: Tensor) -> tuple[Labelled, tuple[int, ...]]:
    return call.of(tensor) or unlabelled(tensor.ndim, weight=True), tuple(tensor.shape)


def _where_zero(result: Labelled, kept: Iterable[Dim]) -> Labelled:
    """The same labels, vanishing where these do."""
    dims = tuple(
        ids if ids is None or k is None or len(k) != len(ids) else vanishing(ids, k > 0)
        for ids, k in zip(result.dims, kept, strict=True)
    )
    return replace(result, dims=dims)


@rule("lerp")
def _lerp(call: Call) -> Result:
    # y = start + weight (end - start)
    start, end = call.first(), call.arg("end")
    result = pointwise(call, call.tensors(), "lose")
    return _where_zero(result, merge(call, [_whole(call, start), _whole(call, end)], call.results()[0].shape, "all"))


@rule("addcmul addcdiv")
def _add_product(call: Call) -> Result:
    # y = x + value * first * second, or first / second
    x, first, second = call.first(), call.arg("tensor1"), call.arg("tensor2")
    if call.base == "addcdiv":
        for ids in _whole(call, second)[0].dims:
            call.labels.divides(ids, call.op, "divides by a channel that may be zero")
    shape = call.results()[0].shape
    result = pointwise(call, [x, first, second], "lose")
    product = merge(call, [_whole(call, first), _whole(call, second)], shape, "any")
    return _where_zero(result, merge(call, [_whole(call, x), (Labelled(product, weight=False), shape)], shape, "all"))


@rule("rrelu_with_noise rrelu_with_noise_functional native_dropout")
def _noisy(call: Call) -> Result:
    shape = call.results()[0].shape
    result = pointwise(call, [t for t in call.tensors() if t.shape == shape], "lose")
    kept = _where_zero(result, merge(call, [_whole(call, call.first())], shape, "any"))
    return [kept] * (2 if call.base == "native_dropout" else 1)


@rule("polar")
def _polar(call: Call) -> Result:
    result = pointwise(call, call.tensors(), "lose")
    return _where_zero(result, merge(call, [_whole(call, call.first())], call.results()[0].shape, "any"))


@rule("bucketize searchsorted isin")
def _looks_up(call: Call) -> Result:
    """Among fixed boundaries: each value by itself."""
    x = call.arg("self" if call.base != "isin" else "elements")
    others = [t for t in call.tensors() if t is not x]
    for t in others:
        for ids in _whole(call, t)[0].dims:
            call.freeze(ids, "is what others are compared with")
    if not isinstance(x, Tensor) or call.results()[0].shape != x.shape or any(t.ndim > 1 for t in others):
        return unknown_operation(call)
    return pointwise(call, [x], "lose")


@rule("where")
def _where(call: Call) -> Result:
    values = [t for t in (call.arg("self"), call.arg("other")) if isinstance(t, Tensor)]
    if call.overload not in {"self", "ScalarSelf", "ScalarOther", "Scalar"}:
        return unknown_operation(call)
    numbers = [v for v in (call.arg("self"), call.arg("other")) if not isinstance(v, Tensor)]
    result = pointwise(call, [call.arg("condition"), *values], "lose")
    if all(_is_zero(v) for v in numbers) and values:
        return _where_zero(result, merge(call, [_whole(call, v) for v in values], call.results()[0].shape, "all"))
    return result


@rule("masked_fill")
def _masked_fill(call: Call) -> Result:
    x = call.first()
    result = pointwise(call, [x, call.arg("mask")], "lose")
    labelled = call.of(x)
    if not _is_zero(call.arg("value")) or labelled is None or len(labelled.dims) != len(result.dims):
        return result
    own = zip(result.dims, labelled.dims, strict=True)  # zeros stay zeros where x has them, whatever the mask is
    return Labelled(tuple(d if d is None or x is None else vanishing(d, x > 0) for d, x in own), result.weight)


@rule("copy")
def _copy(call: Call) -> Result:
    target, source = call.first(), call.arg("src")
    shape = call.results()[0].shape
    into, given = (call.of(t) or unlabelled(t.ndim, weight=True) for t in (target, source))
    merged = merge(call, [(given, source.shape), (into, target.shape)], shape, "lose")
    alone = merge(call, [(given, source.shape)], shape, "all")
    dims = tuple(
        m
        if m is None or into_ids is None
        else vanishing(into_ids, a > 0 if a is not None else np.zeros(len(m), dtype=bool))
        for m, a, into_ids in zip(merged, alone, into.dims, strict=True)
    )
    if not given.weight:
        return Labelled(dims, weight=False)
    return Labelled(dims, into.weight)


@rule("_prelu_kernel prelu")
def _prelu(call: Call) -> Result:
    x, slope = call.tensors()
    labelled = [call.of(t) or unlabelled(t.ndim, weight=True) for t in (x, slope)]
    for ids in labelled[1].dims:
        call.labels.mark("carried", ids)
    dims = merge(
        call, [(n, t.shape) for n, t in zip(labelled, (x, slope), strict=True)], call.results()[0].shape, "any"
    )
    own = [None if ids is None or x_ids is None else vanishing(ids, x_ids > 0)
           for ids, x_ids in zip(dims, labelled[0].dims, strict=True)]  # fmt: skip
    return Labelled(tuple(own), labelled[0].weight)


@rule("glu")
def _glu(call: Call) -> Result:
    labelled, axis = call.of(call.first()), call.arg("dim", -1) % call.first().ndim
    assert labelled is not None
    dims = list(labelled.dims)
    ids = dims[axis]
    if ids is not None:
        half = len(ids) // 2
        call.labels.unite(ids[:half], ids[half:])
        dims[axis] = ids[:half]
    return Labelled(tuple(dims), labelled.weight)
