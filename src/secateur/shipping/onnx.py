"""ONNX, by ``torch.onnx`` from a ``torch.export`` program, and ONNX Runtime to see that it computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from secateur._internal.errors import SecateurError
from secateur.shipping.parity import Runs
from secateur.shipping.programs import first_line, quiet

OWN_FILE = 1 << 30
"""Weights of so many bytes go into a file of their own beside the graph, which can hold two GiB."""


def check_extra(*, runtime: bool) -> None:
    """Raise if what is needed is not installed."""
    wanted = ["onnx", "onnxscript"] + (["onnxruntime"] if runtime else [])
    for name in wanted:
        try:
            __import__(name)
        except ImportError as error:
            without = "; check=False does without it" if name == "onnxruntime" else ""
            raise SecateurError(
                f"export to ONNX needs the package {name}: pip install 'secateur[onnx]'{without}"
            ) from error


def write(program: ExportedProgram, path: Path, names: Sequence[str], opset: int | None) -> dict[str, Any]:
    """Write a program as ONNX, and say what is in it.

    Raises:
        SecateurError: an operator that ONNX does not have, an opset that the graph cannot be said in.
    """
    import onnx

    constants = [t for t in program.constants.values() if isinstance(t, Tensor)]
    size = sum(t.nbytes for t in (*program.state_dict.values(), *constants))
    inputs = set(program.graph_signature.user_inputs)
    try:
        with quiet():
            made = torch.onnx.export(
                program, dynamo=True, opset_version=opset, verbose=False, optimize=True,
                output_names=[f"{name}_out" if name in inputs else name for name in names],
            )  # fmt: skip
            assert made is not None
            made.save(str(path), external_data=size > OWN_FILE)
    except Exception as error:
        raise SecateurError(
            f"export: what torch.export gave cannot be said in ONNX ({type(error).__name__}: {first_line(error)}); "
            "to='program' may do"
        ) from error
    graph = onnx.load(str(path), load_external_data=False)
    found = next(i.version for i in graph.opset_import if not i.domain)
    if opset is not None and found != opset:
        raise SecateurError(f"export(opset={opset}): this graph cannot be said in it; give {found}, or leave it out")
    return {
        "opset": found,
        "operators": sorted({node.op_type for node in graph.graph.node}),
        "inputs": [i.name for i in graph.graph.input],
        "outputs": [o.name for o in graph.graph.output],
    }


def runner(path: Path, inputs: Sequence[str]) -> Runs:
    """The file in ONNX Runtime, on the CPU."""
    session = session_of(path)

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        arrays = {name: t.detach().cpu().numpy() for name, t in zip(inputs, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


def session_of(path: Path, threads: int = 0) -> Any:
    """A session of ONNX Runtime on the CPU, with so many threads; 0 for as many as it takes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.inter_op_num_threads = 3, threads, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
