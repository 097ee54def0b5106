"""``package.module:factory``: how a user names a model or a data set of their own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from secateur._internal.errors import SecateurError


def is_import_string(name: str) -> bool:
    """Whether a name means a user's own factory rather than a built-in one."""
    return ":" in name


def import_string(kind: str, path: str, *, calls: bool = True) -> Any:
    """The callable behind ``package.module:factory``.

    Args:
        kind: what is looked for, for the error (``"model"``, ``"data"``).
        path: import path and attribute (dots reach nested attributes), joined by a colon.
        calls: whether it must be something to call.

    Raises:
        SecateurError: the module cannot be imported, lacks the attribute, or the attribute cannot be called.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise SecateurError(f"{kind} {path!r}: expected package.module:factory, such as my_nets.small:make_model")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise SecateurError(
            f"{kind} {path!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); "
            "is its folder the current one, or on PYTHONPATH?"
        ) from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            file = getattr(sys.modules[module_name], "__file__", None)
            where = f"; the module that was found is {file}" if file else ""
            raise SecateurError(f"{kind} {path!r}: {module_name!r} has no {attribute!r}{where}")
        target = getattr(target, part)
    if calls and not callable(target):
        raise SecateurError(f"{kind} {path!r}: {attribute!r} is a {type(target).__name__}, not something to call")
    return target


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Find modules in the current folder, too, as ``python -m`` does: a command's own folder is that of its program.

    The current folder comes last, so that a file in it never takes the place of a package that is installed.
    """
    here = ""
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def package(name: str, who: str, install: str | None = None) -> Any:
    """A package that is no requirement of ours.

    Args:
        name: what is imported.
        who: needs it.
        install: what to install, if that has another name.

    Raises:
        SecateurError: it is not there, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever another package raises while it is imported
        why = "which is not installed" if isinstance(error, ModuleNotFoundError) else f"which fails: {error}"
        raise SecateurError(f"{who} needs {install or name}, {why}; pip install {install or name}") from error
