"""``export``: one verb from a model, cut or not, to a file that runs where neither its class nor secateur is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateur._internal.batches import Inputs, tensors_in
from secateur._internal.checks import check_choice, check_count
from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.files import make_folder
from secateur._internal.wrappers import unwrapped
from secateur.shipping import onnx as to_onnx
from secateur.shipping.parity import Runs, compared
from secateur.shipping.programs import Exportable, exportable, free_dims, output_names, program_of, quiet

TARGETS = {"onnx": ".onnx", "program": ".pt2"}
"""What a model can be exported to, and how its files end."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        target: ``"onnx"`` or ``"program"``.
        bytes: the size of all that was written.
        free: by input the dims that may have other sizes than the example's.
        apart: how far its outputs are from the model's, in units of the largest of them, on the example and on others
            of other sizes; None if that was not checked.
        facts: of ONNX: ``opset``, ``operators``, names of ``inputs`` and ``outputs``.
    """

    path: Path
    target: str
    bytes: int
    free: dict[str, list[int]]
    apart: dict[str, float] | None
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}: {dims}" for name, dims in self.free.items() if dims) or "none"
        lines = [f"{self.path}: {self.target}, {self.bytes / 2**20:.2f} MiB", f"dims that are free: {sizes}"]
        if self.apart is None:
            lines.append("not checked against the model")
        else:
            distances = ", ".join(f"{distance:.1e} on {name}" for name, distance in self.apart.items())
            lines.append(f"largest difference to the model: {distances}")
        if "opset" in self.facts:
            lines.append(f"opset {self.facts['opset']}: {', '.join(self.facts['operators'])}")
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Inputs,
    *,
    to: str | None = None,
    outputs: Callable[[Any], Any] | None = None,
    dynamic: bool = True,
    check: bool = True,
    opset: int | None = None,
) -> Exported:
    """Write a model as a file that runs without its class and without secateur, and see that it computes the same.

    Args:
        model: a model, cut or not, which is left untouched; it is exported in eval mode.
        path: the file; ``.onnx`` is ONNX, ``.pt2`` a ``torch.export`` program, unless ``to`` says which. An earlier one
            is replaced, once the new one is whole. Large weights of ONNX are in a file beside it, ``.onnx.data``.
        example_inputs: what its forward takes: a tensor, a tuple of positional or a dict of keyword arguments.
        to: ``"onnx"`` or ``"program"``.
        outputs: which of what the forward returns, ``lambda out: out.logits``; all tensors by default.
        dynamic: the first dim of all inputs, the batch, may have other sizes; so may the second of inputs of whole
            numbers [batch, length]. What the model does not bear is fixed, which the answer tells.
        check: compare with the model, on the example and on other inputs of other sizes.
        opset: of ONNX; by default what PyTorch takes.

    Returns:
        What was written: see :class:`Exported`.

    Raises:
        BadFile: it cannot be written.
        SecateurError: an unknown target, inputs on which the model does not run, a forward that cannot be exported,
            a package that is missing, outputs that are not the model's. Nothing is written then.
    """
    if not isinstance(model, nn.Module):
        raise SecateurError(f"export: an nn.Module is expected, a {type(model).__name__} was given")
    model, where = unwrapped(model, "export"), Path(path)
    target = to if to is not None else {end: name for name, end in TARGETS.items()}.get(where.suffix)
    if target is None:
        ends = " or ".join(TARGETS.values())
        raise SecateurError(
            f"export({str(path)!r}): a file that ends with {ends} is expected, or to= one of {', '.join(TARGETS)}"
        )
    check_choice("to", target, TARGETS)
    check_count("opset", opset, optional=True)
    if target == "onnx":
        to_onnx.check_extra(runtime=check)
    if where.is_dir():
        raise BadFile(f"export: {where} is a folder; give a file")
    what = exportable(model, example_inputs, outputs, dynamic=dynamic)
    program = program_of(what)
    make_folder(where.parent)
    folder = where.with_name(f".{where.name}.{os.getpid()}")
    make_folder(folder)
    try:
        new = folder / where.name
        facts, runs = _onnx(what, program, new, opset) if target == "onnx" else _program(program, new)
        apart = compared(what, program, runs) if check else None
        size = sum(file.stat().st_size for file in folder.iterdir())
        for file in sorted(folder.iterdir(), reverse=True):  # the graph last, whose weights are there then
            os.replace(file, where.parent / file.name)
    except OSError as error:
        raise BadFile(
            f"export: {where} cannot be written ({error.strerror or error}); make room, or give another"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Exported(where, target, size, free_dims(program), apart, facts)


def _onnx(what: Exportable, program: ExportedProgram, path: Path, opset: int | None) -> tuple[dict[str, Any], Runs]:
    facts = to_onnx.write(program, path, output_names(what.run()), opset)

    def runs(tensors: Sequence[Tensor]) -> Sequence[np.ndarray]:
        return to_onnx.runner(path, facts["inputs"])(tensors)

    return facts, runs


def _program(program: ExportedProgram, path: Path) -> tuple[dict[str, Any], Runs]:
    with quiet():
        torch.export.save(program, path)

    def runs(tensors: Sequence[Tensor]) -> Sequence[np.ndarray]:
        with quiet():
            again = torch.export.load(path).module()
        leaves, like = tree_flatten(program.example_inputs)
        given = iter(tensors)
        args, kwargs = tree_unflatten([next(given) if isinstance(v, Tensor) else v for v in leaves], like)
        with torch.no_grad():
            return [t.detach().cpu().numpy() for t in tensors_in(again(*args, **kwargs))]

    return {}, runs
