"""What a layer's outputs are added to, as in every residual block: seen in a forward, whatever the model's Python is.

In ``s = u + v`` what matters is the sum. Where ``u`` is the outputs ``y`` of the layer that ran last, or a batch norm
of them, ``a y + b`` channel by channel, all of ``v`` is known when the layer is fitted, and what is missing in it can
be asked of the layer: ``y + (v - v') / a`` in place of ``y`` (arXiv 1707.06168, section 3.3, for residual blocks).
Nothing else may read ``y`` (or what the norm makes of it), so that ``v`` does not depend on it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

TINY = 1e-3
"""A channel that counts less, in parts of the one that counts most, is not asked for what is missing elsewhere."""

ADDING = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
ADDING_IN_PLACE = {torch.Tensor.add_, torch.Tensor.__iadd__}


@dataclass(frozen=True, eq=False)
class Added:
    """That the outputs of a layer are added to something.

    Attributes:
        norm: the path of the batch norm between them, if there is one.
        factor: ``a``, float64 [groups, rows].
    """

    norm: str | None
    factor: Tensor

    @property
    def asked(self) -> Tensor:
        """Which rows count enough in the sum to be asked for what is missing in the other operand."""
        return self.factor.abs() > TINY * self.factor.abs().max()


class Sums(TorchFunctionMode):
    """Tells of each sum of two tensors of one shape, before it is computed; what is told may put others in their place.

    Args:
        reached: called with both operands; returns them, or others, of which the sum is computed then.
        ran: called after any function, with it, its arguments and what it returned.
    """

    def __init__(
        self,
        reached: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        ran: Callable[[Any, Any, Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.reached, self.ran = reached, ran

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func in ADDING or func in ADDING_IN_PLACE) and _is_sum(args, kwargs):
            first, second = self.reached(*args)
            if first is not args[0] and func in ADDING_IN_PLACE:
                args[0].copy_(first)
                first = args[0]
            args = (first, second)
        found = func(*args, **kwargs)
        if self.ran is not None:
            self.ran(func, (args, kwargs), found)
        return found


def _is_sum(args: Any, kwargs: Any) -> bool:
    return (
        not kwargs
        and len(args) == 2
        and all(isinstance(t, Tensor) and t.is_floating_point() for t in args)
        and args[0].shape == args[1].shape
        and args[0].ndim > 1
    )


@dataclass(eq=False)
class Outputs:
    """What becomes of the outputs of layers in one forward.

    Attributes:
        summed: called with a layer's name and what its outputs are added to, when that happens.
        added: the norm between, or None, of the layers whose outputs are added to something.
        normed: the batch norm that runs on the outputs of a layer.
        reads: how often the outputs of a layer are read, and what a norm makes of them.
        looked_at: whether what runs is none of the model's doing.
    """

    summed: Callable[[str, str | None, Tensor], None]
    added: dict[str, str | None] = field(default_factory=dict)
    normed: dict[str, str] = field(default_factory=dict)
    reads: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    looked_at: bool = False
    _known: dict[int, tuple[Any, str, str | None, int]] = field(default_factory=dict)
    _name: str = ""
    _norm: str | None = None
    _x: Tensor | None = None
    _version: int = 0
    _y: Tensor | None = None
    _u: Tensor | None = None
    _rows_second: bool = False

    def looking(self, look: Callable[..., None], *given: Any) -> None:
        """Call what looks at tensors of the model; what it reads does not count."""
        self.looked_at = True
        try:
            look(*given)
        finally:
            self.looked_at = False

    def layer_ran(self, name: str, x: Tensor, y: Tensor, rows_second: bool) -> None:
        """A layer has made ``y`` of ``x``; whether its rows are the second dim, as a batch norm's channels are."""
        self.forget()
        self._name, self._x, self._version, self._y, self._u = name, x, x._version, y, y
        self._rows_second = rows_second
        self._know(y, None)

    def norm_runs(self, name: str, x: Any) -> None:
        """A batch norm is about to run."""
        if self._norm is None and x is self._y and self._rows_second:
            self._norm = self.normed[self._name] = name
        else:
            self.forget()

    def norm_ran(self, name: str, z: Any) -> None:
        """It has run."""
        if self._norm == name and isinstance(z, Tensor):
            self._u = z
            self._know(z, name)

    def reached(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """A sum is about to be computed."""
        if self._u is not None and self._x is not None and self._x._version == self._version:
            for u, v in ((first, second), (second, first)):
                if u is self._u:
                    self.added[self._name] = self._norm
                    self.summed(self._name, self._norm, v)
                    break
        return first, second

    def ran(self, func: Any, given: Any, found: Any) -> None:
        """A function has run: what it reads is counted."""
        if self.looked_at:
            return
        made = [t for t in tree_iter(found) if isinstance(t, Tensor)]
        if not made and func is not torch.Tensor.__setitem__:
            return  # a shape, or a number
        for t in tree_iter(given):
            known = self._known.get(id(t)) if isinstance(t, Tensor) else None
            if known is None or known[0]() is not t:
                continue
            if t._version == known[3] and any(t is one for one in made):
                continue  # it is handed through, as by dropout
            self.reads[known[1:3]] += 1
            if func in ADDING_IN_PLACE and t is given[0][0]:
                del self._known[id(t)]  # from now on it is the sum

    def forget(self) -> None:
        """Something else has run than what is between the last layer and a sum."""
        self._norm, self._x, self._y, self._u = None, None, None, None

    def read_elsewhere(self) -> set[str]:
        """The layers whose outputs, or what a norm makes of them, are read more than once."""
        return {name for (name, _), times in self.reads.items() if times > 1}

    def _know(self, t: Tensor, norm: str | None) -> None:
        self._known[id(t)] = (weakref.ref(t), self._name, norm, t._version)
