"""How long a forward takes, and how large the file of a model is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.modes import evaluating


@contextmanager
def threads_set(threads: int | None) -> Iterator[int]:
    """Run with that many CPU threads (``None``: as they are); gives the number in use."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def latency(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    repeats: int = 30,
    warm_up: int = 5,
    threads: int | None = None,
) -> dict[str, float | int | str]:
    """Time forwards in eval mode without gradients; mode and thread count are as before afterwards.

    Args:
        model: on the device to measure.
        inputs: a tensor, the positional arguments as a tuple, or the keyword arguments as a dict; moved to that device.
        repeats: timed forwards.
        warm_up: forwards before them.
        threads: CPU threads to use; ``None`` for as many as are set.

    Returns:
        ``median_ms``, ``iqr_ms`` (distance of the quartiles), ``min_ms``, ``repeats``, ``threads``, ``device``.

    Raises:
        SecateurError: repeats, warm_up or threads are not positive whole numbers (warm_up may be 0).
    """
    for name, value, least in (("repeats", repeats, 1), ("warm_up", warm_up, 0), ("threads", threads, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise SecateurError(f"{name}={value!r}: an integer of at least {least} is expected")
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with threads_set(threads) as used:
        times = in_turn([model], inputs, repeats, warm_up)[0]
    low, median, high = np.percentile(times, (25, 50, 75)).tolist()
    return {
        "median_ms": median,
        "iqr_ms": high - low,
        "min_ms": times.min().item(),
        "repeats": repeats,
        "threads": used,
        "device": str(device),
    }


def in_turn(models: Sequence[nn.Module], inputs: Any, repeats: int, warm_up: int) -> np.ndarray:
    """Milliseconds of forwards in eval mode without gradients, one of each model and again, [models, repeats].

    What slows the machine down for a while slows down all of them, so their ratios tell more than their times.
    """
    devices = [next((t.device for t in model.parameters()), torch.device("cpu")) for model in models]
    given = [_arguments(inputs, device) for device in devices]
    times = np.zeros((len(models), warm_up + repeats))
    with ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        for turn in range(warm_up + repeats):
            for number, (model, device, (args, kwargs)) in enumerate(zip(models, devices, given, strict=True)):
                _wait(device)
                start = time.perf_counter()
                model(*args, **kwargs)
                _wait(device)
                times[number, turn] = 1000 * (time.perf_counter() - start)
    return times[:, warm_up:]


def file_size(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers as a safetensors file, shared tensors once."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= dict(model.named_buffers())
    return len(save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}))


def _arguments(inputs: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(inputs, Mapping):
        return (), {name: move(value) for name, value in inputs.items()}
    return tuple(move(value) for value in (inputs if isinstance(inputs, tuple) else (inputs,))), {}


def _wait(device: torch.device) -> None:
    """Let the device finish: work on a GPU is only queued."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
