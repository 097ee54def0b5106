"""Latencies of models in turn: medians, spreads, ratios, and what cannot be run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.measure import comparison


class Waits(nn.Module):
    """Takes so many times as long as another."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(256, 256), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x)
        return x


def test_ratios_and_their_spread_are_told(untouched):
    models = {"slow": Waits(40), "fast": Waits(10)}
    x = torch.randn(8, 256)
    with untouched(models["slow"]), untouched(models["fast"]):
        found = sc.compare_latency(models, x, threads=1, batches=(1, 64), turns=5, seconds=0.02)
    assert [(t.model, t.batch, t.threads) for t in found.timings] == [
        ("slow", 1, 1), ("fast", 1, 1), ("slow", 64, 1), ("fast", 64, 1),
    ]  # fmt: skip
    for slow, fast in zip(found.timings[::2], found.timings[1::2], strict=True):
        assert slow.low_ms <= slow.median_ms <= slow.high_ms
        assert fast.speed_up_low <= fast.speed_up <= fast.speed_up_high
        assert 2 < fast.speed_up < 8
        assert slow.speed_up == 1
    assert found.median_speed_up == pytest.approx(np.median([t.speed_up for t in found.timings[1::2]]))
    assert json.loads(json.dumps(found.as_data()))[1]["model"] == "fast"
    text = str(found).splitlines()
    assert len(text) == 5
    assert f"{found.timings[1].speed_up:.2f}" in text[2]


def test_a_machine_that_slows_down_does_not_change_ratios(monkeypatch):
    """The second half of all turns is ten times as slow; every ratio stays four."""
    turn = iter(range(1000))

    def in_turn(models, inputs, repeats, warm_up, turns, backend="eager"):
        n = next(turn) - 2  # two are for the number of repeats
        slow = 10.0 if n >= 6 else 1.0
        return np.full((1, 1, repeats), slow * (4.0 if n % 2 == 0 else 1.0))

    monkeypatch.setattr(comparison, "in_turn", in_turn)
    found = sc.compare_latency({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}, torch.zeros(1, 1), turns=6)
    assert found.timings[1].speed_up == found.timings[1].speed_up_low == found.timings[1].speed_up_high == 4.0
    assert found.timings[0].high_ms > 5 * found.timings[0].low_ms


class Branches(nn.Module):
    """Cannot be exported."""

    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


def test_what_a_backend_cannot_run_is_in_the_table():
    found = sc.compare_latency(
        {"a": Branches(), "b": Branches()}, torch.ones(1, 2), backends=("eager", "onnxruntime"), turns=2, seconds=0.001
    )
    why = [t.why for t in found.timings]
    assert why[:2] == ["", ""]
    assert all("torch.export cannot follow" in word for word in why[2:])
    assert math.isnan(found.timings[2].median_ms)
    assert found.as_data()[2]["median_ms"] is None
    assert "torch.export cannot follow" in str(found)
    assert not math.isnan(found.median_speed_up)


@pytest.mark.parametrize(
    ("models", "how", "words"),
    [
        ({}, {}, "modules by name are expected"),
        ([nn.Linear(1, 1)], {}, "modules by name are expected"),
        ({"a": 3}, {}, "modules by name are expected"),
        ({"a": nn.Linear(1, 1)}, {"backends": "tensorrt"}, "unknown backend"),
        ({"a": nn.Linear(1, 1)}, {"threads": 0}, "threads"),
        ({"a": nn.Linear(1, 1)}, {"batches": [1, -2]}, "batches"),
        ({"a": nn.Linear(1, 1)}, {"turns": 0}, "turns"),
    ],
)
def test_wrong_arguments_are_refused(models, how, words):
    with pytest.raises(sc.SecateurError, match=words):
        sc.compare_latency(models, torch.zeros(1, 1), **how)


def test_a_model_that_does_not_take_the_inputs_is_in_the_table():
    found = sc.compare_latency({"a": nn.Linear(2, 2), "b": nn.Linear(3, 3)}, torch.zeros(1, 2), turns=2, seconds=0.001)
    assert found.timings[0].why == ""
    assert "RuntimeError" in found.timings[1].why
    for empty in ("backends", "threads", "batches"):
        with pytest.raises(sc.SecateurError, match="at least one backend"):
            sc.compare_latency({"a": nn.Linear(2, 2)}, torch.zeros(1, 2), **{empty: []})
