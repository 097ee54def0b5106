"""Data of a user's own in a recipe: batches of any kind that secateur takes, split by name.

A factory, ``data: {name: "my_net:splits", options: {...}}``, gives a dict with ``train`` and ``test``, and perhaps
``validation`` and ``notes``. A split is batches (a list, a ``DataLoader``: tensors, pairs, Hugging Face's dicts), or a
function of a seed that gives them, for an order that the seed decides.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from secateur._internal.batches import Batch, Inputs, examples_of, read_batch, some_of
from secateur._internal.errors import SecateurError, unknown

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Batches:
    """A split.

    Attributes:
        given: batches, or a function of a seed that gives them.
        where: what it is called in messages.
    """

    given: Any
    where: str

    def of(self, seed: int) -> Any:
        """The batches, in the order of the seed where it decides that.

        Raises:
            SecateurError: there are none, or nobody knows how many.
        """
        given = self.given
        if callable(given) and not hasattr(given, "__iter__"):
            try:
                given = given(seed) if inspect.signature(given).parameters else given()
            except SecateurError:
                raise
            except Exception as error:  # whatever a user's function raises
                raise SecateurError(f"{self.where}: it fails ({type(error).__name__}: {error})") from error
        if isinstance(given, (str, Tensor, Mapping, Iterator)) or not hasattr(given, "__iter__"):
            raise SecateurError(
                f"{self.where}: batches that can be read several times are expected (a list, a DataLoader), or a "
                f"function of a seed that gives them, not a {type(given).__name__}"
            )
        if not hasattr(given, "__len__"):
            raise SecateurError(f"{self.where}: it has no length; give a DataLoader or a list of batches")
        if not len(given):
            raise SecateurError(f"{self.where}: there is no batch in it")
        return given

    @cached_property
    def first(self) -> Batch:
        """The first batch, on the CPU."""
        return read_batch(next(iter(self.of(0))), 0, torch.device("cpu"))

    def __len__(self) -> int:
        """About how many examples it has."""
        return len(self.of(0)) * self.first.examples


@dataclass(frozen=True, eq=False)
class OwnData:
    """A user's own data.

    Attributes:
        name: ``package.module:factory``.
        train: what is trained on.
        validation: for everything that is chosen; None if nothing is held out.
        test: for the final number alone.
        notes: what a reader of a number measured on it must know.
    """

    name: str
    train: Batches
    validation: Batches | None
    test: Batches
    notes: str = ""

    def loader(
        self, split: str = "train", batch_size: int = 0, *, shuffle: bool = False, augment: bool = False, seed: int = 0
    ) -> Any:  # fmt: skip
        """The batches of a split; how large they are, and how they are augmented, is the user's own affair."""
        found = getattr(self, split, None) if split in SPLITS else None
        if found is None:
            raise unknown("split", split, [s for s in SPLITS if getattr(self, s) is not None])
        return found.of(seed if shuffle else 0)

    def example(self, count: int = 1) -> Inputs:
        """Inputs of so many examples, on the CPU, taken from the first training batch, again where it has fewer."""
        inputs = self.train.first.inputs
        return some_of(inputs, torch.arange(count) % max(examples_of(inputs), 1))

    def to(self, device: str | torch.device) -> OwnData:
        """Itself: batches are moved as they are read."""
        return self


def own_data(name: str, found: Any) -> OwnData:
    """What a factory gave, as data.

    Raises:
        SecateurError: it is nothing of the kind.
    """
    if not isinstance(found, Mapping) or not {"train", "test"} <= found.keys():
        what = f"a dict with {', '.join(map(str, found))}" if isinstance(found, Mapping) else type(found).__name__
        raise SecateurError(
            f"data {name!r}: the factory gave {what}; a dict with train and test (and perhaps validation and notes) is "
            "expected, or a secateur Dataset"
        )
    if wrong := sorted(map(str, found.keys() - {*SPLITS, "notes"})):
        raise unknown(f"split of data {name!r}", wrong[0], [*SPLITS, "notes"])
    splits = {split: Batches(found[split], f"data {name}, {split}") for split in SPLITS if found.get(split) is not None}
    for split in splits.values():
        _ = split.first
    return OwnData(name, splits["train"], splits.get("validation"), splits["test"], str(found.get("notes", "")))


def on_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs on a device."""
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, inputs)
