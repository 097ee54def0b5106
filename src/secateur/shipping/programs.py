"""A model as a graph with free dims, by ``torch.export``; what every target is made of.

The batch is free: the first dim of all inputs, if they have one in common. Where inputs are whole numbers of two dims,
as the ids of tokens are, the second, the length of the sequence, is free too.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_flatten_with_path, tree_map

from secateur._internal.batches import CACHE, Inputs, arguments, caches, copied, tensors_in
from secateur._internal.errors import SecateurError
from secateur._internal.state import preserved

BATCH, LENGTH = "batch", "length"
Free = dict[int, str]
"""Of an input: which dims are free, and what they are."""


@dataclass(frozen=True)
class Exportable:
    """A model and example inputs, such that all that is free can be told from what is not.

    Attributes:
        model: what is exported: the model, or one around it that gives what matters of its outputs.
        args: example inputs, positional.
        kwargs: example inputs by name.
        sizes: the example's size of each free dim, by its name.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sizes: dict[str, int]

    def run(self, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None) -> Any:
        """What the model gives, in eval mode and without gradients."""
        args, kwargs = (self.args, self.kwargs) if args is None or kwargs is None else (args, kwargs)
        with preserved(self.model), torch.no_grad():
            return self.model(*copied(args), **copied(kwargs))

    def free(self, tensor: Any) -> Free:
        """The free dims of an input."""
        if not isinstance(tensor, Tensor) or not tensor.ndim:
            return {}
        found = {0: BATCH} if BATCH in self.sizes else {}
        if LENGTH in self.sizes and tensor.ndim > 1 and tensor.shape[1] == self.sizes[LENGTH]:
            found[1] = LENGTH
        return found


class Chosen(nn.Module):
    """A model that gives some of its outputs.

    Args:
        model: the model.
        outputs: which of them.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[Any], Any] | None) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What was chosen of the model's outputs."""
        found = self.model(*args, **kwargs)
        return found if self.outputs is None else self.outputs(found)


def exportable(
    model: nn.Module, inputs: Inputs, outputs: Callable[[Any], Any] | None, *, dynamic: bool = True
) -> Exportable:
    """A model with inputs of two examples at least: of a batch of one ``torch.export`` takes the size for fixed.

    Raises:
        SecateurError: inputs without tensors, or on which the model does not run.
    """
    args, kwargs = arguments(inputs)
    if caches(model, inputs):
        kwargs = {**kwargs, CACHE: False}  # nobody has asked for a cache of keys and values
    known = [*inspect.signature(model.forward).parameters]
    kwargs = dict(sorted(kwargs.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known)))
    tensors = tensors_in((args, kwargs))
    if not tensors:
        raise SecateurError("export(example_inputs): a tensor, a tuple or a dict of them is expected; there is none")
    first = {t.shape[0] for t in tensors if t.ndim}
    sizes = {BATCH: next(iter(first))} if dynamic and len(first) == 1 else {}
    lengths = {t.shape[1] for t in tensors if t.ndim == 2 and not t.is_floating_point() and t.dtype != torch.bool}
    if sizes and len(lengths) == 1:
        sizes[LENGTH] = next(iter(lengths))
    if sizes.get(BATCH) == 1:
        args, kwargs = tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v, (args, kwargs))
        sizes[BATCH] = 2
    whole = model if outputs is None else Chosen(model, outputs)
    found = Exportable(whole, args, kwargs, sizes)
    try:
        found.run()
    except Exception as error:
        raise SecateurError(
            f"export: the model does not run on these example inputs ({type(error).__name__}: {_first_line(error)}); "
            "give those that its forward takes"
        ) from error
    return found


def program_of(what: Exportable) -> ExportedProgram:
    """The graph of a model; what of its dims cannot be free is fixed.

    Raises:
        SecateurError: ``torch.export`` cannot follow its forward.
    """
    args, kwargs = copied(what.args), copied(what.kwargs)
    shapes: Any = ShapesCollection()
    for tensor in tensors_in((args, kwargs)):
        if free := what.free(tensor):
            shapes[tensor] = dict.fromkeys(free, Dim.AUTO)
    try:
        with preserved(what.model), torch.no_grad(), quiet():
            return torch.export.export(what.model, args, kwargs, dynamic_shapes=shapes if what.sizes else None)
    except Exception as error:
        raise SecateurError(
            f"export: torch.export cannot follow the forward of {type(what.model).__name__} "
            f"({type(error).__name__}: {_first_line(error)}). Branches on values must be torch.where or torch.cond; "
            "outputs must be tensors, or containers that PyTorch knows: outputs= chooses among them"
        ) from error


def free_dims(program: ExportedProgram) -> dict[str, list[int]]:
    """Which dims of each input a graph leaves free, in the order of the inputs."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return {
        str(name): [d for d, size in enumerate(value.shape) if _is_free(size)]
        for name in program.graph_signature.user_inputs
        if isinstance(value := values.get(str(name)), Tensor)
    }


def _is_free(size: Any) -> bool:
    """Whether a dim of a graph has no one size; a symbol may have been found to have one."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def free_sizes(what: Exportable, program: ExportedProgram) -> set[str]:
    """Which of the sizes a graph leaves free in all inputs that have them."""
    found = set(what.sizes)
    for tensor, dims in zip(tensors_in((what.args, what.kwargs)), free_dims(program).values(), strict=True):
        found -= {size for d, size in what.free(tensor).items() if d not in dims}
    return found


def output_names(outputs: Any) -> list[str]:
    """A name for each tensor that a model gives: its key or attribute, else its number."""
    found = []
    for path, leaf in tree_flatten_with_path(outputs)[0]:
        if isinstance(leaf, Tensor):
            keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
            found.append("_".join(keys) if keys and not keys[0].isdigit() else "_".join(["output", *keys]))
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PyTorch's exporters tell about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given").rstrip(".")
