"""Packages that ``pip install secateur`` does not bring, and what to say where they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from secateur._internal.errors import SecateurError


class MissingExtra(SecateurError, ImportError):
    """A package of one of the project's extras is not installed."""


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Import packages of an extra; where one is missing, say which extra brings it.

    ::

        with extra("lab", "a recipe"):
            import yaml

    Args:
        name: of the extra.
        what: needs the packages.

    Raises:
        MissingExtra: one of them is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).split(".")[0]
        if isinstance(error, MissingExtra) or package in {"secateur", "torch"}:
            raise
        raise MissingExtra(f"{what} needs {package}, which is not installed: pip install 'secateur[{name}]'") from error
