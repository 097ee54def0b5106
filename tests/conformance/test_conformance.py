"""What every criterion, strategy, repair and method that is registered must do, on six kinds of networks.

They are found by their registries: one more is tested without a line here. What a seat may refuse is in ``REFUSALS``,
with the words that it must refuse it in.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.workload import Workload
from secateur.methods.contract import METHODS, TRAINING_METHODS, finished
from secateur.tracing.selection import excluded

from .networks import CASES, Case, as_dicts, case
from .state import prepared, untouched

REFUSALS = {
    ("bn_scale", "tied weights"): "no group has a norm",
    ("bn_scale", "Llama"): "no group has a norm",
    ("eigendamage", "tied weights"): "no layer can become a bottleneck.*enter: it has hooks.*inner: its weight is used",
    ("pivot", "tied weights"): "no layer can have blocks: enter has hooks.*inner shares its weight",
}
"""(seat, network) -> what it says instead of doing it."""
SEATS = [
    *(("criterion", name) for name in sc.CRITERIA),
    *(("strategy", name) for name in sc.STRATEGIES),
    *(("repair", name) for name in sc.REPAIRS),
]
SMALL: dict[str, dict[str, Any]] = {
    "bandit": {"evaluations": 32},
    "distill": {"steps": 5},
    "directional": {"share": 0.9},
    "directed": {"share": 0.9},
}
"""Settings with which a seat is quick on small networks."""


def budget_for(graph: sc.ChannelGraph, named: Collection[str] | None = None) -> sc.Budget:
    """Half of what these groups (all, if not given) could free."""
    free = [g.exact and (named is None or g.name in named) for g in graph.groups]
    least = np.array([g.least if f else len(g) for g, f in zip(graph.groups, free, strict=True)], dtype=np.int64)
    low, high = (graph.macs_terms.total(graph.lengths(widths)) for widths in (least, graph.widths))
    assert low < high, "nothing could be freed"
    return sc.Budget(macs=(low + high) / 2 / high)


def seat(kind: str, name: str) -> dict[str, Any]:
    seats: dict[str, Any] = {"criterion": "magnitude", "strategy": "uniform", "repair": "none"}
    return {**seats, kind: {"name": name, **SMALL.get(name, {})}}


def budget_of(network: str, kind: str, name: str) -> sc.Budget:
    """Half of what the groups could free that the criterion has scores for."""
    return _budget(network, name if kind == "criterion" else "magnitude")


@cache
def _budget(network: str, criterion: str) -> sc.Budget:
    given = case(network)
    model = prepared(given.make())
    graph = _graph(network)
    scores = sc.score(model, graph, seat("criterion", criterion)["criterion"], data=given.batches, loss=given.loss)
    return budget_for(graph, scores.keys() - excluded(model, graph).keys())


@cache
def _graph(network: str) -> sc.ChannelGraph:
    return sc.trace(case(network).make(), case(network).inputs)


def pruned(model: nn.Module, given: Case, kind: str, name: str, budget: sc.Budget, **more: Any) -> sc.Result:
    options = {"data": given.batches, "loss": given.loss, **more}
    return sc.prune(model, given.inputs, budget, **seat(kind, name), **options)


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
@pytest.mark.parametrize("network", CASES)
@pytest.mark.parametrize(("kind", "name"), SEATS, ids=[f"{kind}-{name}" for kind, name in SEATS])
def test_a_seat(kind: str, name: str, network: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = case(network)
    model = prepared(given.make())
    if (name, network) in REFUSALS:
        with untouched(model), pytest.raises(sc.SecateurError, match=REFUSALS[name, network]):
            pruned(model, given, kind, name, sc.Budget(params=0.95))
        return
    budget = budget_of(network, kind, name)
    with untouched(model):
        result = pruned(model, given, kind, name, budget)
    assert capsys.readouterr() == ("", "")  # silent unless asked
    assert result.after.macs == result.graph.macs(result.plan) <= budget.macs * result.before.macs
    assert len(result.plan) > 0
    if kind != "repair" or name == "none":
        assert sc.check(model, result.model, result.plan, given.inputs) <= given.tolerance
    for p in result.model.parameters():
        assert p.isfinite().all()

    again = pruned(model, given, kind, name, budget, progress=True)
    assert again.plan == result.plan, "same seed, same plan"
    for one, two in zip(again.model.state_dict().values(), result.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), "progress shown or not, the same weights"

    plan = sc.Plan.from_json(result.plan.to_json())
    assert plan == result.plan and plan.to_json() == result.plan.to_json()
    replayed = sc.cut(model, plan)
    assert [p.shape for p in replayed.parameters()] == [p.shape for p in result.model.parameters()]


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
@pytest.mark.parametrize(("kind", "name"), SEATS, ids=[f"{kind}-{name}" for kind, name in SEATS])
def test_batches_as_dicts_are_the_same_batches(kind: str, name: str) -> None:
    given = case("batch norms")
    budget = budget_of("batch norms", kind, name)
    one = pruned(given.make(), given, kind, name, budget)
    two = pruned(given.make(), given, kind, name, budget, data=as_dicts(given))
    assert one.plan == two.plan
    for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
@pytest.mark.parametrize(("kind", "name"), SEATS, ids=[f"{kind}-{name}" for kind, name in SEATS])
def test_a_batch_that_fails_leaves_the_model_as_it_was(kind: str, name: str) -> None:
    given = case("batch norms")
    model = prepared(given.make())
    budget = budget_of("batch norms", kind, name)
    bad = [given.batches[0], (torch.zeros(2, 5, 8, 8), torch.zeros(2, dtype=torch.int64)), given.batches[2]]
    registry = {"criterion": sc.CRITERIA, "strategy": sc.STRATEGIES, "repair": sc.REPAIRS}[kind]
    needs_data = getattr(registry.find(name), "needs", sc.Needs()).data
    with untouched(model):
        if needs_data:
            with pytest.raises(sc.BadBatch, match=re.escape("[2, 5, 8, 8]")):
                pruned(model, given, kind, name, budget, data=bad)
        else:
            pruned(model, given, kind, name, budget, data=bad)


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
@pytest.mark.parametrize("network", CASES)
@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_at_once(name: str, network: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = case(network)
    model = prepared(given.make())
    method = METHODS.make(name)
    takes = getattr(method, "takes_budget", True)
    budget = sc.Budget(params=0.9) if takes else None

    def run(progress: bool) -> sc.Result:
        work = Workload(model, given.batches, given.loss, inputs=given.inputs, progress=progress)
        return method.apply(model, given.inputs, budget, work)

    if (name, network) in REFUSALS:
        with untouched(model), pytest.raises(sc.SecateurError, match=REFUSALS[name, network]):
            run(progress=False)
        return
    with untouched(model):
        result = run(progress=False)
    assert capsys.readouterr() == ("", "")
    assert result.before.params == sum(p.numel() for p in model.parameters())
    if takes:
        assert result.after.params == sum(p.numel() for p in result.model.parameters()) <= 0.9 * result.before.params
    again = run(progress=True)
    for one, two in zip(again.model.state_dict().values(), result.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
@pytest.mark.parametrize("network", CASES)
@pytest.mark.parametrize("name", list(TRAINING_METHODS))
def test_a_method_while_training(name: str, network: str) -> None:
    given = case(network)
    model = given.make()
    method = TRAINING_METHODS.make(name, QUICK.get(name, {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    graph = sc.trace(model, given.inputs)
    budget = budget_for(graph) if getattr(method, "takes_budget", True) else None
    handle = method.attach(model, graph, optimizer, budget)
    work = Workload(model, as_dicts(given), given.loss)
    for _ in range(200):
        for batch in work.batches():
            optimizer.zero_grad()
            work.loss_of(batch).backward()
            optimizer.step()
            handle.step()
        if handle.done:
            break
    assert handle.done, f"after 600 steps; {getattr(handle, 'steps_needed', '?')} were said to be needed"
    small, plan = finished(model, handle)
    if plan is not None:
        assert graph.macs(plan) <= budget.macs * graph.macs()
        assert sc.check(model, small, plan, given.inputs) <= given.tolerance
        assert sc.Plan.from_json(plan.to_json()) == plan
    if hasattr(handle, "detach"):
        handle.detach()


QUICK: dict[str, dict[str, Any]] = {
    "increg": {"rate": 0.5, "limit": 1.0}, "greg": {"rate": 0.5, "limit": 1.0}, "spp": {"rate": 0.5, "every": 1},
    "pivot": {"keep": 0.5, "every": 1, "times": 3},
}  # fmt: skip
"""Settings with which a training-time method is quick."""
