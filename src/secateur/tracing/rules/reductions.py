"""How labels flow through reductions, softmax, pooling and resampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from secateur.tracing.call import Call, Result
from secateur.tracing.labels import Dim, Labelled, lasting
from secateur.tracing.rules.norms import exact_norm
from secateur.tracing.rules.pointwise import pointwise
from secateur.tracing.rules.table import RULES, rule, unknown_operation


def _axes(call: Call) -> set[int]:
    ndim = call.first().ndim
    dim = call.arg("dim")
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return set(range(ndim))
    return {d % ndim for d in (dim if isinstance(dim, (list, tuple)) else (dim,))} if ndim else set()


def _reduce(call: Call, reduced: Callable[[Dim], None], *, keeps: bool) -> Labelled:
    labelled = call.of(call.first())
    assert labelled is not None
    axes, keep = _axes(call), bool(call.arg("keepdim", default=False))
    dims: list[Dim] = []
    for d, ids in enumerate(labelled.dims):
        if d in axes:
            reduced(ids)
            dims += [None] if keep else []
        else:
            dims.append(ids if keeps else lasting(ids))
    return Labelled(tuple(dims), labelled.weight)


def _summed(call: Call) -> Callable[[Dim], None]:
    """What a sum over a dim means: exact where zero producers mean zero terms, which no weight's inputs promise."""
    labelled = call.of(call.first())
    if labelled is not None and labelled.weight:
        return lambda ids: call.labels.approximate(ids, f"{call.op} of a weight is taken over it")

    def taken(ids: Dim) -> None:
        if ids is not None and not ((ids < 0).any() and exact_norm(call, ids)):
            call.labels.read(ids, call.op)

    return taken


@rule("sum")
def _sum(call: Call) -> Result:
    return _reduce(call, _summed(call), keeps=True)


@rule("mean amax amin var std var_mean std_mean prod logsumexp")
def _statistics(call: Call) -> Result:
    reason = f"{call.base} is taken over it"
    keeps = call.base not in {"logsumexp"}
    owed: list[Callable[[], None]] = []  # the mean over heads of attention's weights is seldom looked at

    def taken(ids: Dim) -> None:
        if ids is not None and not (call.base == "mean" and exact_norm(call, ids)):
            owed.append(partial(call.labels.approximate, ids, reason))

    labelled = replace(_reduce(call, taken, keeps=keeps), owed=tuple(owed))
    return [labelled] * len(call.results()) if len(call.results()) > 1 else labelled


@rule("linalg_vector_norm norm")
def _norm(call: Call) -> Result:
    if call.arg("ord", call.arg("p")) not in {None, 1, 2, float("inf")}:
        return unknown_operation(call)
    return _reduce(call, _summed(call), keeps=True)


@rule("any all argmax argmin max min median")
def _selects(call: Call) -> Result:
    if len(call.tensors()) > 1 or call.arg("dim") is None:
        return pointwise(call, call.tensors(), "all") if len(call.tensors()) > 1 else unknown_operation(call)

    def searched(ids: Dim) -> None:
        call.freeze(ids, "is searched for an extreme")

    places = _reduce(call, searched, keeps=False)
    if len(call.results()) == 1:
        return [places]
    return [_reduce(call, searched, keeps=True), places]  # the extreme of zeros is zero, where it stands is not


@rule("_softmax _log_softmax softmax log_softmax _safe_softmax")
def _softmax(call: Call) -> Result:
    labelled = call.of(call.first())
    assert labelled is not None
    axis = call.arg("dim") % max(1, call.first().ndim)
    call.labels.approximate(labelled.dims[axis], "softmax is taken over it")
    return Labelled(tuple(lasting(ids) for ids in labelled.dims), labelled.weight)


def _spatial(call: Call, count: int) -> Result:
    labelled = call.of(call.first())
    assert labelled is not None
    for ids in labelled.dims[-count:]:
        call.freeze(ids, "is a spatial position")
    result = Labelled((*labelled.dims[:-count], *(None,) * count), labelled.weight)
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
