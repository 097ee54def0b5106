"""Tries the files that bench/elsewhere.py wrote, which lie beside this one: what they give is what the networks gave.

It needs PyTorch and ONNX Runtime, and refuses to run where secateur or transformers are.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import torch

HERE = Path(__file__).parent
ABSENT = ("secateur", "transformers", "safetensors", "onnx", "onnxscript")


def by_onnx(name: str, inputs: dict[str, torch.Tensor]) -> Any:
    """What the ONNX file gives."""
    session = onnxruntime.InferenceSession(str(HERE / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    arrays = {place.name: x.numpy() for place, x in zip(session.get_inputs(), inputs.values(), strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, arrays)]


def by_program(name: str, inputs: dict[str, torch.Tensor]) -> Any:
    """What the program gives."""
    return torch.export.load(HERE / f"{name}.pt2").module()(*inputs.values())


def by_python(name: str, inputs: dict[str, torch.Tensor]) -> Any:
    """What the file of Python gives."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()(*inputs.values())


def main() -> None:
    """Try all."""
    warnings.simplefilter("ignore")
    here = [name for name in ABSENT if importlib.util.find_spec(name) is not None]
    assert not here, f"{here} are here"
    tried = 0
    for path in sorted(HERE.glob("*.recorded.pt")):
        name, kept = path.name.partition(".")[0], torch.load(path)
        for run in (by_onnx, by_program, by_python):
            with torch.no_grad():
                leaves = torch.utils._pytree.tree_leaves(run(name, kept["inputs"]))
            found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            assert [t.shape for t in found] == [t.shape for t in kept["outputs"]], (name, run.__name__)
            pairs = [(a.double(), b.double()) for a, b in zip(found, kept["outputs"], strict=True)]
            apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
            print(f"{name:10} {run.__name__:10} {apart:.1e}", flush=True)
            assert apart < 1e-4
            tried += 1
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, Python {sys.version.split()[0]}"
    print(f"{tried} files give what the networks gave ({versions})")


if __name__ == "__main__":
    main()
