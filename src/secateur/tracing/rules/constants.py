"""Labels of tensors that are made of nothing."""

from __future__ import annotations

from dataclasses import replace

from secateur.tracing.call import Call, Result
from secateur.tracing.labels import Labelled, lasting, unlabelled
from secateur.tracing.rules.table import rule


@rule(
    "zeros ones full empty scalar_tensor new_zeros new_ones new_full new_empty "
    "empty_strided empty_permuted new_empty_strided"
)
def _constant(call: Call) -> Result:
    """A tensor filled with one value has no positions of its own: it takes the labels it meets."""
    out = call.results()[0]
    dims = [call.labels.fresh(n) if n > 1 else None for n in out.shape]
    if not call.base.endswith("zeros"):
        return Labelled(tuple(lasting(ids) for ids in dims), weight=True)
    return Labelled(tuple(dims), weight=True, zero=True)


@rule("zeros_like ones_like full_like empty_like")
def _constant_like(call: Call) -> Result:
    """It has the positions of what it is like, but nothing of a single one."""
    x = call.first()
    zero, like = call.base == "zeros_like", call.open(x)
    if like.joints and zero:
        return replace(like, zero=True)
    dims = [ids if n > 1 else None for ids, n in zip(call.of(x).dims, x.shape, strict=True)]  # type: ignore[union-attr]
    return Labelled(tuple(dims if zero else map(lasting, dims)), like.weight, free=like.free, zero=zero)


@rule(
    "arange range linspace logspace eye randn rand randint randperm tril_indices triu_indices fft_fftfreq fft_rfftfreq "
    "bartlett_window blackman_window hamming_window hann_window kaiser_window"
)
def _numbers(call: Call) -> Result:
    return unlabelled(call.results()[0].ndim, weight=True)
