"""What runs a model where it is timed: eager PyTorch, ``torch.compile``, or ONNX Runtime on the CPU."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur._internal.batches import Inputs, arguments, tensors_in
from secateur._internal.errors import CannotMeasure, unknown
from secateur._internal.state import device_of, eval_mode
from secateur.shipping.api import export
from secateur.shipping.onnx import session_of
from secateur.shipping.programs import first_line, in_order


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward that can be timed.

    Attributes:
        given: makes what one forward is called with, tensors of its own; that is not timed.
        run: the forward.
        device: where it runs.
    """

    given: Callable[[], Any]
    run: Callable[[Any], Any]
    device: torch.device


@contextmanager
def _eager(model: nn.Module, inputs: Inputs) -> Iterator[Forward]:
    device = device_of(model)
    with eval_mode(model):
        yield Forward(lambda: arguments(copied_to(inputs, device)), lambda given: model(*given[0], **given[1]), device)


@contextmanager
def _compiled(model: nn.Module, inputs: Inputs) -> Iterator[Forward]:
    import torch._dynamo

    device = device_of(model)
    known = inspect.signature(torch.compile).parameters
    own: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    whole: Any = torch.compile(model, dynamic=False, **own)  # else the next of the class would count against this one
    strict: dict[str, Any] = {"fail_on_recompile_limit_hit": True, "accumulated_recompile_limit": 1 << 20}
    with eval_mode(model), torch._dynamo.config.patch(**strict):  # instead of going on in eager PyTorch
        forward = Forward(
            lambda: arguments(copied_to(inputs, device)), lambda given: whole(*given[0], **given[1]), device
        )
        try:
            forward.run(forward.given())
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise CannotMeasure(f"backend='compile': torch.compile cannot run this model here ({why})") from error
        yield forward


@contextmanager
def _onnxruntime(model: nn.Module, inputs: Inputs) -> Iterator[Forward]:
    given = copied_to(inputs, device_of(model))
    with tempfile.TemporaryDirectory() as folder:
        done = export(model, Path(folder) / "model.onnx", given, dynamic=False, check=False)
        try:
            session = session_of(done.path, torch.get_num_threads())
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise CannotMeasure(f"backend='onnxruntime': it cannot run this model ({why})") from error
    arrays = [t.detach().cpu().numpy() for t in tensors_in(in_order(model, given))]
    named = dict(zip(done.facts["inputs"], arrays, strict=True))
    yield Forward(
        lambda: {name: array.copy() for name, array in named.items()},
        lambda own: session.run(None, own),
        torch.device("cpu"),
    )


BACKENDS: Mapping[str, Any] = {"eager": _eager, "compile": _compiled, "onnxruntime": _onnxruntime}
"""By name, what makes a model ready to be timed on inputs: a context, in which it has a :class:`Forward`."""
EAGER = "eager"
LASTING = {"onnxruntime"}
"""Those whose forwards hold all that they need, and go on after their context."""


def check_backend(name: object) -> None:
    """Raise if nothing of this name runs models."""
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)


def ready(model: nn.Module | Forward, inputs: Inputs, backend: str = EAGER) -> Any:
    """A context with the :class:`Forward` of a model; what is one already stays it."""
    return nullcontext(model) if isinstance(model, Forward) else BACKENDS[backend](model, inputs)


def runs_on(model: nn.Module, backend: str) -> torch.device:
    """Where a backend runs a model."""
    return torch.device("cpu") if backend == "onnxruntime" else device_of(model)


def copied_to(inputs: Any, device: torch.device) -> Any:
    """The same inputs in tensors of their own, on a device."""
    return tree_map(lambda value: value.to(device, copy=True) if isinstance(value, Tensor) else value, inputs)
