"""Checkpoints without pickle: any nested state as one safetensors file, written atomically, the last two kept.

``pack`` takes a state apart into tensors and JSON, ``unpack`` puts it together. The JSON and a checksum travel in the
safetensors header, so a checkpoint is a single file: it is there or it is not. A damaged one is passed over for its
predecessor.
"""

from __future__ import annotations

import json
import os
import random
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from secateur.errors import SecateurError

KEPT = 2
PATTERN = re.compile(r"step-(\d+)\.safetensors")


def pack(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Take a nested state apart: (tensors on the CPU by name, the rest as what JSON can hold).

    Args:
        state: dicts (any plain keys), lists, tuples, numbers, strings, ``None`` and tensors, nested at will.

    Raises:
        SecateurError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}

    def take(value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            name = f"{len(tensors)}:{path}"
            last = _channels_last(value)
            # a copy, laid out plainly: safetensors knows neither strides nor shared memory
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"$tensor": name, **({"$layout": "channels_last"} if last else {})}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: take(item, f"{path}.{key}") for key, item in value.items()}
            return {"$dict": [[take(key, path), take(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [take(item, f"{path}.{i}") for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        raise SecateurError(f"state{path}: a {type(value).__name__} cannot be saved: use numbers, strings and tensors")

    return tensors, take(state, "")


def unpack(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """Put together what ``pack`` took apart."""
    if isinstance(tree, list):
        return [unpack(tensors, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        tensor = tensors[tree["$tensor"]]
        return tensor.contiguous(memory_format=torch.channels_last) if "$layout" in tree else tensor
    if "$tuple" in tree:
        return tuple(unpack(tensors, item) for item in tree["$tuple"])
    if "$dict" in tree:
        return {unpack(tensors, key): unpack(tensors, item) for key, item in tree["$dict"]}
    return {key: unpack(tensors, item) for key, item in tree.items()}


def file_at(path: str | Path | None) -> Path | None:
    """Where a checkpoint in a single file is to be.

    Raises:
        SecateurError: it cannot be there.
    """
    if path is None:
        return None
    if not isinstance(path, (str, Path)) or Path(path).is_dir() or not Path(path).parent.is_dir():
        raise SecateurError(f"checkpoint={str(path)!r}: a file in a folder that is there is expected")
    return Path(path)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write(path: Path, state: Any) -> None:
    """Save a nested state to one file."""
    tensors, tree = pack(state)
    text = json.dumps(tree)
    write_atomically(path, to_bytes(tensors, {"state": text, "crc32": _checksum(tensors, text)}))


def read(path: Path) -> Any:
    """Read what ``write`` saved.

    Raises:
        SecateurError: the file is damaged or not a checkpoint.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        text = header["state"]
        if header["crc32"] != _checksum(tensors, text):
            raise SecateurError(f"{path}: the checksum does not match: the file is damaged")
        return unpack(tensors, json.loads(text))
    except (safetensors.SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise SecateurError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error


def save(folder: Path, step: int, state: Any) -> None:
    """Write the checkpoint of a step; drop all but the last two, and what a killed run left half written."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"step-{step:010d}.safetensors", state)
    for old in [*_found(folder)[KEPT:], *folder.glob("step-*.safetensors.*.tmp")]:
        old.unlink(missing_ok=True)


def newest(folder: Path) -> Any | None:
    """The state of the newest checkpoint that can be read; ``None`` if there is none at all.

    Raises:
        SecateurError: there are checkpoints, but all are damaged.
    """
    reasons = []
    for path in _found(folder):
        try:
            return read(path)
        except SecateurError as error:
            reasons.append(str(error))
    if reasons:
        raise SecateurError(f"no checkpoint in {folder} can be read ({'; '.join(reasons)}): delete them to begin anew")
    return None


def random_states() -> dict[str, Any]:
    """The global random states of Python, NumPy and torch."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set what ``random_states`` gave."""
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _found(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if PATTERN.fullmatch(path.name)), reverse=True)


def _channels_last(tensor: Tensor) -> bool:
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        raw = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        value = zlib.crc32(raw, value)
    return f"{value:08x}"
