"""Ways to run a model for a while; its modes, buffers and the random state come back as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients."""
    with _as_it_was(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Eval mode, but batch norms use the batch's statistics."""
    with _as_it_was(model):
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.train()
        yield


def random_state() -> Callable[[], None]:
    """What sets the random states of Python, NumPy and PyTorch on the CPU as they are now."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)

    return back


@contextmanager
def random_kept(model: nn.Module) -> Iterator[None]:
    """The random states of Python, NumPy and PyTorch (of the model's devices too) come back as they were."""
    devices, back = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}), random_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        back()


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer) and not buffer.is_meta
    ]
    try:
        with random_kept(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before in buffers:  # a forward may write into one, or put another in its place
                if not torch.equal(buffer, before):  # what is not touched is not written: a graph may still need it
                    buffer.copy_(before)
                module._buffers[name] = buffer
