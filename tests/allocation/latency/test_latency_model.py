"""What is measured of networks of random widths, and what is fitted to it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocation.latency import sampler
from secateur.allocation.latency.model import LatencyModel, fitted_prices
from secateur.allocation.latency.sampler import random_widths


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 5),
    ).eval()  # fmt: skip


def case():
    model = network()
    return model, sc.trace(model, torch.zeros(1, 3, 8, 8))


def approximate():
    """A model none of whose groups can be cut exactly."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3)).eval()
    return model, sc.trace(model, torch.zeros(1, 6))


def true(graph, widths):
    """Milliseconds by an equation whose prices differ from layer to layer."""
    terms = graph.macs_terms.each(graph.lengths(widths)) / graph.macs()
    return 0.6 + terms @ np.linspace(3, 9, terms.shape[-1]) + widths @ np.linspace(0, 0.04, widths.shape[-1])


def widths_of(graph, count, seed, **settings):
    return random_widths(graph, sc.LatencySettings(samples=count, **settings), np.random.default_rng(seed))


def made_of(graph, count=40, noise=0.0, **changes):
    """A latency model of measurements by the equation."""
    rng, whole = np.random.default_rng(3), float(true(graph, graph.widths))
    widths = widths_of(graph, count, 1)
    parts = true(graph, widths) * (1 + noise * rng.standard_normal(count)) / whole
    data = {
        "fingerprint": graph.fingerprint,
        "where": {"device": "cpu", "inputs": [[1, 3, 8, 8]], "threads": 1, "macs": graph.macs()},
        "settings": sc.LatencySettings(count, threads=1).of_the_samples(), "whole_ms": whole, "repeats": 9,
        "samples": [[k.tolist(), p] for k, p in zip(widths, parts, strict=True)],
    }  # fmt: skip
    return LatencyModel.from_json(json.dumps(data | changes), graph)


def test_the_slope_is_that_of_the_time():
    _, graph = case()
    model, widths = made_of(graph), graph.widths - 5
    for group, slope in enumerate(model.slope(widths)):
        unit = np.eye(len(widths), dtype=int)[group]
        assert (model.ms(widths + unit) - model.ms(widths - unit)) / 2 == pytest.approx(slope)


@pytest.mark.parametrize(("noise", "most"), [(0.0, 0.02), (0.03, 0.04)])
def test_what_is_fitted_is_near_the_truth_at_other_widths(noise, most):
    _, graph = case()
    model = made_of(graph, noise=noise)
    others = widths_of(graph, 30, 9)
    wrong = model.ms(others) / true(graph, others) - 1
    assert np.sqrt(np.mean(wrong**2)) < most
    assert model.error < 1.5 * max(noise, 0.01)


def test_prices_that_differ_between_operations_are_found():
    rng = np.random.default_rng(0)
    macs, channels = rng.random((60, 5)), rng.random((60, 4))
    prices = np.array([0.5, *(2.0, 0.3, 1.0, 0.0, 1.5), *(0.2, 0.0, 0.4, 0.1)])
    took = prices[0] + macs @ prices[1:6] + channels @ prices[6:]
    found = fitted_prices(macs, channels, took, np.ones(5))
    assert found == pytest.approx(prices, abs=0.1)
    assert (found >= 0).all()
    few = fitted_prices(macs[:5], channels[:5], took[:5], np.ones(5))  # fewer than prices: still no nonsense
    assert few[0] + macs @ few[1:6] + channels @ few[6:] == pytest.approx(took, rel=0.5)


def test_fewer_channels_are_never_slower():
    _, graph = case()
    model = made_of(graph, noise=0.2)
    rng = np.random.default_rng(0)
    for _ in range(50):
        widths = rng.integers(1, graph.widths + 1)
        assert model.ms(np.maximum(widths - rng.integers(0, 3, len(widths)), 1)) <= model.ms(widths) + 1e-12
    assert model.ms(graph.widths[None]).shape == (1,)


@pytest.mark.parametrize("round_to", [1, 8])
def test_random_widths_reach_from_the_least_to_the_whole(round_to):
    _, graph = case()
    found = widths_of(graph, 12, 0, round_to=round_to)
    assert (found[0] == graph.widths).all() and (found[1] == round_to).all()
    assert ((found >= round_to) & (found <= graph.widths)).all()
    assert all(
        width == full or width % round_to == 0 for own in found for width, full in zip(own, graph.widths, strict=True)
    )
    assert round_to > 1 or all((a != b).any() for a, b in itertools.combinations(found, 2))


class Wide(nn.Module):
    """Two large layers; a forward writes into its input, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 800), nn.Linear(800, 800), nn.Linear(800, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, shift):
        self.seen += 1
        x.sub_(shift)
        return self.last(self.second(self.first(x).relu()).relu())


def test_a_real_clock_sees_that_a_narrow_network_is_faster_and_leaves_all_as_it_was():
    model = Wide().train()
    inputs = {"x": torch.ones(32, 64), "shift": 1.0}
    graph = sc.trace(model, inputs)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    clock = sc.measure_latency(model, graph, sc.LatencySettings(samples=8, threads=1))
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert (inputs["x"] == 1).all() and (graph.inputs["x"] == 1).all()
    fitted = clock.fitted
    assert len(fitted.samples) == 8 and list(fitted.samples[0][0]) == graph.widths.tolist()
    assert fitted.samples[1][1] < 0.5 < fitted.samples[0][1]  # one channel a layer, and all: by far
    narrow = {g.name: range(80, 800) for g in graph.groups}
    assert clock.measured(sc.make_plan(graph, narrow)) < 0.6 * clock.whole_ms
    assert fitted.ms(graph.widths // 10) < 0.6 * fitted.ms(graph.widths)
    again = LatencyModel.from_json(fitted.to_json(), graph)
    assert again.ms(graph.widths // 2) == fitted.ms(graph.widths // 2) and again.key() == fitted.key()
    assert "ms for the whole network" in repr(clock) and "\n" not in repr(clock)
    plan = sc.allocate(
        graph, sc.score(model, graph, "magnitude"), sc.Budget(latency_ms=0.7 * clock.whole_ms), latency=clock
    )
    assert len(plan) > 0


def test_what_a_checkpoint_has_is_not_measured_again(tmp_path, monkeypatch):
    (model, graph), path = case(), tmp_path / "latency.json"
    given = {"samples": 5, "threads": 1, "checkpoint": path}
    plans = [sc.make_plan(graph, {g.name: range(k, len(g)) for g in graph.groups}) for k in (5, 9)]

    def measure(inputs=None, **changes):
        return sc.measure_latency(model, graph, sc.LatencySettings(**(given | changes)), inputs=inputs)

    first = measure()
    took = [first.measured(plan) for plan in plans]

    def never(*args, **options):
        raise AssertionError("measured")

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "in_turn", never)
        patch.setattr(sampler, "latency", never)
        again = measure(checkpoint=str(path))
        assert [clock.measured(plan) for clock in (first, again) for plan in plans] == took * 2
        assert again.fitted.key() == first.fitted.key()
        assert again.fitted.to_json() == first.fitted.to_json() and again.known == first.known
    assert again.measured(sc.make_plan(graph, {graph.groups[0].name: [0]})) > 0
    assert len(json.loads(path.read_text())["known"]) == 3 and again.fitted.key() == first.fitted.key()
    for changed, what in (({"samples": 6}, "samples"), ({"threads": None}, "threads"), ({"seed": 1}, "seed")):
        with pytest.raises(sc.SecateurError, match=rf"latency.json was measured .*'{what}': .* and not .*delete it"):
            measure(**changed)
    with pytest.raises(sc.SecateurError, match=r"latency.json was measured in another place, \{'inputs': "):
        measure(inputs=torch.zeros(2, 3, 8, 8))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # what is pretended must not be put back
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    own = {"threads": None, "checkpoint": tmp_path / "other.json"}
    assert measure(**own).fitted.key() == measure(**own).fitted.key()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    with pytest.raises(sc.SecateurError, match=r"other.json was measured in another place, \{'threads': 7\} and not"):
        measure(**own)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"\xff",
        lambda text: b"{",
        lambda text: text[: len(text) // 2].encode(),
        lambda text: json.dumps(json.loads(text) | {"known": {"a": -1.0}}).encode(),
        lambda text: json.dumps(json.loads(text) | {"known": []}).encode(),
        lambda text: json.dumps({"known": {}}).encode(),
    ],
)
def test_a_damaged_checkpoint_is_told(tmp_path, damage):
    (model, graph), path = case(), tmp_path / "latency.json"
    settings = sc.LatencySettings(samples=4, threads=1, checkpoint=path)
    sc.measure_latency(model, graph, settings)
    path.write_bytes(damage(path.read_text()))
    with pytest.raises(sc.BadFile, match=r"latency.json is damaged .*delete it, or give another file"):
        sc.measure_latency(model, graph, settings)


def test_a_checkpoint_of_another_network_is_told(tmp_path):
    path = tmp_path / "latency.json"
    settings = sc.LatencySettings(samples=4, threads=1, checkpoint=path)
    sc.measure_latency(*case(), settings)
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    with pytest.raises(sc.SecateurError, match=r"latency.json: the latency model is of another network, .* delete it"):
        sc.measure_latency(other, sc.trace(other, torch.zeros(1, 4)), settings)


class Branching(nn.Module):
    """Most widths make it take another path, and cannot be cut."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 20), nn.Linear(20, 20), nn.Linear(20, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.second(x if x.shape[1] > 12 else x.tanh()).relu())


def test_in_place_of_a_network_that_cannot_be_cut_another_is_timed(tmp_path):
    model, given = Branching().eval(), {"threads": 1, "checkpoint": tmp_path / "latency.json"}
    graph = sc.trace(model, torch.zeros(4, 8))
    for count in (4, 6):
        clock = sc.measure_latency(model, graph, sc.LatencySettings(samples=count, **given))
        assert len(clock.fitted.samples) == count and clock.whole_ms > 0
        assert all(own[0] > 12 for own, _ in clock.fitted.samples)
        given["checkpoint"] = None


class Stopped(Exception):
    """Where something was to be measured."""


def test_prune_measures_if_no_clock_is_given(monkeypatch):
    made = []

    def measure(model, graph, settings, **given):
        made.append(settings)
        raise Stopped

    monkeypatch.setitem(sc.prune.__globals__, "measure_latency", measure)
    wanted = sc.LatencySettings(samples=6, threads=1)
    for latency, settings in ((None, sc.LatencySettings(round_to=4)), (wanted, wanted)):
        with pytest.raises(Stopped):
            sc.prune(network(), torch.zeros(1, 3, 8, 8), sc.Budget(latency_ms=9.0, round_to=4), latency=latency)
        assert made.pop() == settings


def test_the_result_says_what_was_measured():
    model, graph = case()
    settings = sc.LatencySettings(samples=4, threads=1)
    result = sc.prune(model, torch.zeros(1, 3, 8, 8), sc.Budget(latency_ms=1000.0), latency=settings)
    found = result.facts["latency_ms"]
    assert set(found) == {"allowed", "before", "after", "error"}
    assert found["allowed"] == 1000.0 and 0 < found["before"] < 1000 and 0 < found["after"] < 1000
    assert result.plan == sc.make_plan(graph, {})


@pytest.mark.parametrize(
    ("budget", "given", "message"),
    [
        (sc.Budget(latency_ms=1.0), {"criterion": "taylor"}, "taylor needs data"),
        (sc.Budget(latency_ms=1.0, macs=1e-6), {}, "the budget cannot be met: macs"),
        (sc.Budget(latency_ms=1.0, at_least={"no": 3}), {}, "no"),
        (sc.Budget(macs=0.5), {"latency": 5}, "no budget limits latency_ms"),
        (sc.Budget(latency_ms=1.0), {"latency": 5}, "latency=5: what secateur.measure_latency gives"),
        (sc.Budget(latency_ms=1.0), {"strategy": {"name": "bandit", "seed": -1}}, "seed=-1"),
        (sc.Budget(latency_ms=1.0), {"strategy": {"name": "bandit", "checkpoint": "no/c"}}, "checkpoint='no/c'"),
        (sc.Budget(latency_ms=1.0), {"strategy": None}, r"a name \(.*global"),
    ],
)
def test_what_can_be_told_at_once_is_told_before_anything_is_measured(monkeypatch, budget, given, message):
    def never(*args, **options):
        raise AssertionError("measured")

    monkeypatch.setitem(sc.prune.__globals__, "measure_latency", never)
    with pytest.raises(sc.SecateurError, match=message):
        sc.prune(network(), torch.zeros(1, 3, 8, 8), budget, **({"criterion": "magnitude"} | given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 3}, "samples=3: a whole number from 4 on"),
        ({"threads": 0}, "threads=0: a whole number from 1 on"),
        ({"threads": 1.5}, "threads=1.5"),
        ({"round_to": 0}, "round_to=0"),
        ({"approximate": 1}, "approximate=1: true or false"),
        ({"seed": -1}, "seed=-1"),
        ({"checkpoint": "no/folder/t.json"}, "'no/folder/t.json': a file in a folder"),
    ],
)
def test_bad_settings_are_told(options, message):
    with pytest.raises(sc.SecateurError, match=message):
        sc.LatencySettings(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g: sc.measure_latency(m[:3], g), "the graph is of another model"),
        (lambda m, g: sc.measure_latency(m, 5), "a module and what secateur.trace gave"),
        (lambda m, g: sc.measure_latency(m, g, {"samples": 5}), "LatencySettings are expected"),
        (lambda m, g: sc.measure_latency(m, g, inputs="image"), "example inputs with tensors"),
        (lambda m, g: sc.measure_latency(m, g, inputs=torch.zeros(2, 5)), "they do not fit the network"),
        (
            lambda m, g: sc.measure_latency(*approximate()),
            r"no group can be narrowed, none is exact .approximate=True",
        ),
        (
            lambda m, g: sc.measure_latency(m, g, sc.LatencySettings(round_to=64)),
            r"narrowed, all have 64 channels or fewer.*keeps: th",
        ),
        (lambda m, g: sc.measure_latency(network().to("meta"), g), "a network with weights"),
        (lambda m, g: LatencyModel.from_json("{", g), "the latency model is damaged"),
        (lambda m, g: made_of(g, fingerprint="x"), "of another network"),
        (lambda m, g: made_of(g, where={"device": "cpu", "macs": 1}), "traced with other inputs"),
        (lambda m, g: made_of(g, samples=[[[1], 0.5]] * 4), "samples that do not fit"),
        (lambda m, g: made_of(g, samples=[[[-5, 900, 1], 0.5]] * 4), "samples that do not fit"),
        (lambda m, g: made_of(g, samples=[]), "there is nothing to fit to"),
        (lambda m, g: made_of(g, repeats=0), "times that are none"),
        (lambda m, g: made_of(g, whole_ms=float("nan")), "times that are none"),
        (lambda m, g: made_of(g, settings="x"), "the latency model is damaged"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(sc.SecateurError, match=message):
        call(*case())


def test_a_budget_in_milliseconds_of_onnx_runtime(monkeypatch):
    """Not the clock is tested here, whose noise tests/measure knows, but that all of it is of one backend."""
    seen = []

    def times(models, inputs, repeats, warm_up, turns, backend):
        seen.append((backend, type(models[0]).__name__))
        own = sum(p.numel() for p in models[1].parameters())
        return np.array([1.0, own / whole])[:, None, None] * np.ones((1, turns, repeats))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    whole = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(sampler, "in_turn", times)
    monkeypatch.setattr(sampler, "latency", lambda *a, **k: {"median_ms": 1.0} if k["backend"] == "onnxruntime" else {})
    budget = sc.Budget(latency_ms=0.5, backend="onnxruntime", round_to=1)
    result = sc.prune(model, torch.randn(2, 16), budget, latency=sc.LatencySettings(samples=8, backend="onnxruntime"))
    assert {backend for backend, _ in seen} == {"onnxruntime"}
    assert {kind for _, kind in seen} == {"Forward"}  # the whole network is made ready once
    assert result.facts["latency_ms"]["after"] <= 0.5 * 1.05
    with pytest.raises(sc.SecateurError, match="it times with 'eager', the budget's milliseconds are of 'onnxruntime'"):
        sc.prune(model, torch.randn(2, 16), budget, latency=sc.LatencySettings(samples=8))
    with pytest.raises(sc.SecateurError, match=r"it is that of latency_ms=, which is not given"):
        sc.Budget(macs=0.5, backend="onnxruntime")
    with pytest.raises(sc.SecateurError, match="unknown backend 'tensorrt'"):
        sc.Budget(latency_ms=1.0, backend="tensorrt")
