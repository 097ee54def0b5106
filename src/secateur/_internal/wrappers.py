"""What PyTorch puts around a model, and the model inside."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from secateur._internal.errors import SecateurError, notice

_INSIDE = "_orig_mod"  # where `torch.compile(model)` keeps the model


def unwrapped(model: nn.Module, who: str) -> nn.Module:
    """The model inside of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` and ``AveragedModel``.

    All of them give every tensor another name, and none changes what the model computes. Of an ``AveragedModel`` it is
    the averaged model; that the number of averaged models is left behind is told.

    Args:
        model: any module; one that is not wrapped is returned as it is.
        who: the verb that asks, for the notice.
    """
    while True:
        if isinstance(model, AveragedModel):
            notice(
                f"{who}: of an AveragedModel, the averaged model is taken; how many were averaged (n_averaged) is not "
                "kept, so averaging cannot go on from it. Give averaged.module to say so yourself",
                stacklevel=4,
            )
            model = model.module
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif _is_compiled(model):
            model = model.get_submodule(_INSIDE)
        else:
            return model


def _is_compiled(model: nn.Module) -> bool:
    # a script has no dict of modules; torch._dynamo, where the class is, is a second's import
    return not isinstance(model, torch.jit.ScriptModule) and isinstance(model._modules.get(_INSIDE), nn.Module)


def refuse_wrapped(model: nn.Module, who: str) -> None:
    """Raise if a model, or a part of it, is wrapped such that it cannot be cut; the message says what to give instead.

    Args:
        model: any module.
        who: the verb that asks, and its argument.

    Raises:
        SecateurError: one is.
    """
    for path, part in model.named_modules():
        obstacle = _obstacle(part, f"model.{path}" if path else "model")
        if obstacle:
            what = f"{path} is {obstacle}" if path else f"{obstacle} was given"
            raise SecateurError(f"{who}: {what}")


def _obstacle(part: nn.Module, path: str) -> str:
    """What is wrong with a module, and what to do, in words; empty if nothing is."""
    if isinstance(part, torch.jit.ScriptModule):
        return (
            "TorchScript, whose code cannot be followed or changed: give the Python module that it was made from, and "
            "script what comes out"
        )
    kind: Any = type(part)
    for name, tensor in part._parameters.items():
        if tensor is not None and type(tensor.data) is not torch.Tensor and not _within(kind, *_SHARDED):
            return (
                f"a {kind.__name__} whose {name} is a {type(tensor.data).__name__}, and only plain tensors can "
                "be cut: give the model as it is before it is sharded or quantised"
            )
    return _kind_of_obstacle(part, path)


_SHARDED = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")
_OBSERVED = (
    "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat", "torch.ao.quantization.observer",
    "torch.ao.quantization.fake_quantize",
)  # fmt: skip
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


@cache
def _within(kind: Any, *names: str) -> bool:
    """Whether a class, or one that it is derived from, is of one of these packages."""
    rooms = {base.__module__ for base in kind.__mro__}
    return any(room == name or room.startswith(f"{name}.") for room in rooms for name in names)


def _kind_of_obstacle(part: nn.Module, path: str) -> str:
    kind: Any = type(part)
    if isinstance(part, (DataParallel, DistributedDataParallel)):
        return (
            f"a {kind.__name__}, the wrapper for several devices: give the model inside, {path}.module, and wrap what "
            "comes out"
        )
    if isinstance(part, AveragedModel):
        return f"an AveragedModel: give the averaged model inside, {path}.module"
    if _is_compiled(part):
        return (
            f"compiled (torch.compile): give the module inside, {path}.{_INSIDE}, and compile what comes out; or call "
            "model.compile(), which wraps nothing"
        )
    if _within(kind, *_SHARDED):
        return (
            "sharded (FSDP), and no process holds whole weights: prune the model before it is sharded, or load its "
            "full state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) "
            "into a model that is not"
        )
    if _within(kind, *_OBSERVED):
        return (
            f"prepared for quantisation ({kind.__name__}): prune the model before prepare_qat (or prepare), and "
            "prepare what comes out"
        )
    # float models use its FloatFunctional, too
    if _within(kind, *_QUANTISED) and not _within(kind, "torch.ao.nn.quantized.modules.functional_modules"):
        return f"quantised ({kind.__name__}): prune the model with floating-point weights, and quantise what comes out"
    return ""
