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
    return tensor.shape, tensor.stride(), tensor.dtype


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
    rare = {torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default}
    assert {func for func, count in both.seen.items() if count} >= set(_SHORTCUTS) - rare
