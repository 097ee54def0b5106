"""Shapes written in annotations are checked while tests run; one thread a process, since processes run side by side."""

from __future__ import annotations

from jaxtyping import install_import_hook

with install_import_hook(
    ["secateur.scoring.sums", "secateur.methods.sdprun", "secateur.tracing.channel_rows"], "beartype.beartype"
):
    import secateur  # noqa: F401

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

torch.set_num_threads(1)


@pytest.fixture
def in_two_processes(tmp_path):
    """Runs a file as two processes that know each other; gives what each has saved, as ``FOLDER/RANK.safetensors``."""

    def run(file: str) -> list[dict[str, torch.Tensor]]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
        command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", file, str(tmp_path)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]

    return run


@pytest.fixture
def interrupted(monkeypatch):
    """Lets a method raise KeyboardInterrupt at one of its calls; gives a list that grows with every call."""

    def at(kind: type, method: str, number: int) -> list[int]:
        calls, whole = [], getattr(kind, method)

        def counted(*args):
            calls.append(len(calls))
            if len(calls) == number:
                raise KeyboardInterrupt
            return whole(*args)

        monkeypatch.setattr(kind, method, counted)
        return calls

    return at
