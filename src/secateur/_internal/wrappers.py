"""What PyTorch puts around a model, and the model inside."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from secateur._internal.errors import notice

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
        elif isinstance(vars(model).get("_modules", {}).get(_INSIDE), nn.Module):
            model = model.get_submodule(_INSIDE)
        else:
            return model
