"""One pass over the data that shows every layer's inputs and the gradients at its outputs.

A layer is measured only if it computes its weight times its input, and nothing else uses its weight. What is not so is
left out, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur._internal.batches import Batch, call_model, first_argument
from secateur._internal.distributed import all_reduce_, rank
from secateur._internal.errors import BadBatch
from secateur._internal.losses import Loss, checked_loss, needs_gradient, outputs_of
from secateur._internal.state import check_differentiable, preserved
from secateur._internal.workload import Workload, generator_on
from secateur.curvature.fisher import Fisher, draws
from secateur.curvature.layers import Layer, computes_its_weight

STRANGE = "its forward is not its weight times its input"
USED_ELSEWHERE = "its weight is used outside of its own forward too"
NOT_RUN = "its own forward does not run: its weight is used elsewhere"
HALF_TIED = "another layer shares its weight or its bias, but not both"
NOT_REACHED = "the data never reached it"
NO_GRADIENT = "no gradient of the loss reaches it"
REASONS = (STRANGE, USED_ELSEWHERE, NOT_RUN, HALF_TIED)
"""Why a layer is left out, by what it does in a forward."""
OnInput = Callable[[Layer, Tensor], Any]
"""Gets each input of each layer; what it returns is handed to :data:`OnGradient` with the gradient of the same call."""
OnGradient = Callable[[Layer, Tensor, Any], None]


@dataclass
class Seen:
    """What a pass has seen; where several processes work along, all of them together.

    Attributes:
        examples: how many examples.
        how: the Fisher that was used.
        calls: how often each layer ran.
        gradients: how often a gradient came back to its output.
        strange: layers that were left out -> why.
        looking: whether it is us who use a weight at this moment.
    """

    examples: int = 0
    how: Fisher = field(default_factory=Fisher)
    calls: Counter[str] = field(default_factory=Counter)
    gradients: Counter[str] = field(default_factory=Counter)
    strange: dict[str, str] = field(default_factory=dict)
    looking: bool = False


def watch(
    work: Workload,
    layers: Sequence[Layer],
    *,
    on_input: OnInput,
    on_gradient: OnGradient,
    on_draw: Callable[[], None] = lambda: None,
    how: Fisher,
    what: str = "curvature",
) -> Seen:
    """Run the data through the model, in eval mode, forward and back.

    No gradient of a parameter is computed, and nothing is kept between batches.

    Args:
        work: the model, the data and the loss.
        layers: what to look at.
        on_input: called with each input of each layer.
        on_gradient: called with the gradient of the summed loss at each output, once a draw.
        on_draw: called when all gradients of one batch and one draw of targets have been seen.
        how: the targets, and how much of the data.
        what: what is measured, for the progress bar.

    Returns:
        What was seen. Layers in ``strange`` may have been shown to the callbacks before they were found to be so: what
        was made of them is worth nothing.

    Raises:
        SecateurError: a model that was made in ``torch.inference_mode``.
        BadBatch: no data, batches that do not fit, a loss that is not finite or has no gradient.
    """
    model, how = work.model, how.of(work)
    loss = None if how.kind == "outputs" else work.loss
    check_differentiable(model)
    seen = Seen(how=how, strange=dict.fromkeys(_half_tied(layers), HALF_TIED))
    generator = generator_on(work.device, how.seed + rank(work.group))  # no two processes draw alike
    uses = _Uses(layers, seen)

    def run() -> None:
        anchor = torch.zeros((), device=work.device, requires_grad=True)
        with ExitStack() as stack:
            stack.callback(_hooked(layers, anchor, on_input, on_gradient, seen))
            for batch in work.batches(how.batches, what):
                with uses, torch.enable_grad():
                    outputs = outputs_of(lambda inputs: call_model(model, inputs), batch, loss)
                    outputs = outputs if loss is not None else work.that_matter(outputs)
                _back_and_forth(loss, outputs, batch, generator, how, on_draw)
                del outputs  # its activations are gone before those of the next batch come
                seen.examples += batch.examples

    with torch.inference_mode(False), preserved(model, gradients=False, fast_path=False):
        work.together(run)
    seen.strange = uses.elsewhere() | seen.strange
    return _of_all(seen, layers, work)


def _of_all(seen: Seen, layers: Sequence[Layer], work: Workload) -> Seen:
    """What all processes have seen: examples and calls added up; what is strange to one is left out by all."""
    if work.processes == 1:
        return seen
    names = [layer.name for layer in layers]
    table = torch.tensor(
        [
            [seen.examples, seen.calls[name], seen.gradients[name], *(seen.strange.get(name) == r for r in REASONS)]
            for name in names
        ],
        dtype=torch.int64, device=work.device,
    )  # fmt: skip
    for name, (examples, calls, gradients, *strange) in zip(
        names, all_reduce_(table, work.group).tolist(), strict=True
    ):
        seen.examples, seen.calls[name], seen.gradients[name] = examples, calls, gradients
        if any(strange):
            seen.strange[name] = next(why for why, found in zip(REASONS, strange, strict=True) if found)
    return seen


def _half_tied(layers: Sequence[Layer]) -> list[str]:
    """Layers whose table holds a tensor that another one holds too, which as a whole is not theirs."""
    tables = {layer.name: (id(layer.module.weight), id(layer.module.bias) if layer.bias else None) for layer in layers}
    return [
        name
        for name, (weight, bias) in tables.items()
        if any((weight == w) != (bias == b) and (weight == w or b is not None) for w, b in tables.values())
    ]


def _back_and_forth(
    loss: Loss | None,
    outputs: Any,
    batch: Batch,
    generator: torch.Generator,
    how: Fisher,
    on_draw: Callable[[], None],
) -> None:
    """Every draw of one batch, each once back through the model."""
    with torch.enable_grad():
        drawn = _sound(draws(loss, outputs, batch, generator, how), batch.number)
        value = next(drawn)
        for following in drawn:  # the next loss is there before this one goes back, for the last one to be known
            _back(value, batch.number, retain=True)
            on_draw()
            value = following
        _back(value, batch.number, retain=False)  # it frees the activations as it goes
        on_draw()


def _sound(found: Iterator[Tensor], number: int) -> Iterator[Tensor]:
    """Losses of a batch, each one finite number with a gradient."""
    end = object()
    while True:
        value: Any = end

        def following() -> Tensor:
            nonlocal value
            value = next(found, end)
            return torch.zeros(()) if value is end else value

        checked = checked_loss(following, number)
        if value is end:
            return
        yield needs_gradient(checked)


def _back(value: Tensor, number: int, *, retain: bool) -> None:
    try:
        value.backward(retain_graph=retain)
    except RuntimeError as error:
        raise BadBatch(f"no gradient of batch {number} can be found: {error}") from error


def _hooked(
    layers: Sequence[Layer], anchor: Tensor, on_input: OnInput, on_gradient: OnGradient, seen: Seen
) -> Callable[[], None]:
    """Attach to the layers; what is returned detaches."""
    plain = torch.autocast(anchor.device.type, enabled=False)  # sums keep their precision

    def attach(layer: Layer) -> Any:
        weight = layer.module.weight

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            seen.calls[layer.name] += 1
            if layer.name in seen.strange:
                return None
            x = first_argument(args, kwargs)
            with plain, torch.no_grad(), _looking(seen):
                unknown = not seen.examples or seen.calls[layer.name] == 1
                if module.weight is not weight or (unknown and not computes_its_weight(layer, x, output)):
                    seen.strange[layer.name] = STRANGE
                    return None
                kept = on_input(layer, x.detach())
            if not output.requires_grad:  # nothing before it wants a gradient
                output = output + anchor

            def back(g: Tensor) -> None:
                seen.gradients[layer.name] += 1
                with plain:
                    on_gradient(layer, g, kept)

            if output.requires_grad:  # unless the model forbids it here
                output.register_hook(back)
            return output

        return layer.module.register_forward_hook(hook, with_kwargs=True)

    handles = [attach(layer) for layer in layers]

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach


@contextmanager
def _looking(seen: Seen) -> Iterator[None]:
    seen.looking = True
    try:
        yield
    finally:
        seen.looking = False


class _Uses(TorchFunctionMode):
    """Counts how often the weights of layers go into anything that gives other tensors."""

    def __init__(self, layers: Sequence[Layer], seen: Seen) -> None:
        super().__init__()
        self.layers, self.seen = layers, seen
        self.weights = {id(layer.module.weight) for layer in layers}
        self.uses: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.seen.looking:
            given = [id(v) for v in pytree.tree_leaves((args, kwargs)) if id(v) in self.weights]
            made = [id(v) for v in pytree.tree_leaves(result) if isinstance(v, Tensor)] if given else []
            # `weight.to(dtype)` gives the weight itself where nothing is to be done
            self.uses.update(v for v in given if set(made) - {v})
        return result

    def elsewhere(self) -> dict[str, str]:
        """The layers whose weight is used more often than by their own forwards."""
        own: Counter[int] = Counter()
        for layer in self.layers:
            own[id(layer.module.weight)] += self.seen.calls[layer.name]
        used = {layer.name: self.uses[id(layer.module.weight)] for layer in self.layers}
        return {
            layer.name: USED_ELSEWHERE if own[id(layer.module.weight)] else NOT_RUN
            for layer in self.layers
            if own[id(layer.module.weight)] < used[layer.name] and layer.name not in self.seen.strange
        }
