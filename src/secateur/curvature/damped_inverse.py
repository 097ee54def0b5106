"""Damped inverses of factors, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur._internal.checks import check_nonnegative
from secateur._internal.errors import SecateurError


def check_damping(damping: object) -> None:
    """Raise if it is not a number from 0 on."""
    check_nonnegative("damping", damping)


NOTHING = 1e-30
"""What stands for the mean eigenvalue of a factor that is zero throughout."""


def damped(matrix: Tensor, damping: float) -> Tensor:
    """A factor [..., n, n] plus ``damping`` times its mean eigenvalue on the diagonal, float64.

    Raises:
        SecateurError: damping that is not a number from 0 on.
    """
    check_damping(damping)
    matrix = matrix.double()
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    mean = torch.where(mean > 0, mean, NOTHING)  # a factor that is zero: whatever it couples costs nothing
    return matrix + damping * mean * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def root(matrix: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of a damped factor.

    Raises:
        SecateurError: it is singular all the same.
    """
    lower, wrong = torch.linalg.cholesky_ex(damped(matrix, damping))
    if wrong.any() or not lower.isfinite().all():
        raise SecateurError(
            f"a Kronecker factor of size {matrix.shape[-1]} is singular with damping={damping}: "
            "give more damping, or more data"
        )
    return lower


def inverse(matrix: Tensor, damping: float) -> Tensor:
    """The inverse of a damped factor [..., n, n], float64."""
    return torch.cholesky_inverse(root(matrix, damping))
