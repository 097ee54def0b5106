"""What must come back: all of a model's state, and the random states."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("hooks"))


def prepared(model: nn.Module) -> nn.Module:
    """The model with all kinds of state that could be lost: gradients, frozen parameters, hooks, mixed modes."""
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(number % 5))
    next(reversed(list(model.parameters()))).requires_grad_(False)
    first = next(m for m in model.modules() if not list(m.children()))
    first.register_forward_hook(lambda *_: None)
    model.train()
    first.eval()
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All state, copied."""
    tensors = {f"parameter {n}": (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    tensors |= {f"buffer {n}": (id(b), b.detach().clone()) for n, b in model.named_buffers()}
    tensors |= {
        f"gradient {n}": (id(p.grad), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None
    }
    return {
        "tensors": tensors,
        "gradients": {n: p.grad is not None for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: [dict(getattr(m, table)) for table in HOOKS] for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "random": (*python_state(), str(np.random.get_state()), torch.get_rng_state()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
    }


def python_state() -> tuple[Any, ...]:
    """Python's random state; none where annotations are checked while tests run, for that draws from it."""
    return () if "beartype" in sys.modules else random.getstate()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model is as it was afterwards, whatever happens."""
    before = snapshot(model)
    try:
        yield
    finally:
        after = snapshot(model)
        changed = [kind for kind in before if not same(before[kind], after[kind])]
        details = [name for name, value in before["tensors"].items() if not same(value, after["tensors"].get(name))]
        assert not changed, f"{changed} changed: {details}"
