"""The errors of the project, and the words it uses for unknown names."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


class SecateurError(ValueError):
    """Bad input, told once: what was given, what is allowed, what to do next."""


class NothingToPrune(SecateurError):
    """The model has no channel that can go."""


class InfeasibleBudget(SecateurError):
    """No plan meets the budget."""


class CannotCut(SecateurError):
    """Each group may be cut, but the model's own Python does not bear this combination."""


class CannotMeasure(SecateurError):
    """Nothing of a model is what a criterion looks at, or the data reached none of it."""


class BadBatch(SecateurError):
    """Data that cannot be read, or that fits neither the model nor the loss."""


class BadFile(SecateurError):
    """A file that is damaged, of somebody else, or cannot be written."""


class SecateurWarning(UserWarning):
    """Something was substituted, skipped or is only approximate; the text says what and why."""


def notice(text: str, stacklevel: int = 3) -> None:
    """Tell the user of something that is no error but must not pass in silence."""
    warnings.warn(text, SecateurWarning, stacklevel=stacklevel)


def unknown(kind: str, given: object, known: Iterable[str], also: Iterable[str] = ()) -> SecateurError:
    """An error for an unknown name that suggests the nearest known one, or of others that are not listed."""
    names = sorted(known)
    close = difflib.get_close_matches(str(given), [*names, *sorted(also)], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return SecateurError(f"unknown {kind} {given!r}: {hint}known: {', '.join(names)}")
