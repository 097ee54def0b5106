"""Several processes that work on one thing, where ``torch.distributed`` runs; otherwise there is one."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

# `torch.distributed.nn` keeps the group of the time of its import as a default argument for ever. Tracing would import
# it later, when there may be a group, whose threads would then outlive `destroy_process_group` and may abort the
# process at its exit (https://github.com/pytorch/pytorch/issues/190489).
if dist.is_available():
    import torch.distributed.nn


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0 on."""
    return dist.get_rank() if processes() > 1 else 0


def summed(values: np.ndarray, device: torch.device) -> np.ndarray:
    """The sum of numbers over all processes, float64; ``device`` is one that they can share."""
    if processes() == 1:
        return values
    whole = torch.from_numpy(values).to(device)
    dist.all_reduce(whole)
    return np.asarray(whole.cpu().numpy())


def told(text: str, device: torch.device) -> str:
    """The text that the first process has."""
    if processes() == 1:
        return text
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor(len(own), device=device)
    dist.broadcast(size, 0)
    found = own if rank() == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(found, 0)
    return bytes(found.tolist()).decode()
