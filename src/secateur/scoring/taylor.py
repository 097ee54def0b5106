"""First-order Taylor scores: how much the loss moves, to first order, if a channel is scaled away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur._internal.batches import call_model
from secateur._internal.errors import SecateurError, unknown
from secateur._internal.state import preserved
from secateur.scoring.sums import by_group, channel_sums, producers, rows
from secateur.tracing.graph import Axis, ChannelGraph

Loss = Callable[..., Tensor]
"""``loss_fn(outputs, targets)``, a scalar mean over the batch."""
MEANS: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def mean_of(loss_fn: Any) -> Loss:
    """A loss by its name, or the callable itself.

    Raises:
        SecateurError: an unknown name, or something that cannot be called.
    """
    if isinstance(loss_fn, str):
        if loss_fn not in MEANS:
            raise unknown("loss", loss_fn, MEANS)
        return MEANS[loss_fn]
    if not callable(loss_fn):
        raise SecateurError(f"loss_fn={loss_fn!r}: a callable (outputs, targets), or one of {', '.join(MEANS)}")
    found: Loss = loss_fn
    return found


def taylor(
    model: nn.Module, graph: ChannelGraph, data: Iterable[Any] | None = None, loss_fn: Loss | str | None = None, *,
    batches: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    r"""How much the loss moves, to first order, if everything that writes a channel is scaled away.

    ``score[c] = mean over batches of |sum_w w * dL/dw|`` over all producers ``w`` of the channel (arXiv 1906.10771):
    the derivative with respect to one common scale. Batch norms use the batch's statistics here: a filter before a norm
    has no derivative along itself then, so that nothing is counted twice. Their running statistics come back as they
    were, like the gradients, the mode and the random state.

    Args:
        model: the model.
        graph: its graph.
        data: batches ``(inputs, targets)``.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar mean over the batch; or ``"cross_entropy"``, ``"mse"``.
        batches: use at most so many.

    Raises:
        SecateurError: no data, no loss, an empty loader, a batch that is not a pair, a loss that is not finite.
    """
    if data is None or loss_fn is None:
        raise SecateurError("taylor needs data= (batches of inputs and targets) and loss_fn=")
    loss_fn = mean_of(loss_fn)
    parameters = dict(model.named_parameters())
    axes = producers(graph)
    names = list(dict.fromkeys(a.name for a in axes))
    needed = [parameters[name] for name in names]
    total, seen = torch.zeros(()), 0
    with preserved(model, "batch_statistics"):
        for batch in data:
            if batches is not None and seen >= batches:
                break
            gradients = _gradients(model, needed, batch, loss_fn, seen)
            moved = dict(zip(names, (p.detach() * g for p, g in zip(needed, gradients, strict=True)), strict=True))

            def along(axis: Axis, moved: dict[str, Tensor] = moved) -> Tensor:
                return rows(moved[axis.name], axis.dim)

            total = total + channel_sums(graph, axes, along).abs()
            seen += 1
    if not seen:
        raise SecateurError("taylor(data): the loader is empty; give at least one batch")
    return by_group(graph, total / seen)


def loss_of(run: Callable[[Any], Any], batch: Any, loss_fn: Loss, number: int, device: torch.device) -> Tensor:
    """The loss of one batch, one number.

    Args:
        run: inputs to outputs.
        batch: a pair ``(inputs, targets)``.
        loss_fn: a scalar mean over the batch.
        number: of the batch, to be told.
        device: where it is computed.

    Raises:
        SecateurError: no pair, what does not fit the model or the loss, a loss that is no scalar.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise SecateurError(f"data: batches (inputs, targets) are expected, batch {number} is a {type(batch).__name__}")
    # a copy: a forward may write into its inputs
    inputs, targets = tree_map(lambda v: v.to(device, copy=True) if isinstance(v, Tensor) else v, tuple(batch))
    try:
        loss = loss_fn(run(inputs), targets)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shape = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise SecateurError(
            f"data: batch {number} (inputs of shape {shape}) does not fit the model or the loss: {error}"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise SecateurError(f"loss_fn: a scalar tensor, the mean over the batch, is expected; it gave {found}")
    return loss


def not_finite(number: int, value: float) -> SecateurError:
    """An error for the loss of a batch that is NaN or infinite."""
    return SecateurError(f"the loss of batch {number} is {value}: check the data and the model's weights")


def _gradients(model: nn.Module, needed: list[nn.Parameter], batch: Any, loss_fn: Loss, number: int) -> list[Tensor]:
    frozen = [p for p in needed if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with torch.enable_grad():
            loss = loss_of(partial(call_model, model), batch, loss_fn, number, needed[0].device)
            if not math.isfinite(loss.item()):
                raise not_finite(number, loss.item())
            found = torch.autograd.grad(loss, needed, allow_unused=True)
    finally:
        for p in frozen:
            p.requires_grad_(False)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(needed, found, strict=True)]
