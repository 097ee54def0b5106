"""The skeleton: a deep copy of a model that is run in its place.

The model itself is never run. Its skeleton is, whose parameters and buffers hold no data (meta tensors). Where the
model's Python wants more than shapes, fake tensors are tried, then a copy with real data.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from secateur._internal.batches import Inputs, call_model
from secateur._internal.errors import SecateurError
from secateur._internal.state import Switch, fork_rng_of, rng_state, without_fast_path
from secateur.tracing.copying import copy_module

KINDS = ("meta", "fake", "real")
"""What stands in for a model's tensors, in the order in which they are tried."""

_ONE_RUN = threading.RLock()
_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
_LOG = Switch(lambda: not _LOGGER.disabled, lambda on: setattr(_LOGGER, "disabled", not on))


class Skeleton:
    """A copy of a model that can be run without data, made smaller, and changed back.

    Args:
        model: the user's model. It is left untouched.
        inputs: example inputs. They are left untouched.
        kind: one of ``KINDS``.

    Attributes:
        module: the copy, in eval mode.
        inputs: what stands in for the inputs.
        kind: what stands in for the tensors.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, kind: str) -> None:
        self.kind = kind
        self._fake = FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else None
        stand_in = {"meta": _to_meta, "fake": self._to_fake, "real": _to_real}[kind]
        memo: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            smaller = stand_in(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                smaller = nn.Parameter(smaller, requires_grad=False)
            memo[id(tensor)] = smaller
        with copyable(model):
            self.module = copy_module(model, memo)
        self.module.eval()
        with _ONE_RUN:
            self._begin = rng_state()
        self.inputs = pytree.tree_map(lambda v: stand_in(v.detach()) if isinstance(v, Tensor) else v, inputs)

    def _to_fake(self, tensor: Tensor) -> Tensor:
        assert self._fake is not None
        return self._fake.from_tensor(tensor)

    def run(self, watcher: AbstractContextManager[Any]) -> Any:
        """One forward under a watcher, without gradients. The random state comes back.

        All runs of a skeleton begin with the same random state: a forward that draws must not seem to depend on
        widths. The process has one random state for all threads, so runs wait for each other.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(_ONE_RUN)
            stack.enter_context(fork_rng_of(self.module))
            self._begin()
            stack.enter_context(torch.inference_mode(False))  # in which operations would come in larger pieces
            stack.enter_context(torch.no_grad())
            stack.enter_context(without_fast_path())
            if self._fake is not None:
                stack.enter_context(self._fake)
            stack.enter_context(watcher)
            return call_model(self.module, self.inputs)


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _to_real(tensor: Tensor) -> Tensor:
    return tensor.clone()


@contextlib.contextmanager
def copyable(model: nn.Module) -> Iterator[None]:
    """Raise in our words if a model cannot be copied."""
    try:
        yield
    except Exception as error:
        raise SecateurError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); secateur works on a deep "
            "copy so that your model stays untouched: make copy.deepcopy(model) work first"
        ) from error


def quiet() -> AbstractContextManager[None]:
    """PyTorch logs no failing forward as an accident: here it is an answer."""
    return _LOG.off()


@contextlib.contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Training mode for all but dropout, whose noise is no matter of channels. Eval mode afterwards."""
    if not training:
        yield
        return
    for part in module.modules():
        part.training = not isinstance(part, nn.modules.dropout._DropoutNd)
    try:
        yield
    finally:
        module.eval()
