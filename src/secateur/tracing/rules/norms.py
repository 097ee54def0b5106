"""How labels flow through norms: what they hold lives and dies with what they normalise."""

from __future__ import annotations

import numpy as np
from torch import nn

from secateur.tracing.call import Call, Result
from secateur.tracing.labels import Dim, Labelled, NormUse, lasting, vanishing
from secateur.tracing.rules.table import rule
from secateur.tracing.weight_norms import WeightNorm


def _affine(call: Call, ids: Dim, *, zero: bool) -> Dim:
    """Unite a normalised dim with the norm's own tensors; zero: whether the plain normalised value vanishes."""
    scale = bias = None
    for argument in ("weight", "bias", "running_mean", "running_var"):
        tensor = call.arg(argument)
        labelled = call.of(tensor)
        if labelled is None:
            continue
        own = labelled.dims[0]
        if ids is None or own is None:
            call.freeze(own, "normalises fixed positions")
            call.freeze(ids, "is normalised by fixed positions")
            continue
        call.labels.unite(ids, own)
        if labelled.weight:
            call.labels.mark("carried" if argument.startswith("running") else "producer", own)
        if argument == "weight":
            scale = own
        if argument == "bias":
            bias = own
    if ids is None:
        return None
    vanishes = scale > 0 if scale is not None else (ids > 0) & zero
    return vanishing(ids, vanishes if bias is None else vanishes & (bias > 0))


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm _batch_norm_with_update _batch_norm_no_update"
)
def _batch_norm(call: Call) -> Result:
    labelled = call.of(call.arg("input"))
    assert labelled is not None
    for d, ids in enumerate(labelled.dims):
        if d != 1:
            call.labels.approximate(ids, "batch norm takes its statistics over it")
    (path, module), ids = call.at_work(), labelled.dims[1]
    if isinstance(module, nn.modules.batchnorm._NormBase) and ids is not None:
        bare = not [*module.parameters(), *module.buffers()]  # nothing else of it tells how many channels there are
        if bare and len(ids) % module.num_features == 0:  # an instance norm has those of all examples side by side
            call.labels.met.append((path, "num_features", ids[: module.num_features]))
    own_statistics = call.arg("running_mean") is None or bool(call.arg("training", default=False))
    dims = [lasting(ids) for ids in labelled.dims]
    return [Labelled((dims[0], _affine(call, labelled.dims[1], zero=own_statistics), *dims[2:]), labelled.weight)]


@rule("_weight_norm_interface")
def _weight_norm(call: Call) -> Result:
    # w = g v / |v|: a channel along the norm's dim is zero with g, and v must not be zero there
    v, g = call.of(call.arg("v")), call.of(call.arg("g"))
    assert v is not None and g is not None
    dim = call.arg("dim") % len(v.dims)
    length, direction = g.dims[dim], v.dims[dim]
    if length is None or direction is None:
        call.freeze(length, "multiplies fixed positions")
        call.freeze(direction, "is multiplied by fixed positions")
        length = None
    else:
        call.labels.unite(length, direction)
        call.labels.mark("carried", direction)
    for d, ids in enumerate(g.dims):
        if d != dim:
            call.freeze(ids, "kernel position")
    lost = [ids for d, ids in enumerate(v.dims) if d != dim and ids is not None]
    if lost:
        lengths, directions = call.name_of(call.arg("g")), call.name_of(call.arg("v"))
        if lengths is not None and directions is not None:
            call.labels.weight_norms.append((lengths, WeightNorm(directions, dim)))
        else:
            for ids in lost:
                call.labels.approximate(ids, "weight norm takes its statistics over it")
    dims = tuple(length if d == dim else ids for d, ids in enumerate(v.dims))
    norms = tuple(lasting(length) if d == dim else None for d in range(len(v.dims)))
    return [Labelled(dims, v.weight and g.weight), Labelled(norms, v.weight)]


@rule("native_layer_norm _fused_rms_norm")
def _layer_norm(call: Call) -> Result:
    labelled = call.of(call.arg("input"))
    assert labelled is not None
    over = len(call.arg("normalized_shape"))
    kind = "layer norm" if call.base == "native_layer_norm" else "root-mean-square norm"
    dims = [*labelled.dims]
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
                call.labels.unite(ids, own)
                call.labels.mark("producer", own)
        if ids is not None:
            if not exact_norm(call, ids, over):
                call.labels.approximate(ids, f"{kind} takes its statistics over it")
            keeps = scale or kind != "layer norm"
            dims[-back] = vanishing(ids, np.full(len(ids), keeps))
    if tensors[1] is not None:
        dims[: len(dims) - over] = [lasting(ids) for ids in dims[: len(dims) - over]]
    return [Labelled(tuple(dims), labelled.weight)]


def exact_norm(call: Call, ids: np.ndarray, over: int = 1) -> bool:
    """Whether the module whose forward runs is a norm that can be cut exactly; that it is met is noted then.

    What it computes without a channel is right only where the channel is zero.
    """
    path, _ = call.at_work()
    norm = call.labels.norm_at.get(path) if over == 1 else None
    if norm is None or norm.width < len(ids):
        return False
    for given in call.labels.entering.get(path, ()):
        if np.array_equal(np.abs(given), np.abs(ids)):
            call.labels.read(given, norm.kind)
    call.labels.norms.append(NormUse(path, norm, ids))
    return True


@rule("native_group_norm")
def _group_norm(call: Call) -> Result:
    labelled, groups = call.of(call.arg("input")), call.arg("group")
    assert labelled is not None
    for d, ids in enumerate(labelled.dims):
        if d != 1:
            call.freeze(ids, "group norm takes its statistics over it")
    ids = labelled.dims[1]
    if ids is not None and groups < len(ids):
        path, module = call.at_work()
        call.labels.grouped.append((ids, groups, path if isinstance(module, nn.GroupNorm) else None))
    out = _affine(call, ids, zero=ids is not None and groups == len(ids))
    return [Labelled((None, out, *(None,) * (len(labelled.dims) - 2)), labelled.weight)]
