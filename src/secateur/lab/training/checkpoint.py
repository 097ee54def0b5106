"""Checkpoints of a training run, one file a step, the last two kept; a damaged one gives way to its predecessor."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.files import make_folder
from secateur._internal.serial import read, write

KEPT = 2
PATTERN = re.compile(r"step-(\d+)\.safetensors")


def save(folder: Path, step: int, state: Any) -> None:
    """Write the checkpoint of a step; drop all but the last two, and what a killed run left half written."""
    make_folder(folder)
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
        raise BadFile(f"no checkpoint in {folder} can be read ({'; '.join(reasons)}): delete them to begin anew")
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
