"""What curvature measures leaves the model untouched, also where it fails; accuracy and the check of a cut do too."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from secateur.measure.accuracy import accuracy, loss

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 3, 6, 6, generator=G), torch.randint(0, 4, (24,), generator=G)
DATA = [(X[:16], Y[:16]), (X[16:], Y[16:])]
BAD = [DATA[0], (X[:4, :2], Y[:4])]


def projector(**settings):
    return lambda model, data: sc.null_space_projector(model, data, "cross_entropy", **settings)


VERBS = {
    "factors": lambda model, data: sc.kronecker_factors(model, data, "cross_entropy"),
    "full factors": lambda model, data: sc.kronecker_factors(model, data, "cross_entropy", form="full", fisher="exact"),
    "kfe": projector(basis="kfe", soft=True),
    "ekfac": projector(basis="kfe", ekfac=True),
    "lanczos": projector(basis="lanczos", k=5),
    "exact": projector(basis="exact"),
    "hessian": projector(basis="exact", matrix="hessian"),
    "accuracy": accuracy,
    "loss": loss,
}


@pytest.mark.parametrize("name", VERBS)
def test_the_model_is_left_untouched(restless, untouched, name):
    with untouched(restless):
        VERBS[name](restless, DATA)
    with untouched(restless), pytest.raises(sc.BadBatch, match=r"batch 1 .*does not fit the model"):
        VERBS[name](restless, BAD)


@pytest.mark.parametrize("name", VERBS)
def test_a_loader_that_shuffles_leaves_the_random_state(restless, untouched, name):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=12, shuffle=True)
    with untouched(restless):
        VERBS[name](restless, loader)


def test_checking_a_cut_leaves_both_models_untouched(restless, untouched):
    graph = sc.trace(restless, X[:2])
    plan = sc.make_plan(graph, {graph.groups[0].name: [0]})
    small = sc.cut(restless, plan)
    with untouched(restless), untouched(small):
        assert sc.check(restless, small, plan, X) < 1e-5
    with untouched(restless), untouched(small), pytest.raises((RuntimeError, sc.SecateurError)):
        sc.check(restless, small, plan, X[:, :2])
