"""Budgets in milliseconds: what is fitted, that the clock decides, what is told. Most tests make a clock."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocate.budget import Meter
from secateur.timing import Timing, fitted, random_widths


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 5),
    ).eval()  # fmt: skip


class Made:
    """A clock that shows what an equation says, and a fit of it that is wrong by a factor."""

    def __init__(self, graph, wrong=1.0, noise=0.0):
        self.graph, self.wrong, self.noise, self.asked = graph, wrong, noise, []
        self.rng = np.random.default_rng(0)

    def true(self, widths):
        macs = self.graph.macs_terms.totals(self.graph.lengths(widths))
        return 1.0 + 8.0 * macs / self.graph.macs() + 0.02 * widths.sum(-1)

    def ms(self, widths):
        return self.wrong * self.true(widths)

    def slope(self, widths):
        per_length = self.graph.macs_terms.gradient(self.graph.lengths(widths))
        return self.wrong * (8.0 * self.graph.multiplicity.T @ per_length / self.graph.macs() + 0.02)

    def measured(self, plan):
        self.asked.append(float(self.true(self.graph.kept(plan))) * (1 + self.noise * self.rng.standard_normal()))
        return self.asked[-1]

    def key(self):
        return str(self.wrong)


def case():
    model = network()
    graph = sc.trace(model, torch.zeros(1, 3, 8, 8))
    return model, graph, sc.score(model, graph, "magnitude")


@pytest.mark.parametrize("strategy", ["global", "uniform", "threshold"])
@pytest.mark.parametrize("wrong", [0.6, 0.9, 1.0, 1.1, 1.7])
@pytest.mark.parametrize("part", [0.8, 0.5, 0.3])
def test_the_clock_decides_and_most_of_the_budget_is_used(strategy, wrong, part):
    _, graph, scores = case()
    clock = Made(graph, wrong)
    allowed = part * clock.true(graph.widths)
    plan = sc.allocate(graph, scores, sc.Budget(latency_ms=float(allowed)), strategy=strategy, timing=clock)
    took = float(clock.true(graph.kept(plan)))
    assert took <= allowed
    one_wider = min(float(clock.true(graph.kept(plan) + unit)) for unit in np.eye(len(graph.groups), dtype=int))
    assert took > 0.93 * allowed or one_wider > allowed
    assert len(clock.asked) <= 10


def test_a_budget_that_the_whole_network_meets_takes_nothing():
    _, graph, scores = case()
    clock = Made(graph)
    assert len(sc.allocate(graph, scores, sc.Budget(latency_ms=1000.0), timing=clock)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_clock_that_is_not_steady_was_seen_to_show_no_more_than_the_budget(seed):
    _, graph, scores = case()
    clock = Made(graph, 1.2, noise=0.03)
    clock.rng = np.random.default_rng(seed)
    allowed = 0.5 * clock.true(graph.widths)
    plan = sc.allocate(graph, scores, sc.Budget(latency_ms=float(allowed)), timing=clock)
    assert float(clock.true(graph.kept(plan))) <= 1.1 * allowed
    assert min(clock.asked) <= allowed


def test_other_limits_hold_beside_it_and_widths_are_rounded():
    _, graph, scores = case()
    clock = Made(graph, 1.1)
    budget = sc.Budget(latency_ms=6.0, params=0.4, round_to=4)
    plan = sc.allocate(graph, scores, budget, timing=clock)
    assert graph.params(plan) <= 0.4 * graph.params()
    assert clock.true(graph.kept(plan)) <= 6.0
    kept = graph.kept(plan)
    assert all(kept[(kept < graph.widths)] % 4 == 0)


def test_a_clock_that_shows_more_than_the_budget_whatever_stays_is_told():
    _, graph, scores = case()
    clock = Made(graph, 0.5)  # thinks that half of it would do
    with pytest.raises(
        sc.SecateurError, match=r"latency_ms=1.05 is asked for, and the least that was measured is 1\.0"
    ):
        sc.allocate(graph, scores, sc.Budget(latency_ms=1.05), timing=clock)
    with pytest.raises(sc.SecateurError, match=r"latency_ms=0.1 is asked for; feasible are about 0\.5.* to 5"):
        sc.allocate(graph, scores, sc.Budget(latency_ms=0.1), timing=clock)


def test_a_search_looks_for_widths_under_a_budget_in_milliseconds(tmp_path):
    model, graph, scores = case()
    clock = Made(graph, 1.1)
    data = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(4)]
    path, budget = tmp_path / "search.json", sc.Budget(latency_ms=5.0)
    search = sc.Search(model, data, evaluations=100, progress=False, checkpoint=path)
    plan = sc.allocate(graph, scores, budget, strategy=search, timing=clock)
    assert 0.9 * 5.0 < clock.true(graph.kept(plan)) <= 5.0
    assert search.table and search.price >= 0
    other = sc.Search(model, data, evaluations=100, progress=False, checkpoint=path)
    with pytest.raises(sc.SecateurError, match="of another search"):  # prices by another clock are others
        sc.allocate(graph, scores, budget, strategy=other, timing=Made(graph, 1.2))


def test_the_slope_is_that_of_the_time():
    _, graph, _ = case()
    timing = made_of(graph, Made(graph))
    widths = graph.widths - 5
    for group, slope in enumerate(timing.slope(widths)):
        unit = np.eye(len(widths), dtype=int)[group]
        assert (timing.ms(widths + unit) - timing.ms(widths - unit)) / 2 == pytest.approx(slope)


def made_of(graph, clock, count=40, noise=0.0, model=None):
    """A timing of measurements that a made clock shows."""
    rng = np.random.default_rng(3)
    widths = random_widths(graph, count, 1, False, np.random.default_rng(1))
    shown = [float(clock.true(own)) * (1 + noise * rng.standard_normal()) for own in widths]
    samples = [[own.tolist(), ms / 9.0] for own, ms in zip(widths, shown, strict=True)]
    text = json.dumps({"fingerprint": graph.fingerprint, "threads": 1, "whole": 9.0, "repeats": 9, "samples": samples})
    return Timing.from_json(text, model or network(), graph)


@pytest.mark.parametrize(("noise", "most"), [(0.0, 0.01), (0.03, 0.03)])
def test_what_is_fitted_is_near_the_truth_at_other_widths(noise, most):
    _, graph, _ = case()
    clock = Made(graph)
    timing = made_of(graph, clock, noise=noise)
    others = random_widths(graph, 30, 1, False, np.random.default_rng(9))
    wrong = timing.ms(others) / clock.true(others) - 1
    assert np.sqrt(np.mean(wrong**2)) < most
    assert timing.error < 1.5 * max(noise, 0.01)


def test_prices_that_differ_between_operations_are_found():
    rng = np.random.default_rng(0)
    macs, channels = rng.random((60, 5)), rng.random((60, 4))
    prices = np.array([0.5, *(2.0, 0.3, 1.0, 0.0, 1.5), *(0.2, 0.0, 0.4, 0.1)])
    took = prices[0] + macs @ prices[1:6] + channels @ prices[6:]
    found = fitted(macs, channels, took, np.ones(5))
    assert found == pytest.approx(prices, abs=0.1)
    assert (found >= 0).all()
    few = fitted(macs[:5], channels[:5], took[:5], np.ones(5))  # fewer than prices: still no nonsense
    assert few[0] + macs @ few[1:6] + channels @ few[6:] == pytest.approx(took, rel=0.5)


def test_fewer_channels_are_never_slower():
    _, graph, _ = case()
    timing = made_of(graph, Made(graph), noise=0.2)
    rng = np.random.default_rng(0)
    for _ in range(50):
        widths = rng.integers(1, graph.widths + 1)
        assert timing.ms(np.maximum(widths - rng.integers(0, 3, len(widths)), 1)) <= timing.ms(widths) + 1e-12
    assert timing.ms(graph.widths[None]).shape == (1,)


@pytest.mark.parametrize("round_to", [1, 8])
def test_random_widths_reach_from_the_least_to_the_whole(round_to):
    _, graph, _ = case()
    found = random_widths(graph, 12, round_to, False, np.random.default_rng(0))
    assert (found[0] == graph.widths).all() and (found[1] == round_to).all()
    assert ((found >= round_to) & (found <= graph.widths)).all()
    assert all(
        width == full or width % round_to == 0 for own in found for width, full in zip(own, graph.widths, strict=True)
    )
    assert all((a != b).any() for a, b in itertools.combinations(found, 2)) or round_to > 1


def test_a_real_clock_and_what_is_told_of_it():
    model, graph, _ = case()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    timing = sc.Timing(model, graph, samples=8, threads=1, progress=False)
    assert len(timing.samples) == 8 and timing.samples[0][0] == graph.widths.tolist()
    assert timing.samples[0][1] == pytest.approx(1, abs=0.5) and timing.error >= 0
    again = Timing.from_json(timing.to_json(), model, graph)
    widths = graph.widths // 2
    assert again.ms(widths) == timing.ms(widths) and again.key() == timing.key()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    allowed = 2 * timing.whole  # which everything meets, however unsteady the machine
    result = sc.prune(
        model, torch.zeros(1, 3, 8, 8), method="magnitude", budget=sc.Budget(latency_ms=allowed), timing=timing
    )
    found = result.facts["latency_ms"]
    assert set(found) == {"allowed", "before", "after", "error"} and found["allowed"] == allowed
    assert Meter(graph, sc.Budget(latency_ms=1.0), timing).full["latency_ms"] == pytest.approx(timing.ms(graph.widths))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g, s: sc.Budget(latency_ms=0), "latency_ms=0.: milliseconds, a number above 0"),
        (lambda m, g, s: sc.Budget(latency_ms="fast"), "latency_ms='fast'"),
        (lambda m, g, s: sc.Budget(latency_ms=float("nan")), "latency_ms=nan"),
        (lambda m, g, s: sc.allocate(g, s, sc.Budget(latency_ms=1.0)), "to be measured first; call prune"),
        (lambda m, g, s: sc.allocate(g, s, sc.Budget(macs=0.5), timing=Made(g)), "does not limit latency_ms"),
        (lambda m, g, s: sc.prune(m, torch.zeros(1, 3, 8, 8), method="magnitude", budget=sc.Budget(macs=0.5),
            timing=Made(g)), "no budget limits latency_ms"),
        (lambda m, g, s: sc.Timing(m[:3], g), "the graph is of another model"),
        (lambda m, g, s: sc.Timing(m, 5), "a module and what secateur.trace gave"),
        (lambda m, g, s: sc.Timing(m, g, samples=3), "samples=3: a whole number from 4 on"),
        (lambda m, g, s: sc.Timing(m, g, threads=0), "threads=0: a whole number from 1 on"),
        (lambda m, g, s: sc.Timing(m, g, threads=1.5), "threads=1.5"),
        (lambda m, g, s: sc.Timing(m, g, seed=-1), "seed=-1"),
        (lambda m, g, s: Timing.from_json("{", m, g), "the timing is damaged"),
        (lambda m, g, s: Timing.from_json('{"threads": 1, "fingerprint": "x", "samples": []}', m, g), "another model"),
        (lambda m, g, s: Timing.from_json(json.dumps({"threads": 1, "fingerprint": g.fingerprint, "whole": 1,
            "repeats": 9, "samples": [[[1], 2.0]] * 4}), m, g), "samples that do not fit"),
        (lambda m, g, s: sc.eigendamage(m, torch.zeros(1, 3, 8, 8),
            data=[(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))],
            loss_fn="cross_entropy", budget=sc.Budget(latency_ms=1.0)), "rotated layers: only prune"),
        (lambda m, g, s: sc.SDPrun(m, g, lr=0.1, c=1e-3, mu=0.6, budget=sc.Budget(latency_ms=1.0)),
            "what prunes while it trains cannot"),
        (lambda m, g, s: sc.IncReg(m, g, torch.optim.SGD(m.parameters(), lr=0.1), budget=sc.Budget(latency_ms=1.0)),
            "what prunes while it trains cannot"),
    ],
)  # fmt: skip
def test_bad_input_is_told(call, message):
    with pytest.raises(sc.SecateurError, match=message):
        call(*case())
