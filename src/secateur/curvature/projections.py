"""The projections of ``nn.MultiheadAttention`` as modules that run, for as long as somebody wants to look at them.

PyTorch's attention multiplies by its weights itself, past its ``out_proj``, and those of queries, keys and values are
one parameter of its own. :class:`secateur.tracing.attentions.HeadAttention` computes the same from its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.tracing.attentions import IN_PROJECTION, HeadAttention, attentions_of


class InProjection(nn.Linear):
    """Queries, keys and values of an input, by the attention's own ``in_proj_weight`` and ``in_proj_bias``."""

    def __init__(self, attention: Any) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = attention.in_proj_weight.shape
        self.weight, self.bias = attention.in_proj_weight, attention.in_proj_bias


@contextmanager
def projections(model: nn.Module) -> Iterator[None]:
    """Let attention run ``out_proj`` and, where queries, keys and values are of one width, ``in_proj`` as modules.

    What is no query, key and value at once goes through all of ``in_proj``, for each of its parts that it is. The
    attention's parameters keep their names; after this everything is as it was. Hooks on ``out_proj`` run meanwhile.
    """
    opened: list[Any] = []
    kinds = [(part, type(part)) for part in map(model.get_submodule, attentions_of(model))]
    try:
        for part, _ in kinds:
            part.__class__ = HeadAttention
            if part._parameters.get("in_proj_weight") is not None and IN_PROJECTION not in part._modules:
                part._modules[IN_PROJECTION] = InProjection(part)
                opened.append(part)
        yield
    finally:
        for part in opened:
            del part._modules[IN_PROJECTION]
        for part, kind in kinds:
            part.__class__ = kind
