"""Pivoting while training: the schedule, what is held, what may come back, exact resumption."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
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
        expected = handle.keep_at(len(seen))
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
    assert [handle.keep_at(t) for t in range(5)] == pytest.approx(
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
    pivoted = sc.pivot(model, x, 0.5)
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
        ({"keep": 0.5, "exclude": "0"}, "a list of layers is expected"),
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
    model = sc.pivot(model, x, 0.5)
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
