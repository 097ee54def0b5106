"""``export``: one verb from a model, cut or not, to a file that runs where neither its class nor secateur is."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.export import ExportedProgram

from secateur._internal import shards
from secateur._internal.batches import Inputs, tensors_in
from secateur._internal.checks import check_choice, check_count, check_flag
from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.files import make_folder, write_atomically
from secateur._internal.wrappers import unwrapped
from secateur.shipping import huggingface
from secateur.shipping import onnx as to_onnx
from secateur.shipping import python as to_python
from secateur.shipping import timm as to_timm
from secateur.shipping.parity import Runs, compared
from secateur.shipping.programs import (
    Dynamic,
    Exportable,
    check_dynamic,
    exportable,
    free_dims,
    free_sizes,
    output_names,
    program_of,
    quiet,
    with_free_sizes,
)

HF, TIMM = "hf", "timm"
TARGETS = {"onnx": ".onnx", "program": ".pt2", "python": ".py", TIMM: ".txt", HF: ""}
"""What a model can be exported to, and how its files end; nothing where it is a folder, which ``to=`` must name."""
NONSENSE = {"outputs": {HF, TIMM}, "opset": {HF, TIMM, "program", "python"}, "dynamic": {HF, TIMM}, "check": {HF}}
"""Arguments that mean nothing to a target: a folder of ``transformers`` is always compared, a text of shapes never."""
FIXED = "fixed"
"""The fact that says why no size is free."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file, or the folder.
        target: ``"onnx"``, ``"program"``, ``"python"``, ``"timm"`` or ``"hf"``.
        bytes: the size of all that was written.
        free: by input the dims that may have other sizes than the example's.
        apart: how far its outputs are from the model's, in units of the largest of them, on the example, on others of
            other sizes, and on one example alone; None if that was not checked.
        facts: ``sizes``: which of batch and length are free, and from where to where; ``fixed``: why none is, where
            that was tried; of ONNX ``opset``, ``operators``, names of ``inputs`` and ``outputs``; of
            a folder of ``transformers`` ``config``: what its configuration says, before and now.
    """

    path: Path
    target: str
    bytes: int
    free: dict[str, list[int]]
    apart: dict[str, float] | None
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}: {dims}" for name, dims in self.free.items() if dims) or "none"
        lines = [f"{self.path}: {self.target}, {self.bytes / 2**20:.2f} MiB"]
        if self.target == HF:
            lines += [f"config.{name}: {old} -> {new}" for name, (old, new) in self.facts["config"].items()]
        else:
            lines.append(f"dims that are free: {sizes}")
        if FIXED in self.facts:
            lines.append(f"all are fixed, for with free ones: {self.facts[FIXED]}")
        lines += [f"{name}: {of}" for name, of in self.facts.get("sizes", {}).items() if of != "any"]
        if self.apart is None:
            lines.append("not checked against the model")
        else:
            distances = ", ".join(f"{distance:.1e} on {name}" for name, distance in self.apart.items())
            lines.append(f"largest difference to the model: {distances}")
            if "others" not in self.apart:
                lines.append("not compared on other inputs: the model does not run on those that were drawn")
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
    dynamic: Dynamic = True,
    check: bool = True,
    opset: int | None = None,
) -> Exported:
    """Write a model as a file that runs without its class and without secateur, and see that it computes the same.

    Args:
        model: a model, cut or not, which is left untouched; it is exported in eval mode.
        path: the file; ``.onnx`` is ONNX, ``.pt2`` a ``torch.export`` program, ``.py`` plain PyTorch, ``.txt`` a pruned
            model of timm, unless ``to``
            says which. An earlier one is replaced, once the new one is whole. Weights of ONNX of more than a GiB are in
            a file beside it, ``NAME.*.onnx.data``, those of Python and timm always,
            ``NAME.*.safetensors``.
        example_inputs: what its forward takes: a tensor, a tuple of positional or a dict of keyword arguments.
        to: ``"onnx"``, ``"program"``, ``"python"``; ``"timm"``, a text and weights as timm keeps its pruned networks,
            which its own reader makes of the original (it is not compared); ``"hf"``, a folder that plain
            ``transformers`` reads (``from_pretrained``), of a model of theirs whose configuration can say the widths
            (it is always compared).
        outputs: which of what the forward returns, ``lambda out: out.logits``; all tensors by default.
        dynamic: the first dim of all inputs, the batch, may have other sizes; so may the second of inputs of whole
            numbers [batch, length]. Or the dims by input, ``{"image": [0, 2, 3]}``, with names for sizes that are one
            in several inputs, ``{"ids": {0: "batch", 1: "length"}, ...}``. What the model does not bear is fixed,
            which the answer tells.
        check: compare with the model, on the example and on other inputs of other sizes.
        opset: of ONNX; by default what PyTorch takes.

    Returns:
        What was written: see :class:`Exported`.

    Raises:
        BadFile: it cannot be written.
        SecateurError: an unknown target, inputs on which the model does not run, a forward that cannot be exported,
            a package that is missing, outputs that are not the model's. Nothing is written then.
    """
    target, where = _target(path, to)
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        raise SecateurError(f"export: an nn.Module of Python is expected, a {type(model).__name__} was given")
    if outputs is not None and not callable(outputs):
        raise SecateurError(f"export(outputs={outputs!r}): a function is expected, such as lambda out: out.logits")
    model = unwrapped(model, "export")
    check_dynamic(dynamic)
    check_flag("check", check)
    check_count("opset", opset, optional=True)
    given = {"outputs": outputs is not None, "opset": opset is not None, "dynamic": dynamic is not True}
    given["check"] = not check
    wrong = [f"{name}=" for name, is_given in given.items() if is_given and target in NONSENSE[name]]
    if wrong:
        raise SecateurError(f"export(to={target!r}): {', '.join(wrong)} mean nothing here; leave them out")
    if target == TIMM:
        return _pruned_text(model, where)
    if target == HF:
        return _folder(model, where, example_inputs)
    if target == "onnx":
        to_onnx.check_extra(runtime=check)
    with ALONE:
        fixed = exportable(model, example_inputs, outputs)
        free = with_free_sizes(fixed, dynamic)
        if free is fixed:
            return _written(fixed, target, where, opset, check=check)
        try:
            return _written(free, target, where, opset, check=check)
        except BadFile:
            raise
        except SecateurError as error:
            done = _written(fixed, target, where, opset, check=check)
            return replace(done, facts=done.facts | {FIXED: str(error)})


Written = tuple[dict[str, Any], Runs]
"""What is known of what was written, and how it runs."""
ALONE = threading.RLock()
"""PyTorch's exporters are not made for several threads at a time."""


def _target(path: str | Path, to: str | None) -> tuple[str, Path]:
    """What is written, and where.

    Raises:
        BadFile: it is a folder.
        SecateurError: no path, or an unknown target.
    """
    if not isinstance(path, (str, Path)):
        raise SecateurError(f"export(path={path!r}): a file is expected, such as 'small.onnx'")
    where = Path(path)
    target = to if to is not None else {end: name for name, end in TARGETS.items() if end}.get(where.suffix)
    if target is None:
        ends, names = " or ".join(end for end in TARGETS.values() if end), ", ".join(TARGETS)
        raise SecateurError(f"export({str(path)!r}): a file that ends with {ends} is expected, or to= one of {names}")
    check_choice("to", target, TARGETS)
    if where.is_dir() and TARGETS[target]:
        raise BadFile(f"export: {where} is a folder; give a file")
    if where.is_file() and not TARGETS[target]:
        raise BadFile(f"export: {where} is a file; give a folder")
    return target, where


def _pruned_text(model: nn.Module, where: Path) -> Exported:
    """Write the shapes and weights that timm's reader takes."""
    text = to_timm.pruned_text(model)
    weights = to_bytes(shards.apart(model.state_dict()))
    beside = where.with_name(f"{where.stem}.{secrets.token_hex(4)}{BESIDE[TIMM]}")
    make_folder(where.parent)
    write_atomically(beside, weights)
    write_atomically(where, f"{text}\n".encode())
    _remove_earlier(where, TIMM, {beside.name})
    return Exported(where, TIMM, len(weights) + len(text) + 1, {}, None, {})


def _folder(model: nn.Module, where: Path, inputs: Inputs) -> Exported:
    """Write a folder that ``transformers`` reads."""
    huggingface.check_model(model)
    try:
        with ALONE:
            make_folder(where.absolute().parent)
            apart, config = huggingface.write_folder(exportable(model, inputs, None), where)
    except OSError as error:
        raise BadFile(
            f"export: {where} cannot be written ({error.strerror or error}); make room, or give another"
        ) from error
    size = sum(file.stat().st_size for file in where.iterdir() if file.is_file())
    return Exported(where, HF, size, {}, apart, {"config": config})


def _written(what: Exportable, target: str, where: Path, opset: int | None, *, check: bool) -> Exported:
    """Write it beside where it is to be, look at it, and move it there."""
    program = program_of(what)
    above = next(folder for folder in where.absolute().parents if folder.exists())
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{where.name}.", dir=above))
        new = folder / f"{where.stem}.{secrets.token_hex(4)}{TARGETS[target]}"  # so that its weights' file is its own
        facts, runs = WRITE[target](what, program, new, opset)
        apart = compared(what, free_sizes(what, program), runs) if check else None
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        beside = [file for file in folder.iterdir() if file.is_file() and file != new]
        make_folder(where.parent)
        for file in beside:
            os.replace(file, where.parent / file.name)
        os.replace(new, where)
        _remove_earlier(where, target, {file.name for file in beside})
    except OSError as error:
        why = error.strerror or error
        raise BadFile(f"export: {where} cannot be written ({why}); make room, or give another") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return Exported(where, target, size, free_dims(program), apart, facts | {"sizes": free_sizes(what, program)})


def _remove_earlier(where: Path, target: str, but: set[str]) -> None:
    """Remove weights of what was here before."""
    own = re.compile(rf"{re.escape(where.stem)}\.[0-9a-f]{{8}}{re.escape(BESIDE.get(target, ''))}")
    for old in where.parent.iterdir() if target in BESIDE else ():
        if own.fullmatch(old.name) and old.name not in but:
            old.unlink()


def _onnx(what: Exportable, program: ExportedProgram, path: Path, opset: int | None) -> Written:
    facts = to_onnx.write(program, path, output_names(what.run(what.args, what.kwargs)), opset)

    def runs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return to_onnx.runner(path, facts["inputs"])(tensors)

    return facts, runs


def _python(what: Exportable, program: ExportedProgram, path: Path, _: int | None) -> Written:
    return {}, to_python.write(what, program, path, path.with_suffix(BESIDE["python"]))


def _program(what: Exportable, program: ExportedProgram, path: Path, _: int | None) -> Written:
    program.example_inputs = None  # they are the user's, and not for others
    with quiet():
        torch.export.save(program, path)

    def runs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        with quiet():
            again = torch.export.load(path).module()
        args, kwargs = what.given(tensors)
        with torch.no_grad():
            return tensors_in(again(*args, **kwargs))

    return {}, runs


WRITE = {"onnx": _onnx, "program": _program, "python": _python}
BESIDE = {"onnx": ".onnx.data", "python": ".safetensors", TIMM: ".safetensors"}
"""How the files of weights end that may lie beside."""
