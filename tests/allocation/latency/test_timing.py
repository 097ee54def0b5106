"""What is measured of networks of random widths, and what is fitted to it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocation.latency.model import Timing, random_widths, solved
from secateur.allocation.search.search import Search


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
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    return model, sc.trace(model, torch.zeros(1, 6))


def true(graph, widths):
    """Milliseconds by an equation whose prices differ from layer to layer."""
    terms = graph.macs_terms.each(graph.lengths(widths)) / graph.macs()
    return 0.6 + terms @ np.linspace(3, 9, terms.shape[-1]) + widths @ np.linspace(0, 0.04, widths.shape[-1])


def made_of(graph, count=40, noise=0.0, **changes):
    """A timing of measurements by the equation."""
    rng, whole = np.random.default_rng(3), float(true(graph, graph.widths))
    widths = random_widths(graph, count, 1, False, np.random.default_rng(1))
    parts = true(graph, widths) * (1 + noise * rng.standard_normal(count)) / whole
    data = {
        "fingerprint": graph.fingerprint, "threads": 1,
        "where": {"device": "cpu", "inputs": [[1, 3, 8, 8]], "threads": 1, "macs": graph.macs()},
        "settings": {}, "known": {}, "whole": whole, "repeats": 9,
        "samples": [[k.tolist(), p] for k, p in zip(widths, parts, strict=True)],
    }  # fmt: skip
    return Timing.from_json(json.dumps(data | changes), network(), graph)


def test_the_slope_is_that_of_the_time():
    _, graph = case()
    timing, widths = made_of(graph), graph.widths - 5
    for group, slope in enumerate(timing.slope(widths)):
        unit = np.eye(len(widths), dtype=int)[group]
        assert (timing.ms(widths + unit) - timing.ms(widths - unit)) / 2 == pytest.approx(slope)


@pytest.mark.parametrize(("noise", "most"), [(0.0, 0.02), (0.03, 0.04)])
def test_what_is_fitted_is_near_the_truth_at_other_widths(noise, most):
    _, graph = case()
    timing = made_of(graph, noise=noise)
    others = random_widths(graph, 30, 1, False, np.random.default_rng(9))
    wrong = timing.ms(others) / true(graph, others) - 1
    assert np.sqrt(np.mean(wrong**2)) < most
    assert timing.error < 1.5 * max(noise, 0.01)


def test_prices_that_differ_between_operations_are_found():
    rng = np.random.default_rng(0)
    macs, channels = rng.random((60, 5)), rng.random((60, 4))
    prices = np.array([0.5, *(2.0, 0.3, 1.0, 0.0, 1.5), *(0.2, 0.0, 0.4, 0.1)])
    took = prices[0] + macs @ prices[1:6] + channels @ prices[6:]
    found = solved(macs, channels, took, np.ones(5))
    assert found == pytest.approx(prices, abs=0.1)
    assert (found >= 0).all()
    few = solved(macs[:5], channels[:5], took[:5], np.ones(5))  # fewer than prices: still no nonsense
    assert few[0] + macs @ few[1:6] + channels @ few[6:] == pytest.approx(took, rel=0.5)


def test_fewer_channels_are_never_slower():
    _, graph = case()
    timing = made_of(graph, noise=0.2)
    rng = np.random.default_rng(0)
    for _ in range(50):
        widths = rng.integers(1, graph.widths + 1)
        assert timing.ms(np.maximum(widths - rng.integers(0, 3, len(widths)), 1)) <= timing.ms(widths) + 1e-12
    assert timing.ms(graph.widths[None]).shape == (1,)


@pytest.mark.parametrize("round_to", [1, 8])
def test_random_widths_reach_from_the_least_to_the_whole(round_to):
    _, graph = case()
    found = random_widths(graph, 12, round_to, False, np.random.default_rng(0))
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
    timing = sc.Timing(model, graph, samples=8, threads=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert (inputs["x"] == 1).all() and (graph.inputs["x"] == 1).all()
    assert len(timing.samples) == 8 and timing.samples[0][0] == graph.widths.tolist()
    assert timing.samples[1][1] < 0.5 < timing.samples[0][1]  # one channel a layer, and all: by far
    narrow = {g.name: range(80, 800) for g in graph.groups}
    assert timing.measured(sc.make_plan(graph, narrow)) < 0.6 * timing.whole
    assert timing.ms(graph.widths // 10) < 0.6 * timing.ms(graph.widths)
    again = Timing.from_json(timing.to_json(), model, graph)
    assert again.ms(graph.widths // 2) == timing.ms(graph.widths // 2) and again.key() == timing.key()
    plan = sc.allocate(
        graph, sc.score(model, graph, "magnitude"), sc.Budget(latency_ms=0.7 * timing.whole), timing=timing
    )
    assert len(plan) > 0


def test_what_a_checkpoint_has_is_not_measured_again(tmp_path, monkeypatch):
    (model, graph), path = case(), tmp_path / "timing.json"
    given = {"samples": 5, "threads": 1, "progress": False, "checkpoint": path}
    plans = [sc.make_plan(graph, {g.name: range(k, len(g)) for g in graph.groups}) for k in (5, 9)]
    first = sc.Timing(model, graph, **given)
    took = [first.measured(plan) for plan in plans]

    def never(*args, **options):
        raise AssertionError("measured")

    with monkeypatch.context() as patch:
        patch.setitem(sc.Timing.__init__.__globals__, "in_turn", never)
        patch.setitem(sc.Timing.__init__.__globals__, "latency", never)
        again = sc.Timing(model, graph, **given)
        assert [timing.measured(plan) for timing in (first, again) for plan in plans] == took * 2
        assert again.key() == first.key() and again.to_json() == first.to_json() == path.read_text()
    assert again.measured(sc.make_plan(graph, {graph.groups[0].name: [0]})) > 0
    assert len(json.loads(path.read_text())["known"]) == 3 and again.key() == first.key()
    for changed in ({"samples": 6}, {"threads": None}, {"seed": 1}):
        with pytest.raises(sc.SecateurError, match=r"timing.json: it was measured with threads and settings 1, "):
            sc.Timing(model, graph, **(given | changed))
    with pytest.raises(sc.SecateurError, match=r"timing.json: the timing is of another model, device, "):
        sc.Timing(model, graph, inputs=torch.zeros(2, 3, 8, 8), **given)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    own = given | {"threads": None, "checkpoint": tmp_path / "other.json"}
    assert sc.Timing(model, graph, **own).key() == sc.Timing(model, graph, **own).key()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    with pytest.raises(sc.SecateurError, match=r"other.json: .* device, number of threads"):
        sc.Timing(model, graph, **own)
    path.write_bytes(b"\xff")
    with pytest.raises(sc.SecateurError, match=r"timing.json: the timing is damaged .*delete it"):
        sc.Timing(model, graph, **given)


class Branching(nn.Module):
    """Most widths make it take another path, and cannot be cut."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 20), nn.Linear(20, 20), nn.Linear(20, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.second(x if x.shape[1] > 12 else x.tanh()).relu())


def test_in_place_of_a_network_that_cannot_be_cut_another_is_timed(tmp_path):
    model, given = Branching().eval(), {"progress": False, "threads": 1, "checkpoint": tmp_path / "timing.json"}
    graph = sc.trace(model, torch.zeros(4, 8))
    for count in (4, 6):
        timing = sc.Timing(model, graph, samples=count, **given)
        assert len(timing.samples) == count and timing.whole > 0
        assert all(own[0] > 12 for own, _ in timing.samples)
        given["checkpoint"] = None


def test_prune_measures_if_no_timing_is_given(monkeypatch):
    made, prune = [], sc.prune
    monkeypatch.setitem(prune.__globals__, "Timing", lambda *args, **given: made.append(given) or made_of(args[1]))
    model, graph = case()
    whole = float(true(graph, graph.widths))
    result = prune(model, torch.zeros(1, 3, 8, 8), method="magnitude", budget=sc.Budget(latency_ms=10 * whole))
    assert made == [{"round_to": 1, "approximate": False}]
    found = result.facts["latency_ms"]
    assert set(found) == {"allowed", "before", "after", "error"}
    assert found["allowed"] == 10 * whole and found["before"] == whole


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "taylor"}, "taylor needs data"),
        ({"budget": sc.Budget(latency_ms=1.0, macs=1e-6)}, "the budget cannot be met: macs"),
        ({"budget": sc.Budget(latency_ms=1.0, at_least={"no": 3})}, "no"),
        ({"budget": sc.Budget(macs=0.5), "timing": 5}, "no budget limits latency_ms"),
        ({"timing": 5}, "timing=5"),
        ({"strategy": "bandit", "search": {"checkpoint": "c.json"}, "data": [], "loss_fn": "mse"}, "the same times"),
        ({"strategy": Search(network(), [(0, 0)], checkpoint="c.json")}, "the same times"),
        ({"strategy": "bandit", "search": {"seed": -1}, "data": [], "loss_fn": "mse"}, "seed=-1"),
        ({"strategy": "bandit", "search": {"checkpoint": "no/c"}, "data": [], "loss_fn": "mse"}, "checkpoint='no/c'"),
        ({"strategy": None}, "strategy=None: global, "),
    ],
)
def test_what_can_be_told_at_once_is_told_before_anything_is_measured(monkeypatch, given, message):
    def never(*args, **options):
        raise AssertionError("measured")

    monkeypatch.setitem(sc.prune.__globals__, "Timing", never)
    given = {"method": "magnitude", "budget": sc.Budget(latency_ms=1.0)} | given
    with pytest.raises(sc.SecateurError, match=message):
        sc.prune(network(), torch.zeros(1, 3, 8, 8), **given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g: sc.Timing(m[:3], g), "the graph is of another model"),
        (lambda m, g: sc.Timing(m, 5), "a module and what secateur.trace gave"),
        (lambda m, g: sc.Timing(m, g, samples=3), "samples=3: a whole number from 4 on"),
        (lambda m, g: sc.Timing(m, g, threads=0), "threads=0: a whole number from 1 on"),
        (lambda m, g: sc.Timing(m, g, threads=1.5), "threads=1.5"),
        (lambda m, g: sc.Timing(m, g, seed=-1), "seed=-1"),
        (lambda m, g: sc.Timing(m, g, inputs="image"), "example inputs with tensors"),
        (lambda m, g: sc.Timing(m, g, inputs=torch.zeros(2, 5)), "they do not fit the model"),
        (lambda m, g: sc.Timing(*approximate()), "no group can be narrowed, none is exact .approximate=True"),
        (
            lambda m, g: sc.Timing(m, g, round_to=64),
            "narrowed, all have 64 channels or fewer.*keeps: th",
        ),
        (lambda m, g: sc.Timing(network().to("meta"), g), "a model with weights"),
        (lambda m, g: Timing.from_json("{", m, g), "the timing is damaged"),
        (lambda m, g: made_of(g, fingerprint="x"), "of another model, device, number"),
        (lambda m, g: made_of(g, where={"device": "cuda", "inputs": [[1, 3, 8, 8]]}), "another model, device, numb"),
        (lambda m, g: made_of(g, where={"device": "cpu", "inputs": [[4, 3, 8, 8]]}), "another model, device, numb"),
        (lambda m, g: made_of(g, samples=[[[1], 0.5]] * 4), "samples that do not fit"),
        (lambda m, g: made_of(g, samples=[[[-5, 900, 1], 0.5]] * 4), "samples that do not fit"),
        (lambda m, g: made_of(g, samples=[]), "samples that do not fit"),
        (lambda m, g: made_of(g, repeats=0), "samples that do not fit"),
        (lambda m, g: made_of(g, whole=float("nan")), "samples that do not fit"),
        (lambda m, g: made_of(g, threads="x"), "threads 'x'"),
        (lambda m, g: made_of(g, known={"a": -1.0}), "samples that do not fit"),
        (lambda m, g: made_of(g, known=[]), "the timing is damaged"),
        (
            lambda m, g: sc.Timing(m, g, checkpoint="no/folder/t.json"),
            "'no/folder/t.json': a file in a folder",
        ),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(sc.SecateurError, match=message):
        call(*case())
