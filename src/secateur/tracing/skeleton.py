"""The skeleton: a deep copy of a model whose own copies are run in its place.

The model itself is never run. Copies of its skeleton are, whose parameters and buffers hold no data (meta tensors).
Whole numbers do: token ids and masks are small, and a forward may look at them. Where the model's Python wants more,
fake tensors are tried, then a copy with real data.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from secateur._internal.batches import Inputs, call_without_cache
from secateur._internal.errors import SecateurError
from secateur._internal.state import (
    Switch,
    fork_rng_of,
    rng_state,
    without_compiler,
    without_einsum_paths,
    without_fast_path,
)
from secateur.tracing.attentions import attentions_of, free_heads
from secateur.tracing.copying import copy_model, copy_module, has_handles
from secateur.tracing.leaks import Shared, clean
from secateur.tracing.slices import Patched, Removed, patch, shrunk, sliced

KINDS = ("meta", "fake", "real")
"""What stands in for a model's tensors, in the order in which they are tried."""

_ONE_RUN = threading.RLock()
_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
_LOG = Switch(lambda: not _LOGGER.disabled, lambda on: setattr(_LOGGER, "disabled", not on))


class Skeleton:
    """A copy of a model without data. It is never run itself: every run is one of a fresh copy, perhaps a smaller one.

    So all runs begin with the same Python state: what a forward keeps (caches, anchors, a buffer that takes its shape)
    is gone with the copy that kept it.

    Args:
        model: the user's model. It is left untouched.
        inputs: example inputs, one or several. They are left untouched.
        kind: one of ``KINDS``.
        outputs: takes what matters of what the forward returns; all of it if not given.

    Attributes:
        module: the copy, in eval mode.
        tensors: its parameters and buffers by name.
        kind: what stands in for the tensors.
        outputs: takes what matters of what the forward returns.
    """

    def __init__(
        self, model: nn.Module, inputs: Sequence[Inputs], kind: str, outputs: Callable[[Any], Any] | None = None
    ) -> None:
        self.kind = kind
        self.outputs = outputs
        self._fake = FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else None
        stand_in = {"meta": _to_meta, "fake": self._to_fake, "real": _to_real}[kind]
        hollow = _without_data if kind == "meta" else stand_in
        memo: dict[int, Any] = {
            id(p): nn.Parameter(hollow(p.detach()), requires_grad=False) for p in model.parameters()
        }
        memo |= {id(b): stand_in(b.detach()) for b in model.buffers()}
        with copyable(model):
            self.module = copy_model(model, memo)
        self.module.eval()
        free_heads(self.module, attentions_of(self.module))
        self.tensors: dict[str, Tensor] = dict((*self.module.named_parameters(), *self.module.named_buffers()))
        self._handles = has_handles(model)
        self._shared = Shared(model)
        with _ONE_RUN:
            self._begin = rng_state()
        self._inputs = pytree.tree_map(lambda v: stand_in(v.detach()) if isinstance(v, Tensor) else v, list(inputs))

    def _to_fake(self, tensor: Tensor) -> Tensor:
        assert self._fake is not None
        return self._fake.from_tensor(tensor)

    def instance(
        self, removed: Removed | None = None, patched: Patched | None = None
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """A copy to run once, cut as :func:`secateur.cut` would cut the model, and its parameters and buffers by name.

        Args:
            removed: what goes, by the tensors' names.
            patched: what modules remember otherwise.

        Raises:
            SecateurError: a module does not remember what is to be changed.
        """
        memo: dict[int, Any] = {}
        for name, tensor in self.tensors.items():
            memo[id(tensor)] = tensor
            if removed and name in removed:
                take = sliced if self._has_data(tensor) else shrunk
                smaller = take(tensor.detach(), removed[name])
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(smaller, requires_grad=False) if is_parameter else smaller
            elif self._has_data(tensor) and not isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = tensor.clone()  # a forward may write into it
        module = copy_module(self.module, memo, handles=self._handles)
        if patched:
            patch(module, patched)
        return module, {name: memo[id(tensor)] for name, tensor in self.tensors.items()}

    def _has_data(self, tensor: Tensor) -> bool:
        return self.kind == "real" or (self.kind == "meta" and not tensor.is_meta)

    def inputs(self, number: int) -> Inputs:
        """What stands in for some of the inputs, to be used once: a forward may write into it."""

        def own(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) and self._has_data(value) else value

        return pytree.tree_map(own, self._inputs[number])

    def run(
        self, module: nn.Module, inputs: Inputs, watcher: AbstractContextManager[Any], *, training: bool = False
    ) -> Any:
        """One forward of an instance under a watcher, without gradients. The random state comes back.

        All runs of a skeleton begin with the same random state: a forward that draws must not seem to depend on
        widths. The process has one random state for all threads, so runs wait for each other.

        Args:
            module: an instance.
            inputs: from :meth:`inputs`.
            watcher: sees the operations.
            training: training mode for all but dropout, whose noise is no matter of channels.
        """
        if training:
            for part in module.modules():
                part.training = not isinstance(part, nn.modules.dropout._DropoutNd)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_ONE_RUN)
            stack.enter_context(fork_rng_of(self.tensors.values()))
            self._begin()
            stack.enter_context(torch.inference_mode(False))  # in which operations would come in larger pieces
            stack.enter_context(torch.no_grad())
            stack.enter_context(without_fast_path())
            stack.enter_context(without_einsum_paths())
            stack.enter_context(without_compiler())
            if self._fake is not None:
                stack.enter_context(self._fake)
            stack.enter_context(watcher)
            return call_without_cache(module, inputs)

    def forget(self, tensors: Iterable[weakref.ref[Tensor]]) -> None:
        """Take what runs have left behind out of the caches and namespaces that the user's functions share."""
        clean(tensors, self._shared)


_LARGE = 1_000_000  # elements, from which whole numbers are no ids or masks that a forward would look at


def _to_meta(tensor: Tensor) -> Tensor:
    real = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta or tensor.numel() > _LARGE)
    return tensor.to("cpu", copy=True) if real else _without_data(tensor)


def _without_data(tensor: Tensor) -> Tensor:
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
