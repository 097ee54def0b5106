"""Search of widths: the budget is met, the evaluation is that of the masked network, interrupted it ends the same."""

from __future__ import annotations

import copy
import importlib
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.allocation.search.arms import Effects, Factors
from secateur.allocation.search.evaluator import Evaluator
from secateur.allocation.search.search import Search
from secateur.allocation.sensitivity import alone, greedy, tried_alone
from secateur.allocation.strategies import STRATEGIES, fill


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 5),
    ).eval()  # fmt: skip


def case(seed=0):
    model = network(seed)
    data = [(torch.randn(8, 3, 6, 6), torch.randint(0, 5, (8,))) for _ in range(4)]
    graph = sc.trace(model, data[0][0])
    return model, graph, sc.score(model, graph, "magnitude"), data


def rise(model, masked, data, norms="batch"):
    """The mean over all batches of what the loss rises by."""

    def loss(network, x, y):
        network = copy.deepcopy(network)
        if norms == "batch":
            network[1].train()
        return float(F.cross_entropy(network(x), y))

    with torch.no_grad():
        return float(np.mean([loss(masked, x, y) - loss(model, x, y) for x, y in data]))


class Caught(Exception):
    """With what a strategy was given."""


def problem_of(graph, scores, budget):
    found = []

    def catch(problem):
        found.append(problem)
        return STRATEGIES["global"](problem)

    sc.allocate(graph, scores, budget, strategy=catch)
    return found[0]


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize(
    "budget", [sc.Budget(macs=0.5), sc.Budget(params=0.4, macs=0.7), sc.Budget(macs=0.6, round_to=4)]
)
def test_the_budget_is_met_and_used_and_the_model_stays_as_it_was(budget, dueling):
    model, graph, scores, data = case()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    search = Search(model, data, evaluations=100, dueling=dueling, progress=False)
    plan = sc.allocate(graph, scores, budget, strategy=search)
    for unit, fraction in budget.limits.items():
        assert getattr(graph, unit)(plan) <= fraction * getattr(graph, unit)()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert sc.cut(model, plan)(data[0][0]).shape == (8, 5)
    assert rise(model, sc.masked(model, plan), data) == pytest.approx(min(search.losses), abs=1e-6)
    names = {row["group"] for row in search.table}
    assert names <= {group.name for group in graph.groups}
    again = sc.allocate(
        graph, scores, budget, strategy=Search(model, data, evaluations=100, dueling=dueling, progress=False)
    )
    assert again.removed == plan.removed


@pytest.mark.parametrize("norms", ["batch", "running"])
def test_an_evaluation_is_the_loss_of_the_masked_network(norms):
    model, graph, scores, data = case()
    problem = problem_of(graph, scores, sc.Budget(macs=0.5))
    evaluate = Evaluator(model, problem, data, F.cross_entropy, 0, norms)

    rng = np.random.default_rng(0)
    for _ in range(5):
        taken = rng.integers(0, problem.count + 1)
        gone = problem.start - problem.widths(taken)
        removed = {
            g.name: sorted(problem.orders[i][: gone[i]].tolist()) for i, g in enumerate(graph.groups) if gone[i] > 0
        }
        masked = sc.masked(model, sc.make_plan(graph, removed))
        assert evaluate.everywhere(taken) == pytest.approx(rise(model, masked, data, norms), abs=1e-6)


def test_a_group_that_nothing_needs_becomes_narrow():
    """Two branches of equal shape, one of which the head does not look at."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 16), nn.Linear(8, 16)
            self.head, self.other = nn.Linear(16, 4), nn.Linear(16, 4, bias=False)

        def forward(self, x):
            return self.head(self.used(x).tanh()) + 1e-3 * self.other(self.idle(x).tanh())

    torch.manual_seed(0)
    model, x = Branches(), torch.randn(256, 8)
    with torch.no_grad():
        model.head.weight.mul_(10)
        labels = model(x).argmax(1)
    graph = sc.trace(model, x)
    scores = {group.name: torch.ones(len(group)) for group in graph.groups}  # which know nothing
    search = Search(model, [(x, labels)], evaluations=400, start="uniform", progress=False)
    kept = dict(
        zip(
            [g.name for g in graph.groups],
            graph.kept(sc.allocate(graph, scores, sc.Budget(macs=0.6), strategy=search)),
            strict=True,
        )
    )
    assert kept["used"] > 2 * kept["idle"]
    uniform = sc.cut(model, sc.allocate(graph, scores, sc.Budget(macs=0.6), strategy="uniform"))
    with torch.no_grad():
        rise = float(F.cross_entropy(uniform(x), labels) - F.cross_entropy(model(x), labels))
    assert search.losses[0] == pytest.approx(rise, abs=1e-5)
    assert search.losses[1] < rise


@pytest.mark.parametrize("dueling", [False, True])
def test_an_interrupted_search_ends_with_the_same_answer(tmp_path, monkeypatch, interrupted, dueling):
    model, graph, scores, data = case()
    budget, given = sc.Budget(macs=0.5), {"evaluations": 150, "progress": False, "dueling": dueling}
    whole = Search(model, data, **given)
    plan = sc.allocate(graph, scores, budget, strategy=whole)
    monkeypatch.setattr(
        importlib.import_module("secateur.allocation.search.search"), "EVERY", 0.0
    )  # a checkpoint at every block
    calls = interrupted(Evaluator, "_rise", 90)
    path = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        sc.allocate(graph, scores, budget, strategy=Search(model, data, checkpoint=path, **given))
    resumed = Search(model, data, checkpoint=path, **given)
    assert sc.allocate(graph, scores, budget, strategy=resumed).removed == plan.removed
    assert resumed.table == whole.table
    assert len(calls) < 90 + 110  # all of it again would be 160 more
    with pytest.raises(SecateurError, match="of another search"):
        sc.allocate(graph, scores, sc.Budget(macs=0.4), strategy=Search(model, data, checkpoint=path, **given))
    other = Search(model, data, loss_fn=lambda y, t: 3 * F.cross_entropy(y, t), checkpoint=path, **given)
    turned = {name: -values for name, values in scores.items()}
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained[0].weight.mul_(1.1)
    for network, by, search in (
        (model, scores, other), (model, turned, Search(model, data, checkpoint=path, **given)),
        (trained, scores, Search(trained, data, checkpoint=path, **given)),
    ):  # fmt: skip
        with pytest.raises(SecateurError, match="of another search"):
            sc.allocate(sc.trace(network, data[0][0]), by, budget, strategy=search)
    path.write_text(json.dumps({"searches": {key: {} for key in json.loads(path.read_text())["searches"]}}))
    with pytest.raises(SecateurError, match="damaged"):
        sc.allocate(graph, scores, budget, strategy=Search(model, data, checkpoint=path, **given))
    path.write_text("{")
    with pytest.raises(SecateurError, match="damaged"):
        sc.allocate(graph, scores, budget, strategy=Search(model, data, checkpoint=path, **given))


def test_doubts_are_told_where_a_best_width_depends_on_the_others():
    _, graph, scores, _ = case()
    problem = problem_of(graph, scores, sc.Budget(macs=0.5))
    factors = Factors(problem, STRATEGIES["global"](problem), (0.5, 1.0, 2.0))
    rng = np.random.default_rng(0)
    plays = [[int(rng.integers(size)) for size in factors.sizes] for _ in range(600)]
    plain = [[p, sum(p) / 10 + 0.02 * rng.standard_normal()] for p in plays]
    assert factors.doubts(plain) == {}
    # where the second is wide, the first should be narrow
    turned = [[p, p[1] / 2 + 0.1 * (p[0] if p[1] == 0 else -p[0]) + 0.02 * rng.standard_normal()] for p in plays]
    assert graph.groups[factors.groups[0]].name in factors.doubts(turned)
    # a width that was ruled out before the others grew strong says nothing of strong ones
    rest = [0] * (len(factors.sizes) - 2)
    weak = [[[k % 2, 0, *rest], 0.3 - 0.1 * (k % 2) + 0.02 * rng.standard_normal()] for k in range(100)]
    strong = [[[1, 1, *rest], 0.9 + 0.02 * rng.standard_normal()] for _ in range(100)]
    assert factors.doubts(weak + strong) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluations": 3}, "evaluations=3: a whole number from 32 on"),
        ({"start": "globl"}, "did you mean 'global'"),
        ({"ratios": (0.5, 2)}, "1.0 among them"),
        ({"ratios": (0.0, 1.0)}, "numbers above 0"),
        ({"ratios": (1.0,)}, "two or more numbers"),
        ({"ratios": 5}, "ratios=5: two or more"),
        ({"ratios": None}, "ratios=None"),
        ({"ratios": (1.0, "a")}, "numbers above 0"),
        ({"start": ["uniform"]}, "unknown start"),
        ({"radius": None}, "radius=None: a number above 0"),
        ({"seed": -1}, "seed=-1"),
        ({"model": 5}, "a torch.nn.Module is expected, int"),
        ({"data": 5}, "data=5"),
        ({"loss_fn": None}, "loss_fn=None: a callable"),
        ({"checkpoint": "no/such/folder/c.json"}, "a file in a folder that is there"),
        ({"checkpoint": "."}, "a file in a folder that is there"),
        ({"loss_fn": "entropy"}, "loss"),
        ({"data": []}, "there is no batch"),
        ({"data": [torch.zeros(1)]}, "batches .inputs, targets."),
        ({"minutes": 0}, "minutes=0"),
        ({"norms": "batches"}, "did you mean 'batch'"),
    ],
)
def test_bad_input_is_told(options, message):
    model, _, _, data = case()
    with pytest.raises(SecateurError, match=message):
        Search(**({"model": model, "data": data} | options))


def test_a_budget_that_cannot_be_met_a_loss_that_is_not_finite_and_another_model_are_told():
    model, graph, scores, data = case()
    with pytest.raises(SecateurError, match="cannot be met"):
        sc.allocate(graph, scores, sc.Budget(macs=0.001), strategy=Search(model, data, progress=False))
    broken = [(torch.full_like(x, torch.nan), y) for x, y in data]
    with pytest.raises(SecateurError, match="the loss of batch 0 is nan"):
        sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=Search(model, broken, progress=False))
    whole = [F.cross_entropy(model(x), y) for x, y in data]

    def broken_where_pruned(output, y):
        found = F.cross_entropy(output, y)
        return found if any(torch.isclose(found, known) for known in whole) else found * torch.nan

    search = Search(model, data, broken_where_pruned, norms="running", progress=False)
    with pytest.raises(SecateurError, match=r"the loss is nan on batch .* ratios nearer to 1"):
        sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)
    with pytest.raises(SecateurError, match="of another model"):
        sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=Search(copy.deepcopy(model)[:4], data, progress=False))


def test_norms_that_ask_other_processes_are_no_part_of_different_plays(monkeypatch):
    model, _, _, data = case()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    graph = sc.trace(model, data[0][0])
    monkeypatch.setattr(importlib.import_module("secateur.allocation.search.search"), "processes", lambda: 2)
    with pytest.raises(SecateurError, match="Search: 1 takes its statistics from all processes"):
        sc.allocate(graph, sc.score(model, graph, "magnitude"), sc.Budget(macs=0.5), strategy=Search(model, data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :2], y), "batch 3 .inputs of shape .8, 2, 6, 6.. does not fit"),
        (lambda x, y: (x, y + 90), "batch 3 .* does not fit the model or the loss"),
        (lambda x, y: (x.double(), y), "does not fit"),
        (lambda x, y: (x * torch.nan, y), "the loss of batch 3 is nan"),
    ],
)
def test_a_batch_that_does_not_fit_is_told_before_anything_is_tried(change, message):
    model, graph, scores, data = case()
    search = Search(model, [*data[:3], change(*data[3])], progress=False)
    with pytest.raises(SecateurError, match=message):
        sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)
    assert search.done == 0
    search = Search(model, data, lambda output, y: F.cross_entropy(output, y, reduction="none"), progress=False)
    with pytest.raises(SecateurError, match=r"a scalar tensor.*it gave shape \[8\]"):
        sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)


@pytest.mark.parametrize("norms", ["batch", "running"])
def test_inputs_by_name_and_forwards_that_count_and_draw(norms):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, u, v):
            self.seen = self.seen + 1
            return F.dropout(self.body(u + v), 0.1, training=True)

    model = Two().eval()
    data = [({"u": torch.randn(8, 3, 6, 6), "v": torch.ones(1)}, torch.randint(0, 5, (8,))) for _ in range(3)]
    graph = sc.trace(model, data[0][0])
    state = torch.get_rng_state()
    search = Search(model, data, evaluations=40, norms=norms, progress=False)
    plan = sc.allocate(graph, sc.score(model, graph, "magnitude"), sc.Budget(macs=0.5), strategy=search)
    assert graph.macs(plan) <= 0.5 * graph.macs()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.seen == 0


@pytest.mark.parametrize("changed", ["weights", "function", "targets"])
def test_a_search_with_another_loss_is_another_search(tmp_path, changed):
    model, graph, scores, data = case()
    given = {"evaluations": 60, "progress": False, "checkpoint": tmp_path / "search.json"}
    if changed == "targets":  # of a kind that is no tensor
        data = [(x, y.tolist()) for x, y in data]

    def loss(factor):
        if changed == "weights":
            return nn.CrossEntropyLoss(weight=torch.tensor([1.0, factor, 1.0, 1.0, 1.0]))
        if changed == "function":
            return lambda found, y: F.cross_entropy(found, y, label_smoothing=factor / 100)
        return lambda found, y: F.cross_entropy(found, torch.tensor(y))

    sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=Search(model, data, loss(1.0), **given))
    sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=Search(model, data, loss(1.0), **given))
    if changed == "targets":
        data = [(x, y[::-1]) for x, y in data]
    with pytest.raises(SecateurError, match="of another search"):
        sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=Search(model, data, loss(9.0), **given))


def test_a_checkpoint_holds_the_searches_of_several_budgets(tmp_path):
    model, graph, scores, data = case()
    given, path = {"evaluations": 60, "progress": False}, tmp_path / "search.json"
    budgets = (sc.Budget(macs=0.5), sc.Budget(macs=0.3))
    whole = [sc.allocate(graph, scores, budget, strategy=Search(model, data, **given)) for budget in budgets]
    for _ in range(2):
        search = Search(model, data, checkpoint=path, **given)
        assert [sc.allocate(graph, scores, budget, strategy=search) for budget in budgets] == whole
    assert len(json.loads(path.read_text())["searches"]) == 2


class Branching(nn.Module):
    """Either of two layers may keep one channel, but not both: another forward would run."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, width) for width in (20, 20, 60, 60)])
        self.heads = nn.ModuleList([nn.Linear(width, 4) for width in (20, 20, 60, 60)])

    def forward(self, x):
        a, b, c, d = (layer(x).tanh() for layer in self.layers)
        found = 0.01 * (self.heads[0](a) + self.heads[1](b)) + self.heads[2](c) + self.heads[3](d)
        return found.tanh() if a.shape[1] + b.shape[1] < 21 else found


@pytest.mark.parametrize("left", [40, 10, 2])
def test_a_search_with_groups_that_cannot_be_cut_after_all_goes_on_where_it_was(
    tmp_path, monkeypatch, interrupted, left
):
    torch.manual_seed(0)
    model = Branching().eval()
    inputs = torch.randn(16, 8)
    data = [(torch.randn(16, 8), torch.randint(0, 4, (16,))) for _ in range(3)]
    graph = sc.trace(model, inputs)
    scores, budget = sc.score(model, graph, "magnitude"), sc.Budget(params=0.4)
    monkeypatch.setattr(importlib.import_module("secateur.allocation.search.search"), "EVERY", 0.0)
    calls = interrupted(Evaluator, "_rise", 10**6)
    given = {"evaluations": 60, "progress": False}
    whole = sc.allocate(graph, scores, budget, strategy=Search(model, data, **given))
    assert "cannot be cut" in str(whole.skipped) and len(calls) > 60  # there was a second search
    given["checkpoint"] = tmp_path / "search.json"
    interrupted(Evaluator, "_rise", len(calls) - left)
    with pytest.raises(KeyboardInterrupt):
        sc.allocate(graph, scores, budget, strategy=Search(model, data, **given))
    assert sc.allocate(graph, scores, budget, strategy=Search(model, data, **given)) == whole


def test_what_no_group_has_a_choice_for_was_looked_for_all_the_same():
    model, graph, scores, data = case()
    search = Search(model, data, evaluations=100, ratios=(1.0, 1.001), progress=False)
    sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)
    assert search.table == [] and 0 < search.done <= 100 and search.seconds["evaluations"] > 0


def test_minutes_that_are_up_in_the_start_leave_what_was_tried_on_whole_batches(monkeypatch):
    model, graph, scores, data = case()
    problem = problem_of(graph, scores, sc.Budget(macs=0.5))
    evaluate, groups = Evaluator(model, problem, data, F.cross_entropy, 0), len(graph.groups)
    asked, order, bases = [], np.random.default_rng(0).permutation(len(data))[::-1], []
    answer = Search._answer
    monkeypatch.setattr(
        Search, "_answer", lambda self, *given: bases.append(given[2].base.tolist()) or answer(self, *given)
    )

    def late(self, begun, share, device):
        asked.append(share)
        return len(asked) > 2 * groups + 1 and share < 0.5

    monkeypatch.setattr(Search, "_late", late)
    search = Search(model, data, evaluations=400, minutes=1, progress=False)
    sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)
    assert search.started == "sensitivity"
    tried = tried_alone(problem, 400 // 3)
    rises = [evaluate.on([alone(problem, *one) for one in own], order[:2].tolist()).mean(1) for own in tried]
    assert bases == [greedy(problem, tried, rises).tolist()]


def test_without_a_play_the_start_is_the_answer():
    model, graph, scores, data = case()
    search = Search(model, data, evaluations=100, minutes=1e-9, start="uniform", progress=False)
    plan = sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)
    assert plan.removed == sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy="uniform").removed
    assert sum(row["plays"] for row in search.table) == 0
    assert search.late
    search.minutes = None
    sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)
    assert not search.late


@pytest.mark.parametrize(("evaluations", "minutes", "started"), [(60, None, "sensitivity"), (60, 1e-9, "uniform")])
def test_where_sensitivities_are_too_many_the_start_is_uniform_and_says_so(evaluations, minutes, started):
    model, graph, scores, data = case()
    search = Search(model, data, evaluations=evaluations, minutes=minutes, progress=False)
    sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)
    assert (search.started, search.facts()["started"], search.facts()["start"]) == (started, started, "sensitivity")
    many = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 5)).eval()
    data = [(torch.randn(8, 6), torch.randint(0, 5, (8,)))]
    graph = sc.trace(many, data[0][0])
    search = Search(many, data, evaluations=60, progress=False)  # a third are 20 forwards, for 12 groups
    sc.allocate(graph, sc.score(many, graph, "magnitude"), sc.Budget(macs=0.5), strategy=search)
    assert search.started == "uniform" and search.done <= 60


def test_a_search_that_is_interrupted_while_it_looks_for_a_start_ends_the_same(tmp_path, monkeypatch, interrupted):
    model, graph, scores, data = case()
    given = {"evaluations": 150, "progress": False, "checkpoint": tmp_path / "search.json"}
    whole = Search(model, data, evaluations=150, progress=False)
    plan = sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=whole)
    monkeypatch.setattr(importlib.import_module("secateur.allocation.search.search"), "EVERY", 0.0)
    calls = interrupted(Evaluator, "_rise", 40)
    with pytest.raises(KeyboardInterrupt):
        sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=Search(model, data, **given))
    (state,) = json.loads(given["checkpoint"].read_text())["searches"].values()
    assert len(state["rises"]) > 0 and state["plays"] is None
    resumed = Search(model, data, **given)
    assert sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=resumed).removed == plan.removed
    assert resumed.facts() == whole.facts()
    assert len(calls) == 40 + whole.done - state["done"]


def test_nominated_is_what_looks_best_within_the_budget():
    _, graph, scores, _ = case()
    problem = problem_of(graph, scores, sc.Budget(macs=0.5))
    factors = Factors(problem, STRATEGIES["uniform"](problem), (0.4, 0.7, 1.0, 1.3, 1.7))
    rng = np.random.default_rng(0)
    for _ in range(20):
        worth = np.cumsum(rng.random((len(factors.sizes), max(factors.sizes))), 1)  # wider is better, unevenly
        every = np.stack(np.meshgrid(*map(np.arange, factors.sizes), indexing="ij"), -1).reshape(-1, len(factors.sizes))
        looks = worth[np.arange(len(factors.sizes)), every].sum(1)
        met = [problem.meter.met(problem.widths(factors.taken(atoms))) for atoms in every]
        best = np.sort(looks[met])[::-1]
        found = factors.nominated(worth, factors.price(worth), 5)
        own = [worth[np.arange(len(atoms)), atoms].sum() for atoms in found]
        assert all(problem.meter.met(problem.widths(factors.taken(atoms))) for atoms in found)
        assert own == sorted(own, reverse=True)
        assert len({tuple(atoms) for atoms in found}) == 5
        assert own[0] == pytest.approx(best[0])
        assert own[0] >= worth[np.arange(len(worth)), factors.best(worth, factors.price(worth))].sum()


def test_no_more_forwards_are_made_than_allowed_and_the_last_are_a_comparison(monkeypatch):
    model, graph, scores, data = case()
    data = data * 5
    calls, after = [], Evaluator._rise

    def counted(self, taken, batch):
        calls.append((taken.tobytes(), batch))
        return after(self, taken, batch)

    monkeypatch.setattr(Evaluator, "_rise", counted)
    search = Search(model, data, evaluations=200, progress=False)
    sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)
    assert len(calls) == search.done <= 200
    assert search.done > 200 - 28  # a block of plays, if there is no room for it
    first = (200 // 3 // (2 * 8 + 8)) * (2 * 8 + 8)  # sensitivities: of three groups eight widths each
    plays = first + 16 + sum(row["plays"] for row in search.table if row["group"] == search.table[0]["group"])
    assert 150 - 28 < plays <= 150
    tried = {taken: [batch for t, batch in calls[plays:] if t == taken] for taken, _ in calls[plays:]}
    most = [sorted(batches) for batches in tried.values() if len(batches) == max(map(len, tried.values()))]
    assert 2 <= len(most) < len(tried)  # the start and the last ones
    assert all(batches == most[0] for batches in most)  # on the same batches, each once
    assert len(set(most[0])) == len(most[0])


def test_a_search_starts_at_the_greedy_answer_and_plays_near_what_looks_best(monkeypatch):
    moved, priced, seen, answer = [], [], [], Search._answer

    def caught(self, course, plays, factors, evaluate):
        seen.append((course, factors, plays.bandit.known.copy(), plays.bandit.favourite.copy()))
        return answer(self, course, plays, factors, evaluate)

    monkeypatch.setattr(Search, "_answer", caught)
    for seed in range(3):
        model, graph, scores, data = case(seed)
        with torch.no_grad():
            model[-1].weight.mul_(30)
            data = [(x, model(x).argmax(1)) for x, _ in data]  # so that what goes is missed, and the budget has a price
        problem = problem_of(graph, scores, sc.Budget(macs=0.5))
        search = Search(model, data, evaluations=500, seed=seed, progress=False)
        sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)
        course, factors, known, favourite = seen.pop()
        evaluate = Evaluator(model, problem, data, F.cross_entropy, 0)
        tried = tried_alone(problem, 500 // 3)
        rises = [[evaluate.everywhere(alone(problem, *one)) for one in own] for own in tried]
        assert len(course.rises) == 4 * len(tried)  # four batches: each was looked at once
        for own, here in zip(course.alone(len(tried)), rises, strict=True):
            assert own == pytest.approx(here, abs=1e-5)
        assert factors.base.tolist() == greedy(problem, tried, rises).tolist()
        assert search.losses[0] == pytest.approx(evaluate.everywhere(fill(problem, factors.base)), abs=1e-5)
        price = -known[factors.cost != 0] / factors.cost[factors.cost != 0]  # one for all
        assert price == pytest.approx(price[0])
        assert problem.meter.met(problem.widths(factors.taken(favourite)))
        moved.append(favourite.tolist() != factors.start.tolist())
        priced.append(price[0] > 0)
    assert any(moved) and any(priced)


def test_blocks_that_do_not_fit_are_not_played():
    model, graph, scores, data = case()
    ratios = [1 + number / 20 for number in range(-18, 20)]
    search = Search(model, data, evaluations=32, ratios=ratios, dueling=True, start="uniform", progress=False)
    plan = sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search)
    assert search.done <= 32
    assert plan.removed == sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy="uniform").removed


def test_prune_searches_by_name_and_says_what_it_found():
    model, graph, _, data = case()
    given = {"data": data, "loss_fn": "cross_entropy", "budget": sc.Budget(macs=0.5)}
    result = sc.prune(model, data[0][0], strategy="bandit", search={"evaluations": 60, "progress": False}, **given)
    assert result.after.macs <= 0.5 * result.before.macs
    assert set(result.facts["search"]) == {
        "start",
        "started",
        "table",
        "doubts",
        "price",
        "explained",
        "losses",
        "better",
        "forwards",
        "late",
    }
    assert json.loads(json.dumps(result.facts["search"])) == result.facts["search"]
    for options, message in (
        ({"strategy": "bandit", "loss_fn": None, "method": "magnitude"}, "needs data= .* and loss_fn="),
        ({"search": {"evaluations": 60}}, "searches nothing"),
        ({"strategy": "bandit", "search": {"evaluations": 1}}, "from 32 on"),
        ({"strategy": "bandit", "search": {"evaluation": 100}}, "did you mean 'evaluations'"),
        ({"strategy": "bandit", "search": 5}, "search=5: settings by name"),
        ({"strategy": "bandit", "data": iter(data)}, "an iterator ends"),
        ({"strategy": "bandi"}, "did you mean 'bandit'"),
    ):
        with pytest.raises(SecateurError, match=message):
            sc.prune(model, data[0][0], **(given | options))
    with pytest.raises(SecateurError, match="tries widths on the model"):
        sc.allocate(graph, {}, sc.Budget(macs=0.5), strategy="bandit")


@pytest.mark.parametrize("dueling", [False, True])
def test_effects_are_those_of_an_additive_problem_and_do_not_depend_on_how_many_plays_come_at_a_time(dueling):
    rng, sizes = np.random.default_rng(0), [4, 3, 5]
    parts = [rng.standard_normal(size) for size in sizes]
    plays = rng.integers(0, sizes, (4000, 2, 3) if dueling else (4000, 3))
    true = sum(part[plays[..., factor]] for factor, part in enumerate(parts))
    batches = rng.integers(0, 20, 4000)
    hard = rng.standard_normal(20)[batches]
    rewards = (true[:, 0] - true[:, 1]) if dueling else true + hard
    whole, pieces = Effects(sizes), Effects(sizes)
    whole.add(plays, rewards, batches)
    for start in range(0, 4000, 7):
        some = slice(start, start + 7)
        pieces.add(plays[some], rewards[some], batches[some])
    worth = whole.table()
    assert (worth == pieces.table()).all()
    for own, part in zip(worth, parts, strict=True):
        assert own[: len(part)] - own[0] == pytest.approx(part - part[0], abs=0.02)  # RIDGE plays of 4,000
    assert whole.explained > 0.999
    noisy = Effects(sizes)
    noisy.add(plays, rewards + (rewards if dueling else true).std() * rng.standard_normal(4000), batches)
    noisy.table()
    assert 0.4 < noisy.explained < 0.6
    nothing = []  # of pure noise a fit to few plays would explain a lot
    for start in range(0, 4000, 80):
        few, some = Effects(sizes), slice(start, start + 80)
        few.add(plays[some], rng.standard_normal(80), batches[some])
        few.table()
        nothing.append(few.explained)
    assert np.mean(nothing) < 0.1


@pytest.mark.parametrize("count", [1, 3, 40, 1000])
def test_effects_are_the_least_squares_with_an_unknown_for_every_atom_and_batch(count):
    rng, sizes = np.random.default_rng(1), [4, 3, 5]
    plays, rewards, batches = rng.integers(0, sizes, (200, 3)), rng.standard_normal(200), rng.integers(0, count, 200)
    effects = Effects(sizes)
    effects.add(plays, rewards, batches)
    columns = [np.eye(size)[plays[:, factor]] for factor, size in enumerate(sizes)] + [np.ones((200, 1))]
    design = np.concatenate([*columns, np.eye(count)[batches]], 1)
    penalty = np.diag(np.concatenate([np.full(12, 1.0), [1e-9], np.full(count, 3.0)]))
    found = np.linalg.solve(design.T @ design + penalty, design.T @ rewards)
    worth = effects.table()
    assert np.concatenate([worth[0, :4], worth[1, :3], worth[2]]) == pytest.approx(found[:12], abs=1e-9)


def test_effects_of_what_was_hardly_played_are_small_and_of_what_was_not_are_none():
    effects = Effects([3, 2])
    assert not effects.table().any()
    effects.add(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), np.array([1.0, 0.0, 0.0, -1.0]), [0, 0, 0, 0])
    worth = effects.table()
    assert worth[0, 2] == worth[1, 2] == 0
    assert 0 < worth[0, 0] < 0.5 and worth[0, 1] == pytest.approx(-worth[0, 0])
