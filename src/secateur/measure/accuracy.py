"""Accuracy and mean loss of a model on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur._internal.errors import SecateurError
from secateur._internal.state import eval_mode

Batches = Iterable[tuple[Tensor, Tensor]]


def accuracy(model: nn.Module, data: Batches | tuple[Tensor, Tensor]) -> float:
    """The share of images whose largest output is at their label.

    Args:
        model: images to [n, classes].
        data: batches ``(x, y)``, or one pair of tensors.

    Raises:
        SecateurError: there is no image.
    """
    return float(_mean(model, data, _hits))


def loss(
    model: nn.Module,
    data: Batches | tuple[Tensor, Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> float:
    """The mean of a mean loss over all images.

    Raises:
        SecateurError: there is no image.
    """
    return float(_mean(model, data, loss_fn))


def loss_and_accuracy(
    model: nn.Module,
    data: Batches | tuple[Tensor, Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> tuple[float, float]:
    """:func:`loss` and :func:`accuracy` from one pass."""
    both = _mean(model, data, lambda output, y: torch.stack([loss_fn(output, y).double(), _hits(output, y)]))
    return float(both[0]), float(both[1])


def _hits(output: Tensor, y: Tensor) -> Tensor:
    found = output.argmax(1)
    if found.shape != y.shape:
        raise SecateurError(
            f"accuracy: outputs of shape {list(output.shape)} are for labels of shape {list(found.shape)}, not "
            f"{list(y.shape)}; give whole numbers, one a prediction (y.squeeze(1), y.argmax(1))"
        )
    return (found == y).double().mean()


def _mean(model: nn.Module, data: Batches | tuple[Tensor, Tensor], value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean of a mean over images, however they are batched."""
    batches: Batches = [data] if isinstance(data, tuple) else data
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total, count = torch.zeros((), dtype=torch.float64), 0
    with eval_mode(model):
        for x, y in batches:
            if len(y):
                total = total + value(model(x.to(device)), y.to(device)).double().to("cpu") * len(y)
                count += len(y)
    if not count:
        raise SecateurError("data: there is no image to measure on")
    return total / count
