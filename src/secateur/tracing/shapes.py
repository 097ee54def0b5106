"""Results of the commonest operations on tensors without data, by their shapes alone.

PyTorch computes these shapes too, through layers of Python that take a hundred times longer than the answer. Whatever
is out of the ordinary here (shapes that do not fit, mixed dtypes, broadcasting) is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def quick(func: Any, args: tuple, kwargs: dict) -> Any:
    """The result of an operation on meta tensors, or None if PyTorch should find it."""
    shortcut = _SHORTCUTS.get(func)
    if shortcut is None or kwargs:
        return None
    first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
    if not isinstance(first, Tensor) or not first.is_meta:
        return None
    return shortcut(*args)


def _like(x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    if shape is None:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _plain(x: Tensor) -> bool:
    return x.is_floating_point() and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))


def _dense(x: Tensor) -> bool:
    """Whether its elements lie side by side in some order of its dims, which pointwise operations keep."""
    if not x.is_floating_point():
        return False
    if x.is_contiguous():
        return True
    due = 1
    for stride, n in sorted(zip(x.stride(), x.shape, strict=True)):
        if n != 1 and stride != due:
            return False
        due *= n
    return due > 0


def _unary(x: Tensor, *_: object) -> Tensor | None:
    return _like(x) if _dense(x) else None


def _in_place(x: Tensor, *_: object) -> Tensor | None:
    return x if x.is_floating_point() else None


def _binary(x: Tensor, y: object, *_: object) -> Tensor | None:
    if isinstance(y, (int, float)):
        return _unary(x)
    if not isinstance(y, Tensor) or not y.is_meta or x.dtype != y.dtype or not x.is_floating_point():
        return None
    if x.shape == y.shape:  # where they differ, the first one's order counts
        return _like(x) if _dense(x) and (x.stride() == y.stride() or _dense(y)) else None
    wide, other = (x, y) if x.ndim >= y.ndim else (y, x)
    fits = all(n in (1, w) for n, w in zip(reversed(other.shape), reversed(wide.shape), strict=False))
    return _like(wide, tuple(wide.shape)) if fits and x.is_contiguous() and y.is_contiguous() else None


def _softmax(x: Tensor, dim: int, converts: object = None) -> Tensor | None:
    return (
        _like(x) if x.is_floating_point() and x.is_contiguous() and not converts and -x.ndim <= dim < x.ndim else None
    )


def _power(x: Tensor, exponent: object) -> Tensor | None:
    return _unary(x) if isinstance(exponent, (int, float)) else None


def _binary_in_place(x: Tensor, y: object, *_: object) -> Tensor | None:
    fits = isinstance(y, Tensor) and y.is_meta and x.shape == y.shape and x.dtype == y.dtype
    return x if fits and x.is_floating_point() else None


def _addmm(b: Tensor, x: Tensor, w: Tensor) -> Tensor | None:
    fits = x.ndim == w.ndim == 2 and x.shape[1] == w.shape[0] and b.shape == w.shape[1:]
    same = x.is_meta and w.is_meta and b.dtype == x.dtype == w.dtype and x.is_floating_point()
    return _like(x, (x.shape[0], w.shape[1])) if fits and same else None


def _grouped_mm(x: Tensor, w: Tensor, offsets: Tensor | None = None, *rest: object) -> Tensor | None:
    fits = x.ndim == 2 and w.ndim == 3 and x.shape[1] == w.shape[1] and offsets is not None
    same = w.is_meta and x.dtype == w.dtype and x.is_floating_point() and not any(v is not None for v in rest)
    return _like(x, (x.shape[0], w.shape[2])) if fits and same else None


def _mean(x: Tensor, dims: list[int] | None, keep: bool = False) -> Tensor | None:
    if not dims or not x.is_contiguous() or not x.is_floating_point() or any(not -x.ndim <= d < x.ndim for d in dims):
        return None
    gone = {d % x.ndim for d in dims}
    return _like(x, tuple(1 if d in gone else s for d, s in enumerate(x.shape) if keep or d not in gone))


def _layer_norm(x: Tensor, shape: list[int], w: Tensor | None, b: Tensor | None, _: float) -> tuple | None:
    over = len(shape)
    own = [t for t in (w, b) if t is not None]
    if not x.is_floating_point() or tuple(x.shape[x.ndim - over :]) != tuple(shape):
        return None
    if any(tuple(t.shape) != tuple(shape) or not t.is_meta or t.dtype != x.dtype for t in own):
        return None
    left = (*x.shape[: x.ndim - over], *(1,) * over)
    return _like(x, tuple(x.shape)), _like(x, left), _like(x, left)


def _batch_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    own = [t for t in rest[:4] if isinstance(t, Tensor)]
    if not _plain(x) or x.ndim < 2 or any(t.shape != x.shape[1:2] or not t.is_meta for t in own):
        return None
    return _like(x), _like(x, (0,)), _like(x, (0,))


def _convolution(
    x: Tensor, w: Tensor, b: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Tensor | None:  # fmt: skip
    space = x.ndim - 2
    if transposed or not _plain(x) or not w.is_meta or w.dtype != x.dtype or w.ndim != x.ndim or any(output_padding):
        return None
    if x.shape[1] != w.shape[1] * groups or w.shape[0] % groups or (b is not None and b.shape != w.shape[:1]):
        return None
    size = [x.shape[0], w.shape[0]]
    for d in range(space):
        step, pad, spread = (v[d if len(v) > 1 else 0] for v in (stride, padding, dilation))
        size.append((x.shape[d + 2] + 2 * pad - spread * (w.shape[d + 2] - 1) - 1) // step + 1)
    return _like(x, tuple(size)) if min(size) > 0 else None


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    axis = dim % max(1, first.ndim)
    rest = [s for d, s in enumerate(first.shape) if d != axis]
    for t in tensors:
        if t.ndim != first.ndim or t.dtype != first.dtype or not t.is_meta or not t.is_contiguous():
            return None
        if [s for d, s in enumerate(t.shape) if d != axis] != rest:
            return None
    shape = list(first.shape)
    shape[axis] = sum(t.shape[axis] for t in tensors)
    return _like(first, tuple(shape))


_SHORTCUTS: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten.relu.default: _unary,
    aten.relu_.default: _in_place,
    aten.silu.default: _unary,
    aten.silu_.default: _in_place,
    aten.gelu.default: _unary,
    aten.sigmoid.default: _unary,
    aten.sigmoid_.default: _in_place,
    aten.tanh.default: _unary,
    aten.tanh_.default: _in_place,
    aten.add_.Tensor: _binary_in_place,
    aten.mul_.Tensor: _binary_in_place,
    aten.addmm.default: _addmm,
    aten._grouped_mm.default: _grouped_mm,
    aten.mean.dim: _mean,
    aten.native_layer_norm.default: _layer_norm,
    aten.hardtanh.default: _unary,
    aten.hardtanh_.default: _in_place,
    aten.add.Tensor: _binary,
    aten.sub.Tensor: _binary,
    aten.mul.Tensor: _binary,
    aten.mul.Scalar: _binary,
    aten.rsqrt.default: _unary,
    aten.neg.default: _unary,
    aten.cos.default: _unary,
    aten.sin.default: _unary,
    aten.exp.default: _unary,
    aten.pow.Tensor_Scalar: _power,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _softmax,
    aten.cat.default: _cat,
}
