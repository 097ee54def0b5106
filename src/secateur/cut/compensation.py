r"""Rows that stay make up for rows that go (Optimal Brain Surgeon on Kronecker factors, arXiv 1905.05934, section 3).

With the Fisher ``G (x) A`` of a layer, the least rise of the loss under the removal of the rows ``P`` has a closed form
in which ``A`` cancels (the rows are constrained jointly, not one after the other)::

    W[stay] <- W[stay] + G[stay, stay]^-1 G[stay, P] W[P]        rise = 1/2 tr(A W_P^T (G^-1[P, P])^-1 W_P)
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from secateur.curvature import Curvature, damped, root
from secateur.plan import Plan

DAMPING = 1e-3


def compensated(model: nn.Module, plan: Plan, curvature: Curvature, *, damping: float = DAMPING) -> nn.Module:
    """A copy of the model, of full size, whose remaining rows make up for those that the plan removes.

    The weights of the rows that go stay in it; ``cut`` takes them away, ``masked`` sets them to zero.

    Args:
        model: the model the plan was made for.
        plan: what goes.
        curvature: factors of the model's layers, in either form; layers without any stay as they are.
        damping: added to the diagonal of ``G``, in units of its mean eigenvalue.

    Raises:
        SecateurError: factors of another model, singular factors.
    """
    changed = copy.deepcopy(model)
    for name, factors in curvature.items():
        removed = plan.slices.get(f"{name}.weight" if name else "weight", {}).get(0, [])
        if not removed:
            continue
        layer = factors.of(changed).layer
        module = layer.module
        table = layer.table().double()
        gone = torch.zeros(table.shape[0] * table.shape[1], dtype=torch.bool)
        gone[removed] = True
        for number, which in enumerate(gone.reshape(table.shape[:2])):
            table[number] = _made_up(table[number], factors.g[number], which.to(table.device), damping)
        weight, bias = layer.weights(table)
        with torch.no_grad():
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
    return changed


def _made_up(table: Tensor, g: Tensor, gone: Tensor, damping: float) -> Tensor:
    """One group's table [rows, taps, columns] with its remaining rows changed."""
    if not gone.any() or gone.all():
        return table
    stay, matrix = ~gone, damped(g, damping)
    share = torch.cholesky_solve(matrix[stay][:, gone], root(matrix[stay][:, stay], 0))
    result = table.clone()
    result[stay] += torch.einsum("sp,ptc->stc", share, table[gone])
    return result
