"""Values that settings may have; each check raises one message that says what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from secateur._internal.errors import SecateurError, unknown


def is_number(value: object) -> bool:
    """Whether it is a finite number (true and false are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_count(name: str, value: object, least: int = 1, *, optional: bool = False) -> None:
    """Raise if it is no whole number from ``least`` on."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SecateurError(f"{name}={value!r}: a whole number from {least} on is expected")


def check_seed(seed: object) -> None:
    """Raise if it is no seed."""
    check_count("seed", seed, 0)


def check_flag(name: str, value: object) -> None:
    """Raise if it is neither true nor false."""
    if not isinstance(value, bool):
        raise SecateurError(f"{name}={value!r}: true or false is expected")


def check_positive(name: str, value: object, *, optional: bool = False) -> None:
    """Raise if it is no number above 0."""
    if value is None and optional:
        return
    if not is_number(value) or not value > 0:  # type: ignore[operator]
        raise SecateurError(f"{name}={value!r}: a number above 0 is expected")


def check_nonnegative(name: str, value: object) -> None:
    """Raise if it is no number from 0 on."""
    if not is_number(value) or not value >= 0:  # type: ignore[operator]
        raise SecateurError(f"{name}={value!r}: a number from 0 on is expected")


def check_open_fraction(name: str, value: object) -> None:
    """Raise if it is no number in (0, 1)."""
    if not is_number(value) or not 0 < value < 1:  # type: ignore[operator]
        raise SecateurError(f"{name}={value!r}: a number in (0, 1) is expected")


def check_choice(kind: str, value: object, known: Iterable[str]) -> None:
    """Raise if it is none of these names."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise unknown(kind, value, known)


def check_names(name: str, value: object, what: str) -> None:
    """Raise if it is no list of texts."""
    listed = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, str) for item in value)
    if not listed:
        raise SecateurError(f"{name}={value!r}: a list of the {what} is expected")
