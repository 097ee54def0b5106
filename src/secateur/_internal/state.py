"""The one guard: whatever is done with a model inside :func:`preserved`, its state comes back as it was.

What comes back, also after an error: training or eval mode of every module; buffers, their values and which tensors
they are; gradients and ``requires_grad`` of every parameter; hooks; the random states of Python, NumPy and PyTorch.
Weights are not copied: what changes them works on a copy.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur._internal.errors import SecateurError

MODES = ("eval", "batch_statistics", "as_is")
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@contextmanager
def preserved(
    model: nn.Module, mode: str = "eval", *, gradients: bool = True, fast_path: bool = True
) -> Iterator[None]:
    """Run a model for a while; all of its state comes back.

    Args:
        model: the model.
        mode: ``"eval"``; ``"batch_statistics"``, which is eval mode but for batch norms, which use the batch's
            statistics; or ``"as_is"``.
        gradients: whether parameters want gradients as they did; otherwise none does.
        fast_path: whether fused attention may pass by the modules' own forwards, and with them their hooks.
    """
    with ExitStack() as stack:
        stack.callback(_snapshot(model))
        stack.enter_context(fork_rng_of(model.parameters()))
        if not fast_path:
            stack.enter_context(without_fast_path())
        if mode != "as_is":
            model.eval()
        if mode == "batch_statistics":
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.train()
        for p in model.parameters():
            p.grad = None
            if not gradients and p.requires_grad:
                p.requires_grad_(False)
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; all state comes back."""
    with preserved(model), torch.no_grad():
        yield


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember the state of a model; what is returned puts it back."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    hooks = [(table, table.copy()) for m in modules for name in _HOOKS if (table := vars(m).get(name)) is not None]
    buffers = [(m._buffers, dict(m._buffers)) for m in modules]
    values = [
        (buffer, buffer.clone())
        for _, table in buffers
        for buffer in table.values()
        if buffer is not None and not is_lazy(buffer) and not buffer.is_meta
    ]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def back() -> None:
        for module, mode in modes:
            module.training = mode
        for table, before in hooks:
            if table.keys() != before.keys():
                table.clear()
                table.update(before)
        with torch.no_grad():
            for buffer, before in values:
                if not torch.equal(buffer, before):  # what is not touched is not written: a graph may still need it
                    buffer.copy_(before)
        for table, before in buffers:
            if table.keys() != before.keys() or any(table[name] is not buffer for name, buffer in before.items()):
                table.clear()
                table.update(before)
        for p, wanted, gradient in parameters:
            if p.requires_grad != wanted:
                p.requires_grad_(wanted)
            p.grad = gradient

    return back


def rng_state() -> Callable[[], None]:
    """What sets the random states of Python, NumPy and PyTorch on the CPU as they are now."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)

    return back


@contextmanager
def fork_rng_of(tensors: Iterable[Tensor]) -> Iterator[None]:
    """The random states of Python, NumPy and PyTorch (of the tensors' devices too) come back as they were."""
    devices, back = sorted({p.device.index or 0 for p in tensors if p.device.type == "cuda"}), rng_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        back()


class Switch:
    """A switch that the whole process has once, safely turned off by several threads at a time.

    The first that turns it off remembers how it was, and the last that is done puts it back.

    Args:
        is_on: reads the switch.
        turn: sets it.
    """

    def __init__(self, is_on: Callable[[], bool], turn: Callable[[bool], object]) -> None:
        self._is_on, self._turn = is_on, turn
        self._lock, self._users, self._before = threading.Lock(), 0, True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Off for as long as this lasts, whatever other threads do meanwhile."""
        with self._lock:
            if not self._users:
                self._before = self._is_on()
                self._turn(False)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._turn(self._before)


_FAST_PATH = Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)


def without_fast_path() -> AbstractContextManager[None]:
    """Attention runs through its modules, which PyTorch's fused fast path would pass by."""
    return _FAST_PATH.off()


def _set_einsum_paths(on: bool) -> None:
    torch.backends.opt_einsum.set_flags(_enabled=on and torch.backends.opt_einsum.is_available())


_EINSUM_PATHS = Switch(lambda: torch.backends.opt_einsum.enabled, _set_einsum_paths)


def without_einsum_paths() -> AbstractContextManager[None]:
    """``torch.einsum`` contracts from left to right, not in an order that depends on widths."""
    return _EINSUM_PATHS.off()


def without_compiler() -> AbstractContextManager[Any]:
    """What ``torch.compile`` has wrapped runs as it was written. A compiler that nobody has loaded stays unloaded."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def check_differentiable(model: nn.Module) -> None:
    """Raise if a model's tensors were made in ``torch.inference_mode``, of which no gradient can be had."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise SecateurError(
                f"{type(model).__name__}: {name!r} was made in torch.inference_mode(), and nothing can be "
                "differentiated through it: copy the model outside of it first (copy.deepcopy(model)), or load it there"
            )


def is_on_meta(model: nn.Module) -> bool:
    """Whether any of its parameters holds no data."""
    return any(p.is_meta for p in model.parameters())


def device_of(model: Any) -> torch.device:
    """Where a model's parameters are (the first one's device), the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
