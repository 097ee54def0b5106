"""Norms over channels of which some are gone, exactly: what is left is normalised as it was beside zeros.

A norm takes its statistics over ``d`` channels. Where the removed ones are zero, these are functions of the ``k`` that
stay, if ``d`` is remembered:

- A root-mean-square norm, ``w x / sqrt(sum(x^2)/d + e)``, is one over ``k`` channels with the weight ``w sqrt(d/k)``
  and ``e d/k``. The module stays, with other values. Its class does not matter, nor who wrote it: a module is one if
  it computes, tried on random numbers, what it should.
- A layer norm needs ``mu = sum(x)/d`` and ``var = (sum((x - mu)^2) + (d - k) mu^2)/d``, which :class:`NarrowLayerNorm`
  computes in its place.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from secateur.tracing.attentions import without_fused_kernel

LAYER, ROOT_MEAN_SQUARE = KINDS = ("layer norm", "root-mean-square norm")


@dataclass(frozen=True)
class Norm:
    """What a norm needs to be cut exactly.

    Attributes:
        kind: ``"layer norm"`` or ``"root-mean-square norm"``.
        width: the number of channels that its statistics are taken over, those that are gone among them.
        eps: the attribute that holds its epsilon (root-mean-square norms).
        offset: what is added to its weight (1 where it is learnt as a difference from 1).
        dim: of its inputs, along which the channels are: the last, or 1 as in feature maps (layer norms).
    """

    kind: str
    width: int
    eps: str = ""
    offset: float = 0.0
    dim: int = -1


class NarrowLayerNorm(nn.LayerNorm):
    """A layer norm over some of its channels, where the others are zero; :func:`narrow` makes it of a layer norm.

    Attributes:
        width: over how many channels its statistics are taken, those that are zero among them.
        dim: along which the channels are, -1 or 1.
    """

    width: int
    dim: int

    def forward(self, x: Tensor) -> Tensor:
        """The outputs [..., channels] for inputs [..., channels], or both [examples, channels, ...]."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = wide.sum(self.dim, keepdim=True) / self.width
        centred = wide - mean
        gone = self.width - x.shape[self.dim]
        variance = (centred.square().sum(self.dim, keepdim=True) + gone * mean.square()) / self.width
        y = (centred * torch.rsqrt(variance + self.eps)).to(x.dtype)
        shape = (-1,) if self.dim == -1 else (-1,) + (1,) * (x.ndim - 2)
        y = y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)

    def extra_repr(self) -> str:
        """What ``repr`` shows of it."""
        return f"{len(self.weight)} of {self.width}, eps={self.eps}{', dim=1' * (self.dim == 1)}"


def norm_of(module: nn.Module | None) -> Norm | None:
    """What kind of norm a module is, if it is one that can be cut exactly.

    Args:
        module: any module; its parameters may be without data.
    """
    if module is None or next(module.children(), None) is not None:
        return None
    if isinstance(module, NarrowLayerNorm):
        return Norm(LAYER, module.width, dim=module.dim)
    if type(module) is nn.LayerNorm:
        plain = len(module.normalized_shape) == 1 and module.weight is not None
        return Norm(LAYER, module.normalized_shape[0]) if plain else None
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        return None
    weights = dict(module.named_parameters(recurse=False))
    if "weight" not in weights or not weights.keys() <= {"weight", "bias"} or [*module.buffers()]:
        return None
    if any(w.ndim != 1 or len(w) != len(weights["weight"]) for w in weights.values()):
        return None
    width = len(weights["weight"])
    known = _TRIED.setdefault(type(module), {})
    own = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool, type(None)))}
    settings = repr(sorted(own.items(), key=lambda item: item[0]))  # another instance may be told to do otherwise
    for name, value in vars(module).items():
        if type(value) is float and 0 < value < 1:
            kinds = [Norm(LAYER, width, name, dim=dim) for dim in (-1, 1)]
            if "bias" not in weights:
                kinds = [*(Norm(ROOT_MEAN_SQUARE, width, name, offset) for offset in (0.0, 1.0)), *kinds]
            for norm in kinds:
                if (norm, settings) not in known:
                    known[norm, settings] = width > 1 and _holds(module, norm)
                if known[norm, settings]:
                    return norm
    return None


_TRIED: WeakKeyDictionary[type, dict[tuple[Norm, str], bool]] = WeakKeyDictionary()


def norms_of(model: nn.Module) -> dict[str, Norm]:
    """All norms of a model that can be cut exactly, by their paths."""
    found = ((path, norm_of(module)) for path, module in model.named_modules())
    return {path: norm for path, norm in found if norm is not None}


def _holds(module: nn.Module, norm: Norm) -> bool:
    """Whether a module is such a norm: cut, it gives on random numbers what it gives beside zeros."""
    for dtype in (torch.float64, torch.float32):  # one that casts may know no other than the latter
        with contextlib.suppress(Exception):  # it is no norm: whatever it raises says so
            return _holds_in(dtype, module, norm)
    return False


def _holds_in(dtype: torch.dtype, module: nn.Module, norm: Norm) -> bool:
    generator = torch.Generator().manual_seed(0)
    weights = [name for name, _ in module.named_parameters(recurse=False)]
    drawn = {n: torch.randn(norm.width, generator=generator, dtype=dtype) for n in weights}
    whole = _double(module, drawn)
    x = torch.randn(3, norm.width, generator=generator, dtype=dtype)
    kept = torch.arange(norm.width)[:: 2 if norm.width > 2 else norm.width]
    zeros = torch.zeros_like(x)
    zeros[:, kept] = x[:, kept]
    small_values = math.sqrt(getattr(module, norm.eps))  # where epsilon counts
    x[0], zeros[0] = x[0] * small_values, zeros[0] * small_values
    small = _double(module, {n: w[kept] for n, w in drawn.items()})
    narrow(small, norm)
    around = norm.kind == LAYER and norm.dim == 1
    if norm.kind == LAYER:  # along the last of three dims, or the second of four, so that no other one is meant
        x, zeros = (t.reshape(1, 3, -1).repeat(2, 1, 1) for t in (x, zeros))
        x, zeros = (t.transpose(1, 2)[..., None].repeat(1, 1, 1, 2) if around else t for t in (x, zeros))
    axis = 1 if around or norm.kind != LAYER else -1
    with torch.no_grad():
        expected, found = whole(zeros).index_select(axis, kept), small(x.index_select(axis, kept))
        loose = 1.0 if dtype == torch.float64 else 10.0
        return bool(torch.allclose(expected, found.to(expected.dtype), rtol=1e-5 * loose, atol=1e-6 * loose))


def _double(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy with these weights, on the CPU."""
    memo: dict[int, Any] = {id(getattr(module, name)): nn.Parameter(w.clone()) for name, w in weights.items()}
    copied = copy.deepcopy(module, memo)
    width = len(weights["weight"])
    for name, value in vars(copied).items():  # normalized_shape, and what else says how many channels there are
        if value in ((len(module.weight),), len(module.weight)) and type(value) in (int, tuple):  # type: ignore[arg-type]
            setattr(copied, name, (width,) if isinstance(value, tuple) else width)
    return copied


def narrow(module: nn.Module, norm: Norm) -> None:
    """Let a norm whose tensors have been cut go on as what it was, in place, so that whoever holds it holds that.

    Args:
        module: the norm: it gets other values, or a layer norm the class :class:`NarrowLayerNorm`.
        norm: what it was.
    """
    if norm.kind == LAYER:
        module.eps = getattr(module, norm.eps or "eps")
        module.width, module.dim = norm.width, norm.dim  # type: ignore[assignment]
        if not hasattr(module, "bias"):
            module.register_parameter("bias", None)
        module.__class__ = NarrowLayerNorm
        return
    ratio = norm.width / len(module.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        module.weight.add_(norm.offset).mul_(math.sqrt(ratio)).sub_(norm.offset)  # type: ignore[operator]
    setattr(module, norm.eps, getattr(module, norm.eps) * ratio)


def narrow_all(model: nn.Module, norms: Mapping[str, Norm]) -> None:
    """Narrow the norms of a model whose tensors have been cut, in place."""
    for path, norm in norms.items():
        narrow(model.get_submodule(path), norm)
        holder = model.get_submodule(path.rpartition(".")[0])
        if norm.kind == LAYER and isinstance(holder, nn.TransformerEncoderLayer):
            without_fused_kernel(holder)
