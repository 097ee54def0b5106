"""Bottlenecks and EigenDamage against exact oracles in float64."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur._internal.workload import Workload
from secateur.allocation.rank_allocation import Choice, Room, Shape, fill, lagrangian
from secateur.curvature.eigenbasis import eigenbasis_of
from secateur.curvature.kronecker import kronecker_factors
from secateur.methods.eigendamage import EigenDamage
from secateur.surgery.low_rank.bottleneck import Bottleneck, hollow, replay, split
from secateur.tracing.graph import fingerprint

LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "linear on tokens": (nn.Linear(6, 5, bias=False), (4, 3, 6)),
    "conv": (nn.Conv2d(4, 5, 3, padding=1), (4, 4, 6, 6)),
    "strided": (nn.Conv2d(4, 5, 3, stride=2, padding=1), (4, 4, 7, 7)),
    "dilated, reflected": (nn.Conv2d(4, 5, 3, dilation=2, padding=2, padding_mode="reflect"), (4, 4, 7, 7)),
    "1-D": (nn.Conv1d(4, 3, 5, padding="same", bias=False), (4, 4, 9)),
    "3-D": (nn.Conv3d(2, 3, 2), (4, 2, 4, 4, 4)),
}


def basis_of(module, x):
    model = nn.Sequential(module)
    factors = kronecker_factors(model, [x], "mse", bias=False)
    return eigenbasis_of(factors["0"])


@pytest.mark.parametrize("name", LAYERS)
def test_with_all_rows_and_columns_it_is_the_layer(name):
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    module, x = copy.deepcopy(module).double(), torch.randn(shape, dtype=torch.float64)
    basis = basis_of(module, x)
    made = split(module, basis, torch.arange(basis.qg.shape[-1]), torch.arange(basis.qa.shape[-1]))
    torch.testing.assert_close(made(x), module(x), rtol=1e-9, atol=1e-10)
    assert [type(part) for part in made] == [type(module)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("side", ["rows", "columns", "neither"])
def test_a_rotation_that_keeps_all_is_taken_up_by_the_core(name, side):
    """What is left computes the same as with both rotations, for less."""
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    module, x = copy.deepcopy(module).double(), torch.randn(shape, dtype=torch.float64)
    basis = basis_of(module, x)
    wide = basis.qg.shape[-1], basis.qa.shape[-1]
    without = {"rows": (0, 1), "columns": (1, 0), "neither": (1, 1)}[side]
    rows, columns = (torch.arange(begin, n) for begin, n in zip(without, wide, strict=True))
    made = split(module, basis, rows, columns)
    assert list(made._modules) == {"rows": ["0", "1"], "columns": ["1", "2"], "neither": ["0", "1", "2"]}[side]
    assert {type(part) for part in made} == {type(module)}
    both = hollow(module, len(rows), len(columns), rotations=(True, True))
    qa, qg = basis.qa[0][:, columns], basis.qg[0][:, rows]
    core = torch.einsum("ir,itj,jc->rtc", qg, basis.layer.table()[0], qa)
    with torch.no_grad():
        for part, weight in zip(both, (qa.mT, core.mT, qg), strict=True):
            part.weight.copy_(weight.reshape(part.weight.shape))
        if module.bias is not None:
            both[2].bias.copy_(module.bias)
    torch.testing.assert_close(made(x), both(x), rtol=1e-9, atol=1e-10)
    taps = module.weight[0, 0].numel()
    of = Shape(module.weight.numel(), wide[0], wide[1], taps, wide)
    assert sum(p.weight.numel() for p in made) == of.of(len(rows), len(columns))
    assert sum(p.weight.numel() for p in both) == Shape(0, *wide, taps).of(len(rows), len(columns))


def test_what_was_saved_with_both_rotations_is_replayed_with_both():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    text = json.dumps({"fingerprint": fingerprint(model), "layers": {"0": [5, 3]}})
    assert len(replay(model, text)[0]) == 3
    text = json.dumps({"fingerprint": fingerprint(model), "layers": {"0": [5, 3]}, "rotations": False})
    again = replay(model, text)
    assert (
        list(again[0]._modules) == ["0", "1"] and json.loads(sc.record(again)[0]["eigendamage"])["rotations"] is False
    )


@pytest.mark.parametrize("name", LAYERS)
def test_twice_is_the_merged_bases(name):
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    module, x = copy.deepcopy(module).double(), torch.randn(shape, dtype=torch.float64)
    basis = basis_of(module, x)
    one = split(module, basis, torch.arange(1, basis.qg.shape[-1]), torch.arange(1, basis.qa.shape[-1]))
    inner = basis_of(one.core, one[0](x))
    rows, columns = torch.arange(1, inner.qg.shape[-1]), torch.arange(inner.qa.shape[-1])
    two = split(one, inner, rows, columns)
    assert len(two) == 3
    by_hand = basis.qa[0][:, 1:] @ inner.qa[0]
    torch.testing.assert_close(two[0].weight.flatten(1), by_hand.mT)
    nested = copy.deepcopy(one)
    nested[1] = split(one.core, inner, rows, columns)
    model = nn.Sequential(nested)
    torch.testing.assert_close(two(x), model(x), rtol=1e-9, atol=1e-10)
    merged = sc.merge_bases(model)
    assert len(merged[0]) == 3 and not isinstance(merged[0].core, Bottleneck)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-9, atol=1e-10)


def test_inputs_in_a_subspace_need_no_more_columns_than_it_has_dims():
    """Coordinates cannot do this: every input coordinate varies."""
    torch.manual_seed(0)
    span = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0]
    x = torch.randn(50, 3, dtype=torch.float64) @ span.T
    module = nn.Linear(8, 6).double()
    basis = basis_of(module, x)
    assert (basis.a == 0).sum() == 5
    made = split(module, basis, torch.arange(6), torch.arange(5, 8))
    torch.testing.assert_close(made(x), module(x), rtol=1e-8, atol=1e-9)


# --------------------------------------------------------------------------------------------- boxes within a budget


def random_choice(name, source, positions=1, folded=True):
    rows, columns, taps = (int(source.integers(2, 12)) for _ in range(3))
    damage = source.random((rows, 1)) ** 4 * source.random((1, columns)) ** 4 * source.random((rows, columns))
    damage = damage[np.argsort(-damage.sum(1))][:, np.argsort(-damage.sum(0))]
    out = {}
    for unit, inward, outward in (("params", 1, 1), ("macs", 4 * positions, positions)):
        costs = rows * columns * taps * outward, rows * outward, columns * inward, taps * outward
        out[unit] = Shape(*costs, (rows, columns) if folded else (0, 0))
    return Choice(name, damage, out)


def room_of(seed, **limits):
    source = np.random.default_rng(seed)
    choices = [random_choice(str(i), source, int(source.integers(1, 20))) for i in range(5)]
    totals = {u: 50 + sum(c.cost[u].whole for c in choices) for u in ("params", "macs")}
    return Room(choices, totals, sc.Budget(**{"round_to": 1} | limits))


@pytest.mark.parametrize("limits", [{"params": 0.5}, {"macs": 0.4}, {"params": 0.6, "macs": 0.5}], ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_a_budget_is_met_and_used(seed, limits):
    room = room_of(seed, **limits)
    boxes = lagrangian(room)
    assert room.met(boxes)
    for i, box in enumerate(boxes):
        if box is None:
            continue
        shape = room.choices[i].damage.shape
        for more in ((box[0] + 1, box[1]), (box[0], box[1] + 1), None):
            if more is None or (more[0] <= shape[0] and more[1] <= shape[1]):
                assert not room.met([*boxes[:i], more, *boxes[i + 1 :]]), (i, box, more)


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed):
    """Brute force over two small layers."""
    room = room_of(seed, params=0.5)
    two = room.choices[:2]
    room = Room(two, {u: 10 + sum(c.cost[u].whole for c in two) for u in room.totals}, room.budget)
    best = np.inf
    every = [[None, *((r + 1, c + 1) for r, c in np.ndindex(*choice.damage.shape))] for choice in two]
    for one in every[0]:
        for two in every[1]:
            if room.met([one, two]):
                lost = sum(c.loss[b] if b else 0 for c, b in zip(room.choices, (one, two), strict=True))
                best = min(best, lost)
    found = sum(c.loss[b] if b else 0 for c, b in zip(room.choices, lagrangian(room), strict=True))
    assert found == pytest.approx(best, rel=1e-12)


def test_two_limits_that_only_a_mix_of_choices_meets_can_be_met():
    """One layer is cheaper as a box in parameters alone, the other in MACs alone."""
    one = Choice("one", np.ones((4, 4)), {"params": Shape(100, 5, 5, 5), "macs": Shape(10, 5, 5, 5)})
    two = Choice("two", np.ones((4, 4)), {"params": Shape(10, 5, 5, 5), "macs": Shape(100, 5, 5, 5)})
    both = Choice("both", np.ones((4, 4)), {"params": Shape(100, 1, 1, 1), "macs": Shape(100, 1, 1, 1)})
    room = Room([one, two, both], {"params": 210, "macs": 210}, sc.Budget(params=0.2, macs=0.2))
    assert room.met(lagrangian(room))


def test_fill_never_goes_over():
    room = room_of(0, params=0.7)
    assert room.met(fill(room, room.smallest()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("part", [0.3, 0.15])
def test_what_rounded_sizes_leave_of_a_budget_is_filled_by_finer_ones(seed, part, monkeypatch):
    source = np.random.default_rng(seed)
    choices = [
        Choice(str(shape), source.random(shape), {"params": Shape(shape[0] * shape[1], *shape, 1, shape)})
        for shape in ((64, 40), (48, 64))
    ]
    totals = {"params": sum(c.cost["params"].whole for c in choices)}
    room, single = (Room(choices, totals, sc.Budget(params=part, round_to=n)) for n in ("auto", 1))
    boxes = lagrangian(room)
    used = room.used(boxes)["params"] / room.allowed["params"]
    assert used <= 1 and (used >= 0.95 or room.lost(boxes) <= single.lost(lagrangian(single)))
    monkeypatch.setattr(sc.Budget, "finer", ())
    coarse = lagrangian(room)
    assert room.used(coarse)["params"] < 0.95 * room.allowed["params"]
    assert room.lost(boxes) < room.lost(coarse)


def test_what_cannot_be_met_is_told():
    with pytest.raises(sc.SecateurError, match=r"cannot be met.*feasible"):
        lagrangian(room_of(0, params=0.01))
    with pytest.raises(sc.SecateurError, match="rotated channels are no channels"):
        room_of(0, channels=0.5)


# ------------------------------------------------------------------------------------------------ on whole networks


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 20),
        nn.ReLU(), nn.Linear(20, 4),
    ).double()  # fmt: skip


X = torch.randn(20, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(20) % 4
DATA = [(X[:10], Y[:10]), (X[10:], Y[10:])]
LOSS = "cross_entropy"


def counts(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("rule", ["lagrangian", "threshold"])
@pytest.mark.parametrize("limits", [{"params": 0.4}, {"macs": 0.6}, {"params": 0.5, "macs": 0.7}], ids=str)
def test_the_real_counts_are_within_the_budget(limits, rule):
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    options = {"rule": rule, "ekfac": rule == "lagrangian", "limit": 0.99}
    small = sc.eigendamage(model, X[:2], sc.Budget(**{"round_to": 1} | limits), data=DATA, loss=LOSS, **options).model
    macs, params = counts(model, X[:2])
    real = dict(zip(("macs", "params"), counts(small, X[:2]), strict=True))
    assert all(real[u] <= f * {"macs": macs, "params": params}[u] for u, f in limits.items())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert any(isinstance(m, Bottleneck) for m in small.modules())
    assert small[5].weight.shape == model[5].weight.shape  # grouped: left alone


def test_a_budget_of_everything_leaves_every_layer_alone():
    model = network()
    small = sc.eigendamage(model, X[:2], sc.Budget(params=1.0), data=DATA, loss=LOSS).model
    assert not any(isinstance(m, Bottleneck) for m in small.modules())
    assert torch.equal(small(X), model(X))


def test_again_on_its_own_result_it_is_three_layers_at_most():
    model = network()
    one = sc.eigendamage(model, X[:2], sc.Budget(params=0.5), data=DATA, loss=LOSS).model
    two = sc.eigendamage(one, X[:2], sc.Budget(params=0.5), data=DATA, loss=LOSS).model
    assert counts(two, X[:2])[1] <= 0.5 * counts(one, X[:2])[1]
    for module in two.modules():
        if isinstance(module, Bottleneck):
            assert len(module) in (2, 3) and not any(isinstance(m, Bottleneck) for m in module)
    assert [next(iter(step)) for step in sc.record(two)] == ["eigendamage", "eigendamage"]


def test_it_is_saved_and_loaded(tmp_path):
    small = sc.eigendamage(network(), X[:2], sc.Budget(params=0.5), data=DATA, loss=LOSS).model
    small = sc.eigendamage(small, X[:2], sc.Budget(params=0.6), data=DATA, loss=LOSS).model
    sc.save(small, tmp_path)
    again = sc.load(tmp_path, network)
    assert torch.equal(again.eval()(X), small.eval()(X))


def test_rotations_may_stay_fixed_and_it_exports():
    small = sc.eigendamage(network(), X[:2], sc.Budget(params=0.4), data=DATA, loss=LOSS, train_rotations=False).model
    made = [m for m in small.modules() if isinstance(m, Bottleneck)]
    assert all(part.weight.requires_grad is (part is m.core) for m in made for part in m)
    F.cross_entropy(small.train()(X), Y).backward()
    exported = torch.export.export(small.eval(), (X[:2],)).module()
    torch.testing.assert_close(exported(X[:2]), small(X[:2]))


def test_hollow_has_the_shapes():
    made = hollow(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), 2, 3)
    assert [tuple(m.weight.shape) for m in made] == [(3, 4, 1, 1), (2, 3, 3, 3), (6, 2, 1, 1)]
    assert made(torch.randn(1, 4, 8, 8)).shape == (1, 6, 4, 4) and made[2].bias is None


BAD = {
    "rule": ({"rule": "lagrange"}, "did you mean 'lagrangian'"),
    "option": ({"ruel": "lagrangian"}, "unknown option of eigendamage 'ruel': did you mean 'rule'"),
    "no budget": ({"budget": 0.5}, "a Budget is expected"),
    "limit": ({"limit": 1.0}, r"limit=1.0: a number in \(0, 1\)"),
    "layer": ({"layers": ["1"]}, "'1' is no linear"),
    "floors": (
        {"rule": "threshold", "budget": sc.Budget(params=0.5, round_to=4)}, "knows no round_to"),
    "too small": ({"budget": sc.Budget(params=0.01)}, "cannot be met"),
    "only grouped": ({"layers": ["5"]}, "no layer can become"),
    "all excluded": ({"exclude": [nn.Conv2d, "8"]}, "no layer can become.*0: excluded by Conv2d.*8: excluded by '8'"),
    "loader": ({"data": []}, "loader is empty"),
    "no loss": ({"loss": None}, "eigendamage needs data=.*loss="),
    "inputs": ({"example_inputs": X[:, :1]}, "fails on the example inputs"),
    "separable": ({"separable": "cpd"}, "did you mean 'cp'"),
    "fisher": ({"fisher": "exact", "samples": 2}, "draws nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name):
    changed, message = BAD[name]
    given = {"example_inputs": X[:2], "data": DATA, "loss": LOSS, "budget": sc.Budget(params=0.5), **changed}
    with pytest.raises(sc.SecateurError, match=message):
        sc.eigendamage(network(), **given)


def test_the_curvature_once_measured_serves_for_every_budget():
    model = network()
    work = Workload(model, DATA, LOSS)
    method = EigenDamage(ekfac=True, repair="none")
    for fraction in (0.7, 0.4):
        one = method.apply(model, X[:2], sc.Budget(params=fraction), work)
        assert work.forwards == 2 * len(DATA), "two passes, and no more for the second budget"
        two = sc.eigendamage(model, X[:2], sc.Budget(params=fraction), data=DATA, loss=LOSS, ekfac=True, repair="none")
        assert torch.equal(one.model.eval()(X), two.model.eval()(X))
        assert set(one.facts["left whole"]) == {"5", "10"}
        assert one.facts["left whole"]["5"] == "a grouped convolution"
        assert "the last layer" in one.facts["left whole"]["10"]


def test_layers_whose_weight_is_not_theirs_alone_stay_and_the_budget_is_still_met():
    torch.manual_seed(0)
    shared = nn.Linear(20, 20)
    tied, twin = nn.Linear(20, 20), nn.Linear(20, 20)
    twin.weight = tied.weight
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(20, 20))
    model = nn.Sequential(nn.Linear(20, 60), nn.Linear(60, 20), shared, tied, twin, shared, computed, nn.Linear(20, 3))
    x = torch.randn(30, 20)
    result = sc.eigendamage(model, x, sc.Budget(params=0.7), data=[x], loss=LOSS, fisher="exact", repair="none")
    assert set(result.facts["bottlenecks"]) <= {"0", "1"} and set(result.facts["left whole"]) == {"2", "3", "4", "7"}
    assert counts(result.model, x)[1] <= 0.7 * counts(model, x)[1]
    assert "6" in kronecker_factors(model, [x], "cross_entropy").skipped
