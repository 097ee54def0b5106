"""The one error of the project, and the words it uses for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(ValueError):
    """Bad input, told once: what was given, what is allowed, what to do next."""


def check_seed(seed: object) -> None:
    """Raise if it is no seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise SecateurError(f"seed={seed!r}: a whole number from 0 on is expected")


def unknown(kind: str, given: object, known: Iterable[str]) -> SecateurError:
    """An error for an unknown name that suggests the nearest known one."""
    names = sorted(known)
    close = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return SecateurError(f"unknown {kind} {given!r}: {hint}known: {', '.join(names)}")
