r"""Depthwise-separable bottlenecks: the core of every convolutional bottleneck as a depthwise convolution.

The core ``W[o, k, i]`` (rows, taps, columns) becomes a sum of ``R = min(rows, columns)`` products (arXiv 1905.05934,
appendix on depthwise-separable networks)::

    W[o, k, i]  ~  sum_q  U[o, q] S[k, q] V[i, q]

so that ``V`` goes into the rotation before it, ``U`` into the one after it, and a depthwise convolution with the
kernels ``S`` is left: ``R (in + taps + out)`` weights. Never more than the bottleneck has; not exact in general.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from secateur._internal.checks import check_choice, check_count
from secateur._internal.errors import SecateurError
from secateur._internal.records import add_to_record
from secateur.curvature.layers import CONVOLUTIONS
from secateur.surgery.low_rank.bottleneck import Bottleneck, Rewrite, hollow, put, read, three
from secateur.tracing.graph import fingerprint

SEPARATE = "separate"
HOW = ("cp", "svd")
Parts = tuple[Tensor, Tensor, Tensor]
"""``U`` [rows, R], ``S`` [taps, R], ``V`` [columns, R]."""


def separate(model: nn.Module, how: str = "cp", *, sweeps: int = 100) -> nn.Module:
    """Make the cores of all convolutional bottlenecks depthwise; one that stands at several places stays.

    Args:
        model: what :func:`secateur.eigendamage` returned, before or after fine-tuning; it is left untouched.
        how: ``"cp"``: the best sum of products that alternating least squares find; ``"svd"``: its beginning, from the
            singular vectors of the mean tap alone.
        sweeps: at most so many alternations.

    Returns:
        A new module, which remembers what was done; fine-tune it, for the products are an approximation.

    Raises:
        SecateurError: an unknown ``how``, no convolutional bottleneck in the model, weights that are not finite.
    """
    check_how(how)
    check_count("sweeps", sweeps, 0)
    copied, ranks = copy.deepcopy(model), {}
    for name in separable(model):
        layer: Any = copied.get_submodule(name)
        core = layer.core.weight.detach().double().flatten(2).mT  # [rows, taps, columns]
        if not core.isfinite().all():
            raise SecateurError(
                f"separate: the weights of {name!r} are not finite; go back to a checkpoint before that"
            )
        u, s, v = from_mean_tap(core)
        if how == "cp":
            u, s, v = alternating(core, stirred((u, s, v)), sweeps)
        u, s, v = _balanced(u, s, v)
        made: Any = hollow(layer, u.shape[1], u.shape[1], groups=u.shape[1], rotations=(True, True))
        with torch.no_grad():
            first, middle, last = three(layer)
            enter, leave = (None if m is middle else m.weight.double().flatten(1) for m in (first, last))
            into, out_of = v.mT if enter is None else v.mT @ enter, u if leave is None else leave @ u
            for new, weight in zip(made, (into, s.mT, out_of), strict=True):
                new.weight.copy_(weight.reshape(new.weight.shape))
            if made[2].bias is not None:
                made[2].bias.copy_(last.bias)
                made[2].bias.requires_grad_(last.bias.requires_grad)
        for new, old in zip(made, three(layer), strict=True):
            new.weight.requires_grad_(old.weight.requires_grad)
        copied, ranks[name] = put(copied, name, made), (u.shape[1], u.shape[1])
    if not ranks:
        raise SecateurError(
            "separate: the model has no convolutional bottleneck; make some with eigendamage(...), or leave it as it is"
        )
    return add_to_record(copied, model, {SEPARATE: Rewrite(fingerprint(model), ranks)})


def check_how(how: object) -> None:
    """Raise if there is no such way."""
    check_choice("way to separate", how, HOW)


def replay(model: nn.Module, text: str) -> nn.Module:
    """Do it again on a fresh model; the weights come later.

    Raises:
        SecateurError: damaged data, or another model's.
    """
    copied = copy.deepcopy(model)
    done = read(model, text)
    for name, (rank, _) in done.layers.items():
        layer: Any = dict(copied.named_modules()).get(name)
        if not _separable(layer) or rank != min(layer.core.weight.shape[:2]):
            raise SecateurError(f"the rewrite is damaged: {name!r} cannot become separable of rank {rank}")
        copied = put(copied, name, hollow(layer, rank, rank, groups=rank, rotations=(True, True)))
    return add_to_record(copied, model, {SEPARATE: done})


def separable(model: nn.Module) -> list[str]:
    """The paths of the convolutional bottlenecks that stand at one place only and are not depthwise yet."""
    every = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if _separable(m)]
    return [name for name, layer in every if sum(other is layer for _, other in every) == 1]


def _separable(layer: Any) -> bool:
    return isinstance(layer, Bottleneck) and isinstance(layer.core, CONVOLUTIONS) and layer.core.groups == 1


# -------------------------------------------------------------------------------- a core [rows, taps, columns] in parts


def product(parts: Parts) -> Tensor:
    """The core that the parts stand for, [rows, taps, columns]."""
    return torch.einsum("oq,kq,iq->oki", *parts)


def from_mean_tap(core: Tensor) -> Parts:
    """The best ``S`` for the singular vectors of the mean tap: its diagonal in them."""
    u, _, vt = torch.linalg.svd(core.mean(1), full_matrices=False)
    return u, torch.einsum("oq,oki,qi->kq", u, core, vt), vt.mT


def alternating(core: Tensor, parts: Parts, sweeps: int, tolerance: float = 1e-5) -> Parts:
    """Least squares for each part in turn; the error never grows.

    Args:
        core: [rows, taps, columns], float64.
        parts: where to begin.
        sweeps: at most so many.
        tolerance: stop when a sweep lowers the squared error by less than this part of the core's square.
    """
    u, s, v = parts
    size = core.square().sum()
    error = (core - product(parts)).square().sum()
    for _ in range(sweeps):
        u = torch.einsum("oki,kq,iq->oq", core, s, v) @ _inverse(s, v)
        s = torch.einsum("oki,oq,iq->kq", core, u, v) @ _inverse(u, v)
        v = torch.einsum("oki,oq,kq->iq", core, u, s) @ _inverse(u, s)
        before, error = error, (core - product((u, s, v))).square().sum()
        if before - error <= tolerance * size:
            break
    return u, s, v


def stirred(parts: Parts) -> Parts:
    """The parts with small random ones for products that are zero, which least squares would leave at zero for ever."""
    u, s, v = parts
    size = s.norm(dim=0)
    dead = size <= 1e-6 * size.max()
    source = torch.Generator().manual_seed(0)

    def drawn(part: Tensor) -> Tensor:
        return torch.randn(part.shape, generator=source, dtype=part.dtype).to(part.device) / part.shape[0] ** 0.5

    return (
        torch.where(dead, drawn(u), u),
        torch.where(dead, 0.01 * size.max() * drawn(s), s),
        torch.where(dead, drawn(v), v),
    )


def _inverse(a: Tensor, b: Tensor) -> Tensor:
    """Of the Gram matrix of the products of columns: ``(a^T a) * (b^T b)``."""
    return torch.linalg.pinv((a.mT @ a) * (b.mT @ b), hermitian=True, rtol=1e-12)


def _balanced(*parts: Tensor) -> Parts:
    """The same products with equally long columns in all parts, so that fine-tuning finds none stiffer."""
    norms = [part.norm(dim=0) for part in parts]
    each = (norms[0] * norms[1] * norms[2]).pow(1 / 3)
    u, s, v = (part * (each / norm.clamp_min(1e-300)) for part, norm in zip(parts, norms, strict=True))
    return u, s, v
