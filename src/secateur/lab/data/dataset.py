"""What a data set is here: three splits of tensors, and how to normalise them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from secateur._internal.errors import SecateurError, unknown
from secateur.lab.data.loader import Loader


@dataclass(frozen=True, eq=False)
class Split:
    """Images [n, channels, height, width] (uint8, or floats as they are) and int64 labels [n], on one device."""

    images: Tensor
    labels: Tensor

    def __repr__(self) -> str:
        return f"Split({len(self)} of {'x'.join(map(str, self.images.shape[1:]))}, {self.images.dtype})"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Split:
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, wholly on one device.

    Attributes:
        name: as it was asked for.
        train: what is trained on.
        validation: carved from the training data, for everything that is chosen; ``None`` if nothing was held out.
        test: for the final number alone.
        classes: number of labels.
        mean: of each channel, after division by 255 for uint8 images.
        std: likewise.
        notes: what a reader of a number measured on it must know.
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    notes: str = ""

    @property
    def image(self) -> tuple[int, ...]:
        """Shape [channels, height, width] of one image."""
        return tuple(self.train.images.shape[1:])

    def example(self, count: int = 1) -> Tensor:
        """So many images of zeros, on the CPU."""
        return torch.zeros(count, *self.image)

    def split(self, name: str) -> Split:
        """The split ``train``, ``validation`` or ``test``."""
        if name not in {"train", "validation", "test"}:
            raise unknown("split", name, ("train", "validation", "test"))
        split = getattr(self, name)
        if split is None:
            raise SecateurError(f"data {self.name!r} has no validation split: load it with validation=0.1, say")
        return split

    def loader(
        self,
        split: str = "train",
        batch_size: int = 128,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
    ) -> Loader:
        """Normalised batches of one split."""
        part = self.split(split)
        return Loader(
            part.images,
            part.labels,
            batch_size,
            shuffle=shuffle,
            augment=augment,
            seed=seed,
            mean=self.mean,
            std=self.std,
        )

    def to(self, device: str | torch.device) -> Dataset:
        """The same data on another device."""

        def move(split: Split) -> Split:
            return Split(split.images.to(device), split.labels.to(device))

        held_out = None if self.validation is None else move(self.validation)
        return replace(self, train=move(self.train), validation=held_out, test=move(self.test))


def stratified(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted row numbers of two parts with the same share of every class: (the rest, the fraction).

    Args:
        labels: int64 [n].
        fraction: share of every class that goes to the second part, rounded to whole images.
        seed: decides which; NumPy's RandomState, whose stream never changes between versions.
    """
    generator = np.random.RandomState(seed)
    classes = labels.cpu().numpy()
    second = np.zeros(len(classes), dtype=bool)
    for label in np.unique(classes):
        rows = np.flatnonzero(classes == label)
        second[generator.permutation(rows)[: round(fraction * len(rows))]] = True
    return torch.from_numpy(np.flatnonzero(~second)), torch.from_numpy(np.flatnonzero(second))


def hold_out(train: Split, fraction: float, seed: int = 0) -> tuple[Split, Split | None]:
    """Carve a validation split from training data: (what stays, what is held out or ``None``).

    Raises:
        SecateurError: the fraction is not in [0, 1), or leaves one of the two parts empty.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
        raise SecateurError(f"validation={fraction!r}: a fraction of the training data in [0, 1) is expected")
    if fraction == 0:
        return train, None
    stay, out = stratified(train.labels, fraction, seed)
    if not len(stay) or not len(out):
        raise SecateurError(
            f"validation={fraction!r} of {len(train)} images leaves an empty part: use another fraction"
        )
    return train[stay.to(train.labels.device)], train[out.to(train.labels.device)]
