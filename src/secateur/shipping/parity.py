"""Whether what was exported gives what the model gives: on the example inputs, and on others of other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from secateur._internal.batches import tensors_in
from secateur._internal.errors import SecateurError
from secateur.shipping.programs import BATCH, LENGTH, Exportable, free_sizes

ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""So far apart outputs may be, in units of the largest of them; kernels of several libraries add up in other orders."""
Runs = Callable[[Sequence[Tensor]], Sequence[np.ndarray]]
"""What was exported: the tensors of the inputs, in their order, to those of the outputs."""


def compared(what: Exportable, program: ExportedProgram, runs: Runs, seed: int = 0) -> dict[str, float]:
    """How far outputs are apart, in units of the largest of them; by inputs: ``"example"``, ``"others"``.

    Raises:
        SecateurError: they are further apart than their type explains, or of other shapes.
    """
    found = {}
    for name, (args, kwargs) in {"example": (what.args, what.kwargs), "others": others(what, program, seed)}.items():
        try:
            expected = tensors_in(what.run(args, kwargs))
        except Exception:  # the model does not bear other sizes, so nobody can ask for them
            continue
        given = runs(tensors_in((args, kwargs)))
        if [tuple(t.shape) for t in expected] != [tuple(np.shape(a)) for a in given]:
            raise SecateurError(
                f"export: on {name} inputs the model gives {[list(t.shape) for t in expected]}, what was exported "
                f"{[list(np.shape(a)) for a in given]}; nothing was written"
            )
        apart = [_apart(t, a) for t, a in zip(expected, given, strict=True)]
        for number, (distance, tensor) in enumerate(zip(apart, expected, strict=True)):
            if not distance <= ALLOWED.get(tensor.dtype, 0.0):
                raise SecateurError(
                    f"export: on {name} inputs output {number} is {distance:.2g} of its size away from the model's "
                    f"({tensor.dtype}); nothing was written. check=False writes it all the same"
                )
        found[name] = max(apart, default=0.0)
    return found


def others(what: Exportable, program: ExportedProgram, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs like the example's, drawn anew, of other sizes where dims are free."""
    generator = torch.Generator().manual_seed(seed)
    free = free_sizes(what, program)
    sizes = {BATCH: lambda size: size + 1, LENGTH: lambda size: max(1, size - 1)}
    new_sizes = {name: of(what.sizes[name]) for name, of in sizes.items() if name in free}

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        names = what.free(value)
        shape = [new_sizes.get(names.get(d, ""), size) for d, size in enumerate(value.shape)]
        if value.is_floating_point():
            spread = value.float().std() if value.numel() > 1 else torch.ones(())
            new = torch.randn(shape, generator=generator) * spread.cpu() + value.float().mean().cpu()
            return new.to(value)
        return value.flatten()[torch.randint(value.numel(), shape, generator=generator).to(value.device)]

    args, kwargs = tree_map(drawn, (what.args, what.kwargs))
    return args, kwargs


def _apart(tensor: Tensor, array: np.ndarray) -> float:
    """The largest difference, in units of the largest number; of whole numbers whether any is another."""
    expected = tensor.detach().cpu()
    found = torch.from_numpy(np.ascontiguousarray(array))
    if not expected.is_floating_point():
        return float(not torch.equal(expected, found.to(expected.dtype)))
    expected, found = expected.double(), found.double()
    if not expected.numel():
        return 0.0
    same = (expected == found) | (expected.isnan() & found.isnan())  # infinite ones too
    return float(
        (expected - found).abs().masked_fill(same, 0).max() / expected.abs().nan_to_num(0, 0, 0).max().clamp(min=1e-12)
    )


def as_arrays(tensors: Sequence[Tensor], names: Sequence[str]) -> Mapping[str, np.ndarray]:
    """Tensors as NumPy's arrays, by name."""
    return {name: t.detach().cpu().numpy() for name, t in zip(names, tensors, strict=True)}
