"""Nested state as tensors and JSON, and as one safetensors file: nothing is pickled.

``pack`` takes a state apart into tensors and JSON, ``unpack`` puts it together. The JSON and a checksum travel in the
safetensors header, so that a state is a single file: it is there or it is not.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.files import write_atomically


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
            raise BadFile(f"{path}: the checksum does not match: the file is damaged")
        return unpack(tensors, json.loads(text))
    except (safetensors.SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise BadFile(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error


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


def digest_of(value: Any) -> bytes:
    """SHA-256 of all tensors in a value, and of the numbers and texts beside them, in their order."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, (str, int, float, bool)) or leaf is None:
            found.update(repr(leaf).encode())
    return found.digest()
