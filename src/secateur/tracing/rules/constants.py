"""Labels of tensors that are made of nothing."""

from __future__ import annotations

from secateur.tracing.call import Call, Result
from secateur.tracing.labels import Labelled, lasting, unlabelled
from secateur.tracing.rules.table import rule


@rule(
    "zeros ones full empty new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like scalar_tensor"
)
def _constant(call: Call) -> Result:
    """A tensor filled with one value has no positions of its own: it takes the labels it meets."""
    out = call.results()[0]
    dims = [call.labels.fresh(n) if n > 1 else None for n in out.shape]
    if call.base not in {"zeros", "new_zeros", "zeros_like"}:
        return Labelled(tuple(lasting(ids) for ids in dims), weight=True)
    return Labelled(tuple(dims), weight=True, zero=True)


@rule("arange linspace eye randn rand randint randperm tril_indices triu_indices")
def _numbers(call: Call) -> Result:
    return unlabelled(call.results()[0].ndim, weight=True)
