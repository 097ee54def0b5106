"""The recipes that come with the project: data of the package, found wherever and however it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from secateur._internal.errors import SecateurError, unknown
from secateur.lab.recipe.reading import read
from secateur.lab.recipe.sections import Recipe

_ENDING = ".yaml"


def shipped() -> dict[str, Traversable]:
    """The recipes that come with the project, by name."""
    folder = resources.files("secateur.lab") / "recipes"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(_ENDING)]
    return {entry.name.removesuffix(_ENDING): entry for entry in sorted(found, key=lambda entry: entry.name)}


def read_named(given: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that is meant: a YAML file, or the name of a shipped one.

    Args:
        given: a path or a name; a file that is there is meant before a name.
        overrides: ``key=value``, as for :func:`secateur.lab.recipe.reading.read`.

    Raises:
        SecateurError: neither; or what is wrong with the recipe.
    """
    path = Path(given)
    if path.is_file():
        return read(path, overrides)
    known = shipped()
    if path.suffix in {_ENDING, ".yml"} or len(path.parts) > 1:
        raise SecateurError(
            f"recipe {given!r}: there is no such file; `secateur list recipes` shows those that come with secateur"
        )
    if given not in known:
        raise unknown("recipe", given, known)
    return read(known[given], overrides, folder=Path.cwd())
