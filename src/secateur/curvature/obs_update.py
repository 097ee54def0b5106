r"""How the rest of a layer should move, for the loss to rise least, if some of it moves as given.

With the Fisher ``G (x) A`` of a layer the answer is in closed form. Where whole rows of the displacement ``D`` are
given, ``A`` cancels (Kron-OBS, arXiv 1905.05934, section 3); where whole columns are, ``G`` does, and what is left is
the regression of the columns' inputs on the other inputs, the bias's constant 1 among them::

    D[stay, :] = -G[stay, stay]^-1 G[stay, given] D[given, :]
    D[:, stay] = -D[:, given] A[given, stay] A[stay, stay]^-1
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.curvature.damped_inverse import damped, root
from secateur.curvature.kronecker import Factors


def obs_update(table: Tensor, factor: Tensor, given: Tensor, damping: float) -> Tensor:
    """The least displacement of the other rows if some rows move as given.

    Args:
        table: displacements [rows, ...], those that are given.
        factor: what couples the rows, [rows, rows].
        given: bool [rows].
        damping: added to the diagonal of ``factor``, in units of its mean eigenvalue.

    Returns:
        All displacements, float64.

    Raises:
        SecateurError: a factor that is singular all the same.
    """
    flat = table.double().flatten(1) * given[:, None]
    if given.any() and not given.all():
        stay, matrix = ~given, damped(factor, damping)
        flat[stay] = -torch.cholesky_solve(matrix[stay][:, given], root(matrix[stay][:, stay], 0)) @ flat[given]
    return flat.view(table.shape)


def obs_update_rows(factors: Factors, table: Tensor, given: Tensor, damping: float) -> Tensor:
    """The displacement of a layer whose outputs ``given`` move as given.

    Args:
        factors: of the layer.
        table: displacement [groups, rows, taps, columns].
        given: bool [outputs].
        damping: as for :func:`obs_update`.
    """
    which = given.to(table.device).reshape(table.shape[:2])
    return torch.stack([obs_update(t, g, w, damping) for t, g, w in zip(table, factors.g, which, strict=True)])


def obs_update_columns(factors: Factors, table: Tensor, given: Tensor, damping: float) -> Tensor:
    """The displacement of a layer whose columns for the inputs ``given`` move as given.

    Args:
        factors: of the layer.
        table: displacement [groups, rows, taps, columns].
        given: bool [inputs of a group].
        damping: as for :func:`obs_update`.
    """
    layer = factors.layer
    which = given.to(table.device).repeat_interleave((table.shape[-1] - layer.bias) // len(given))
    which = torch.cat([which, which.new_zeros(int(layer.bias))])
    turned = [obs_update(t.permute(2, 0, 1), a, which, damping) for t, a in zip(table, factors.a, strict=True)]
    return torch.stack([t.permute(1, 2, 0) for t in turned])
