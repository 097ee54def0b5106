"""Batches from tensors that lie on the device: shuffled, augmented and sharded by whole-tensor operations.

The order of the images and every crop and flip of an epoch are a function of ``(seed, epoch)`` alone, drawn from a
generator of its own. So a run may begin anywhere (``batches(start)``), and the shards of one step, over all ranks, are
together exactly the batch that one process would see.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur._internal.errors import SecateurError

PAD = 4  # pixels on each side, the habit of the field for 32x32 images


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator that depends on the seed and the epoch only, well mixed."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def crop_flip(images: Tensor, rows: Tensor, columns: Tensor, flip: Tensor) -> Tensor:
    """Crop every image from its own zero-padded self, and mirror some.

    Args:
        images: [n, channels, height, width].
        rows: int64 [n], upper edge of the crop in the padded image; ``PAD`` is the image itself.
        columns: int64 [n], its left edge.
        flip: bool [n], which images are mirrored left to right.
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    y = rows[:, None] + torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device).expand(n, width)
    x = columns[:, None] + torch.where(flip[:, None], width - 1 - x, x)
    image = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, y[:, None, :, None], x[:, None, None, :]]


class Loader:
    """Batches ``(x, y)`` of normalised float32 images and int64 labels.

    Args:
        images: [n, channels, height, width]; uint8 is divided by 255, floats are taken as they are.
        labels: integers [n].
        batch_size: images a step, over all ranks together.
        shuffle: a new order every epoch.
        augment: crops from the image padded by 4, and mirror images.
        seed: of order and augmentation.
        mean: of each channel; empty for no normalisation.
        std: likewise.
        rank: which share of each batch is ours.
        world: into how many shares a batch is cut.
        drop_last: leave out a last batch that is not full.

    Raises:
        SecateurError: no images, shapes that do not fit, or a batch that cannot be shared among the ranks.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int = 128,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        _check_tensors(images, labels, mean=mean, std=std)
        _check_number("batch_size", batch_size, least=1)
        _check_number("seed", seed, least=0)
        self.images, self.labels, self.batch_size, self.seed = images, labels.to(torch.int64), batch_size, seed
        self.shuffle, self.augment, self.drop_last = shuffle, augment, drop_last
        self.epoch, self.rank, self.world = 0, 0, 1
        shape = (1, -1, 1, 1)
        self.mean = torch.tensor(mean, device=images.device).view(shape) if len(mean) else None
        self.std = torch.tensor(std, device=images.device).view(shape) if len(std) else None
        if not len(self):
            raise SecateurError(f"drop_last=True leaves no batch: {len(images)} images are fewer than {batch_size=}")
        if world != 1 or rank != 0:
            self._share(rank, world)

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass."""
        self.epoch = epoch

    def shard(self, rank: int, world: int) -> Loader:
        """The same loader, reduced to one rank's share of every batch."""
        other = copy.copy(self)
        other._share(rank, world)
        return other

    def size(self, step: int) -> int:
        """Images in the given batch of an epoch, over all ranks."""
        return min(self.batch_size, len(self.labels) - step * self.batch_size)

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This epoch's batches from the given one on."""
        n, device, generator = len(self.labels), self.images.device, epoch_generator(self.seed, self.epoch)
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        order = order.to(device)
        if self.augment:
            offsets = torch.randint(2 * PAD + 1, (2, n), generator=generator).to(device)
            flip = torch.randint(2, (n,), generator=generator).bool().to(device)
        for step in range(start, len(self)):
            mine = slice(step * self.batch_size + self.rank, step * self.batch_size + self.size(step), self.world)
            x = self.images[order[mine]]
            if self.augment:
                x = crop_flip(x, offsets[0, mine], offsets[1, mine], flip[mine])
            yield self.normalise(x), self.labels[order[mine]]

    def normalise(self, images: Tensor) -> Tensor:
        """Float images, each channel with its mean taken off and divided by its standard deviation."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        if self.mean is not None:
            x = x - self.mean
        return x if self.std is None else x / self.std

    def _share(self, rank: int, world: int) -> None:
        if not 0 <= rank < world:
            raise SecateurError(f"rank={rank}, world={world}: 0 <= rank < world is expected")
        least = self.size(len(self) - 1)
        if least < world:
            raise SecateurError(
                f"batch_size={self.batch_size} of {len(self.labels)} images: the last batch of {least} cannot be "
                f"shared among {world} processes; choose another batch size or drop_last=True"
            )
        self.rank, self.world = rank, world


def _check_tensors(images: Tensor, labels: Tensor, **of_channels: Sequence[float]) -> None:
    if images.dim() != 4:
        raise SecateurError(f"images of shape {list(images.shape)}: [n, channels, height, width] is expected")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise SecateurError(f"images of type {images.dtype}: uint8 or floats are expected")
    if labels.dim() != 1 or labels.is_floating_point() or len(labels) != len(images):
        raise SecateurError(
            f"labels of shape {list(labels.shape)} and type {labels.dtype}: one integer for each of the "
            f"{len(images)} images is expected"
        )
    if not len(images):
        raise SecateurError("an empty loader: there is no image in it")
    if images.device != labels.device:
        raise SecateurError(f"images on {images.device}, labels on {labels.device}: put both on one device")
    for name, values in of_channels.items():
        if len(values) not in (0, images.shape[1]):
            raise SecateurError(
                f"{name} of {len(values)} values: one for each of {images.shape[1]} channels is expected"
            )


def _check_number(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SecateurError(f"{name}={value!r}: an integer of at least {least} is expected")
