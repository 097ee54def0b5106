"""How labels flow through reductions, softmax, pooling and resampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from secateur.tracing.call import Call, Result, merge
from secateur.tracing.labels import Dim, Labelled, lasting, unlabelled, vanishing
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


@rule("sum nansum count_nonzero")
def _sum(call: Call) -> Result:
    return _reduce(call, _summed(call), keeps=True)


@rule("mean nanmean amax amin aminmax var std var_mean std_mean prod logsumexp")
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
    order = call.arg("ord", call.arg("p"))
    if order is not None and not order > 0:  # the smallest value
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


@rule("sort argsort msort topk kthvalue mode cumsum cumprod cummax cummin _cummax_helper _cummin_helper logcumsumexp")
def _ordered(call: Call) -> Result:
    """Positions along a dim are put in order, or added up one after the other: other dims pass."""
    labelled, ndim = call.of(call.first()), call.first().ndim
    assert labelled is not None
    axis = call.arg("dim", 0 if call.base == "msort" else -1) % max(1, ndim)
    dims = list(labelled.dims)
    if ndim:
        call.freeze(dims[axis], "is put in order")
        dims[axis] = None
        if call.base in {"kthvalue", "mode"} and not call.arg("keepdim", default=False):
            del dims[axis]
    values = Labelled(tuple(dims), labelled.weight)
    places = Labelled(tuple(lasting(ids) for ids in dims), labelled.weight)
    if call.base in {"argsort", "logcumsumexp"}:
        return [places]
    return [values, places][: len(call.results())]


@rule("tril triu")
def _triangle(call: Call) -> Result:
    labelled = call.of(call.first())
    assert labelled is not None
    for ids in labelled.dims[-2:]:
        call.freeze(ids, "is kept or not by its place")
    return Labelled((*labelled.dims[:-2], None, None), labelled.weight, zero=labelled.zero)


@rule("_softmax _log_softmax softmax log_softmax _safe_softmax")
def _softmax(call: Call) -> Result:
    labelled = call.of(call.first())
    assert labelled is not None
    axis = call.arg("dim") % max(1, call.first().ndim)
    call.labels.approximate(labelled.dims[axis], "softmax is taken over it")
    return Labelled(tuple(lasting(ids) for ids in labelled.dims), labelled.weight)


@rule("grid_sampler_2d grid_sampler_3d grid_sampler")
def _grid_sampler(call: Call) -> Result:
    x, grid = call.of(call.arg("input")), call.of(call.arg("grid"))
    assert x is not None and grid is not None
    for ids in x.dims[2:]:
        call.freeze(ids, "is a spatial position")
    for ids in grid.dims:
        call.freeze(ids, "says where values are taken from")
    return Labelled((x.dims[0] if grid.dims[0] is None else None, x.dims[1], *(None,) * (len(x.dims) - 2)), x.weight)


@rule("affine_grid_generator")
def _affine_grid(call: Call) -> Result:
    call.freeze_all("says where values are taken from")
    return unlabelled(call.results()[0].ndim, weight=False)


@rule("max_unpool2d max_unpool3d")
def _max_unpool(call: Call) -> Result:
    count = 2 if call.base == "max_unpool2d" else 3
    x, places = call.first(), call.arg("indices")
    both = [call.of(x), call.of(places)]
    dims = merge(call, [(n, t.shape) for n, t in zip(both, (x, places), strict=True) if n is not None], x.shape, "any")
    for ids in dims[-count:]:
        call.freeze(ids, "is a spatial position")
    kept = both[0].dims if both[0] is not None else dims
    own = (d if d is None or k is None else vanishing(d, k > 0) for d, k in zip(dims, kept, strict=True))
    return Labelled((*tuple(own)[:-count], *(None,) * count), weight=False)


def _spatial(call: Call, count: int) -> Result:
    labelled = call.of(call.first())
    assert labelled is not None
    for ids in labelled.dims[-count:]:
        call.freeze(ids, "is a spatial position")
    result = Labelled((*labelled.dims[:-count], *(None,) * count), labelled.weight)
    return [result] * len(call.results())


for _n, _spaces in enumerate(("1d", "2d", "3d"), start=1):
    for _name in (
        f"avg_pool{_spaces} max_pool{_spaces} max_pool{_spaces}_with_indices "
        f"adaptive_avg_pool{_spaces} adaptive_max_pool{_spaces} upsample_nearest{_spaces} "
        f"_upsample_nearest_exact{_spaces} "
        f"reflection_pad{_spaces} replication_pad{_spaces}"
    ).split():
        RULES[_name] = lambda call, count=_n: _spatial(call, count)  # type: ignore[misc]
for _n in (2, 3):
    RULES[f"_adaptive_avg_pool{_n}d"] = lambda call, count=_n: _spatial(call, count)  # type: ignore[misc]
    RULES[f"fractional_max_pool{_n}d"] = lambda call, count=_n: _spatial(call, count)  # type: ignore[misc]
RULES["upsample_linear1d"] = lambda call: _spatial(call, 1)
for _name in ["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]:
    RULES[_name] = lambda call: _spatial(call, 2)
RULES["upsample_trilinear3d"] = lambda call: _spatial(call, 3)
