"""Shapes written in annotations are checked while tests run; one thread a process, since processes run side by side."""

from __future__ import annotations

import os
import random
import sys

import beartype  # noqa: F401 (it takes part in random states from then on, so it is there from the beginning)
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from safetensors.torch import load_file
from torch import nn

import forked
from conformance.state import untouched as same_state

install_import_hook(
    ["secateur.scoring.sums", "secateur.methods.sdprun", "secateur.tracing.channel_rows"], "beartype.beartype"
)  # for good, since each of these is imported when it is first used; nothing of secateur is imported yet
torch.set_num_threads(1)
# a test dependency brings torchvision, which need not fit the PyTorch that is here; transformers shall not look at it
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it tells what it lacks when it is first used
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def one_thread():
    """A test that left several threads would slow down all that follow in its process."""
    yield
    assert torch.get_num_threads() == 1


@pytest.fixture
def in_two_processes(tmp_path):
    """Runs a file as two processes that know each other; gives what each has saved, as ``FOLDER/RANK.safetensors``."""

    def run(file: str) -> list[dict[str, torch.Tensor]]:
        forked.run_two(file, tmp_path)
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


class Restless(nn.Module):
    """A small network with all that a forward may leave behind, and all that a user may have set."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.drop, self.head = nn.Conv2d(8, 6, 3), nn.Dropout(0.5), nn.Linear(6, 4)
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(1))

    def forward(self, x):
        self.written += 1
        self.replaced = self.replaced + 1
        torch.rand(2), random.random(), np.random.rand()
        x = self.norm(self.first(x)).relu()
        return self.head(self.drop(self.second(x).relu().mean((2, 3))))


@pytest.fixture
def restless():
    """A :class:`Restless` network in a mixed mode, with gradients, hooks and a frozen weight."""
    torch.manual_seed(0)
    model = Restless().train()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.second.register_forward_hook(lambda *_: None)
    model.head.register_forward_pre_hook(lambda *_: None)
    model.head.register_full_backward_hook(lambda *_: None)
    return model


@pytest.fixture
def untouched():
    """A context in which nothing of a model may change, though it may fail."""
    return same_state
