"""One pass over the data that shows every layer's inputs and the gradients at its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur._internal.batches import call_model, tensors_in
from secateur._internal.errors import SecateurError
from secateur.curvature.layers import Layer
from secateur.curvature.losses import Loss, Pass, draws

OnInput = Callable[[Layer, Tensor], Any]
"""Gets each input of each layer; what it returns is handed to :data:`OnGradient` with the gradient of the same call."""
OnGradient = Callable[[Layer, Tensor, Any], None]


def watch(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Iterable[Any],
    loss: Loss,
    *,
    on_input: OnInput,
    on_gradient: OnGradient,
    on_draw: Callable[[], None] = lambda: None,
    how: Pass,
) -> int:
    """Run the data through the model, in eval mode, forward and back.

    No gradient of a parameter is computed, and nothing is kept between batches.

    Args:
        model: the model.
        layers: what to look at.
        data: batches (inputs, targets); targets may be missing where they are drawn.
        loss: see :data:`secateur.curvature.losses.Loss`.
        on_input: called with each input of each layer.
        on_gradient: called with the gradient of the summed loss at each output, once a draw.
        on_draw: called when all gradients of one batch and one draw of targets have been seen.
        how: the targets, and how much of the data.

    Returns:
        The number of examples seen.

    Raises:
        SecateurError: no data, batches that do not fit, a loss that is not finite or has no gradient.
    """
    device = layers[0].module.weight.device
    generator = torch.Generator(device).manual_seed(how.seed)
    examples = 0
    with ExitStack() as stack:
        stack.enter_context(at_rest(model))
        anchor = torch.zeros((), device=device, requires_grad=True)
        stack.callback(_hooked(layers, anchor, on_input, on_gradient))
        for number, batch in enumerate(data):
            if how.batches is not None and number >= how.batches:
                break
            inputs, targets = split_batch(batch, how.fisher, number, device)
            _there_and_back(
                model, inputs, partial(draws, loss, targets=targets, generator=generator, how=how), on_draw, number
            )
            examples += examples_of(inputs)
    if not examples:
        raise SecateurError("data: the loader is empty; give at least one batch")
    return examples


def _there_and_back(
    model: nn.Module, inputs: Any, values: Callable[..., Iterator[Tensor]], on_draw: Callable[[], None], number: int
) -> None:
    """One batch; its activations are gone when this returns, before those of the next come."""
    with torch.enable_grad():
        drawn = checked(values(outputs=forward(model, inputs, number)), number)
        value = next(drawn)
        for following in drawn:  # the next loss is there before this one goes back, for the last one to be known
            _back(value, number, retain=True)
            on_draw()
            value = following
        _back(value, number, retain=False)  # it frees the activations as it goes
        on_draw()


def _back(value: Tensor, number: int, *, retain: bool) -> None:
    try:
        value.backward(retain_graph=retain)
    except RuntimeError as error:
        raise SecateurError(f"no gradient of batch {number} can be found: {error}") from error


def _hooked(layers: Sequence[Layer], anchor: Tensor, on_input: OnInput, on_gradient: OnGradient) -> Callable[[], None]:
    """Attach to the layers; what is returned detaches."""
    plain = torch.autocast(layers[0].module.weight.device.type, enabled=False)  # sums keep their precision

    def attach(layer: Layer) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            with plain:
                kept = on_input(layer, inputs[0].detach())
            if not output.requires_grad:  # nothing before it wants a gradient
                output = output + anchor

            def back(g: Tensor) -> None:
                with plain:
                    on_gradient(layer, g, kept)

            output.register_hook(back)
            return output

        return layer.module.register_forward_hook(hook)

    handles = [attach(layer) for layer in layers]

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach


@contextmanager
def at_rest(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Eval mode, no parameter wants a gradient (or those that do still do), the random state comes back."""
    modes = [(m, m.training) for m in model.modules()]
    wanting = [] if gradients else [p for p in model.parameters() if p.requires_grad]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        for p in wanting:
            p.requires_grad_(False)
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for p in wanting:
            p.requires_grad_(True)
        for m, mode in modes:
            m.training = mode


def split_batch(batch: Any, fisher: str, number: int, device: torch.device) -> tuple[Any, Any]:
    """Inputs and targets on the device; no targets where they are to be drawn."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
    elif fisher != "empirical":
        inputs, targets = (batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch), None
    else:
        raise SecateurError(f"data: batches (inputs, targets) are expected, batch {number} is a {type(batch).__name__}")
    inputs, targets = tree_map(lambda v: v.detach().to(device) if isinstance(v, Tensor) else v, (inputs, targets))
    return inputs, (targets if fisher == "empirical" else None)


def examples_of(inputs: Any) -> int:
    """How many examples a batch of inputs holds."""
    first = tensors_in(list(inputs.values()) if isinstance(inputs, Mapping) else inputs)[0]
    return first.shape[0] if first.ndim else 1


def forward(model: nn.Module, inputs: Any, number: int) -> Any:
    """The outputs, or an error that says which batch does not fit."""
    try:
        return call_model(model, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, SecateurError):
            raise
        shapes = ", ".join(str(list(t.shape)) for t in tensors_in(inputs))
        raise SecateurError(
            f"data: batch {number} (inputs of shape {shapes}) does not fit the model: {error}"
        ) from error


def checked(found: Iterator[Tensor], number: int) -> Iterator[Tensor]:
    """Losses of a batch, each one finite number with a gradient."""
    while True:
        try:
            value = next(found)
        except StopIteration:
            return
        except SecateurError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise SecateurError(f"the loss does not fit the outputs and targets of batch {number}: {error}") from error
        yield _sound(value, number)


def _sound(value: Any, number: int) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        raise SecateurError("the loss must be one number that depends on the outputs, as a tensor")
    if not math.isfinite(value.item()):
        raise SecateurError(f"the loss of batch {number} is {value.item()}: check the data and the model's weights")
    return value
