"""What was done to a model to make it what it is: a list that travels with it, and that ``save`` writes.

The list holds plain strings in plain dicts and no object of this project's, so that a model of the user's own classes
that was pickled whole (``torch.save(small)``) can be read where secateur is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn

_RECORD = "_secateur_record"


class Step(Protocol):
    """One thing done, as data."""

    def to_json(self) -> str:
        """As JSON text, with the fingerprint of the model it was done to."""


def record(model: nn.Module) -> list[dict[str, str]]:
    """What was done to a model to make it what it is, in order: the kind of each step, and the step as JSON text."""
    return [dict(entry) for entry in getattr(model, _RECORD, [])]


def add_to_record(new: nn.Module, old: nn.Module, entry: Mapping[str, Step]) -> nn.Module:
    """The new model, remembering what was done to the old one and one more step."""
    step = {kind: done.to_json() for kind, done in entry.items()}
    setattr(new, _RECORD, [*record(old), step])
    return new
