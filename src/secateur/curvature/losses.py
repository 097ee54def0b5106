"""Losses as the Fisher needs them: summed over the examples, with targets that the model itself draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import SecateurError, unknown

FISHERS = ("sampled", "empirical")
Loss = Callable[[Any, Any, torch.Generator], Tensor]
"""``loss(outputs, targets, generator)`` -> the negative log-likelihood, summed over examples; ``targets`` is None where
the loss is to draw them from the model's own distribution (with the generator), the data's targets otherwise."""


def cross_entropy(outputs: Tensor, targets: Tensor | None, generator: torch.Generator) -> Tensor:
    """Of logits [batch, classes, *positions], summed; one class is drawn a position where no targets are given."""
    if targets is None:
        logits = outputs.detach().movedim(1, -1)
        drawn = torch.multinomial(logits.flatten(0, -2).float().softmax(-1), 1, generator=generator)
        targets = drawn.view(logits.shape[:-1])
    return F.cross_entropy(outputs, targets, reduction="sum")


def mse(outputs: Tensor, targets: Tensor | None, generator: torch.Generator) -> Tensor:
    """Half the squared error, summed: the negative log-likelihood of a normal distribution of variance 1."""
    if targets is None:
        noise = torch.empty_like(outputs.detach()).normal_(generator=generator)
        targets = outputs.detach() + noise
    return 0.5 * (outputs - targets).square().sum()


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse}


def loss_of(given: str | Loss) -> Loss:
    """A loss by its name, or the user's own."""
    if callable(given):
        return given
    if given not in LOSSES:
        raise unknown("loss", given, LOSSES)
    return LOSSES[given]


def check_fisher(fisher: str, samples: int) -> None:
    """Raise if this is no way to get targets."""
    if fisher not in FISHERS:
        raise SecateurError(f"fisher={fisher!r}: 'sampled' (the model draws) or 'empirical' (the data's targets)")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise SecateurError(f"samples={samples!r}: a whole number from 1 on is expected")
    if fisher == "empirical" and samples != 1:
        raise SecateurError(f"samples={samples}: the empirical Fisher has one target an example; leave samples at 1")
