"""Which layers are left alone, for methods that change layers and know nothing of channel groups."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from secateur._internal.errors import SecateurError, unknown
from secateur.tracing.selection import Exclude


def excluded_layers(model: nn.Module, exclude: Exclude) -> dict[str, str]:
    """The paths of all modules that are excluded, and of those inside them -> why.

    Args:
        model: the model.
        exclude: glob patterns of module paths (``*`` also matches dots), modules, types of modules; one or several.

    Raises:
        SecateurError: a pattern, a module or a type that nothing in the model is, or something else.
    """
    found: dict[str, str] = {}
    for given in check_exclude(exclude):
        meant = _meant(model, given)
        inside = {id(part) for module in meant for part in module.modules()}
        words = repr(given) if isinstance(given, str) else getattr(given, "__name__", "the module itself")
        for path, module in model.named_modules(remove_duplicate=False):
            if id(module) in inside:
                found.setdefault(path, f"excluded by {words}")
    return found


def check_exclude(exclude: Any) -> list[Any]:
    """What is excluded as a list, after a look at its kind.

    Raises:
        SecateurError: it is not of the kinds that can be excluded.
    """
    one = isinstance(exclude, (str, nn.Module, type))
    listed = [exclude] if one else list(exclude) if isinstance(exclude, (list, tuple, set, frozenset)) else None
    if listed is None or not all(_is_selector(given) for given in listed):
        raise SecateurError(
            f"exclude={exclude!r}: patterns of names, modules or types of modules are expected, for instance "
            "['head', 'layers.0.*']"
        )
    return listed


def _is_selector(given: Any) -> bool:
    return isinstance(given, (str, nn.Module)) or (isinstance(given, type) and issubclass(given, nn.Module))


def _meant(model: nn.Module, given: Any) -> list[nn.Module]:
    """The modules that one pattern, module or type means."""
    paths = dict(model.named_modules(remove_duplicate=False))
    if isinstance(given, str):
        found = [module for path, module in paths.items() if fnmatchcase(path, given)]
        if not found:
            raise unknown("layer or module in exclude", given, [path for path in paths if path])
        return found
    if isinstance(given, nn.Module):
        if not any(module is given for module in paths.values()):
            raise SecateurError(f"exclude: this {type(given).__name__} is no module of the model: give one of its own")
        return [given]
    found = [module for module in paths.values() if isinstance(module, given)]
    if not found:
        raise unknown("type of module in exclude", given.__name__, {type(m).__name__ for m in paths.values()})
    return found


def frozen_layers(model: nn.Module) -> dict[str, str]:
    """The paths of modules whose weight does not require gradients -> why they are left alone.

    A model of which nothing is trained any more says nothing of its single layers.
    """
    if not any(p.requires_grad for p in model.parameters()):
        return {}
    weights = ((path, module._parameters.get("weight")) for path, module in model.named_modules())
    return {path: FROZEN for path, weight in weights if weight is not None and not weight.requires_grad}


FROZEN = "its weight does not require gradients"
