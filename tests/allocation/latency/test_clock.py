"""Budgets in milliseconds: the clock decides, whatever is fitted. The clock is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.workload import Workload
from secateur.allocation.api import allocated


def true_ms(graph, widths):
    """Milliseconds by an equation."""
    macs = graph.macs_terms.totals(graph.lengths(widths))
    return 1.0 + 8.0 * macs / graph.macs() + 0.02 * widths.sum(-1)


class Fitted:
    """A fit of the equation that is wrong by a factor, and in its base."""

    def __init__(self, graph, wrong=1.0, base=1.0):
        self.graph, self.wrong, self.base = graph, wrong, base

    def ms(self, widths):
        return self.wrong * (true_ms(self.graph, widths) - 1.0 + self.base)

    def slope(self, widths):
        per_length = self.graph.macs_terms.gradient(self.graph.lengths(widths))
        return self.wrong * (8.0 * self.graph.multiplicity.T @ per_length / self.graph.macs() + 0.02)

    def key(self):
        return str(self.wrong)


class Made:
    """A clock that shows what the equation says, with noise."""

    backend = "eager"

    def __init__(self, graph, wrong=1.0, base=1.0, noise=0.0, seed=0):
        self.graph, self.fitted, self.noise, self.asked = graph, Fitted(graph, wrong, base), noise, []
        self.rng = np.random.default_rng(seed)

    def true(self, widths):
        return true_ms(self.graph, widths)

    def measured(self, plan):
        self.asked.append(float(self.true(self.graph.kept(plan))) * (1 + self.noise * self.rng.standard_normal()))
        return self.asked[-1]


def case():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 5),
    ).eval()  # fmt: skip
    graph = sc.trace(model, torch.zeros(1, 3, 8, 8))
    return model, graph, sc.score(model, graph, "magnitude")


@pytest.mark.parametrize("strategy", ["global", "uniform", "threshold"])
@pytest.mark.parametrize(("wrong", "base"), [(0.6, 1.0), (0.9, 0.5), (1.0, 1.0), (1.1, 2.0), (1.7, 0.0)])
@pytest.mark.parametrize("part", [0.8, 0.5, 0.3])
def test_the_clock_decides_and_most_of_the_budget_is_used(strategy, wrong, base, part):
    _, graph, scores = case()
    clock = Made(graph, wrong, base)
    allowed = float(part * clock.true(graph.widths))
    plan = sc.allocate(graph, scores, sc.Budget(latency_ms=allowed, round_to=1), strategy=strategy, latency=clock)
    took = float(clock.true(graph.kept(plan)))
    assert took <= allowed
    one_wider = min(float(clock.true(graph.kept(plan) + unit)) for unit in np.eye(len(graph.groups), dtype=int))
    assert took > 0.93 * allowed or one_wider > allowed
    assert len(clock.asked) <= 2 * 11


class Asked:
    """Another strategy, which keeps the limits that it was given."""

    def __init__(self, strategy):
        self.strategy, self.limits = strategy, []

    def widths(self, problem, work):
        self.limits.append(problem.meter.allowed["latency_ms"])
        return self.strategy.widths(problem, work)


def test_a_clock_that_is_right_changes_nothing_of_a_strategys_answer():
    _, graph, scores = case()
    clock, asked = Made(graph), Asked(sc.Threshold())
    plan = sc.allocate(graph, scores, sc.Budget(latency_ms=6.0, round_to=1), strategy=asked, latency=clock)
    assert asked.limits == [pytest.approx(6.0)]
    as_well = sc.allocate(graph, scores, sc.Budget(latency_ms=6.0, round_to=1), strategy="threshold", latency=clock)
    assert plan == as_well


def test_a_strategy_is_asked_for_what_the_fit_says_of_the_limit():
    _, graph, scores = case()
    clock, asked = Made(graph, 0.7), Asked(sc.Global())
    sc.allocate(graph, scores, sc.Budget(latency_ms=6.0, round_to=1), strategy=asked, latency=clock)
    assert asked.limits == [pytest.approx(0.7 * 6.0)]


def test_a_budget_that_the_whole_network_meets_takes_nothing():
    _, graph, scores = case()
    assert len(sc.allocate(graph, scores, sc.Budget(latency_ms=1000.0), strategy="global", latency=Made(graph))) == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_clock_that_is_not_steady_was_seen_to_show_no_more_than_the_budget(seed):
    _, graph, scores = case()
    clock = Made(graph, 1.2, noise=0.03, seed=seed)
    allowed = float(0.5 * clock.true(graph.widths))
    plan = sc.allocate(graph, scores, sc.Budget(latency_ms=allowed, round_to=1), strategy="global", latency=clock)
    assert float(clock.true(graph.kept(plan))) <= 1.1 * allowed
    assert min(clock.asked) <= allowed


def test_other_limits_hold_beside_it_and_widths_are_rounded():
    _, graph, scores = case()
    clock = Made(graph, 1.1)
    plan = sc.allocate(
        graph, scores, sc.Budget(latency_ms=6.0, params=0.4, round_to=4), strategy="global", latency=clock
    )
    assert graph.params(plan) <= 0.4 * graph.params()
    kept = graph.kept(plan)
    assert clock.true(kept) <= 6.0
    assert all(kept[(kept < graph.widths)] % 4 == 0)


def test_what_is_narrowest_is_tried_before_a_budget_is_said_to_be_impossible():
    _, graph, scores = case()
    clock = Made(graph, base=0.01)  # the base is a hundred times what is fitted
    least = float(clock.true(np.ones(len(graph.groups), dtype=int)))
    plan = sc.allocate(graph, scores, sc.Budget(latency_ms=1.001 * least, round_to=1), strategy="global", latency=clock)
    assert clock.true(graph.kept(plan)) <= 1.001 * least


def test_what_was_seen_to_meet_a_budget_is_the_answer_if_the_clock_shows_more_later():
    model, graph, scores = case()
    work = sc.Workload(model)
    clock = Made(graph)
    allowed = float(0.5 * clock.true(graph.widths))
    steady, seen = clock.measured, []

    def later_slower(plan):
        seen.append(steady(plan) * (1 if not seen or min(seen) > allowed else 10))
        return seen[-1]

    clock.measured = later_slower
    with pytest.warns(sc.SecateurWarning, match="it is not steady, and the answer is uniform widths"):
        plan = sc.allocate(
            graph, scores, sc.Budget(latency_ms=allowed, round_to=1), strategy="global", latency=clock, work=work
        )
    assert plan == sc.allocate(
        graph, scores, sc.Budget(latency_ms=allowed, round_to=1), strategy="uniform", latency=Made(graph)
    )
    assert max(seen[1:]) > allowed
    assert len(work.notices) == 1  # which the result tells as well


class Never:
    """A criterion that notes that it was asked."""

    def __init__(self, asked):
        self.asked = asked

    def scores(self, graph, work):
        self.asked.append(0)


def test_a_budget_that_cannot_be_met_is_told():
    _, graph, scores = case()
    clock = Made(graph, 0.5)  # thinks that half of it would do
    with pytest.raises(
        sc.InfeasibleBudget, match=r"latency_ms=1.05 is asked for, and the least that was measured is 1\.0"
    ):
        sc.allocate(graph, scores, sc.Budget(latency_ms=1.05), strategy="global", latency=clock)
    low = float(clock.true(np.ones(len(graph.groups), dtype=int)))
    assert (
        Made(graph, 1.7).fitted.ms(np.ones(len(graph.groups), dtype=int)) > 1.05 * low
    )  # what the fit says decides nothing
    plan = sc.allocate(
        graph, scores, sc.Budget(latency_ms=1.05 * low, round_to=1), strategy="global", latency=Made(graph, 1.7)
    )
    assert float(clock.true(graph.kept(plan))) <= 1.05 * low
    scored = []
    for criterion in (sc.Magnitude(), Never(scored)):
        model, clock = case()[0], Made(graph)
        with pytest.raises(sc.InfeasibleBudget, match=r"latency_ms=1.05 is asked for, .* that was measured is 1\.0"):
            sc.prune(model, torch.zeros(1, 3, 8, 8), sc.Budget(latency_ms=1.05), criterion=criterion, latency=clock)
        assert len(clock.asked) == 1
    assert not scored  # told before any work


def test_a_search_looks_for_widths_under_a_budget_in_milliseconds(tmp_path):
    model, graph, scores = case()
    clock = Made(graph, 1.1)
    data = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(4)]
    path, budget = tmp_path / "search.json", sc.Budget(latency_ms=5.0)
    bandit = sc.Bandit(evaluations=100, checkpoint=str(path))
    work = Workload(model, data, "cross_entropy")
    plan = allocated(graph, scores, budget, bandit, work, latency=clock)
    assert 0.9 * 5.0 < clock.true(graph.kept(plan)) <= 5.0
    found = work.facts["search"]
    assert found["table"] and found["price"] >= 0
    with pytest.raises(
        sc.SecateurError, match="of another search, with another latency"
    ):  # prices by another clock are others
        allocated(graph, scores, budget, bandit, Workload(model, data, "cross_entropy"), latency=Made(graph, 1.2))


def test_a_clock_of_another_model_or_trace_is_told_before_any_work():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x, skip=False):
            x = self.first(x).relu()
            return self.last(x if skip else self.second(x).relu())

    model = Two().eval()
    graph, shorter = sc.trace(model, {"x": torch.zeros(1, 6)}), sc.trace(model, {"x": torch.zeros(1, 6), "skip": True})
    scores = sc.score(model, graph, "magnitude")
    for wrong in (Made(shorter), Made(case()[1])):
        for call in (
            lambda clock: sc.allocate(graph, scores, sc.Budget(latency_ms=1.0), latency=clock),
            lambda clock: sc.prune(
                model, {"x": torch.zeros(1, 6)}, sc.Budget(latency_ms=1.0), criterion=Never([]), latency=clock
            ),
        ):
            with pytest.raises(sc.SecateurError, match="of another model, or was traced with other inputs"):
                call(wrong)
    with pytest.raises(sc.SecateurError, match=r"latency=5: what secateur\.measure_latency gives is expected"):
        sc.allocate(graph, scores, sc.Budget(latency_ms=1.0), strategy="global", latency=5)
    one, three = (nn.Sequential(nn.Conv2d(1, 8, 3, stride), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval() for stride in (1, 3))
    image = torch.zeros(1, 1, 32, 32)
    graph = sc.trace(three, image)
    with pytest.raises(sc.SecateurError, match="of another model, or was traced with other inputs"):  # names and shapes
        sc.allocate(
            graph, sc.score(three, graph, "magnitude"), sc.Budget(latency_ms=1.0), latency=Made(sc.trace(one, image))
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g, s: sc.Budget(latency_ms=0), "latency_ms=0.: milliseconds, a number above 0"),
        (lambda m, g, s: sc.Budget(latency_ms="fast"), "latency_ms='fast'"),
        (lambda m, g, s: sc.Budget(latency_ms=float("nan")), "latency_ms=nan"),
        (lambda m, g, s: sc.allocate(g, s, sc.Budget(latency_ms=1.0)), "to be measured first; call prune"),
        (lambda m, g, s: sc.allocate(g, s, sc.Budget(macs=0.5), latency=Made(g)), "does not limit latency_ms"),
        (lambda m, g, s: sc.eigendamage(m, torch.zeros(1, 3, 8, 8),
            data=[(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))],
            loss="cross_entropy", budget=sc.Budget(latency_ms=1.0)), "rotated layers: only prune"),
        (lambda m, g, s: sc.SDPrun(m, g, lr=0.1, c=1e-3, mu=0.6, budget=sc.Budget(latency_ms=1.0)),
            "what prunes while it trains cannot"),
        (lambda m, g, s: sc.IncReg(m, g, torch.optim.SGD(m.parameters(), lr=0.1), budget=sc.Budget(latency_ms=1.0)),
            "what prunes while it trains cannot"),
    ],
)  # fmt: skip
def test_bad_input_is_told(call, message):
    with pytest.raises(sc.SecateurError, match=message):
        call(*case())
