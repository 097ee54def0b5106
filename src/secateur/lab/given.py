"""What a command is given in words: a model, example inputs, data, a loss, an evaluation."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import storage as store
from secateur._internal.batches import Inputs, read_batches
from secateur._internal.errors import SecateurError
from secateur._internal.importing import import_string, is_import_string
from secateur._internal.losses import LOSSES
from secateur.lab.models.elsewhere import is_elsewhere
from secateur.lab.models.registry import MODELS, build, example_input

INPUT = "input"
"""The note in a save that describes an example input: a shape, or see :func:`described`."""
IMAGE = (1, 3, 224, 224)
"""What networks of torchvision are made for."""


@dataclass(frozen=True)
class Source:
    """What makes a model, and what it is called with, in a command's words.

    Attributes:
        model: a built-in model, ``package.module:factory``, ``torchvision:``, ``timm:`` or ``hf:`` and a name, or a
            directory that was saved.
        options: keyword arguments of what makes it.
        factory: makes the original of what was saved, where that is a user's own. It is never taken from the directory,
            since a foreign file could then have anything imported.
        weights: of a model that is made: a file or a directory.
        input: example inputs, each as :func:`read_input` reads it.
        inputs: ``package.module:function`` that gives them instead.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    factory: str | None = None
    weights: Path | None = None
    input: Sequence[str] = ()
    inputs: str | None = None

    @property
    def saved(self) -> bool:
        """Whether it is a directory; the name of a built-in model is that, ``./NAME`` a directory."""
        return self.model not in MODELS and Path(self.model).is_dir()

    def network(self, verb: str) -> nn.Module:
        """The model.

        Args:
            verb: the command, for messages.

        Raises:
            SecateurError: an unknown model, one that needs a factory and has none, weights of another.
        """
        if self.saved:
            if self.weights is not None:
                raise SecateurError(f"--weights {self.weights}: {self.model} is a saved model, and has its own")
            return _saved(self, verb)
        if self.factory is not None:
            raise SecateurError(
                f"--build {self.factory!r}: it belongs to a directory that was saved; {self.model!r} is none"
            )
        if self.weights is not None:
            return store.load_weights(self.weights, self.original)
        return self.original()

    def original(self) -> nn.Module:
        """The model as it is made, before anything was done to it."""
        name = self.factory if self.factory is not None else self.model
        if self.saved and self.factory is None:
            origin = store.read_head(self.model)["model"]
            if origin is None or is_import_string(origin["name"]):
                raise SecateurError(_ask_for_factory(self.model, origin, "measure"))
            return build(origin["name"], **origin["options"])
        return build(name, **self.options)

    def example(self, network: nn.Module, batch: Inputs | None = None) -> Inputs:
        """Example inputs: those that are given, else of data, else those that the model is known to take.

        Args:
            network: the model.
            batch: inputs of the data, if there are data.

        Raises:
            SecateurError: nobody knows them.
        """
        if self.inputs is not None and self.input:
            raise SecateurError("--input and --inputs: both are example inputs; give one of them")
        if self.inputs is not None:
            return _called("--inputs", self.inputs, import_string("--inputs", self.inputs))
        if self.input:
            return drawn_inputs([read_input(text) for text in self.input])
        if batch is not None:
            return batch
        known = _known(self, network)
        if known is None:
            raise SecateurError(
                f"{self.model}: nobody knows its inputs: give --input, such as --input 1,3,32,32 or --input "
                "input_ids=1,16:int64:100, or --inputs package.module:function"
            )
        return known


def _known(source: Source, network: nn.Module) -> Inputs | None:
    """Example inputs that a save, a registry or the model itself tells of."""
    name, options = source.model, source.options
    if source.saved:
        head = store.read_head(name)
        noted = head["notes"].get(INPUT)
        if noted is not None and (found := drawn_like(noted)) is not None:
            return found
        origin = head["model"] or {"name": ":", "options": {}}
        name, options = (source.factory, source.options) if source.factory else (origin["name"], origin["options"])
    if name in MODELS:
        return torch.zeros(example_input(name, **options))
    dummy = getattr(network, "dummy_inputs", None)  # of transformers
    if isinstance(dummy, Mapping) and dummy:
        return {key: value.to("cpu") if isinstance(value, Tensor) else value for key, value in dummy.items()}
    size = getattr(network, "default_cfg", {}).get("input_size")  # of timm
    if size is not None:
        return torch.zeros(1, *size)
    return torch.zeros(IMAGE) if is_elsewhere(name) and name.startswith("torchvision:") else None


def _saved(source: Source, verb: str) -> nn.Module:
    """A saved model."""
    directory = source.model
    origin = store.read_head(directory)["model"]
    if source.factory is not None:
        return store.load(directory, source.original)
    if source.options:
        raise SecateurError(f"{directory} is a saved model: it takes no options, unless --build says what makes it")
    if origin is None or is_import_string(origin["name"]):
        raise SecateurError(_ask_for_factory(directory, origin, verb))
    return store.load(directory)


def _ask_for_factory(directory: str, origin: Mapping[str, Any] | None, verb: str) -> str:
    """The command that would work, with what the file says about who made the model."""
    command = f"secateur {verb} {shlex.quote(directory)} --build"
    if origin is None:
        return (
            f"{directory} does not begin with a built-in model, and does not say what made it: name the factory, "
            f"{command} package.module:factory"
        )
    options = "".join(f" {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in origin["options"].items())
    return (
        f"{directory} was made by {origin['name']}, and no code that a file names is imported unasked. If it is yours, "
        f"or you trust it: {command} {shlex.quote(origin['name'])}{options}"
    )


# ----------------------------------------------------------------------------------------------------------- the inputs

Spec = dict[str, Any]
"""One example input: ``name`` (None is positional), ``shape``, ``dtype``, and of whole numbers ``high``, their end."""


def read_input(text: str) -> Spec:
    """``[NAME=]SIZES[:DTYPE[:HIGH]]``, such as ``1,3,32,32`` or ``input_ids=1,16:int64:100``.

    Raises:
        SecateurError: it is none.
    """
    name, equals, rest = text.rpartition("=")
    sizes, _, more = rest.partition(":")
    kind, _, high = (more or "float32").partition(":")
    dtype = getattr(torch, kind, None)
    try:
        shape = [int(size) for size in sizes.split(",")]
        end = int(high) if high else 2
    except ValueError:
        shape, end = [], 0
    fits = isinstance(dtype, torch.dtype) and not dtype.is_complex
    if isinstance(dtype, torch.dtype) and fits and not dtype.is_floating_point and dtype != torch.bool:
        fits = end - 1 <= torch.iinfo(dtype).max
    if not shape or min(shape) < 1 or end < 1 or not fits or (equals and not name):
        raise SecateurError(
            f"--input {text!r}: [NAME=]SIZES[:DTYPE[:HIGH]] with positive whole numbers is expected, such as 1,3,32,32 "
            "or input_ids=1,16:int64:100"
        )
    return {"name": name or None, "shape": shape, "dtype": kind, "high": end}


def drawn_inputs(specs: Sequence[Spec]) -> Inputs:
    """Random inputs, the same every time: a tensor, a tuple, or by name.

    Raises:
        SecateurError: some have names and some have none.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [_drawn(spec, generator) for spec in specs]
    names = [spec["name"] for spec in specs]
    if all(names):
        return dict(zip(names, tensors, strict=True))
    if any(names):
        raise SecateurError("--input: either all inputs have names, or none has")
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _drawn(spec: Spec, generator: torch.Generator) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec["dtype"])
    if dtype == torch.bool:
        return torch.ones(spec["shape"], dtype=dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, spec["high"], spec["shape"], generator=generator, dtype=dtype)
    return torch.randn(spec["shape"], generator=generator).to(dtype)


def described(inputs: Inputs) -> list[Spec] | None:
    """What to draw inputs like these from, as JSON; None of such as are not plain tensors."""
    named = inputs.items() if isinstance(inputs, Mapping) else [(None, value) for value in _listed(inputs)]
    found = []
    for name, value in named:
        if not isinstance(value, Tensor):
            return None
        whole = not value.is_floating_point() and not value.is_complex() and value.numel()
        high = max(2, int(value.max()) + 1) if whole else 2
        kind = str(value.dtype).removeprefix("torch.")
        found.append({"name": name, "shape": list(value.shape), "dtype": kind, "high": high})
    return found


def _listed(inputs: Inputs) -> Sequence[Any]:
    return inputs if isinstance(inputs, (tuple, list)) else [inputs]


def drawn_like(noted: Any) -> Inputs | None:
    """Inputs as a save describes them: a shape, or :func:`described`; None if it does not."""
    if isinstance(noted, list) and noted and all(type(n) is int and n > 0 for n in noted):
        noted = [{"name": None, "shape": noted, "dtype": "float32", "high": 2}]
    fits = isinstance(noted, list) and noted and all(isinstance(spec, dict) for spec in noted)
    try:
        return drawn_inputs(noted) if fits else None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SecateurError):  # what somebody else wrote
        return None


# ---------------------------------------------------------------------------------------- the data, the loss, the rest


def data_of(text: str) -> Iterable[Any]:
    """Batches: what ``package.module:loader`` is, or what it gives when it is called.

    Raises:
        SecateurError: it cannot be imported, or gives no batches.
    """
    found = import_string("--data", text, calls=False)
    if callable(found) and not hasattr(found, "__iter__"):
        found = _called("--data", text, found)
    if isinstance(found, Iterator):  # whose first batch must not be lost by looking at it
        first = list(islice(found, 1))
        next(iter(read_batches(first, torch.device("cpu"), 1, "--data")))
        return chain(first, found)
    next(iter(read_batches(found, torch.device("cpu"), 1, "--data")))
    batches: Iterable[Any] = found
    return batches


def _called(option: str, text: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except SecateurError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise SecateurError(f"{option} {text}: it fails ({type(error).__name__}: {error})") from error


def loss_of(text: str | None, option: str = "--loss") -> Any:
    """A loss by its name, or ``package.module:function`` of (outputs, targets).

    Args:
        text: the name.
        option: what it is called in messages.
    """
    if text is None or not is_import_string(text):
        if text is not None and text not in LOSSES:
            raise SecateurError(
                f"{option} {text!r}: {', '.join(LOSSES)} or package.module:function of (outputs, targets) is expected"
            )
        return text
    found = import_string(option, text)
    return _called(option, text, found) if isinstance(found, type) and issubclass(found, nn.Module) else found


def outputs_of(text: str | None) -> Callable[[Any], Any] | None:
    """Which of the outputs: ``logits``, ``0``, or a path of names and numbers, ``heads.keyword``."""
    if text is None:
        return None
    steps = text.split(".")

    def chosen(outputs: Any) -> Any:
        for step in steps:
            if isinstance(outputs, Mapping):
                outputs = outputs[step]
            else:
                outputs = outputs[int(step)] if step.isdigit() else getattr(outputs, step)
        return outputs

    return chosen


def evaluation_of(text: str | None) -> Callable[[nn.Module], dict[str, float | None]] | None:
    """``package.module:function`` of the model, that gives a number, or several by name; what is none is None."""
    if text is None:
        return None
    function = import_string("--evaluate", text)

    def evaluated(model: nn.Module) -> dict[str, float | None]:
        given = _called("--evaluate", text, function, model)
        named = given if isinstance(given, Mapping) else {text.partition(":")[2]: given}
        try:
            numbers = {str(name): float(value) for name, value in named.items()}
        except (TypeError, ValueError) as error:
            raise SecateurError(
                f"--evaluate {text}: a number, or numbers by name, are expected, it gave {given!r}"
            ) from error
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}

    return evaluated
