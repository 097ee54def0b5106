"""Weights in safetensors, in files of at most so many bytes, as Hugging Face divides them.

A model that is larger than one file has several and ``model.safetensors.index.json``, which says which tensor is where.
No more than one of them is in memory beside the model, and of those that are read no more than a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from secateur._internal.errors import BadFile
from secateur._internal.files import write_atomically

SHARD = 5 * 10**9
"""Bytes of a file, at most, unless a single tensor is larger."""
INDEX = "model.safetensors.index.json"
BLOCK = 1 << 20


def divided(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of the tensors of each file, in their order."""
    found: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        own = tensor.numel() * tensor.element_size()
        if found[-1] and size + own > SHARD:
            found.append([])
            size = 0
        found[-1].append(name)
        size += own
    return found


def names_of(stem: str, count: int) -> list[str]:
    """The names of the files."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}.{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors as one file, or as several.

    Args:
        folder: where to.
        stem: what the files' names begin with; none of these names is in use.
        tensors: by name.

    Returns:
        The checksum (SHA-256) of each file.

    Raises:
        BadFile: they cannot be written; nothing is left of them.
        SafetensorError, RuntimeError, ValueError, KeyError: a tensor of a kind that cannot be stored; likewise.
    """
    parts = divided(tensors)
    done: dict[str, str] = {}
    try:
        for name, part in zip(names_of(stem, len(parts)), parts, strict=True):
            content = to_bytes(apart({key: tensors[key] for key in part}))
            write_atomically(folder / name, content)
            done[name] = hashlib.sha256(content).hexdigest()
    except BaseException:
        for name in done:  # nothing refers to them, and they take up room
            (folder / name).unlink(missing_ok=True)
        raise
    return done


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own; copied only where they are not so."""
    found, seen = {}, set[int]()
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        whole = own.untyped_storage().nbytes() == own.numel() * own.element_size()
        found[name] = own if whole and own.data_ptr() not in seen else own.clone()
        seen.add(own.data_ptr())
    return found


def index(tensors: Mapping[str, Tensor], files: Sequence[str]) -> bytes:
    """What the index says, as JSON."""
    parts = divided(tensors)
    where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1) + "\n").encode()


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class Weights:
    """Tensors in files, of which one is open at a time, read when they are asked for.

    Args:
        paths: of the files.

    Raises:
        SafetensorError, OSError: one cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, torch.Size] = {}
        self._open: tuple[Path, Any] | None = None
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    self.where[name] = path
                    self.shapes[name] = torch.Size(file.get_slice(name).get_shape())

    @property
    def names(self) -> set[str]:
        """Of all."""
        return set(self.where)

    def __getitem__(self, name: str) -> Tensor:
        path = self.where[name]
        if self._open is None or self._open[0] != path:
            self._open = None  # what is mapped counts as memory of the process
            self._open = path, safe_open(path, "pt")
        tensor: Tensor = self._open[1].get_tensor(name)
        return tensor


def checked(folder: Path, checksums: Mapping[str, str], said_in: str) -> Weights:
    """The tensors of some files, whose checksums are looked at first.

    Args:
        folder: where they are.
        checksums: of each file.
        said_in: the file that says so, for messages.

    Raises:
        BadFile: a file is missing or damaged.
    """
    for name, due in checksums.items():
        path = folder / name
        if not path.is_file():
            raise BadFile(f"{folder}: its weights, {name}, are missing")
        try:
            same = checksum(path) == due
        except OSError as error:
            raise BadFile(f"{path} cannot be read ({error})") from error
        if not same:
            raise BadFile(f"{path} is damaged, cut short or of another save: its checksum is not the one in {said_in}")
    try:
        return Weights([folder / name for name in checksums])
    except (SafetensorError, OSError) as error:
        raise BadFile(f"{folder}: its weights cannot be read ({error})") from error


def unchecked(path: Path) -> Weights:
    """The tensors of a file, or of all that an index names, as somebody else has written them.

    Raises:
        BadFile: an index that is none.
        SafetensorError, OSError: a file that cannot be read.
    """
    if path.suffix != ".json":
        return Weights([path])
    try:
        named = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"weights {path}: it is no index of safetensors files ({error})") from error
    return Weights([path.with_name(Path(str(name)).name) for name in sorted(named)])
