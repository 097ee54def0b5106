"""The tracer's short cuts to shapes give what PyTorch gives, on everything that random networks call them with."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from secateur.tracing.shapes import _SHORTCUTS, quick

from .networks import network, random_spec

NETWORKS = 300


class Both(TorchDispatchMode):
    """Compare every short cut with what PyTorch finds."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = quick(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if isinstance(found, tuple):  # the statistics after the first are nobody's input
            assert looks(found[0]) == looks(out[0]), func
        elif found is not None:
            assert looks(found) == looks(out), func
        self.seen[func] += found is not None
        return out


def looks(tensor):
    strides = [stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]  # others mean nothing
    return tensor.shape, strides, tensor.dtype


def test_short_cuts_give_what_pytorch_gives():
    both = Both()
    for seed in range(NETWORKS):
        model, inputs = network(random_spec(seed))
        given = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, inputs)
        try:
            with both, torch.no_grad():
                model.to("meta")(**given) if isinstance(given, dict) else model(
                    *(given if isinstance(given, tuple) else (given,))
                )
        except (RuntimeError, NotImplementedError):  # it needs values somewhere
            continue
    aten = torch.ops.aten
    rare = {aten.hardtanh.default, aten.hardtanh_.default, aten._safe_softmax.default, aten.cos.default,
            aten.sin.default, aten.exp.default, aten.neg.default, aten.mul.Scalar,
            aten._grouped_mm.default}  # fmt: skip
    assert {func for func, count in both.seen.items() if count} >= set(_SHORTCUTS) - rare


SHAPES = [(3, 4), (1, 4), (4,), (3, 1), (2, 3, 4), (2, 1, 4), (1,), (2, 3, 4, 5), (1, 3, 1, 1), (2, 1, 1, 5), (1, 1)]


def test_on_all_kinds_of_shapes():
    """One operand's shape broadcast over another's, transposed ones, plain numbers."""
    aten = torch.ops.aten
    tensors = [torch.empty(shape, device="meta") for shape in SHAPES]
    tensors += [t.transpose(0, 1) for t in tensors if t.ndim > 1] + [t.transpose(-1, -2) for t in tensors if t.ndim > 2]
    tensors += [torch.empty(2, 8, 4, device="meta")[:, ::2], torch.empty(2, 3, 4, 5, device="meta").permute(0, 3, 1, 2)]
    tensors += [torch.empty(3, 4, device="meta", dtype=torch.int64)]
    both, found = Both(), 0
    with both:
        for x in tensors:
            for function in (aten.rsqrt, aten.cos, aten.sin, aten.exp, aten.neg):
                function(x)
            for dim in range(-x.ndim, x.ndim):
                aten._safe_softmax(x, dim)
            if x.ndim > 1 and x.is_floating_point():
                aten.native_layer_norm(x, [x.shape[-1]], x.new_empty(x.shape[-1]), None, 1e-5)
            for dim in range(-x.ndim, x.ndim):
                if x.is_floating_point():
                    aten._softmax(x, dim, False)
            aten.mul(x, 2.5), aten.mul.Scalar(x, 3), aten.add(x, 1), aten.sub(x, 0.5)
            aten.pow(x, 2), aten.pow(x, 0.5)
            for y in tensors:
                try:
                    torch.broadcast_shapes(x.shape, y.shape)
                except RuntimeError:
                    continue
                aten.add(x, y), aten.mul(x, y), aten.sub(x, y)
        found = sum(both.seen.values())
    assert found > 300
