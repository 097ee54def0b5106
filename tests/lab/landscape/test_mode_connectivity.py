"""Curves, planes and shares between two solutions: on paper where there is a formula, on digits where there is none."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.lab.landscape.mode_connectivity import Curve, along, barrier, connect, plane, steep_share
from secateur.lab.training.loop import fit

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32).flatten(1)[:600] / 16
Y = torch.tensor(DIGITS.target)[:600]
DATA = [(X[i : i + 50], Y[i : i + 50]) for i in range(0, 600, 50)]


def trained(seed, norm=True):
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 24), nn.BatchNorm1d(24) if norm else nn.Identity(), nn.ReLU(), nn.Linear(24, 10)]
    model = nn.Sequential(*layers)
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1), DATA, epochs=10, progress=False)
    return model.eval()


class Point(nn.Module):
    """A point of the plane; its output is itself."""

    def __init__(self, x, y) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))

    def forward(self, inputs):
        return self.at.expand(len(inputs), 2)


def ring(output, _):
    """Zero on the unit circle."""
    return (output.norm(dim=1) - 1).square().mean()


POINTS = [(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))]


def test_the_straight_line_crosses_the_ring_and_the_trained_curve_follows_it():
    start, end = Point(1.0, 0.0), Point(0.0, 1.0)
    line = connect(start, end, POINTS, epochs=0)
    rows = along(start, line, POINTS, points=61, loss=ring)
    assert barrier(rows) == pytest.approx((1 - 0.5**0.5) ** 2, rel=1e-6)
    assert rows[-1]["length"] == pytest.approx(2**0.5)
    assert [rows[0]["u"], rows[30]["u"], rows[60]["u"]] == [0, 0.5, 1]
    curve = connect(start, end, POINTS * 50, epochs=20, lr=0.3, loss=ring)
    rows = along(start, curve, POINTS, loss=ring)
    assert barrier(rows) < 1e-3  # a parabola cannot follow a circle exactly
    assert rows[-1]["length"] == pytest.approx(math.pi / 2, rel=0.02)
    for at, model in ((0.0, start), (1.0, end)):
        assert torch.equal(curve.at(at)["at"], model.at)


def test_a_curve_of_a_network_has_no_barrier_where_the_line_has_one():
    start, end = trained(0), trained(1)
    before = copy.deepcopy((start.state_dict(), end.state_dict()))
    state = torch.random.get_rng_state()
    line, curve = (connect(start, end, DATA, epochs=e) for e in (0, 20))
    assert torch.equal(torch.random.get_rng_state(), state)
    straight, bent = (along(start, c, DATA, DATA[:2], points=11) for c in (line, curve))
    assert barrier(straight) > 0.1
    assert barrier(bent) < 0.01
    assert set(bent[0]) == {"u", "length", "train_loss", "train_error", "test_loss", "test_error"}
    for model, state_before in zip((start, end), before, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, state_before[name])
    again = connect(start, end, DATA, epochs=20)
    for name, value in curve.control.items():
        assert torch.equal(value, again.control[name])


def test_batch_norms_are_estimated_anew_at_every_point():
    start = trained(0)
    wrong = copy.deepcopy(start)
    wrong[1].running_mean.fill_(100.0)
    curve = connect(start, start, DATA, epochs=0)
    one, other = (along(m, curve, DATA, points=2) for m in (start, wrong))
    assert one == other
    assert one[0]["train_error"] < 0.2


def test_a_killed_training_of_the_curve_goes_on(tmp_path):
    start, end = trained(0, norm=False), trained(1, norm=False)
    whole = connect(start, end, DATA, epochs=4)

    class Stopped(Exception):
        pass

    class Breaking(list):
        def __iter__(self):
            if breaking and len(list((tmp_path / "at").glob("*"))) > 0:
                raise Stopped
            return super().__iter__()

    breaking = True
    data = Breaking(DATA)
    with pytest.raises(Stopped):
        connect(start, end, data, epochs=4, checkpoint_dir=tmp_path / "at")
    breaking = False
    resumed = connect(start, end, data, epochs=4, checkpoint_dir=tmp_path / "at")
    for name, value in whole.control.items():
        assert torch.equal(value, resumed.control[name])


def test_the_plane_holds_the_three_points_and_their_losses():
    start, end = Point(1.0, 0.0), Point(0.0, 1.0)
    curve = Curve({"at": start.at.detach()}, {"at": torch.tensor([1.0, 1.0]).double()}, {"at": end.at.detach()})
    found = plane(start, curve, POINTS, steps=21, margin=0.25, loss=ring)
    assert found.points["start"] == (0.0, 0.0)
    assert found.points["end"] == pytest.approx((2**0.5, 0.0))
    assert found.points["control"] == pytest.approx((0.5**0.5, 0.5**0.5))
    e1, e2 = torch.tensor([-1.0, 1.0]).double() / 2**0.5, torch.tensor([1.0, 1.0]).double() / 2**0.5
    for j in (0, 7, 20):
        for i in (0, 11, 20):
            here = start.at.detach() + found.x[i] * e1 + found.y[j] * e2
            assert found.loss[j][i] == pytest.approx(float((here.norm() - 1) ** 2))
    assert found.path[0] == (0.0, 0.0)
    assert found.path[-1] == pytest.approx(found.points["end"])
    assert min(found.x) < 0 < 2**0.5 < max(found.x)
    straight = connect(start, end, POINTS, epochs=0)
    assert plane(start, straight, POINTS, steps=3, loss=ring).points["control"][1] == 0
    with pytest.raises(SecateurError, match="same point"):
        plane(start, connect(start, start, POINTS, epochs=0), POINTS, steps=3)


def test_the_steep_share_of_a_way():
    model = trained(0, norm=False)
    found = sc.null_space_projector(model, DATA, "cross_entropy", basis="lanczos", k=5)
    along_first = copy.deepcopy(model)
    aside = copy.deepcopy(model)
    flat_way = found.products.join(found.project(found.products.split(found.vectors.sum(1) + 1)))
    ways = {0: found.vectors[:, 0], 1: flat_way}
    for which, moved in ((0, along_first), (1, aside)):
        with torch.no_grad():
            for p, d in zip(moved.parameters(), found.products.split(ways[which]).values(), strict=True):
                p.add_(d, alpha=0.1)
    assert steep_share(model, along_first, found) == pytest.approx(1.0, abs=1e-3)
    assert steep_share(model, aside, found) == pytest.approx(0.0, abs=1e-3)
    assert steep_share(model, model, found) == 0


@pytest.mark.parametrize("soft", [False, True])
def test_the_steep_share_is_known_to_the_kronecker_factored_projector_too(soft):
    model = trained(0, norm=False)
    flat = sc.null_space_projector(model, DATA, "cross_entropy", basis="kfe", soft=soft)
    end = copy.deepcopy(model)
    with torch.no_grad():
        for p in end.parameters():
            p.add_(torch.randn_like(p))
    way = {name: p.detach() - dict(model.named_parameters())[name].detach() for name, p in end.named_parameters()}
    rest = flat.project(way)
    parts = [torch.stack([(way[n] - rest[n]).square().sum(), way[n].square().sum()]) for n in way]
    steep, whole = torch.stack(parts).sum(0).tolist()
    assert steep_share(model, end, flat) == pytest.approx((steep / whole) ** 0.5, rel=1e-5)
    assert 0 < steep_share(model, end, flat) < 1


def test_bad_input_is_told():
    start = trained(0, norm=False)
    other = nn.Sequential(nn.Linear(64, 8), nn.Identity(), nn.ReLU(), nn.Linear(8, 10))
    with pytest.raises(SecateurError, match=r"'0.weight' has shape \(24, 64\) and \(8, 64\).*before it was cut"):
        connect(start, other, DATA, epochs=1)
    curve = connect(start, start, DATA, epochs=0)
    with pytest.raises(SecateurError, match="points=1"):
        along(start, curve, DATA, points=1)
    with pytest.raises(SecateurError, match="the loader is empty"):
        along(start, curve, [], points=2)
