"""What was done to a model to make it what it is: a list that travels with it, and that ``save`` writes."""

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
    """What was done to a model to make it what it is, in order, as data."""
    return [{kind: step.to_json() for kind, step in entry.items()} for entry in getattr(model, _RECORD, [])]


def add_to_record(new: nn.Module, old: nn.Module, entry: Mapping[str, Step]) -> nn.Module:
    """The new model, remembering what the old one does and one more step."""
    setattr(new, _RECORD, [*getattr(old, _RECORD, []), dict(entry)])
    return new
