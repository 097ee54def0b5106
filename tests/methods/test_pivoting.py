"""Pivoting while training: the schedule, what is held, what may come back, exact resumption."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur._internal.workload import Workload
from secateur.measure.counting import counted
from secateur.methods.contract import METHODS, TRAINING_METHODS, finished
from secateur.repair.refit import least_squares
from secateur.surgery.blocks.packed_layers import Packed
from secateur.surgery.blocks.pivots import remembered


def case(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    return model, torch.randn(64, 16), torch.randint(0, 4, (64,))


def train(model, optimizer, handle, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        handle.step()


def density(layer):
    return float((layer.weight != 0).float().mean())


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("layout", ["bundles", "diagonal", "growth"])
def test_ever_less_stays_and_what_is_out_in_the_end_stays_out(make, layout):
    model, x, y = case()
    optimizer = make(model.parameters(), lr=0.05, weight_decay=1e-3)
    handle = sc.Pivoting(model, 0.25, every=3, times=4, layout=layout, exclude=["4"])
    seen = []
    for _ in range(4):
        train(model, optimizer, handle, x, y, 3)
        seen.append(density(model[2]))
        expected = handle.settings.keep_at(len(seen))
        expected = 1 / math.ceil(1 / expected - 1e-9) if layout == "diagonal" else expected
        assert expected - 2 / 32 < seen[-1] <= expected + 1e-9
    assert seen == sorted(seen, reverse=True)
    assert handle.done
    assert seen[-1] == pytest.approx(0.25)
    out = [(m.weight == 0).clone() for m in (model[0], model[2])]
    train(model, optimizer, handle, x, y, 50)
    assert all(torch.equal(m.weight == 0, o) for m, o in zip((model[0], model[2]), out, strict=True))
    assert density(model[4]) == 1
    packed = sc.pack(model, x, handle.patterns, way="blocks")
    assert sum(isinstance(m, Packed) for m in packed) == 2
    assert torch.allclose(packed(x), model(x), atol=1e-5)


def test_the_schedule_is_cubic():
    handle = sc.Pivoting(case()[0], 0.2, every=1, times=4)
    assert [handle.settings.keep_at(t) for t in range(5)] == pytest.approx(
        [1, 0.2 + 0.8 * 27 / 64, 0.2 + 0.8 / 8, 0.2 + 0.8 / 64, 0.2]
    )
    assert handle.steps_needed == 4


def test_between_updates_weights_may_come_back():
    model, x, y = case()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = sc.Pivoting(model, 0.25, every=5, times=4, blocks=4, exclude=["4"])
    train(model, optimizer, handle, x, y, 5)
    first = handle.patterns["2"].mask()
    train(model, optimizer, handle, x, y, 1)
    assert density(model[2]) == 1
    with torch.no_grad():
        model[2].weight[torch.from_numpy(~first)] *= 1e4  # they grow to be the largest
    train(model, optimizer, handle, x, y, 4)
    assert (handle.patterns["2"].mask() & ~first).any()


@pytest.mark.parametrize("stop", [4, 9, 14])
def test_a_resumed_run_ends_with_the_same_bits(stop):
    ends = []
    for stops in ([20], [stop, 20 - stop]):
        model, x, y = case()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        handle = sc.Pivoting(model, 0.25, every=3, times=4)
        for count in stops:
            train(model, optimizer, handle, x, y, count)
            state = [json.loads(json.dumps(handle.state_dict())), model.state_dict(), optimizer.state_dict()]
            other = case(1)[0]
            optimizer_of = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
            again = sc.Pivoting(other, 0.25, every=3, times=4)
            again.load_state_dict(state[0])
            other.load_state_dict(state[1])
            optimizer_of.load_state_dict(state[2])
            model, optimizer, handle = other, optimizer_of, again
        ends.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in ends), strict=True))


def test_patterns_of_a_pivoted_model_are_kept():
    model, x, y = case()
    pivoted = sc.pivot(model, x, 0.5).model
    out = [m.weight == 0 for m in pivoted if isinstance(m, nn.Linear)]
    handle = sc.Pivoting(pivoted, patterns=remembered(pivoted))
    assert handle.done
    train(pivoted, torch.optim.Adam(pivoted.parameters(), lr=0.01), handle, x, y, 10)
    assert all(torch.equal(m.weight == 0, o) for m, o in zip(pivoted[::2], out, strict=True))
    assert torch.allclose(sc.pack(pivoted, x, way="at_once")(x), pivoted(x), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the model has no patterns"),
        ({"keep": 0.5, "exclude": 0}, "exclude=0: patterns of names"),
        ({"every": 3}, "give keep= too"),
        ({"keep": 0.5, "evry": 3}, "unknown option of Pivoting 'evry': did you mean 'every'"),
        ({"keep": 0.5, "patterns": {}}, "either keep="),
        ({"keep": 0.0}, r"in \(0, 1\]"),
        ({"keep": 0.5, "every": 0}, "every=0: a whole number from 1 on"),
        ({"keep": 0.5, "times": 1.5}, "times=1.5: a whole number from 1 on"),
        ({"keep": 0.5, "exclude": ["9"]}, "layer"),
        ({"keep": 0.01}, "no layer can have blocks"),
        ({"patterns": {}}, "there is none"),
        ({"patterns": {"0": 1}}, "a pattern for each layer"),
        ({"keep": 0.4, "layout": "diagonal"}, "a half, a third, a quarter"),
        ({"keep": 0.5, "seed": -1}, "seed=-1: a whole number from 0 on"),
    ],
)
def test_bad_input_is_told(options, message):
    with pytest.raises(SecateurError, match=message):
        sc.Pivoting(case()[0], **options)


def test_a_pivoted_model_brings_its_patterns():
    model, x, y = case()
    with pytest.raises(SecateurError, match="the model has no patterns"):
        sc.Pivoting(model)
    model = sc.pivot(model, x, 0.5).model
    outside = model[0].weight == 0
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), sc.Pivoting(model), x, y, 3)
    assert torch.equal(model[0].weight == 0, outside)


def test_the_state_of_other_settings_is_refused():
    handle = sc.Pivoting(case()[0], 0.5)
    with pytest.raises(SecateurError, match="the state is of pivoting with"):
        handle.load_state_dict(sc.Pivoting(case()[0], 0.25).state_dict())
    with pytest.raises(SecateurError, match="the state is of pivoting with NoneType"):
        handle.load_state_dict(None)
    with pytest.raises(SecateurError, match="is damaged"):
        handle.load_state_dict({k: v for k, v in handle.state_dict().items() if k != "patterns"})


def test_what_is_not_finite_outside_of_the_blocks_becomes_zero_too():
    model, x, y = case()
    handle = sc.Pivoting(model, 0.5, every=1, times=1)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), handle, x, y, 1)
    out = model[0].weight == 0
    with torch.no_grad():
        model[0].weight[out] = float("inf")
    handle.step()
    assert torch.equal(model[0].weight == 0, out)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(SecateurError, match=r"layer '0': the weight holds NaN"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.0), sc.Pivoting(model, 0.5, every=1), x, y, 1)


@pytest.mark.parametrize("layout", ["bundles", "diagonal", "growth"])
def test_the_result_counts_what_packed_layers_cost_and_says_what_stays_whole(layout):
    model = nn.Sequential(
        nn.Conv2d(16, 30, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(30, 32, 1, bias=False),
        nn.Flatten(),
        nn.Linear(32 * 36, 8),
    )
    x = torch.randn(2, 16, 6, 6)
    blocks = {} if layout == "diagonal" else {"blocks": 4}
    result = sc.pivot(model, x, keep=0.25, layout=layout, exclude="4", **blocks)
    assert vars(result.before) == {**counted(model, x), "channels": None}
    packed = sc.pack(result.model, x, way="at_once")
    assert vars(result.after) == {**counted(packed, x), "channels": None}
    assert result.plan is None
    assert set(result.facts["left whole"]) == {"4"}
    assert "excluded by '4'" in result.facts["left whole"]["4"]
    assert set(result.facts["blocks"]) == set(result.facts["captured"]) == {"0", "2"}
    json.dumps(result.facts)
    assert "macs" in result.table()


def test_what_is_frozen_and_what_is_excluded_by_type_or_module_stays_whole():
    model, x, _ = case()
    model[0].requires_grad_(False)
    for exclude in (model[4], [model[4]], "4"):
        result = sc.pivot(model, x, 0.5, exclude=exclude)
        assert set(result.facts["blocks"]) == {"2"}
        assert "does not require gradients" in result.facts["left whole"]["0"]
        assert "excluded" in result.facts["left whole"]["4"]
    with pytest.raises(SecateurError, match=r"no layer can have blocks.*excluded by Linear"):
        sc.pivot(model, x, 0.5, exclude=nn.Linear)


def test_a_model_of_which_nothing_is_trained_any_more_is_pruned_like_any_other():
    model, x, _ = case()
    whole = sc.pivot(model, x, 0.5)
    assert set(sc.pivot(model.requires_grad_(False), x, 0.5).facts["blocks"]) == set(whole.facts["blocks"])


def test_it_is_a_method_at_once_and_one_while_training():
    model, x, y = case()
    once = METHODS.make("pivot", {"keep": 0.25})
    assert not once.takes_budget
    assert not once.plans
    once.check(model, x, None)
    result = once.apply(model, x, None, Workload(model))
    direct = sc.pivot(model, x, 0.25).model
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), direct.parameters(), strict=True))
    with pytest.raises(SecateurError, match="no budget"):
        once.apply(model, x, sc.Budget(macs=0.5), Workload(model))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    bit_by_bit = TRAINING_METHODS.make({"name": "pivot", "keep": 0.25, "every": 2, "times": 3, "exclude": ("4",)})
    handle = bit_by_bit.attach(model, sc.trace(model, x), optimizer, None)
    with pytest.raises(SecateurError, match=r"after 0 steps more than keep is left, for it takes 6 steps"):
        handle.small()
    train(model, optimizer, handle, x, y, handle.steps_needed)
    small, plan = finished(model, handle)
    assert plan is None
    assert density(small[2]) == pytest.approx(0.25)
    with pytest.raises(SecateurError, match="no plan"):
        handle.plan()
    assert handle.facts["left whole"] == {"4": "excluded by '4'"}

    keeper = bit_by_bit.keeper(small)
    train(small, torch.optim.SGD(small.parameters(), lr=0.05), keeper, x, y, 3)
    assert density(small[2]) == pytest.approx(0.25)
    done = bit_by_bit.finish(small, x)
    assert sorted([*done.facts["packed"], *done.facts["dense"]]) == ["0", "2"]
    torch.testing.assert_close(done.model(x), small(x), rtol=1e-4, atol=1e-5)
    handle.detach()
    with pytest.raises(SecateurError, match="detached"):
        handle.step()


@pytest.mark.parametrize("layout", ["bundles", "diagonal", "growth"])
def test_with_data_what_stays_is_the_least_squares_of_each_block(layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 10)).double()
    x = torch.randn(60, 8, 3, 3, dtype=torch.float64)
    plain = sc.pivot(model, x[:2], 0.5, layout=layout, exclude=["3"])
    result = sc.pivot(model, x[:2], 0.5, layout=layout, exclude=["3"], data=[x[:40], x[40:]])
    layer, before = result.model[0], plain.model[0]
    windows = torch.nn.functional.unfold(x, 3, padding=1).mT.flatten(0, 1)
    y = model[0](x).flatten(2).mT.flatten(0, 1).detach()
    pattern = remembered(result.model)["0"]
    for rows, columns in zip(pattern.rows, pattern.columns, strict=True):
        own = rows[rows < 12]
        at = (torch.from_numpy(columns)[:, None] * 9 + torch.arange(9)).flatten()
        seen = torch.cat([windows[:, at], torch.ones(len(windows), 1)], 1)
        table = [
            torch.cat([m.weight.detach().flatten(1)[own][:, at], m.bias.detach()[own, None]], 1)
            for m in (before, layer)
        ]
        step = least_squares(seen[None], y[None][..., own], table[0][None], 1e-3)[0]
        if len(own) == len(rows):  # the step's length is that of all of a block's rows
            torch.testing.assert_close(table[1], table[0] + step, rtol=1e-6, atol=1e-8)
    error = [(m(x) - model(x)).norm() for m in (plain.model, result.model)]
    assert error[1] < 0.95 * error[0]
    packed = sc.pack(result.model, x[:2])
    torch.testing.assert_close(packed(x), result.model(x))


def test_what_the_repair_cannot_do_is_told():
    torch.manual_seed(0)
    twice = nn.Linear(16, 16, bias=False)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), twice, nn.Linear(16, 16), nn.Linear(16, 4)).double()
    model[3].bias = model[0].bias
    x = torch.randn(50, 8, dtype=torch.float64)
    result = sc.pivot(model, x[:2], 0.5, data=[x])
    assert set(result.facts["not fitted"]) == {"0", "3"}
    assert "not fitted" not in sc.pivot(model, x[:2], 0.5).facts
    with pytest.raises(SecateurError, match="changed '0' outside of its blocks; use 'refit' or 'none'"):
        sc.pivot(model, x[:2], 0.5, data=[x], repair=sc.Distill(steps=1))
    with pytest.raises(SecateurError, match="unknown repair 'refid'"):
        sc.pivot(model, x[:2], 0.5, data=[x], repair="refid")


def test_the_blocks_of_bottlenecks_are_fitted_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    x = torch.randn(80, 16, dtype=torch.float64)
    low = sc.eigendamage(model, x[:2], sc.Budget(params=0.6), data=[(x, x[:, :4])], loss="mse").model
    result = sc.pivot(low, x[:2], 0.5, data=[x])
    error = [(m(x) - low(x)).norm() for m in (sc.pivot(low, x[:2], 0.5).model, result.model)]
    assert error[1] < error[0]
