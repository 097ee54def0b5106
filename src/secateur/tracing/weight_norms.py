"""Weight norm, ``w = g v / |v|``, whose directions lose positions: what stays of ``w`` is what it was.

The norm of a direction ``v`` is taken over its kept positions only, once it is cut. So ``g`` becomes ``g |v'| / |v|``:
exactly the same weight, as a weight norm of its own that can be trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightNorm:
    """How a weight is normalised.

    Attributes:
        direction: the name of the parameter ``v`` [any shape].
        dim: of which each position has a norm of its own.
    """

    direction: str
    dim: int


def rescale(length: Tensor, direction: Tensor, before: Tensor, dim: int) -> None:
    """Keep the weight as it was, in place.

    A direction that has become zero gets ones, and the length 0: it has none to be normalised by.

    Args:
        length: ``g``, as many as the direction has positions along ``dim``; it is changed.
        direction: ``v`` without what it has lost.
        before: ``v`` before that, with the same positions along ``dim``.
        dim: of which each position has a norm of its own.
    """
    with torch.no_grad():
        now, was = _norm(direction, dim), _norm(before, dim)
        length.mul_((now / was).to(length.dtype).reshape(length.shape))
        gone = (now == 0) & (was > 0)
        direction.add_(gone.to(direction.dtype).reshape([-1 if d == dim else 1 for d in range(direction.ndim)]))


def _norm(direction: Tensor, dim: int) -> Tensor:
    others = [d for d in range(direction.ndim) if d != dim]
    return torch.linalg.vector_norm(direction.double(), dim=others) if others else direction.double().abs()
