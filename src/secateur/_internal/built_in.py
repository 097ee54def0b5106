"""The networks that come with the project, known by name to those who must not know where they are made.

A save of such a network holds its name and options, so that ``load`` needs no function from the user. The networks
themselves are in the lab, which is above everything that saves and loads. So the lab registers them here, and the first
look-up imports the one module that does. Only these names are ever looked up: a name out of a file can make one of
these networks, and cannot import anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from secateur._internal.errors import unknown

Maker = Callable[..., nn.Module]

ROOM = "secateur.lab.models.registry"
"""The module that registers the networks when it is imported."""
_ORIGIN = "_secateur_built"
_MAKERS: dict[str, Maker] = {}


def register(name: str, make: Maker) -> None:
    """Make a network known.

    Args:
        name: of the network.
        make: builds it; the keyword arguments are its options, which it checks.
    """
    _MAKERS[name] = make


def names() -> list[str]:
    """The names of all networks."""
    importlib.import_module(ROOM)
    return list(_MAKERS)


def make(name: str, options: Mapping[str, Any]) -> nn.Module:
    """A fresh network.

    Raises:
        SecateurError: no network has this name, or it takes no such options.
    """
    known = names()
    if name not in known:
        raise unknown("model", name, known)
    return _MAKERS[name](**options)


def set_origin(model: nn.Module, name: str, options: Mapping[str, Any]) -> None:
    """Let a model remember what it was made by.

    Args:
        model: the model, which gets an attribute.
        name: of the network, or ``package.module:factory`` of a user's own.
        options: that it was made with.
    """
    setattr(model, _ORIGIN, {"name": name, "options": dict(options)})


def origin(model: nn.Module) -> dict[str, Any] | None:
    """``name`` and ``options`` of what a model was made by, as far as it remembers; a cut model remembers it too."""
    found = getattr(model, _ORIGIN, None)
    return None if found is None else dict(found)
