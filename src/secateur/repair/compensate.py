r"""What stays makes up for what goes (Optimal Brain Surgeon on Kronecker factors, arXiv 1905.05934, section 3).

Channels go, and the least rise of the loss of one layer under it has a closed form, for all of them jointly::

    producers    W[stay, :] += G[stay, stay]^-1 G[stay, gone] W[gone, :]       the published one: the rows that stay
    consumers    W[:, stay] += W[:, gone] A[gone, stay] A[stay, stay]^-1       ours: the columns that stay

A consumer whose input vanishes predicts it from its other inputs, by least squares over the data (compare arXiv
1707.06168); no label is needed. A producer's rows can make up only for what moves the loss in the same direction.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from secateur._internal.errors import unknown
from secateur.curvature.kronecker import Curvature
from secateur.curvature.obs_update import obs_update_columns, obs_update_rows
from secateur.plan import Plan
from secateur.tracing.channel_rows import along

DAMPING = 1e-3
SIDES = {"producers": (0, obs_update_rows), "consumers": (1, obs_update_columns)}
"""By name: the dim of the weight that loses channels, and what makes up for it."""


def compensated(
    model: nn.Module, plan: Plan, curvature: Curvature, *, at: str = "producers", damping: float = DAMPING
) -> nn.Module:
    """A copy of the model, of full size, in which what stays makes up for what the plan removes.

    The weights that go stay in it; ``cut`` takes them away, ``masked`` sets them to zero.

    Args:
        model: the model the plan was made for.
        plan: what goes.
        curvature: factors of the model's layers, in either form; layers without any stay as they are.
        at: ``"producers"`` or ``"consumers"`` of the channels.
        damping: added to the diagonal of the factor that is inverted, in units of its mean eigenvalue.

    Raises:
        SecateurError: unknown side, factors of another model, singular factors.
    """
    if at not in SIDES:
        raise unknown("at", at, SIDES)
    dim, make_up = SIDES[at]
    changed = copy.deepcopy(model)
    for name, factors in curvature.items():
        removed = plan.slices.get(f"{name}.weight" if name else "weight", {}).get(dim, [])
        if not removed:
            continue
        layer = factors.of(changed).layer
        gone = torch.zeros(layer.module.weight.shape[dim], dtype=torch.bool)
        gone[removed] = True
        before = layer.table().double()
        weight, bias = layer.weights(before + make_up(factors, -before, gone, damping))
        gone = gone.to(weight.device)  # what goes stays as it was, until it goes
        with torch.no_grad():
            module = layer.module
            module.weight.copy_(torch.where(along(gone, dim, weight), module.weight, weight))
            if bias is not None:
                module.bias.copy_(torch.where(gone, module.bias, bias) if dim == 0 else bias)
    return changed
