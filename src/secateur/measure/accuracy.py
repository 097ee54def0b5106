"""Accuracy and mean loss of a model on labelled examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from secateur._internal.batches import Batch, call_model, read_batches
from secateur._internal.errors import BadBatch
from secateur._internal.losses import IGNORED, Loss, checked_loss, class_axis, logits_of, outputs_of, read_loss
from secateur._internal.state import device_of, eval_mode

Data = Iterable[Any]
"""Batches with targets (:mod:`secateur._internal.batches`), or one pair of tensors; all of them are on this process."""


def accuracy(model: nn.Module, data: Data) -> float:
    """The share of predictions that are right: the largest output is at the label.

    An example has one prediction, or one at every position (of a sequence, of a map); labels of -100 do not count.

    Args:
        model: the model; it is left untouched.
        data: batches with labels, or one pair of tensors.

    Raises:
        BadBatch: there is nothing to predict, or labels do not fit the outputs.
    """
    return _measured(model, data, None)[1]


def loss(model: nn.Module, data: Data, loss: Any = "cross_entropy") -> float:
    """The mean of a mean loss over all examples, however they are batched.

    Args:
        model: the model; it is left untouched.
        data: batches with targets, or one pair of tensors.
        loss: see :mod:`secateur._internal.losses`.

    Raises:
        BadBatch: there is no example, or the data do not fit.
    """
    return _measured(model, data, read_loss(loss), right=False)[0]


def loss_and_accuracy(model: nn.Module, data: Data, loss: Any = "cross_entropy") -> tuple[float, float]:
    """:func:`loss` and :func:`accuracy` from one pass."""
    return _measured(model, data, read_loss(loss))


def _measured(model: nn.Module, data: Data, loss: Loss | None, *, right: bool = True) -> tuple[float, float]:
    """Mean loss and accuracy."""
    total, examples, hits, predictions = 0.0, 0, 0, 0
    with eval_mode(model):
        for batch in _batches(model, data):
            if not batch.examples:
                continue
            outputs = outputs_of(partial(call_model, model), batch, loss)
            examples += batch.examples
            if loss is not None:
                value = checked_loss(partial(loss.mean, outputs, batch.targets), batch.number)
                total += float(value) * batch.examples
            if right:
                found = _hits(logits_of(outputs), batch.targets)
                hits, predictions = hits + int(found.sum()), predictions + found.numel()
    if not (predictions if right else examples):
        raise BadBatch("data: there is no example to measure on; give at least one batch, with labels")
    return total / max(examples, 1), hits / max(predictions, 1)


def _batches(model: nn.Module, data: Data) -> Iterator[Batch]:
    pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    return read_batches([data] if pair else data, device_of(model))


def _hits(outputs: Tensor, labels: Any) -> Tensor:
    """Which predictions are right, bool; those that count."""
    axis = class_axis(outputs, labels)
    found = outputs.argmax(axis)
    if not isinstance(labels, Tensor) or found.shape != labels.shape:
        shape = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise BadBatch(
            f"accuracy: outputs of shape {list(outputs.shape)} are for labels of shape {list(found.shape)}, not "
            f"{shape}; give whole numbers, one a prediction (y.squeeze(1), y.argmax(1))"
        )
    return (found == labels)[labels != IGNORED]
