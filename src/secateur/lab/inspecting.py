"""A model by name, or one that was saved, made and looked at, or exported."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import storage as store
from secateur._internal.errors import SecateurError
from secateur._internal.importing import is_import_string
from secateur.lab.models.registry import build, example_input
from secateur.shipping.api import export
from secateur.tracing.api import trace

INPUT = "input"
"""The note in a save that holds the shape of an example input."""


def inspected(
    model: str, options: Mapping[str, Any], shape: list[int] | None = None, factory: str | None = None
) -> str:
    """Which channels of a model can be removed, which cannot, and why, as text; see :func:`made`."""
    network, sizes = made(model, options, shape, factory, "inspect")
    return trace(network, torch.zeros(sizes)).summary()


def exported(
    model: str, options: Mapping[str, Any], path: Path, shape: list[int] | None = None, factory: str | None = None,
    **how: Any,
) -> str:  # fmt: skip
    """Write a model for where it runs, see :func:`secateur.export` and :func:`made`; what was written, as text."""
    network, sizes = made(model, options, shape, factory, "export")
    generator = torch.Generator().manual_seed(0)
    return str(export(network.eval(), path, torch.randn(sizes, generator=generator), **how))


def made(
    model: str, options: Mapping[str, Any], shape: list[int] | None, factory: str | None, verb: str
) -> tuple[nn.Module, list[int]]:
    """A model that a command names, and the shape of an example input.

    Args:
        model: a built-in model, ``package.module:factory``, or a directory that was saved.
        options: keyword arguments of the model's factory.
        shape: of an example input; known already of built-in models, and of what a run has saved.
        factory: makes the original of what was saved, where that is a user's own: ``package.module:factory``. It is
            never taken from the directory, since a foreign file could then have anything imported.
        verb: the command, for messages.

    Raises:
        SecateurError: an unknown model, one that needs a factory or a shape and has none.
    """
    if Path(model).is_dir():
        return _saved(model, options, shape, factory, verb)
    if factory is not None:
        raise SecateurError(f"--build {factory!r}: it belongs to a directory that was saved; {model!r} is none")
    return build(model, **options), shape or list(example_input(model, **options))


def _saved(
    directory: str, options: Mapping[str, Any], shape: list[int] | None, factory: str | None, verb: str
) -> tuple[nn.Module, list[int]]:
    """A saved model and the shape of an example input."""
    head = store.read_head(directory)
    origin = head["model"]
    if factory is not None:
        network = store.load(directory, lambda: build(factory, **options))
    elif options:
        raise SecateurError(f"{directory} is a saved model: it takes no options, unless --build says what makes it")
    elif origin is None or is_import_string(origin["name"]):
        raise SecateurError(_ask_for_factory(directory, origin, verb))
    else:
        network = store.load(directory)
    noted = head["notes"].get(INPUT)
    if shape is None and isinstance(noted, list) and noted and all(type(n) is int and n > 0 for n in noted):
        shape = noted
    if shape is None and origin is not None and not is_import_string(origin["name"]):
        shape = list(example_input(origin["name"], **origin["options"]))
    if shape is None:
        raise SecateurError(
            f"{directory}: nobody knows the shape of its inputs: give --input, such as --input 1,3,32,32"
        )
    return network, shape


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
