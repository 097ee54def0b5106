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

from secateur._internal.checks import check_count
from secateur.measure.backends import EAGER, Forward, check_backend, ready, runs_on


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
    backend: str = EAGER,
) -> dict[str, float | int | str]:
    """Time forwards in eval mode without gradients; mode and thread count are as before afterwards.

    Args:
        model: on the device to measure.
        inputs: a tensor, the positional arguments as a tuple, or the keyword arguments as a dict; moved to that device.
        repeats: timed forwards.
        warm_up: forwards before them.
        threads: CPU threads to use; ``None`` for as many as are set.
        backend: what runs it: ``"eager"``, ``"compile"`` (``torch.compile``) or ``"onnxruntime"`` (on the CPU).

    Returns:
        ``median_ms``, ``iqr_ms`` (distance of the quartiles), ``min_ms``, ``repeats``, ``threads``, ``device``,
        ``backend``.

    Raises:
        CannotMeasure: the backend cannot run it.
        SecateurError: repeats, warm_up or threads are not positive whole numbers (warm_up may be 0).
    """
    check_count("repeats", repeats)
    check_count("warm_up", warm_up, 0)
    check_count("threads", threads, optional=True)
    check_backend(backend)
    with threads_set(threads) as used:
        times = in_turn([model], inputs, repeats, warm_up, 1, backend)
    low, median, high = np.percentile(times, (25, 50, 75)).tolist()
    return {
        "median_ms": median,
        "iqr_ms": high - low,
        "min_ms": times.min().item(),
        "repeats": repeats,
        "threads": used,
        "device": str(runs_on(model, backend)),
        "backend": backend,
    }


def in_turn(
    models: Sequence[nn.Module | Forward], inputs: Any, repeats: int, warm_up: int, turns: int, backend: str = EAGER
) -> np.ndarray:
    """Milliseconds of forwards in eval mode without gradients, [models, turns, repeats].

    In every turn each model has so many forwards, one after another, and before them some that do not count. So a
    model's weights are in the cache, as they are where it runs alone. What slows the machine down for a while slows
    down all models, so their ratios in a turn tell more than their times.

    Args:
        models: each on the device to measure; or what is ready to be timed already.
        inputs: as for :func:`latency`; every forward has a copy of its own.
        repeats: timed forwards of each model in a turn.
        warm_up: forwards before them.
        turns: how many.
        backend: what runs the models.
    """
    times = np.zeros((len(models), turns, repeats))
    with ExitStack() as stack:
        forwards = [stack.enter_context(ready(model, inputs, backend)) for model in models]
        for turn in range(turns):
            for number, forward in enumerate(forwards):
                for repeat in range(-warm_up, repeats):
                    given = forward.given()
                    wait_for(forward.device)
                    start = time.perf_counter()
                    forward.run(given)
                    wait_for(forward.device)
                    if repeat >= 0:
                        times[number, turn, repeat] = 1000 * (time.perf_counter() - start)
    return times


def file_size(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers as a safetensors file, shared tensors once."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= dict(model.named_buffers())
    return len(save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}))


def wait_for(device: torch.device) -> None:
    """Let a device finish: work on a GPU is only queued."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
