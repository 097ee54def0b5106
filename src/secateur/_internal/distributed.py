"""Several processes that work on one thing, where ``torch.distributed`` runs; otherwise there is one.

One contract for all that takes data: every process sees its own shard, sums are added up over the processes, and what
decides (a plan, widths, whether to stop) is taken on rank 0 and told to the others. ``group=None`` is the default
group.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from secateur._internal.errors import SecateurError


def _import_without_group() -> None:
    """Import ``torch.distributed.nn``, which tracing does somewhere below, without a group in its default arguments.

    Its functions take the default group of the time of the import as default argument, and keep it for ever. Its
    threads would then outlive ``destroy_process_group``, and may abort the process at its exit
    (https://github.com/pytorch/pytorch/issues/190489). Imported before there is a group, they have ``None`` there,
    which means the default group of the time of the call; so that is put there when the import comes later.
    """
    functional = importlib.import_module("torch.distributed.nn.functional")
    for function in vars(functional).values():
        if inspect.isfunction(function) and function.__module__ == functional.__name__ and function.__defaults__:
            function.__defaults__ = tuple(
                None if isinstance(v, dist.ProcessGroup) else v for v in function.__defaults__
            )


if dist.is_available():
    _import_without_group()

Group = Any
"""A ``torch.distributed`` process group, or ``None`` for the default one."""
T = TypeVar("T")


def world_size(group: Group = None) -> int:
    """How many processes there are."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """Which of them this one is, from 0 on."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def all_reduce(values: np.ndarray, device: torch.device, group: Group = None) -> np.ndarray:
    """The sum of numbers over all processes, float64; ``device`` is one that they can share."""
    if world_size(group) == 1:
        return values
    whole = torch.from_numpy(values).to(device)
    dist.all_reduce(whole, group=group)
    return np.asarray(whole.cpu().numpy())


def all_reduce_(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_gather(tensor: Tensor, group: Group = None) -> list[Tensor]:
    """The tensors of all processes, in the order of their ranks; their first dims may differ."""
    world = world_size(group)
    if world == 1:
        return [tensor]
    own = torch.tensor([len(tensor)], device=tensor.device)
    sizes = [torch.zeros_like(own) for _ in range(world)]
    dist.all_gather(sizes, own, group=group)
    most = max(int(size) for size in sizes)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    found = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(found, padded, group=group)
    return [part[: int(size)] for part, size in zip(found, sizes, strict=True)]


def together(compute: Callable[[], T], device: torch.device, group: Group = None) -> T:
    """What each process computes by itself; an error of one is an error of all, so that none waits for another.

    Args:
        compute: must not communicate.
        device: one that the processes can share.
        group: the processes.

    Raises:
        SecateurError: another process failed, with its error's text; a process that failed itself raises its own error.
    """
    if world_size(group) == 1:
        return compute()
    found, failed = None, None
    try:
        found = compute()
    except Exception as error:
        failed = error
    if all_reduce(np.array([float(failed is not None)]), device, group)[0]:
        text = "" if failed is None else str(failed) or type(failed).__name__
        told = all_gather(torch.tensor(list(text.encode()), dtype=torch.uint8, device=device), group)
        if failed is not None:
            raise failed
        first = next(number for number, own in enumerate(told) if len(own))
        raise SecateurError(f"process {first}: {bytes(told[first].tolist()).decode()}")
    return found  # type: ignore[return-value]


def broadcast_(tensor: Tensor, group: Group = None) -> Tensor:
    """The tensor that rank 0 has, in place; it must be contiguous, and of one shape and dtype everywhere."""
    if world_size(group) > 1:
        dist.broadcast(tensor, dist.get_global_rank(group, 0) if group is not None else 0, group=group)
    return tensor


def broadcast_text(text: str, device: torch.device, group: Group = None) -> str:
    """The text that rank 0 has."""
    if world_size(group) == 1:
        return text
    source = dist.get_global_rank(group, 0) if group is not None else 0
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor(len(own), device=device)
    dist.broadcast(size, source, group=group)
    found = own if rank(group) == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(found, source, group=group)
    return bytes(found.tolist()).decode()


def broadcast_json(value: Any, device: torch.device, group: Group = None) -> Any:
    """What rank 0 has, of the kinds that JSON can hold."""
    return value if world_size(group) == 1 else json.loads(broadcast_text(json.dumps(value), device, group))
