"""A model as a graph with free dims, by ``torch.export``; what every target is made of.

The batch is free: the first dim of all inputs, if they have one in common. Where inputs are whole numbers of two dims,
as the ids of tokens are, the second, the length of the sequence, is free too.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten
from torch.utils._sympy.numbers import int_oo

from secateur._internal.batches import CACHE, Inputs, arguments, caches, copied, tensors_in
from secateur._internal.errors import SecateurError, unknown
from secateur._internal.state import preserved

BATCH, LENGTH = "batch", "length"
LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "torch.fx.experimental.symbolic_shapes")
Free = dict[int, str]
"""Of an input: which dims are free, and what they are."""
Dynamic = bool | Mapping[str, Sequence[int] | Mapping[int, str]]
"""The usual sizes are free, none, or those of inputs that are named."""


@dataclass(frozen=True)
class Exportable:
    """A model and example inputs.

    Attributes:
        model: what is exported: the model, or one around it that gives what matters of its outputs.
        args: example inputs, positional.
        kwargs: example inputs by name, in the order of the forward's.
        free: of every tensor in them the dims that are to be free, and what they are.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    free: tuple[Free, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the example."""
        return tensors_in((self.args, self.kwargs))

    @property
    def sizes(self) -> dict[str, int]:
        """The example's size of each dim that is to be free, by what it is."""
        each = zip(self.tensors, self.free, strict=True) if self.free else ()
        return {name: tensor.shape[d] for tensor, dims in each for d, name in dims.items()}

    def inputs(self) -> dict[str, Any]:
        """What the forward is given, by its name there."""
        named = inspect.signature(self.model.forward).parameters.values()
        places = [p.name for p in named if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        places += [f"input_{i}" for i in range(len(places), len(self.args))]
        return dict(zip(places, self.args, strict=False)) | self.kwargs

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model gives, in eval mode and without gradients."""
        with preserved(self.model), torch.no_grad():
            return self.model(*copied(args), **copied(kwargs))

    def given(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Other tensors as the forward takes them, in place of the example's."""
        leaves, like = tree_flatten((self.args, self.kwargs))
        others = iter(tensors)
        args, kwargs = tree_unflatten([next(others) if isinstance(v, Tensor) else v for v in leaves], like)
        return args, kwargs


class Chosen(nn.Module):
    """A model that gives some of its outputs; its forward takes what the model's takes.

    Args:
        model: the model.
        outputs: which of them.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.outputs(self.model(*args, **kwargs))

        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
        self.forward = forward


def in_order(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as a forward takes them, those by name in the order in which it names them."""
    args, kwargs = arguments(inputs)
    if caches(model, inputs):
        kwargs = {**kwargs, CACHE: False}  # nobody has asked for a cache of keys and values
    known = [*inspect.signature(model.forward).parameters]
    return args, dict(sorted(kwargs.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known)))


def exportable(model: nn.Module, inputs: Inputs, outputs: Callable[[Any], Any] | None) -> Exportable:
    """A model with example inputs, nothing free.

    Raises:
        SecateurError: inputs without tensors, or on which the model does not run; outputs without tensors.
    """
    args, kwargs = in_order(model, inputs)
    if not tensors_in((args, kwargs)):
        raise SecateurError("export(example_inputs): a tensor, a tuple or a dict of them is expected; there is none")
    found = Exportable(model, args, kwargs)
    try:
        given = found.run(args, kwargs)
    except Exception as error:
        raise SecateurError(
            f"export: the model does not run on these example inputs ({type(error).__name__}: {first_line(error)}); "
            "give those that its forward takes"
        ) from error
    if outputs is not None:
        try:
            given = outputs(given)
        except Exception as error:
            raise SecateurError(
                f"export(outputs=...): it does not take what the forward returns, a {type(given).__name__} "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        found = Exportable(Chosen(model, outputs), args, kwargs)
    if not tensors_in(given):
        raise SecateurError(f"export: a tensor is to come out, and there is a {type(given).__name__} without one")
    return found


def of_batch(tensor: Tensor, dims: Free, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A tensor after a change of the dim that is the batch, if one is."""
    return next((change(tensor, d) for d, name in dims.items() if name == BATCH), tensor)


def check_dynamic(dynamic: Any) -> None:
    """Raise if it does not say which sizes are free."""
    named = isinstance(dynamic, Mapping) and all(isinstance(dims, (list, tuple, Mapping)) for dims in dynamic.values())
    if not isinstance(dynamic, bool) and not named:
        raise SecateurError(
            f"export(dynamic={dynamic!r}): True, False, or the dims of inputs that are free are expected, such as "
            "{'image': [0, 2, 3]}"
        )


def with_free_sizes(what: Exportable, dynamic: Dynamic = True) -> Exportable:
    """The same with what may be free, and two examples at least: ``torch.export`` takes a batch of one for fixed.

    Args:
        what: the model and example inputs.
        dynamic: see :func:`secateur.export`.

    Raises:
        SecateurError: names of inputs, or dims, that there are none of; sizes of one name that differ.
    """
    if not dynamic:
        return what
    tensors = what.tensors
    free = _usual(tensors) if dynamic is True else _asked(what, dynamic)
    if not any(free):
        return what
    args, kwargs = what.args, what.kwargs
    if replace(what, free=tuple(free)).sizes.get(BATCH) == 1:
        both = zip(tensors, free, strict=True)
        args, kwargs = what.given([of_batch(t, dims, lambda t, d: torch.cat([t, t], d)) for t, dims in both])
    return replace(what, args=args, kwargs=kwargs, free=tuple(free))


def _usual(tensors: Sequence[Tensor]) -> list[Free]:
    """The batch, and the length where inputs are whole numbers [batch, length]."""
    first = {t.shape[0] for t in tensors if t.ndim}
    if len(first) != 1:
        return []
    lengths = {t.shape[1] for t in tensors if t.ndim == 2 and not t.is_floating_point() and t.dtype != torch.bool}
    length = lengths.pop() if len(lengths) == 1 else None
    return [
        ({0: BATCH} if t.ndim else {}) | ({1: LENGTH} if t.ndim > 1 and t.shape[1] == length else {}) for t in tensors
    ]


def _asked(what: Exportable, dynamic: Mapping[str, Any]) -> list[Free]:
    """The dims that are named, input by input."""
    inputs = what.inputs()
    for name in dynamic:
        if name not in inputs:
            raise unknown("input in export(dynamic=...)", name, inputs)
    found: list[Free] = []
    sizes: dict[str, int] = {}
    for name, value in inputs.items():
        given = dynamic.get(name, ())
        dims = dict(given) if isinstance(given, Mapping) else {d: BATCH if d == 0 else f"{name}_{d}" for d in given}
        for tensor in tensors_in(value):
            for d, size in dims.items():
                if isinstance(d, bool) or not isinstance(d, int) or not 0 <= d < tensor.ndim:
                    raise SecateurError(f"export(dynamic=...): {name} has dims 0 to {tensor.ndim - 1}, {d!r} was given")
                if sizes.setdefault(str(size), tensor.shape[d]) != tensor.shape[d]:
                    raise SecateurError(
                        f"export(dynamic=...): {size!r} is {sizes[str(size)]} and {tensor.shape[d]} in the example; "
                        "sizes of one name are one"
                    )
            found.append({int(d): str(size) for d, size in dims.items()})
    return found


def program_of(what: Exportable) -> ExportedProgram:
    """The graph of a model; what of its dims cannot be free is fixed.

    Raises:
        SecateurError: ``torch.export`` cannot follow its forward.
    """
    args, kwargs = copied(what.args), copied(what.kwargs)
    shapes: Any = ShapesCollection()
    dims = iter(what.free)
    for tensor in tensors_in((args, kwargs)):
        if free := next(dims, {}):
            shapes[tensor] = dict.fromkeys(free, Dim.AUTO)
    try:
        with preserved(what.model), torch.no_grad(), quiet():
            return torch.export.export(what.model, args, kwargs, dynamic_shapes=shapes if what.sizes else None)
    except Exception as error:
        model = what.model.model if isinstance(what.model, Chosen) else what.model
        raise SecateurError(
            f"export: torch.export cannot follow the forward of {type(model).__name__} ({type(error).__name__}: "
            f"{first_line(error)}). Branches on values must be torch.where or torch.cond; outputs must be tensors, or "
            "containers that PyTorch knows: outputs= chooses among them"
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


def free_sizes(what: Exportable, program: ExportedProgram) -> dict[str, str]:
    """Which of the sizes a graph leaves free in all inputs that have them, and from where to where it holds."""
    found = dict.fromkeys(what.sizes, "any")
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    for free, (name, dims) in zip(what.free, free_dims(program).items(), strict=bool(what.free)):
        for d, size in free.items():
            if d not in dims:
                found.pop(size, None)
            elif size in found:
                symbol = values[name].shape[d].node.expr
                allowed = program.range_constraints.get(symbol)
                upper = "any" if allowed is None or allowed.upper == int_oo else str(allowed.upper)
                if allowed is not None and (int(allowed.lower) > 2 or upper != "any"):
                    found[size] = f"{allowed.lower} to {upper}"
    return found


def output_names(outputs: Any) -> list[str]:
    """A name for each tensor that a model gives: its key or field, else its number; no two are the same."""
    found: list[str] = []
    for path, leaf in tree_flatten_with_path(outputs)[0]:
        if isinstance(leaf, Tensor):
            keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
            name = "_".join(keys) if keys and not keys[0].isdigit() else "_".join(["output", *keys])
            same = sum(other == name or other.startswith(f"{name}__") for other in found)
            found.append(f"{name}__{same}" if same else name)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PyTorch's exporters tell about themselves."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """What an error says first; what caused it where it says nothing of its own."""
    while error.__cause__ is not None and type(error).__module__.startswith("torch.onnx"):
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given").rstrip(".")
