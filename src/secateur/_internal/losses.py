r"""The one place where a batch becomes a loss.

==========================  ===========================================================================================
``loss``                    means
==========================  ===========================================================================================
``"cross_entropy"``         of logits and classes. The classes are the last dim for ``[batch, ..., classes]`` (sequence
                            models), dim 1 for feature maps; the shape of the targets decides, and where both would do
                            it is refused. Targets of -100 do not count. Position is compared with position: targets of
                            a model that predicts the next token must be shifted already (``"model"`` shifts itself).
``"mse"``                   the mean squared error; outputs and targets must have one shape.
``"model"``                 the model's own ``.loss``, as Hugging Face's models compute it; the default where batches
                            are dicts with ``labels``.
an ``nn.Module``            a loss of PyTorch's or of your own, with the mean or the sum as its reduction.
a callable                  ``loss(outputs, targets)``, a mean over the batch.
==========================  ===========================================================================================

Outputs may be a tensor, a tuple (its first tensor) or an object with ``logits``. A loss that also has a method
``sample(outputs, generator)`` draws targets from the model's own distribution, for the Fisher; the first two do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur._internal.batches import Batch, call_model, tensors_in
from secateur._internal.errors import BadBatch, SecateurError, unknown

IGNORED = -100
"""Targets of this value do not count."""
Run = Callable[[Any], Any]
"""Inputs to outputs."""


# ----------------------------------------------------------------------------------------------- outputs to one tensor


def named_logits(outputs: Any) -> Tensor | None:
    """What a model's outputs hold as ``logits``, if they do."""
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return named if isinstance(named, Tensor) else None


def logits_of(outputs: Any) -> Tensor:
    """The tensor of a model's outputs that a loss compares: itself, ``.logits``, or the first one there is.

    Raises:
        BadBatch: there is none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    named = named_logits(outputs)
    if named is not None:
        return named
    found = tensors_in(outputs)
    if not found:
        raise BadBatch(f"the model's output is a {type(outputs).__name__} without a tensor that a loss could compare")
    return found[0]


def own_loss(outputs: Any) -> Tensor:
    """The loss that a model has computed itself.

    Raises:
        BadBatch: it has computed none.
    """
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(found, Tensor):
        raise BadBatch(
            "loss='model': the model's output has no .loss; batches must be dicts with labels, and the model must "
            "compute a loss of them, as those of transformers do"
        )
    return found


# -------------------------------------------------------------------------------------------------------- cross entropy


def class_axis(outputs: Tensor, targets: Any) -> int:
    """Which dim of the logits are the classes: 1, or the last.

    Raises:
        BadBatch: targets that fit neither, or both.
    """
    if outputs.ndim <= 2:
        return outputs.ndim - 1
    if not isinstance(targets, Tensor):
        raise BadBatch(
            f"loss='cross_entropy': of outputs {list(outputs.shape)} the targets tell which dim the classes are, and "
            "this batch has none"
        )
    dim1 = outputs.shape[:1] + outputs.shape[2:] == targets.shape
    last = outputs.shape[:-1] == targets.shape
    if dim1 == last:
        why = "either dim 1 or the last one could be the classes" if dim1 else "no dim can be the classes"
        raise BadBatch(
            f"loss='cross_entropy': with outputs {list(outputs.shape)} and targets {list(targets.shape)} {why}; give a "
            "callable loss(outputs, targets)"
        )
    return 1 if dim1 else outputs.ndim - 1


def _rows(outputs: Tensor, targets: Any) -> Tensor:
    """The logits [positions, classes]."""
    axis = class_axis(outputs, targets)
    return outputs.movedim(axis, -1).flatten(0, -2) if outputs.ndim > 1 else outputs[None]


def _cross_entropy(outputs: Tensor, targets: Any, reduction: str) -> Tensor:
    if not isinstance(targets, Tensor):
        raise BadBatch(f"loss='cross_entropy': a tensor of targets is expected, not a {type(targets).__name__}")
    if targets.is_floating_point():  # probabilities of the classes
        if targets.shape != outputs.shape or outputs.ndim > 2:
            raise BadBatch(
                f"loss='cross_entropy': targets {list(targets.shape)} of {targets.dtype} for outputs "
                f"{list(outputs.shape)}: give classes as whole numbers, or probabilities in the shape of outputs "
                "[batch, classes]; for others, a callable loss(outputs, targets)"
            )
        return F.cross_entropy(outputs, targets, reduction=reduction)
    rows = _rows(outputs, targets)
    if targets.numel() != len(rows):
        raise BadBatch(
            f"loss='cross_entropy': targets {list(targets.shape)} do not fit outputs {list(outputs.shape)}: one class "
            "for each position is due"
        )
    return F.cross_entropy(rows, targets.flatten(), reduction=reduction, ignore_index=IGNORED)


def _draw_classes(outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
    """One class for each position, in the shape of the outputs without their classes; -100 where the data's is."""
    logits = outputs.detach().movedim(class_axis(outputs, targets), -1)
    drawn = torch.multinomial(logits.reshape(-1, logits.shape[-1]).float().softmax(-1), 1, generator=generator)
    drawn = drawn.view(logits.shape[:-1])
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == drawn.shape:
        drawn = torch.where(targets == IGNORED, IGNORED, drawn)
    return drawn


def _each_class(outputs: Tensor, targets: Any) -> Iterator[Tensor]:
    """For every class ``c`` a loss whose gradients, squared and added up, are the mean over drawn classes."""
    if outputs.ndim != 2:
        raise SecateurError("fisher='exact' is for logits [batch, classes]; draw targets instead (fisher='sampled')")
    share = outputs.detach().softmax(1).sqrt()
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == outputs.shape[:1]:
        share = share * (targets != IGNORED)[:, None]
    logs = outputs.log_softmax(1)
    for c in range(outputs.shape[1]):
        yield -(share[:, c] * logs[:, c]).sum()


# -------------------------------------------------------------------------------------------------------------- squares


def _squares(outputs: Tensor, targets: Any) -> Tensor:
    if not isinstance(targets, Tensor) or outputs.shape != targets.shape:
        shape = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise BadBatch(
            f"loss='mse': outputs {list(outputs.shape)} and targets {shape} must have one shape; broadcasting would "
            "compare every example with every other"
        )
    return (outputs - targets).square()


def _draw_normal(outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
    noise = torch.empty_like(outputs.detach()).normal_(generator=generator)
    return outputs.detach() + noise


def _each_output(outputs: Tensor, targets: Any) -> Iterator[Tensor]:
    """For every output its sum over the batch: the normal distribution's noise has unit variance in each."""
    flat = outputs.flatten(1)
    for d in range(flat.shape[1]):
        yield flat[:, d].sum()


# --------------------------------------------------------------------------------------------------------------- a loss


@dataclass(frozen=True)
class Loss:
    """A loss, in the two forms that methods need.

    Attributes:
        name: for messages and for keys.
        mean: ``(outputs, targets)`` -> the mean over the batch.
        total: ``(outputs, targets, examples)`` -> the negative log-likelihood, summed over the examples.
        draw: ``(outputs, targets, generator)`` -> targets from the model's own distribution; None if it cannot.
        each: ``(outputs, targets)`` -> losses whose squared gradients add up to the mean over all draws; None likewise.
        of_model: whether the model computes it, of batches with labels.
    """

    name: str
    mean: Callable[[Any, Any], Tensor]
    total: Callable[[Any, Any, int], Tensor]
    draw: Callable[[Any, Any, torch.Generator], Any] | None = None
    each: Callable[[Any, Any], Iterator[Tensor]] | None = None
    of_model: bool = False


CROSS_ENTROPY = Loss(
    "cross_entropy",
    mean=lambda outputs, targets: _cross_entropy(logits_of(outputs), targets, "mean"),
    total=lambda outputs, targets, _: _cross_entropy(logits_of(outputs), targets, "sum"),
    draw=lambda outputs, targets, generator: _draw_classes(logits_of(outputs), targets, generator),
    each=lambda outputs, targets: _each_class(logits_of(outputs), targets),
)
MSE = Loss(
    "mse",
    mean=lambda outputs, targets: _squares(logits_of(outputs), targets).mean(),
    # half the squared error: the negative log-likelihood of a normal distribution of variance 1
    total=lambda outputs, targets, _: 0.5 * _squares(logits_of(outputs), targets).sum(),
    draw=lambda outputs, targets, generator: _draw_normal(logits_of(outputs), targets, generator),
    each=lambda outputs, targets: _each_output(logits_of(outputs), targets),
)
MODEL = Loss(
    "model",
    mean=lambda outputs, _: own_loss(outputs),
    total=lambda outputs, _, examples: own_loss(outputs) * examples,
    of_model=True,
)
LOSSES = {loss.name: loss for loss in (CROSS_ENTROPY, MSE, MODEL)}


def read_loss(given: Any, first: Batch | None = None) -> Loss:
    """A loss by its name, one of PyTorch's, or the user's own.

    Args:
        given: see the module; None for the model's own, where the batches have labels.
        first: a batch, which tells whether they have.

    Raises:
        SecateurError: an unknown name, something that cannot be called or takes no two arguments, none at all.
    """
    if isinstance(given, Loss):
        return given
    if given is None:
        if first is not None and first.labelled:
            return MODEL
        raise SecateurError(
            f"loss= is needed: a name ({', '.join(LOSSES)}), an nn.Module or a callable (outputs, targets)"
        )
    if isinstance(given, str):
        if given not in LOSSES:
            raise unknown("loss", given, LOSSES)
        return LOSSES[given]
    if given is F.cross_entropy or (isinstance(given, nn.CrossEntropyLoss) and _plain(given, nn.CrossEntropyLoss())):
        return CROSS_ENTROPY
    if given is F.mse_loss or (isinstance(given, nn.MSELoss) and _plain(given, nn.MSELoss())):
        return MSE
    if not callable(given):
        raise SecateurError(
            f"loss={given!r}: a name ({', '.join(LOSSES)}), an nn.Module or a callable (outputs, targets) is expected"
        )
    return _own(given)


def _plain(given: nn.Module, usual: nn.Module) -> bool:
    """Whether a loss of PyTorch's has its usual settings."""
    names = ("weight", "ignore_index", "label_smoothing", "reduction")
    return all(getattr(given, name, None) == getattr(usual, name, None) for name in names)


def _own(given: Callable[[Any, Any], Tensor]) -> Loss:
    try:
        inspect.signature(given.forward if isinstance(given, nn.Module) else given).bind(None, None)
    except TypeError as error:
        raise SecateurError(f"loss={given!r}: loss(outputs, targets) is expected, two arguments ({error})") from error
    except ValueError:  # a builtin that does not tell
        pass
    reduction = getattr(given, "reduction", "mean")
    if reduction not in {"mean", "sum"}:
        raise SecateurError(f"loss={given!r}: its reduction is {reduction!r}; 'mean' or 'sum' is expected")
    is_module = isinstance(given, nn.Module)

    def value(outputs: Any, targets: Any) -> Tensor:
        # a loss of PyTorch's compares tensors; a callable of the user's own gets what the model gave
        outputs = logits_of(outputs) if is_module and type(given).__module__.startswith("torch.") else outputs
        return given(outputs, targets)

    def mean(outputs: Any, targets: Any) -> Tensor:
        found = value(outputs, targets)
        return found / max(_length(targets, outputs), 1) if reduction == "sum" else found

    def total(outputs: Any, targets: Any, examples: int) -> Tensor:
        found = value(outputs, targets)
        return found if reduction == "sum" else found * examples

    sampler = getattr(given, "sample", None)
    draw = None if sampler is None else (lambda outputs, _, generator: sampler(outputs, generator))
    name = getattr(given, "__qualname__", type(given).__qualname__)
    return Loss(name, mean, total, draw)


def _length(targets: Any, outputs: Any) -> int:
    found = tensors_in(targets) or tensors_in(outputs)
    return found[0].shape[0] if found and found[0].ndim else 1


# ------------------------------------------------------------------------------------------------------ a batch's loss


def outputs_of(run: Run, batch: Batch, loss: Loss | None = None) -> Any:
    """The outputs of a batch, or an error that says which batch does not fit the model.

    Args:
        run: inputs to outputs.
        batch: the batch.
        loss: for the model's own loss, labels are given with the inputs.
    """
    inputs = batch.with_labels() if loss is not None and loss.of_model else batch.inputs
    try:
        return run(inputs)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, (SecateurError, torch.OutOfMemoryError)):
            raise
        raise BadBatch(
            f"data: batch {batch.number} (inputs of shape {batch.shapes()}) does not fit the model: {error}"
        ) from error


def batch_loss(run: Run | nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """The mean loss of one batch: one finite number.

    Args:
        run: the model, or what takes inputs to outputs.
        batch: the batch.
        loss: the loss.

    Raises:
        BadBatch: what does not fit the model or the loss, a loss that is no scalar or not finite.
    """
    call = (lambda inputs: call_model(run, inputs)) if isinstance(run, nn.Module) else run
    outputs = outputs_of(call, batch, loss)
    return checked_loss(lambda: loss.mean(outputs, batch.targets), batch.number)


def checked_loss(compute: Callable[[], Tensor], number: int) -> Tensor:
    """A loss that is computed now: one finite number, or an error that says of which batch and why.

    Raises:
        BadBatch: it does not fit outputs and targets, is no scalar tensor, or not finite.
    """
    try:
        value = compute()
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, (SecateurError, torch.OutOfMemoryError)):
            raise
        raise BadBatch(f"the loss does not fit the outputs and targets of batch {number}: {error}") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise BadBatch(f"loss: one number as a tensor, the mean over the batch, is expected; it gave {found}")
    value = value.reshape(())
    if not math.isfinite(value.item()):
        raise BadBatch(f"the loss of batch {number} is {value.item()}: check the data and the model's weights")
    return value


def needs_gradient(value: Tensor) -> Tensor:
    """The loss itself, if it can be differentiated.

    Raises:
        BadBatch: it depends on nothing that wants a gradient, because it was detached, say.
    """
    if not value.requires_grad:
        raise BadBatch(
            "loss: it must depend on the outputs, and has no gradient: does the loss or the model detach them, or use "
            ".item() or torch.no_grad()?"
        )
    return value
