"""The full-form factors are those of curvlinops, an independent implementation."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_kronecker import X, Y
from torch import nn

from secateur.curvature.kronecker import kronecker_factors

with warnings.catch_warnings():  # what it imports uses torch.jit
    warnings.simplefilter("ignore", DeprecationWarning)
    from curvlinops import KFACLinearOperator

PARTS = {
    "linears": (
        nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3)), nn.CrossEntropyLoss(), Y),
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, bias=False), nn.ReLU(),
            nn.Flatten(), nn.Linear(20, 3),
        ), nn.CrossEntropyLoss(), Y),
    "regression": (
        nn.Sequential(nn.Conv2d(2, 3, (2, 3), dilation=(1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)),
        nn.MSELoss(reduction="sum"), X[:, 0, 0, :2]),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_the_factors_agree(name):
    torch.manual_seed(0)
    model, loss, targets = PARTS[name]
    model = model.double()
    data = [(X[:4], targets[:4]), (X[4:], targets[4:])]
    theirs = KFACLinearOperator(
        model, loss, list(model.parameters()), data, fisher_type="empirical", kfac_approx="expand",
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    theirs.compute_kronecker_factors()
    kind = "mse" if name == "regression" else "cross_entropy"
    ours = kronecker_factors(model, data, kind, form="full", fisher="empirical")
    assert set(ours) == set(theirs._input_covariances)
    for layer, factors in ours.items():
        a, g = theirs._input_covariances[layer], theirs._gradient_covariances[layer]
        one, two = torch.kron(factors.g[0], factors.a[0]), torch.kron(g, a)
        # their squared error is not halved and, as a sum, not averaged over the 7 examples
        scale = 4 * 7 if name == "regression" else 1
        torch.testing.assert_close(two, scale * one, rtol=1e-9, atol=1e-14)
