"""What a layer's outputs are added to, as in every residual block: seen in a forward, whatever the model's Python is.

In ``s = u + v`` what matters is the sum. Where ``u`` is, channel by channel, ``a y + b`` of the outputs ``y`` of the
layer that ran last (a batch norm or a scale is between them, or nothing), all of ``v`` is known when the layer is
fitted, and what is missing in it can be asked of the layer: ``y + (v - v') / a`` in place of ``y``. Due to arXiv
1707.06168, section 3.3, for residual blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

EXACT = 1e-3
"""So much of ``u`` may be missing in ``a y + b``, of its spread (half precision has less)."""
TINY = 1e-3
"""A channel that counts less, in parts of the one that counts most, is not asked for what is missing elsewhere."""

ADDING = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
ADDING_IN_PLACE = {torch.Tensor.add_, torch.Tensor.__iadd__}


@dataclass(frozen=True, eq=False)
class Added:
    """Where the outputs of a layer are added to something.

    Attributes:
        number: which sum of two tensors of its shape it is, after the layer ran.
        side: which of the two operands is made of the layer's outputs.
        factor: ``a``, float64 [groups, rows].
        shift: ``b``, likewise.
        norm: the path of the batch norm between them, if there is one.
    """

    number: int
    side: int
    factor: Tensor
    shift: Tensor
    norm: str | None

    @property
    def asked(self) -> Tensor:
        """Which rows count enough in the sum to be asked for what is missing in the other operand."""
        return self.factor.abs() > TINY * self.factor.abs().max()


class Sums(TorchFunctionMode):
    """Tells of each sum of two tensors of one shape, before it is computed; what is told may put others in their place.

    Args:
        reached: called with both operands; returns them, or others, of which the sum is computed then.
        made: called with whatever any other function returns.
    """

    def __init__(
        self, reached: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], made: Callable[[Any], None] | None = None
    ) -> None:
        super().__init__()
        self.reached, self.made = reached, made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func in ADDING or func in ADDING_IN_PLACE) and _is_sum(args, kwargs):
            first, second = self.reached(*args)
            if first is not args[0] and func in ADDING_IN_PLACE:
                args[0].copy_(first)
                first = args[0]
            args = (first, second)
        found = func(*args, **kwargs)
        if self.made is not None:
            self.made(found)
        return found


def _is_sum(args: Any, kwargs: Any) -> bool:
    return (
        not kwargs
        and len(args) == 2
        and all(isinstance(t, Tensor) and t.is_floating_point() for t in args)
        and args[0].shape == args[1].shape
        and args[0].ndim > 1
    )


def affine(y: Tensor, u: Tensor) -> tuple[Tensor, Tensor] | None:
    """``a`` and ``b`` with ``u = a y + b`` row by row; None where it is something else.

    Args:
        y: samples, [groups, samples, rows].
        u: likewise.
    """
    y, u = y.double(), u.double()
    if y.shape != u.shape or y.shape[1] < 3 or not (y.isfinite().all() and u.isfinite().all()):
        return None
    y_mean, u_mean = y.mean(1, keepdim=True), u.mean(1, keepdim=True)
    energy = (y - y_mean).square().sum(1)
    a = ((y - y_mean) * (u - u_mean)).sum(1) / energy.clamp(min=1e-300)
    a = torch.where(energy > 1e-20 * y.square().sum(1), a, 0.0)  # what is constant tells nothing
    b = u_mean[:, 0] - a * y_mean[:, 0]
    missing = (u - a[:, None] * y - b[:, None]).norm()
    if not a.any() or missing > EXACT * (u - u_mean).norm():
        return None
    return a, b
