r"""The smaller model fitted to what the original computes: layer by layer, in closed form, in one forward.

Each linear and convolution ``W`` of the smaller model, in the order in which they run, gets inputs ``x'`` from fitted
layers, and predicts from them what the original computes there from its own, ``y``, in the rows that are left::

    W' = W + D
    D = argmin sum |y - (W + D) x'|^2 + damping |D|^2 = (sum (y - W x') x'^T) (sum x' x'^T + damping I)^-1

All layers are fitted, not only those that lose inputs: after the first cut all inputs differ. Fitting in order, on the
inputs of the smaller model, is due to arXiv 1707.06168, which fits the layers that lose inputs. A step is as long as
images that it was not computed from say. Batch norms are re-estimated on the way; no label is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from secateur.curvature import check_damping
from secateur.curvature.kronecker import wide
from secateur.curvature.layers import Layer, input_samples_at, layers_of, output_samples_at
from secateur.curvature.solving import root
from secateur.curvature.watching import at_rest, examples_of, split_batch
from secateur.cut.channels import check_plan
from secateur.errors import SecateurError
from secateur.plan import Plan
from secateur.trace import call_model
from secateur.trace.tracer import without_fast_path

DAMPING = 1e-3
HELD_OUT = 8
"""One in so many samples, the last ones, is held out to find the length of the step."""


def refit(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    examples: int = 1024,
    positions: int | None = None,
    damping: float = DAMPING,
) -> dict[str, str]:
    """Fit the smaller model, in place, to what the original computes.

    Args:
        model: the original; it is left untouched.
        small: what :func:`secateur.cut` made of it by ``plan``; if this fails, it is as before.
        plan: what was removed.
        data: batches as for :func:`secateur.cut.recalibrate`; targets are not looked at.
        examples: how many are used; they pass through both models as one batch, without gradients.
        positions: how many positions of a layer's outputs are fitted over all examples; by default four for each
            column of the layer's weight and not less than 8192.
        damping: in units of the mean square of the layer's inputs.

    Returns:
        The layers that stay as they are: path -> reason.

    Raises:
        SecateurError: models and plan that do not belong together, no data, layers whose outputs are not finite.
    """
    check_plan(model, plan)
    check_damping(damping)
    for name, value in (("examples", examples), ("positions", positions)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SecateurError(f"refit({name}={value!r}): a whole number from 1 on is expected")
    pairs, left = _pairs(model, small, plan)
    inputs = _joined(data, examples, next(iter(pairs.values()))[0].module.weight.device)
    many = {name: positions or max(8192, 4 * one.table().shape[-1]) for name, (one, _) in pairs.items()}
    wanted, runs = _outputs(model, pairs, many, inputs)
    left |= {
        name: "it runs several times in a forward" if runs[name] else "no forward reaches it"
        for name in pairs.keys() - wanted.keys()
    }
    before = {name: t.clone() for name, t in small.state_dict().items()}

    def fit(name: str, x: Tensor) -> None:
        layer = pairs[name][1]
        rows = plan.slices.get(f"{name}.weight" if name else "weight", {}).get(0, [])
        y = wanted.pop(name)  # of shape [groups, samples, rows]: without the rows that went
        stay = torch.ones(y.shape[0] * y.shape[2], dtype=torch.bool, device=y.device)
        stay[rows] = False
        y = y.transpose(1, 2).flatten(0, 1)[stay].unflatten(0, (layer.groups, -1)).transpose(1, 2)
        table = layer.table().double().squeeze(2)
        step = least_squares(input_samples_at(layer, wide(x), many[name]), y, table, damping, name)
        weight, bias = layer.weights((table + step).unsqueeze(2))
        layer.module.weight.copy_(weight)
        if bias is not None:
            layer.module.bias.copy_(bias)

    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, args, name=name: fit(name, args[0]) if name in wanted else None
        )
        for name, (_, layer) in pairs.items()
        if name in wanted
    ]
    handles += [m.register_forward_pre_hook(_take_statistics) for m in small.modules() if isinstance(m, _BatchNorm)]
    try:
        with torch.no_grad(), at_rest(small), without_fast_path():
            call_model(small, inputs)
    except BaseException:
        small.load_state_dict(before)
        raise
    finally:
        for handle in handles:
            handle.remove()
    return left


def least_squares(x: Tensor, y: Tensor, table: Tensor, damping: float, name: str = "a layer") -> Tensor:
    """By how much a table of weights should change.

    Args:
        x: inputs, [groups, samples, columns].
        y: what should come out, [groups, samples, rows].
        table: weights, [groups, rows, columns].
        damping: in units of the mean square of the inputs.
        name: for messages.

    Returns:
        The step, float64, [groups, rows, columns].
    """
    x, y = x.double(), y.double()
    missing = y - x @ table.double().mT
    if not missing.isfinite().all():
        raise SecateurError(f"refit: the inputs or outputs of {name!r} are not finite: check the data and the weights")
    fitted = x.shape[1] - x.shape[1] // HELD_OUT
    seen, rest = x[:, :fitted], missing[:, :fitted]
    squares = seen.mT @ seen
    if not squares.diagonal(dim1=1, dim2=2).any():
        return torch.zeros_like(table, dtype=torch.float64)
    products = rest.mT @ seen
    step = torch.cholesky_solve(products.mT, root(squares, damping)).mT
    if fitted == x.shape[1]:
        return step
    moved = x[:, fitted:] @ step.mT
    best = (moved * missing[:, fitted:]).sum((1, 2)) / moved.square().sum((1, 2)).clamp(min=1e-300)
    return step * best.clamp(0, 1)[:, None, None]


def _pairs(model: nn.Module, small: nn.Module, plan: Plan) -> tuple[dict[str, tuple[Layer, Layer]], dict[str, str]]:
    """The layers of both models, those that can be fitted; and why others cannot."""
    ones, others = ({layer.name: layer for layer in layers_of(m, "full")} for m in (model, small))
    uses = Counter(id(m.weight) for m in dict(model.named_modules(remove_duplicate=False)).values() if _has_weight(m))
    pairs, left = {}, {}
    for name, layer in ones.items():
        if uses[id(layer.module.weight)] > 1:
            left[name] = "its weight is used at several places"
            continue
        shape = list(layer.module.weight.shape)
        for dim, positions in plan.slices.get(f"{name}.weight" if name else "weight", {}).items():
            shape[dim] -= len(positions)
        other = others.get(name)
        if other is None or list(other.module.weight.shape) != shape:
            found = "no such layer" if other is None else f"shape {list(other.module.weight.shape)}"
            raise SecateurError(f"refit: the plan leaves {name!r} with shape {shape}, the smaller model has {found}")
        pairs[name] = (layer, other)
    if not pairs:
        raise SecateurError("refit: every weight is used at several places; there is nothing to fit")
    return pairs, left


def _take_statistics(norm: _BatchNorm, args: tuple[Tensor, ...]) -> None:
    """The running statistics of a batch norm become those of its input, and are used at once."""
    if norm.running_mean is not None and norm.running_var is not None and args[0].numel() > args[0].shape[1]:
        x = wide(args[0]).transpose(0, 1).flatten(1)
        norm.running_mean.copy_(x.mean(1))
        norm.running_var.copy_(x.var(1))


def _has_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None


def _joined(data: Iterable[Any], examples: int, device: torch.device) -> Any:
    """The inputs of as many examples as one batch."""
    parts: list[Any] = []
    count = 0
    for number, batch in enumerate(data):
        inputs = batch if isinstance(batch, Mapping) else split_batch(batch, "sampled", number, device)[0]
        parts.append(inputs)
        count += examples_of(inputs)
        if count >= examples:
            break
    if not count:
        raise SecateurError("refit: the data is empty; give at least one batch")
    short = max(0, count - examples)
    return tree_map(
        lambda *tensors: torch.cat(tensors)[: count - short] if isinstance(tensors[0], Tensor) else tensors[0], *parts
    )


def _outputs(
    model: nn.Module, pairs: Mapping[str, tuple[Layer, Layer]], many: Mapping[str, int], inputs: Any
) -> tuple[dict[str, Tensor], Counter[str]]:
    """Samples of what the layers of the original compute, of those that run just once; how often each runs."""
    found: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def see(name: str, y: Tensor) -> None:
        calls[name] += 1
        found[name] = output_samples_at(pairs[name][0], wide(y), many[name])

    handles = [
        layer.module.register_forward_hook(lambda _, args, y, name=name: see(name, y))
        for name, (layer, _) in pairs.items()
    ]
    try:
        with torch.no_grad(), at_rest(model), without_fast_path():
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: y for name, y in found.items() if calls[name] == 1}, calls
