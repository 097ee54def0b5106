"""Losses as the Fisher needs them: summed over the examples, with targets that the model itself draws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur._internal.errors import SecateurError, unknown

FISHERS = ("sampled", "exact", "empirical")
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


def _each_class(outputs: Tensor) -> Iterator[Tensor]:
    """For every class ``c`` a loss whose gradients, squared and added up, are the mean over drawn classes."""
    if outputs.ndim != 2:
        raise SecateurError("fisher='exact' is for logits [batch, classes]; draw targets instead (fisher='sampled')")
    share = outputs.detach().softmax(1).sqrt()
    logs = outputs.log_softmax(1)
    for c in range(outputs.shape[1]):
        yield -(share[:, c] * logs[:, c]).sum()


def _each_output(outputs: Tensor) -> Iterator[Tensor]:
    """For every output its sum over the batch: the normal distribution's noise has unit variance in each."""
    flat = outputs.flatten(1)
    for d in range(flat.shape[1]):
        yield flat[:, d].sum()


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse}


def loss_of(given: str | Loss | nn.Module | Callable[[Any, Any], Tensor]) -> Loss:
    """A loss by its name, one of PyTorch's that means the same, or the user's own.

    A callable of outputs and targets alone is a mean over the batch and cannot draw: it is for the empirical Fisher.

    Raises:
        SecateurError: an unknown name, one of PyTorch's losses with settings that change its meaning.
    """
    if isinstance(given, str):
        if given not in LOSSES:
            raise unknown("loss", given, LOSSES)
        return LOSSES[given]
    if given is F.cross_entropy or given is F.mse_loss:
        return cross_entropy if given is F.cross_entropy else mse
    if isinstance(given, (nn.CrossEntropyLoss, nn.MSELoss)):
        return _of_module(given)
    if not callable(given):
        raise SecateurError(f"loss={given!r}: a name ({', '.join(LOSSES)}) or a callable is expected")
    return given if _takes(given) != 2 else _mean(given)  # type: ignore[arg-type, return-value]


def _of_module(given: nn.Module) -> Loss:
    if isinstance(given, nn.MSELoss):
        return mse
    plain = nn.CrossEntropyLoss()
    for name in ("weight", "ignore_index", "label_smoothing"):
        if getattr(given, name) != getattr(plain, name):
            raise SecateurError(
                f"CrossEntropyLoss({name}=...) is not the likelihood that targets are drawn from: give a callable "
                "loss(outputs, targets, generator) that draws, or use fisher='empirical' with loss(outputs, targets)"
            )
    return cross_entropy


def _takes(function: Callable[..., Any]) -> int | None:
    """How many positional arguments a callable needs, if it tells."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def _mean(function: Callable[[Any, Any], Tensor]) -> Loss:
    def summed(outputs: Any, targets: Any, generator: torch.Generator) -> Tensor:
        if targets is None:
            raise SecateurError(
                "this loss takes outputs and targets and cannot draw them: use fisher='empirical', a loss by name "
                f"({', '.join(LOSSES)}), or a callable loss(outputs, targets, generator)"
            )
        return function(outputs, targets) * len(targets)

    return summed


EXACT: dict[Loss, Callable[[Tensor], Iterator[Tensor]]] = {cross_entropy: _each_class, mse: _each_output}


@dataclass(frozen=True)
class Pass:
    """How data is passed over.

    Attributes:
        fisher: ``"sampled"``, ``"exact"`` or ``"empirical"``.
        samples: how many targets are drawn for each example.
        batches: use at most so many.
        seed: for the drawn targets.

    Raises:
        SecateurError: no way to get targets.
    """

    fisher: str = "sampled"
    samples: int = 1
    batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        fisher, samples = self.fisher, self.samples
        if fisher not in FISHERS:
            raise SecateurError(
                f"fisher={fisher!r}: 'sampled' (the model draws targets), 'exact' (the mean over all draws) or "
                "'empirical' (the data's targets)"
            )
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise SecateurError(f"samples={samples!r}: a whole number from 1 on is expected")
        if fisher != "sampled" and samples != 1:
            raise SecateurError(f"samples={samples}: fisher={fisher!r} draws nothing; leave samples at 1")


def draws(loss: Loss, outputs: Any, targets: Any, generator: torch.Generator, how: Pass) -> Iterator[Tensor]:
    """The losses of one batch whose squared gradients add up to ``how.samples`` times the Fisher."""
    if how.fisher != "exact":
        for _ in range(how.samples):
            yield loss(outputs, targets, generator)
    elif loss in EXACT:
        yield from EXACT[loss](outputs)
    else:
        raise SecateurError(f"fisher='exact' is known for {', '.join(LOSSES)}; draw targets instead (fisher='sampled')")
