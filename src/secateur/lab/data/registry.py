"""Data sets by name: digits (inside scikit-learn), MNIST and CIFAR-10 (parquet), or ``package.module:factory``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur._internal import importing as factory
from secateur._internal.errors import SecateurError, unknown
from secateur._internal.extras import extra
from secateur.lab.data import parquet
from secateur.lab.data.dataset import Dataset, Split, hold_out, stratified
from secateur.lab.data.own import own_data


@dataclass(frozen=True)
class Source:
    """A data set in parquet files.

    Attributes:
        repository: where huggingface_hub finds it.
        layout: what its files hold.
        images: how many training and test images it has.
        mean: of each channel of the training images, after division by 255.
        std: likewise.
    """

    repository: str
    layout: parquet.Layout
    images: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


MNIST = Source(
    "ylecun/mnist", parquet.Layout(("image", "img"), (1, 28, 28), 10), (60_000, 10_000), (0.1307,), (0.3081,)
)
CIFAR10 = Source(
    "uoft-cs/cifar10",
    parquet.Layout(("img", "image"), (3, 32, 32), 10),
    (50_000, 10_000),
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
)


def digits(root: str | Path | None, validation: float) -> Dataset:
    """The 1,797 8x8 digits inside scikit-learn, values in [0, 1]; a fixed fifth of every class is the test split."""
    with extra("lab", "data 'digits'"):
        from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy((raw.images / 16).astype(np.float32))[:, None]
    everything = Split(images, torch.from_numpy(raw.target.astype(np.int64)))
    rest, test = stratified(everything.labels, 0.2)
    train, held_out = hold_out(everything[rest], validation)
    notes = "8x8 digits of scikit-learn, lossless"
    return Dataset("digits", train, held_out, everything[test], 10, (0.305,), (0.376,), notes)


def from_parquet(name: str, source: Source, root: str | Path | None, validation: float) -> Dataset:
    """A data set from local parquet files, or fetched where there is a network."""
    files = find(name, source, root)
    train, test = (parquet.read(files[split], source.layout) for split in ("train", "test"))
    splits = [Split(torch.from_numpy(part.images), torch.from_numpy(part.labels)) for part in (train, test)]
    kept, held_out = hold_out(splits[0], validation)
    notes = "images stored as JPEG (lossy)" if train.jpeg or test.jpeg else "lossless"
    return Dataset(name, kept, held_out, splits[1], source.layout.classes, source.mean, source.std, notes)


SOURCES = {"mnist": MNIST, "cifar10": CIFAR10}
DATA: dict[str, Callable[[str | Path | None, float], Dataset]] = {
    "digits": digits,
    **{name: partial(from_parquet, name, source) for name, source in SOURCES.items()},
}


def load(
    name: str, *, root: str | Path | None = None, device: str | torch.device = "cpu", validation: float = 0.1,
    options: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """A data set, wholly on the device.

    Args:
        name: a key of ``DATA``, or ``package.module:factory`` that returns a ``Dataset``, or a dict of splits, which
            becomes :class:`secateur.lab.data.own.OwnData`.
        root: a folder that holds ``NAME/train.parquet`` and ``NAME/test.parquet``. Without it: ``$SECATEUR_DATA``,
            ``data`` and ``../shared/data`` beside the working directory or this repository, then huggingface_hub.
        device: where the tensors are put.
        validation: share of every class of the training images held out, always the same ones, because nothing may
            be chosen by the test images; 0 for none. A user's own data set brings its own.
        options: keyword arguments of a factory.

    Raises:
        SecateurError: unknown name, missing or damaged files, a factory that returns something else.
    """
    if factory.is_import_string(name):
        try:
            dataset = factory.import_string("data", name)(**(options or {}))
        except SecateurError:
            raise
        except Exception as error:  # whatever a user's factory raises
            raise SecateurError(f"data {name!r}: the factory fails ({type(error).__name__}: {error})") from error
        found = dataset if isinstance(dataset, Dataset) else own_data(name, dataset)
        return found.to(device)
    if options:
        raise SecateurError(f"data.options: data {name!r} takes none; they are for package.module:factory")
    if name not in DATA:
        raise unknown("data", name, DATA)
    return DATA[name](root, validation).to(device)


def stand_in(
    name: str, *, root: str | Path | None = None, device: str | torch.device = "cpu", validation: float = 0.1,
    options: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """A data set of the same sizes whose images are all zero: nothing is read from large files, fetched or kept.

    Of ``digits``, which is small, and of a user's own, which nobody here knows, it is the data set itself.

    Args:
        name: as for :func:`load`.
        root: likewise.
        device: likewise.
        validation: likewise.
        options: likewise.
    """
    source = SOURCES.get(name)
    if source is None:
        return load(name, root=root, device=device, validation=validation, options=options)
    here = local(name, root) is not None
    held_out = round(validation * source.images[0])

    def split(number: int) -> Split:
        images = torch.zeros((1, *source.layout.shape), dtype=torch.uint8, device=device).expand(number, -1, -1, -1)
        return Split(images, torch.arange(number, device=device) % source.layout.classes)

    train, test = split(source.images[0] - held_out), split(source.images[1])
    notes = "" if here else f"data {name!r} is not here: a run fetches it from {source.repository}"
    layout = source.layout
    return Dataset(name, train, split(held_out) if held_out else None, test, layout.classes, notes=notes)


def local(name: str, root: str | Path | None) -> dict[str, list[Path]] | None:
    """The files of the splits ``train`` and ``test`` where they are here.

    Raises:
        SecateurError: a folder is named, and holds none.
    """
    for folder in folders(root):
        files = {split: parquet.files_of(folder / name, split) for split in ("train", "test")}
        if all(files.values()):
            return files
    if root is not None:
        raise SecateurError(f"data {name!r}: {root} holds no {name}/train.parquet and {name}/test.parquet")
    return None


def find(name: str, source: Source, root: str | Path | None) -> dict[str, list[Path]]:
    """The files of the splits ``train`` and ``test``: local ones, or fetched."""
    here = local(name, root)
    if here is not None:
        return here
    fetched = fetch(name, source.repository)
    files = {split: parquet.files_of(fetched, split) for split in ("train", "test")}
    if not all(files.values()):
        raise SecateurError(f"data {name!r}: {source.repository} was fetched but has no train and test parquet files")
    return files


def folders(root: str | Path | None) -> Iterator[Path]:
    """Where to look, in order."""
    if root is not None:
        yield Path(root)
        return
    if os.environ.get("SECATEUR_DATA"):
        yield Path(os.environ["SECATEUR_DATA"])
    for base in (Path.cwd(), Path(__file__).resolve().parents[4]):
        yield base / "data"
        yield base.parent / "shared" / "data"


def fetch(name: str, repository: str) -> Path:
    """Fetch a data set's parquet files by huggingface_hub, which keeps them in its own cache."""
    with extra("lab", f"fetching data {name!r}"):
        from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as error:  # no network, a proxy, a moved repository: the library has many errors for it
        raise SecateurError(
            f"data {name!r} is not here and cannot be fetched from {repository} ({type(error).__name__}): put "
            f"train.parquet and test.parquet of that data set into data/{name}/, or set SECATEUR_DATA to a folder "
            f"that holds {name}/"
        ) from error
