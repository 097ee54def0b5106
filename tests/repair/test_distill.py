"""Distill: the smaller network comes nearer to the original, by the rule that is written, and goes on where it was."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.repair import distill as module
from secateur.repair.distill import Distill


def case(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2),
        nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 5),
    ).eval()  # fmt: skip
    data = [torch.randn(16, 1, 8, 8) for _ in range(6)]
    sc.recalibrate(model, data)
    graph = sc.trace(model, data[0][:2])
    plan = sc.allocate(graph, sc.score(model, graph, "magnitude"), sc.Budget(macs=0.5, round_to=2))
    return model, sc.cut(model, plan), plan, data


def apart(model, small, data):
    with torch.no_grad():
        return float(sum((model(x) - small(x)).square().mean() for x in data))


SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9)


@pytest.mark.parametrize("settings", [{}, {"objective": "kl"}, {"optimizer": SGD}], ids=str)
def test_it_comes_nearer_to_the_original_without_labels(settings):
    model, small, plan, data = case()
    before = apart(model, small, data)
    told = sc.distill(model, small, plan, data, steps=80, lr=0.01, **settings)["distill"]
    assert apart(model, small, data) < 0.4 * before
    assert told["after"] < 0.5 * told["before"] and told["steps"] == 80
    assert json.loads(json.dumps(told)) == told


def test_what_hybrid_leaves_needs_no_plan():
    model, _, plan, data = case()
    result = sc.hybrid(model, data[0][:2], sc.Budget(macs=0.5), data=data, repair="none")
    before = apart(model, result.model, data)
    sc.distill(model, result.model, result.plan, data, steps=60, lr=0.003)
    assert result.plan is None and apart(model, result.model, data) < 0.5 * before
    with pytest.raises(sc.SecateurError, match="made for another model"):
        sc.distill(result.model, copy.deepcopy(result.model), plan, data, steps=1)


def test_its_steps_are_those_that_are_written():
    model, small, plan, data = case()
    by_hand = copy.deepcopy(small)
    optimizer = SGD(by_hand.parameters())
    for m in by_hand.modules():
        m.train(isinstance(m, nn.BatchNorm2d))
    for number in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * module._schedule(number, 10)
        x = data[number % 6]
        with torch.no_grad():
            t = model(x)
        optimizer.zero_grad()
        (F.mse_loss(by_hand(x), t) / (t - t.mean()).square().mean()).backward()
        optimizer.step()
    sc.distill(model, small, plan, data, steps=10, optimizer=SGD)
    for one, other in zip(small.state_dict().values(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
    assert not any(m.training for m in small.modules())
    assert all(p.grad is None for p in small.parameters())


def test_the_rate_rises_and_falls():
    rates = [module._schedule(number, 100) for number in range(100)]
    assert max(rates) == 1.0 and rates[0] == 0.2 and rates[-1] < 0.01
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_several_outputs_count_each_in_its_own_unit():
    one, other = torch.randn(8, 3), 1000 * torch.randn(8, 2)
    shift = [0.1 * one.std(correction=0), 0.1 * other.std(correction=0)]
    found = Distill().difference({"a": one + shift[0], "b": other + shift[1]}, {"a": one, "b": other})
    assert float(found) == pytest.approx(0.02, rel=1e-4)
    assert float(Distill().difference(one, one)) == 0.0
    with pytest.raises(sc.SecateurError, match="of the same shapes"):
        Distill().difference(one, other)
    with pytest.raises(sc.SecateurError, match="floating-point"):
        Distill().difference(torch.arange(3), torch.arange(3))


class Noisy(nn.Module):
    """Draws in every forward, in eval mode too."""

    def forward(self, x):
        return F.dropout(x, 0.1, training=True)


@pytest.mark.parametrize("stopped", [1, 7, 19])
def test_what_was_interrupted_goes_on_and_ends_with_the_same(tmp_path, monkeypatch, interrupted, stopped):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_SAVES", 0.0)
    model, small, plan, data = case()
    model[2], small[2] = Noisy(), Noisy()
    loader = torch.utils.data.DataLoader(torch.cat(data), batch_size=16, shuffle=True)  # its order is drawn
    whole, given = copy.deepcopy(small), {"steps": 20, "checkpoint": tmp_path / "distill.safetensors"}
    sc.distill(model, whole, plan, loader, steps=20)
    before = {name: t.clone() for name, t in small.state_dict().items()}
    with monkeypatch.context() as patch:
        calls = interrupted(module._Training, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            sc.distill(model, small, plan, loader, **given)
        patch.undo()
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())
    monkeypatch.undo()
    calls.clear()
    done = []
    step = module._Training._step
    monkeypatch.setattr(module._Training, "_step", lambda self, *of: done.append(of[0]) or step(self, *of))
    sc.distill(model, small, plan, loader, **given)
    assert done == list(range(stopped - 1, 20))
    for one, other in zip(small.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(sc.SecateurError, match="of other settings or another model: delete it"):
        sc.distill(model, sc.cut(model, plan), plan, loader, **{**given, "steps": 30})
    with pytest.raises(sc.SecateurError, match="is of other data"):
        sc.distill(model, sc.cut(model, plan), plan, data, **given)
    given["checkpoint"].write_bytes(b"damaged")
    with pytest.raises(sc.BadFile, match="not a readable checkpoint"):
        sc.distill(model, sc.cut(model, plan), plan, loader, **given)


def test_frozen_weights_stay_and_what_cannot_be_trained_is_told():
    model, small, plan, data = case()
    small[0].weight.requires_grad_(False)
    before = small[0].weight.clone()
    sc.distill(model, small, plan, data, steps=3)
    assert torch.equal(small[0].weight, before) and not small[0].weight.requires_grad
    for p in small.parameters():
        p.requires_grad_(False)
    with pytest.raises(sc.SecateurError, match="no parameter of the smaller model wants a gradient"):
        sc.distill(model, small, plan, data, steps=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: a whole number from 1 on"),
        ({"objective": "mae"}, "unknown objective 'mae'"),
        ({"temperature": 0}, "temperature=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"optimizer": "adam"}, "optimizer='adam': what makes an optimizer"),
        ({"seed": -1}, "seed=-1"),
        ({"checkpoint": "nowhere/there.safetensors"}, "checkpoint='nowhere/there.safetensors'"),
    ],
)
def test_bad_settings_are_told(options, message):
    with pytest.raises(sc.SecateurError, match=message):
        Distill(**options)
