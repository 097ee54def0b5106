"""Whether what was exported gives what the model gives: on the example inputs, and on others of other sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur._internal.batches import tensors_in
from secateur._internal.errors import SecateurError
from secateur._internal.state import fork_rng_of
from secateur.shipping.programs import BATCH, LENGTH, Exportable, Free, first_line, of_batch

ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""So far apart outputs may be, in units of the largest of them; kernels of several libraries add up in other orders."""
HUGE = 1e4
"""What is so many times the median is no measure for the others: masks are written as the largest number there is."""
UNCHECKED = "check=False writes it all the same"
FEW = 2
"""Inputs of no more different numbers are masks, of which others are drawn from the same numbers."""
Runs = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""What was exported: the tensors of the inputs, in their order, to those of the outputs."""


def compared(
    what: Exportable, free: Collection[str], runs: Runs, *, allowed: float = 1.0, otherwise: str = UNCHECKED,
    seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """How far outputs are apart, in units of the largest of them; by inputs.

    ``"example"``, ``"others"`` of other sizes where these are free, and ``"one"``, the first example alone.

    Args:
        what: the model and example inputs.
        free: which of their sizes may be others; as :func:`free_sizes` says it, with the range, where that is known.
        runs: what was exported.
        allowed: the part of :data:`ALLOWED` that is.
        otherwise: what can be done where it is not the same.
        seed: of the other inputs.

    Raises:
        SecateurError: they are further apart than their type explains, of other shapes, or do not come out.
    """
    found = {}
    with fork_rng_of(what.model.parameters()):
        for name, (args, kwargs) in _inputs(what, free, seed).items():
            try:
                expected = tensors_in(what.run(args, kwargs))
            except Exception:  # the model does not bear other sizes, so nobody can ask for them
                continue
            if not any(t.isfinite().any() for t in expected if t.numel()):
                continue  # which says nothing
            found[name] = _compared(name, expected, tensors_in((args, kwargs)), runs, allowed, otherwise)
    if not found:
        raise SecateurError(
            f"export: the model gives no finite number on these inputs, so nothing can be compared; {otherwise}"
        )
    return found


def _compared(
    name: str, expected: Sequence[Tensor], inputs: Sequence[Tensor], runs: Runs, allowed: float, otherwise: str
) -> float:
    try:
        given = list(runs(inputs))
    except Exception as error:
        raise SecateurError(
            f"export: what was written does not run on the {name} inputs ({type(error).__name__}: "
            f"{first_line(error)}); nothing was written; {otherwise}"
        ) from error
    if [t.shape for t in expected] != [t.shape for t in given]:
        shapes, others = ([list(t.shape) for t in some] for some in (expected, given))
        raise SecateurError(
            f"export: on the {name} inputs the model gives {shapes}, what was exported {others}; nothing was written"
        )
    apart = [apart_from(t, other) for t, other in zip(expected, given, strict=True)]
    for number, (distance, tensor) in enumerate(zip(apart, expected, strict=True)):
        if not distance <= allowed * ALLOWED.get(tensor.dtype, 0.0):
            raise SecateurError(
                f"export: on the {name} inputs output {number} is {distance:.2g} of its size away from the model's "
                f"({tensor.dtype}); nothing was written; {otherwise}"
            )
    return max(apart, default=0.0)


def _inputs(what: Exportable, free: Collection[str], seed: int) -> dict[str, tuple[Any, Any]]:
    """Inputs to compare on, by what they are."""
    found = {"example": (what.args, what.kwargs), "others": others(what, free, seed)}
    if BATCH in free:
        both = zip(what.tensors, what.free, strict=True)
        found["one"] = what.given([of_batch(t, dims, lambda t, d: t.narrow(d, 0, 1)) for t, dims in both])
    return found


def others(what: Exportable, free: Collection[str], seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs like the example's, drawn anew, of other sizes where dims are free."""
    generator = torch.Generator().manual_seed(seed)
    other = {BATCH: lambda size: size + 1, LENGTH: lambda size: max(1, size - 1)}
    sizes = {name: other.get(name, lambda size: 2 * size)(size) for name, size in what.sizes.items() if name in free}
    for name, said in free.items() if isinstance(free, Mapping) else ():
        low, _, high = said.partition(" to ")
        if high:  # a table of positions, say, ends
            sizes[name] = max(int(low), min(sizes[name], int(high) if high.isdigit() else sizes[name]))

    def drawn(value: Tensor, dims: Free) -> Tensor:
        if not value.ndim:
            return value
        shape = [sizes.get(dims.get(d, ""), size) for d, size in enumerate(value.shape)]
        if not value.numel():
            return value.new_zeros(shape)
        plain = value.is_floating_point() and bool(value.isfinite().all()) and float(value.abs().max()) < 1e8
        if plain and len(value.unique()) > FEW:
            spread, middle = value.double().std().cpu(), value.double().mean().cpu()
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread + middle).to(value)
        return value.flatten()[torch.randint(value.numel(), shape, generator=generator).to(value.device)]

    each: Sequence[Free] = what.free or [{}] * len(what.tensors)
    return what.given([drawn(t, dims) for t, dims in zip(what.tensors, each, strict=True)])


def apart_from(expected: Tensor, found: Tensor) -> float:
    """The largest difference, in units of the largest number; of whole numbers whether any is another."""
    expected, found = expected.detach().cpu(), found.detach().cpu()
    if not (expected.is_floating_point() or expected.is_complex()):
        return float(found.is_floating_point() or not torch.equal(expected, found.to(expected.dtype)))
    if not expected.numel():
        return 0.0
    if expected.is_complex():
        expected, found = torch.view_as_real(expected), torch.view_as_real(found)
    e, f = expected.double(), found.double()
    same = (e == f) | (e.isnan() & f.isnan())  # infinite ones too
    size = e.abs().nan_to_num(0, 0, 0)
    typical = size[size > 0].median() if bool((size > 0).any()) else size.max()
    unit = size[size <= HUGE * typical].max().clamp(min=1e-12)
    return float(((e - f).abs() / torch.maximum(size, unit)).masked_fill(same, 0).nan_to_num(torch.inf).max())
