"""The one reader of batches: what a loader gives, as what a forward is called with and what a loss is told.

===================================  =====================================  ======================
a batch                              inputs                                 targets
===================================  =====================================  ======================
a tensor                             it                                     none
``(inputs, targets)``                the first                              the second
``(inputs,)``                        it                                     none
``(inputs, a, b, ...)``              the first                              the tuple of the rest
a dict with ``labels``               by keyword, without the labels         the labels
a dict without                       by keyword                             none
===================================  =====================================  ======================

Inputs are a tensor, a tuple of positional arguments or a dict of keyword arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur._internal.errors import BadBatch, SecateurError

Inputs = Any
"""A tensor, a tuple of positional arguments or a dict of keyword arguments."""
LABELS = "labels"
"""The key under which Hugging Face's batches hold the targets."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch, on the model's device.

    Attributes:
        number: its place in the data, from 0 on.
        inputs: what the forward is called with: a tensor, a tuple or a dict; a copy, which the forward may write into.
        targets: what the loss compares the outputs with; None if the data has none.
        labelled: whether the targets came with the inputs, under ``labels``, so that the model can compute its loss.
    """

    number: int
    inputs: Inputs
    targets: Any = None
    labelled: bool = False

    @property
    def examples(self) -> int:
        """How many examples it holds: the length of the first input."""
        return examples_of(self.inputs)

    def with_labels(self) -> Inputs:
        """The inputs as the loader gave them, with the labels, a copy, which the forward may write into."""
        return {**self.inputs, LABELS: copied(self.targets)} if self.labelled else self.inputs

    def shapes(self) -> str:
        """The shapes of the inputs, for messages."""
        return ", ".join(str(list(t.shape)) for t in tensors_in(self.inputs)) or "without tensors"


def read_batch(raw: Any, number: int, device: torch.device) -> Batch:
    """One batch of a user's loader.

    Args:
        raw: what the loader gave.
        number: its place in the data.
        device: where to.

    Raises:
        BadBatch: something that is no batch.
    """
    if isinstance(raw, Batch):
        return raw
    labelled = False
    inputs, targets = raw, None
    if isinstance(raw, Mapping):
        inputs = dict(raw)
        targets = inputs.pop(LABELS, None)
        labelled = targets is not None
    elif isinstance(raw, (tuple, list)):
        if not raw:
            raise BadBatch(f"data: batch {number} is an empty {type(raw).__name__}; {_EXPECTED}")
        inputs = raw[0]
        targets = None if len(raw) == 1 else raw[1] if len(raw) == 2 else tuple(raw[1:])
        if isinstance(inputs, Mapping):
            inputs = dict(inputs)
        elif isinstance(inputs, (tuple, list)):
            inputs = tuple(inputs)
    if not isinstance(inputs, (Tensor, tuple, dict)) or not any(isinstance(t, Tensor) for t in tensors_in(inputs)):
        of = f" of {type(inputs).__name__}" if isinstance(raw, (tuple, list)) else ""
        without = " without a tensor" if isinstance(inputs, (tuple, dict)) else ""
        raise BadBatch(f"data: {_EXPECTED}; batch {number} is a {type(raw).__name__}{of}{without}")
    inputs = pytree.tree_map(lambda v: v.detach().to(device, copy=True) if isinstance(v, Tensor) else v, inputs)
    targets = pytree.tree_map(lambda v: _on(v, device) if isinstance(v, Tensor) else v, targets)
    return Batch(number, inputs, targets, labelled)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device)
    return moved.clone() if moved.is_inference() else moved  # as it is, no loss of it could be differentiated


_EXPECTED = "batches are tensors, pairs (inputs, targets), or dicts of keyword arguments"


def read_batches(data: Iterable[Any], device: torch.device, most: int | None = None, who: str = "") -> Iterator[Batch]:
    """All batches of a user's data, or the first ones, on a device.

    Args:
        data: what gives batches.
        device: where to.
        most: at most so many.
        who: the verb that asks, for messages.

    Raises:
        BadBatch: data that cannot be iterated, or gives nothing.
    """
    who = f"{who}(data): " if who else "data: "
    if isinstance(data, (str, bytes, Mapping, Tensor)) or not isinstance(data, Iterable):
        raise BadBatch(
            f"{who}something that gives batches is expected, a loader or a list of batches; {type(data).__name__} was "
            "given"
        )
    seen = 0
    for raw in islice(data, most):
        yield read_batch(raw, seen, device)
        seen += 1
    if not seen:
        raise BadBatch(f"{who}the loader is empty: no batches were given; give at least one batch")


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a forward is called with: a tuple one by one, a dict by its names, anything else alone."""
    if isinstance(inputs, tuple):
        return inputs, {}
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """``model(*inputs)`` for a tuple, ``model(**inputs)`` for a dict, ``model(inputs)`` else."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


CACHE = "use_cache"


def caches(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a forward may return a cache of keys and values for which nobody has asked."""
    args, kwargs = arguments(inputs)
    names = list(inspect.signature(model.forward).parameters)
    return CACHE in names[len(args) :] and CACHE not in kwargs


def call_without_cache(model: nn.Module, inputs: Inputs) -> Any:
    """:func:`call_model`, with ``use_cache=False`` where the forward knows it and the inputs do not say."""
    args, kwargs = arguments(inputs)
    if caches(model, inputs):
        kwargs = {**kwargs, CACHE: False}
    return model(*args, **kwargs)


def demands_labels(model: nn.Module, batch: Batch) -> bool:
    """Whether a forward cannot be called without the labels that a batch has."""
    known = inspect.signature(model.forward).parameters if batch.labelled else {}
    return LABELS in known and known[LABELS].default is inspect.Parameter.empty


def copied(inputs: Inputs) -> Inputs:
    """A copy, which a forward may write into."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)


def examples_of(inputs: Inputs) -> int:
    """How many examples inputs hold: the length of the first tensor."""
    tensors = tensors_in(inputs)
    return (tensors[0].shape[0] if tensors[0].ndim else 1) if tensors else 0


def some_of(inputs: Inputs, which: slice | Tensor) -> Inputs:
    """Some of the examples of inputs, or the same several times; what is not as long as all of them stays whole."""
    count = examples_of(inputs)

    def chosen(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or len(value) != count:
            return value
        return value[which.to(value.device) if isinstance(which, Tensor) else which]

    return pytree.tree_map(chosen, inputs)


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input of a layer, however it was called: the first positional argument, else ``input=``, else any first."""
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a model's inputs or output: containers and plain objects are looked into, each once.

    Raises:
        SecateurError: an iterator, which cannot be looked into without using it up.
    """
    found: list[Tensor] = []
    seen: dict[int, Any] = {}  # holds the objects, so that their ids stay theirs
    left = [value]
    while left:
        leaves = pytree.tree_leaves(left.pop(0))
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif isinstance(leaf, Iterator):
                raise SecateurError(
                    f"a model must give tensors, or containers of them; {type(leaf).__name__} can be read only once"
                )
            elif not isinstance(leaf, _PLAIN) and id(leaf) not in seen:
                seen[id(leaf)] = leaf
                if isinstance(leaf, Mapping):  # a dict of a class of its own
                    left.append([*leaf.values()])
                slots = [s for kind in type(leaf).__mro__ for s in np.atleast_1d(vars(kind).get("__slots__", ()))]
                left.append([*vars(leaf).values()] if hasattr(leaf, "__dict__") else [])
                left.append([getattr(leaf, s) for s in slots if s != "__dict__" and hasattr(leaf, s)])
    return found


_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, np.ndarray, torch.dtype, torch.device, nn.Module)
