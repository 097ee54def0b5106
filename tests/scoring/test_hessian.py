"""Second-order scores and their compensation against brute force, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.curvature.damped_inverse import inverse
from secateur.curvature.kronecker import Factors, kronecker_factors
from secateur.curvature.layers import Layer
from secateur.curvature.obs_update import obs_update
from secateur.repair.compensate import compensated_weights
from secateur.scoring import hessian

ROWS, COLUMNS = 5, 4


def positive(size, seed):
    a = torch.randn(size, size + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / (size + 3)


@pytest.fixture
def factors():
    """A linear with made-up factors."""
    torch.manual_seed(0)
    layer = Layer("it", nn.Linear(COLUMNS, ROWS, bias=False).double(), "full")
    return Factors(layer, positive(COLUMNS, 1)[None], positive(ROWS, 2)[None])


def brute_force(factors, gone):
    """The least ``1/2 vec(dW)^T (G (x) A) vec(dW)`` with ``W + dW`` zero in the rows that go, by one linear system."""
    table = factors.layer.table()[0, :, 0]
    fisher = torch.kron(factors.g[0], factors.a[0])
    fixed = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    fixed[gone] = True
    fixed = fixed.flatten()
    change = torch.zeros(ROWS * COLUMNS, dtype=torch.float64)
    change[fixed] = -table.flatten()[fixed]
    change[~fixed] = torch.linalg.solve(fisher[~fixed][:, ~fixed], -fisher[~fixed][:, fixed] @ change[fixed])
    return change.reshape(ROWS, COLUMNS), 0.5 * change @ fisher @ change


@pytest.mark.parametrize("row", range(ROWS))
def test_kron_obs_is_the_least_rise_of_the_quadratic(factors, row):
    _, cost = brute_force(factors, [row])
    torch.testing.assert_close(hessian._kron_obs(factors, 0.0)[0, row], cost, rtol=1e-9, atol=0)


@pytest.mark.parametrize("gone", [[0], [1, 3], [0, 2, 4], [0, 1, 2, 3]])
def test_compensation_is_its_joint_minimiser(factors, gone):
    table = factors.layer.table()[0]
    which = torch.zeros(ROWS, dtype=torch.bool)
    which[gone] = True
    moved = obs_update(-table, factors.g[0], which, 0.0)
    change, cost = brute_force(factors, gone)
    torch.testing.assert_close(moved[:, 0], change, rtol=1e-9, atol=1e-12)
    w, g = table[which][:, 0], inverse(factors.g, 0)[0]
    closed = 0.5 * torch.trace(factors.a[0] @ w.T @ torch.linalg.inv(g[which][:, which]) @ w)
    torch.testing.assert_close(closed, cost, rtol=1e-9, atol=0)
    alone = 0.5 * torch.einsum("rc,cd,qd,rq->", w, factors.a[0], w, factors.g[0][which][:, which])
    assert cost <= alone + 1e-12


def test_with_unit_factors_all_are_the_squared_norm(factors):
    unit = Factors(factors.layer, torch.eye(COLUMNS).double()[None], torch.eye(ROWS).double()[None])
    norm = 0.5 * factors.layer.table().square().sum((2, 3))
    for scores in (hessian._kron_obd(unit), hessian._kron_obs(unit, 0.0), hessian._obs(unit, 0.0)):
        torch.testing.assert_close(scores, norm)
    which = torch.tensor([True, False, True, False, False])
    assert not obs_update(-unit.layer.table()[0], unit.g[0], which, 0.0)[~which].any()


def test_kron_obs_is_at_most_kron_obd_and_equal_where_rows_are_independent(factors):
    assert (hessian._kron_obs(factors, 0.0) <= hessian._kron_obd(factors)).all()
    g = factors.g.clone()
    g[0, 2] = g[0, :, 2] = 0
    g[0, 2, 2] = 3.0
    alone = Factors(factors.layer, factors.a, g)
    equal = torch.isclose(hessian._kron_obs(alone, 0.0), hessian._kron_obd(alone))[0]
    assert equal.tolist() == [False, False, True, False, False]


def test_obs_by_hand(factors):
    table, a, g = factors.layer.table()[0, :, 0], torch.linalg.inv(factors.a[0]), torch.linalg.inv(factors.g[0])
    exact = torch.stack(
        [0.5 * sum(table[r, j] ** 2 / (g[r, r] * a[j, j]) for j in range(COLUMNS)) for r in range(ROWS)]
    )
    torch.testing.assert_close(hessian._obs(factors, 0.0)[0], exact)


# ------------------------------------------------------------------------------------------------ on whole networks


class Residual(nn.Module):
    """Two convolutions write one stream."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(4, 3)

    def forward(self, x):
        x = self.a(x).relu()
        x = x + self.norm(self.b(x))
        return self.head(self.c(x).relu().mean((2, 3)))


X = torch.randn(9, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 1, 0, 0])
DATA = [(X[:5], Y[:5]), (X[5:], Y[5:])]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Residual().double().eval()


@pytest.fixture
def graph(model):
    return sc.trace(model, X)


def test_obd_is_the_diagonal_of_the_empirical_fisher(model, graph):
    scores = sc.score(model, graph, sc.OBD(fisher="empirical"), data=DATA, loss=F.cross_entropy)
    parameters = dict(model.named_parameters())
    squares = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for x, y in zip(X, Y, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        for (n, _), g in zip(parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
            squares[n] += g.square() / len(X)
    exact = {}
    for n in ("a", "b", "c"):
        rise = 0.5 * squares[f"{n}.weight"] * parameters[f"{n}.weight"].square()
        exact[n] = rise.sum((1, 2, 3)) + 0.5 * squares[f"{n}.bias"] * parameters[f"{n}.bias"].square()
    torch.testing.assert_close(scores["a"], (exact["a"] + exact["b"]).detach())
    torch.testing.assert_close(scores["c"], exact["c"].detach())


CRITERIA = ["obd", "obs", "kron_obd", "kron_obs"]


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_lead_to_plans_that_cut_exactly(model, graph, name):
    scores = sc.score(model, graph, name, data=DATA, loss="cross_entropy")
    assert {n: tuple(s.shape) for n, s in scores.items()} == {"a": (6,), "c": (4,)}
    assert all((s >= 0).all() and s.dtype == torch.float64 for s in scores.values())
    plan = sc.allocate(graph, scores, sc.Budget(macs=0.6))
    assert sc.check(model, sc.cut(model, plan), plan, X) < 1e-10
    result = sc.prune(
        model, X, sc.Budget(macs=0.6), criterion=name, strategy="global", repair="none", data=DATA,
        loss=nn.CrossEntropyLoss(),
    )  # fmt: skip
    assert result.after.macs <= 0.6 * result.before.macs


def test_compensation_changes_what_stays_and_lowers_the_rise_of_the_loss():
    """On a layer with dependent rows: some are sums of others, and can be made up for entirely."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double()
    with torch.no_grad():
        model[1].weight[:, 5] = 2 * model[1].weight[:, 1]  # what row 5 does, row 1 can do
    x, y = torch.randn(64, 6, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    graph = sc.trace(model, x)
    curvature = kronecker_factors(model, [(x, y)], "mse", form="full", samples=50)
    plan = sc.make_plan(graph, {"0": [5]})
    plain, better = sc.cut(model, plan), sc.cut(model, plan)
    repair = sc.Compensate(samples=50)
    facts = sc.apply_repair(model, better, plan, repair, data=[(x, y)], loss="mse")
    assert facts == {"compensated": ["0"], "left whole": {}}
    full = copy.deepcopy(model)
    full.load_state_dict({**full.state_dict(), **compensated_weights(model, plan, curvature)})
    assert sc.check(full, better, plan, x) < 1e-10
    before = model(x)
    assert F.mse_loss(better(x), before) < 0.01 * F.mse_loss(plain(x), before)
    assert torch.equal(model(x), before)


def test_factors_serve_the_weights_that_the_model_holds_now(model, graph):
    curvature = kronecker_factors(model, DATA, "cross_entropy", form="full")
    later = copy.deepcopy(model)
    with torch.no_grad():
        later.c.weight.mul_(3)
        later.c.bias.mul_(3)
    one, two = (hessian._kron_obs(curvature["c"].of(m), 1e-3) for m in (model, later))
    torch.testing.assert_close(two, 9 * one)
    plan = sc.make_plan(graph, {"c": [1]})
    weights = [compensated_weights(m, plan, curvature)["c.weight"] for m in (model, later)]
    torch.testing.assert_close(weights[1], 3 * weights[0])
    other = kronecker_factors(nn.Linear(4, 5), [torch.randn(3, 4)], "cross_entropy", form="full")[""]
    with pytest.raises(sc.SecateurError, match="another model"):
        other.of(model)


def test_the_repair_uses_the_factors_of_the_criterion(model):
    """One pass over the data serves both."""
    how = {"samples": 2, "seed": 3}
    result = sc.prune(
        model, X, sc.Budget(macs=0.6), criterion=sc.KronOBS(**how), repair=sc.Compensate(**how), data=DATA,
        loss="cross_entropy",
    )  # fmt: skip
    assert result.facts["forwards"] == len(DATA)
    assert {"a", "b"} <= set(result.facts["compensated"]) <= {"a", "b", "c"}


def test_a_group_that_something_else_writes_too_has_no_score():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.line, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, ids):
            x = self.table(ids)
            x = x + self.down(self.up(x).relu())
            return self.head(x.sum(1))

    model, ids = Both(), torch.randint(7, (4, 3))
    graph = sc.trace(model, ids)
    scores = sc.score(model, graph, "kron_obs", data=[ids], loss="cross_entropy")
    assert set(scores) == {"up"} and {g.name for g in graph.groups} == {"table", "up"}
    plan = sc.allocate(graph, scores, sc.Budget(channels=0.9))
    assert plan.skipped == {"table": "has no scores: table: it is no linear or convolution whose rows are channels"}


BAD = {
    "no data": ({"criterion": "kron_obs"}, "needs data="),
    "no loss": ({"criterion": "obd", "data": DATA}, "loss="),
    "damping": ({"criterion": {"name": "obs", "damping": -1.0}, "data": DATA, "loss": F.cross_entropy}, "from 0 on"),
    "singular": (
        {"criterion": sc.KronOBS(damping=0.0), "data": [(X[:1], Y[:1])], "loss": F.cross_entropy}, "singular"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(model, graph, name):
    options, message = BAD[name]
    with pytest.raises(sc.SecateurError, match=message):
        sc.score(model, graph, **options)
