"""Search of widths: the budget is met, the evaluation is that of the masked network, interrupted it ends the same."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.allocation.least_rise import least_rise
from secateur.allocation.problem import fill
from secateur.allocation.search import checkpoint, evaluator
from secateur.allocation.search.arms import ArmTable, Effects
from secateur.allocation.search.evaluator import Evaluator
from secateur.allocation.search.loop import Loop
from secateur.allocation.sensitivity import alone, measured, tried_alone
from secateur.allocation.strategies import global_items, uniform_items


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


class Catch:
    """A strategy that keeps the problem it was given."""

    def widths(self, problem, work):
        self.problem = problem
        return problem.least


def problem_of(graph, scores, budget):
    caught = Catch()
    sc.allocate(graph, scores, budget, strategy=caught)
    return caught.problem


def search(model, graph, scores, data, budget, loss="cross_entropy", **settings):
    """The plan of a search, and what it learned."""
    work = sc.Workload(model, data, loss)
    plan = sc.allocate(graph, scores, budget, strategy=sc.Bandit(**settings), work=work)
    return plan, work.facts["search"]


def evaluator_of(model, problem, data, norms="batch"):
    return Evaluator(sc.Workload(model, data, "cross_entropy"), problem, norms)


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize(
    "budget", [sc.Budget(macs=0.5), sc.Budget(params=0.4, macs=0.7), sc.Budget(macs=0.6, round_to=4)]
)
def test_the_budget_is_met_and_used_and_the_model_stays_as_it_was(budget, dueling):
    model, graph, scores, data = case()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan, found = search(model, graph, scores, data, budget, evaluations=100, dueling=dueling)
    for unit, fraction in budget.limits.items():
        assert getattr(graph, unit)(plan) <= fraction * getattr(graph, unit)()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert sc.cut(model, plan)(data[0][0]).shape == (8, 5)
    assert rise(model, sc.masked(model, plan), data) == pytest.approx(min(found["losses"]), abs=1e-6)
    names = {row["group"] for row in found["table"]}
    assert names <= {group.name for group in graph.groups}
    again = search(model, graph, scores, data, budget, evaluations=100, dueling=dueling)
    assert (again[0].removed, again[1]) == (plan.removed, found)


@pytest.mark.parametrize("norms", ["batch", "running"])
def test_an_evaluation_is_the_loss_of_the_masked_network(norms):
    model, graph, scores, data = case()
    problem = problem_of(graph, scores, sc.Budget(macs=0.5))
    evaluate = evaluator_of(model, problem, data, norms)
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
    budget = sc.Budget(macs=0.6, round_to=1)
    plan, found = search(model, graph, scores, [(x, labels)], budget, evaluations=400, start="uniform")
    kept = dict(zip([g.name for g in graph.groups], graph.kept(plan), strict=True))
    assert kept["used"] > 2 * kept["idle"]
    uniform = sc.cut(model, sc.allocate(graph, scores, budget, strategy="uniform"))
    with torch.no_grad():
        rise = float(F.cross_entropy(uniform(x), labels) - F.cross_entropy(model(x), labels))
    assert found["losses"][0] == pytest.approx(rise, abs=1e-5)
    assert found["losses"][1] < rise


@pytest.mark.parametrize("dueling", [False, True])
def test_an_interrupted_search_ends_with_the_same_answer(tmp_path, monkeypatch, interrupted, dueling):
    model, graph, scores, data = case()
    budget, given = sc.Budget(macs=0.5), {"evaluations": 150, "dueling": dueling}
    whole = search(model, graph, scores, data, budget, **given)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_SAVES", 0.0)  # a checkpoint at every block
    calls = interrupted(Evaluator, "_rise", 90)
    path = tmp_path / "search.json"
    given["checkpoint"] = path
    with pytest.raises(KeyboardInterrupt):
        search(model, graph, scores, data, budget, **given)
    assert search(model, graph, scores, data, budget, **given) == whole
    assert len(calls) < 90 + 110  # all of it again would be 160 more


def test_a_checkpoint_of_another_search_is_refused_with_what_differs(tmp_path):
    model, graph, scores, data = case()
    budget, given = sc.Budget(macs=0.5), {"evaluations": 60, "checkpoint": str(tmp_path / "search.json")}
    search(model, graph, scores, data, budget, **given)
    kept = (tmp_path / "search.json").read_bytes()
    turned = {name: -values for name, values in scores.items()}
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained[0].weight.mul_(1.1)
    others = [(x, y.roll(1)) for x, y in data]
    for what, call in (
        ("another settings", lambda: search(model, graph, scores, data, budget, **(given | {"seed": 1}))),
        ("another model", lambda: search(trained, sc.trace(trained, data[0][0]), scores, data, budget, **given)),
        ("another data", lambda: search(model, graph, scores, others, budget, **given)),
        ("another loss", lambda: search(model, graph, scores, data, budget, F.multi_margin_loss, **given)),
        ("another order of the channels", lambda: search(model, graph, turned, data, budget, **given)),
    ):
        with pytest.raises(SecateurError, match=f"search.json is of another search, with {what}"):
            call()
        assert (tmp_path / "search.json").read_bytes() == kept


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "{",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({"searches": json.loads(text)["searches"]}),
        lambda text: json.dumps(json.loads(text) | {"searches": {key: {} for key in json.loads(text)["searches"]}}),
    ],
)
def test_a_damaged_checkpoint_is_told(tmp_path, damage):
    model, graph, scores, data = case()
    path = tmp_path / "search.json"
    given = {"evaluations": 60, "checkpoint": path}
    search(model, graph, scores, data, sc.Budget(macs=0.5), **given)
    path.write_text(damage(path.read_text()))
    with pytest.raises(sc.BadFile, match=r"search.json is damaged .*delete it to begin anew"):
        search(model, graph, scores, data, sc.Budget(macs=0.5), **given)


def test_doubts_are_told_where_a_best_width_depends_on_the_others():
    _, graph, scores, _ = case()
    problem = problem_of(graph, scores, sc.Budget(macs=0.5))
    arms = ArmTable(problem, global_items(problem), (0.5, 1.0, 2.0))
    rng = np.random.default_rng(0)
    plays = [[int(rng.integers(size)) for size in arms.sizes] for _ in range(600)]
    plain = [[p, sum(p) / 10 + 0.02 * rng.standard_normal()] for p in plays]
    assert arms.doubts(plain) == {}
    # where the second is wide, the first should be narrow
    turned = [[p, p[1] / 2 + 0.1 * (p[0] if p[1] == 0 else -p[0]) + 0.02 * rng.standard_normal()] for p in plays]
    assert graph.groups[arms.groups[0]].name in arms.doubts(turned)
    # a width that was ruled out before the others grew strong says nothing of strong ones
    rest = [0] * (len(arms.sizes) - 2)
    weak = [[[k % 2, 0, *rest], 0.3 - 0.1 * (k % 2) + 0.02 * rng.standard_normal()] for k in range(100)]
    strong = [[[1, 1, *rest], 0.9 + 0.02 * rng.standard_normal()] for _ in range(100)]
    assert arms.doubts(weak + strong) == {}


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
        ({"checkpoint": "no/such/folder/c.json"}, "a file in a folder that is there"),
        ({"checkpoint": "."}, "a file in a folder that is there"),
        ({"minutes": 0}, "minutes=0"),
        ({"norms": "batches"}, "did you mean 'batch'"),
        ({"dueling": 1}, "dueling=1: true or false"),
    ],
)
def test_bad_settings_are_told(options, message):
    with pytest.raises(SecateurError, match=message):
        sc.Bandit(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "give model=, data= and loss="),
        ({"model": network()[:4]}, "the graph is of another model"),
        ({"model": network().to("meta")}, "on the meta device"),
        ({"data": None}, "needs data="),
        ({"data": 5}, "int was given"),
        ({"data": []}, "no batches were given"),
        ({"data": [torch.zeros(1, 3, 6, 6)]}, "a tensor of targets is expected"),
        ({"loss": None}, "needs data=.* and loss="),
        ({"loss": "entropy"}, "did you mean 'cross_entropy'"),
        ({"model": None, "data": None, "loss": None, "work": 5}, "work=5.: a secateur.Workload is expected"),
        ({"work": sc.Workload(network())}, "it has its own model=, data=, loss="),
    ],
)
@pytest.mark.parametrize("strategy", ["bandit", "sensitivity"])
def test_what_is_not_there_to_try_widths_with_is_told(strategy, options, message):
    model, graph, scores, data = case()
    given = {"model": model, "data": data, "loss": "cross_entropy", "strategy": strategy} | options
    with pytest.raises(SecateurError, match=message):
        sc.allocate(graph, scores, sc.Budget(macs=0.5), **given)


def test_a_budget_that_cannot_be_met_and_a_loss_that_is_not_finite_are_told():
    model, graph, scores, data = case()
    with pytest.raises(sc.InfeasibleBudget, match="cannot be met"):
        search(model, graph, scores, data, sc.Budget(macs=0.001))
    broken = [(torch.full_like(x, torch.nan), y) for x, y in data]
    with pytest.raises(sc.BadBatch, match="the loss of batch 0 is nan"):
        search(model, graph, scores, broken, sc.Budget(macs=0.5))
    whole = [F.cross_entropy(model(x), y) for x, y in data]

    def broken_where_pruned(output, y):
        found = F.cross_entropy(output, y)
        return found if any(torch.isclose(found, known) for known in whole) else found * torch.nan

    with pytest.raises(sc.BadBatch, match=r"the loss of batch . is nan: .* with widths \[.*ratios nearer to 1"):
        search(model, graph, scores, data, sc.Budget(macs=0.5), broken_where_pruned, norms="running")


def test_norms_that_ask_other_processes_are_no_part_of_different_plays(monkeypatch):
    model, _, _, data = case()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    graph = sc.trace(model, data[0][0])
    monkeypatch.setattr(evaluator, "world_size", lambda group: 2)
    with pytest.raises(SecateurError, match="1 takes its statistics from all processes"):
        search(model, graph, sc.score(model, graph, "magnitude"), data, sc.Budget(macs=0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :2], y), "batch 3 .inputs of shape .8, 2, 6, 6.. does not fit"),
        (lambda x, y: (x, y + 90), "does not fit the outputs and targets of batch 3"),
        (lambda x, y: (x.double(), y), "does not fit"),
        (lambda x, y: (x * torch.nan, y), "the loss of batch 3 is nan"),
    ],
)
def test_a_batch_that_does_not_fit_is_told_before_anything_is_tried(change, message, interrupted):
    model, graph, scores, data = case()
    calls = interrupted(Evaluator, "_rise", 10**6)
    with pytest.raises(sc.BadBatch, match=message):
        search(model, graph, scores, [*data[:3], change(*data[3])], sc.Budget(macs=0.5))
    with pytest.raises(sc.BadBatch, match=r"one number as a tensor.*it gave shape \[8\]"):
        search(model, graph, scores, data, sc.Budget(macs=0.5), lambda y, t: F.cross_entropy(y, t, reduction="none"))
    assert not calls


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
    scores = sc.score(model, graph, "magnitude")
    plan, _ = search(model, graph, scores, data, sc.Budget(macs=0.5), evaluations=40, norms=norms)
    assert graph.macs(plan) <= 0.5 * graph.macs()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.seen == 0


def test_a_forward_that_writes_into_its_input_sees_the_same_batch_in_every_play():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x):
            return self.body(x.mul_(0.5))

    model, (_, _, _, data) = Writes().eval(), case()
    graph = sc.trace(model, data[0][0].clone())
    problem = problem_of(graph, sc.score(model, graph, "magnitude"), sc.Budget(macs=0.5))
    evaluate = evaluator_of(model, problem, data)
    taken = problem.count // 2
    first = evaluate.everywhere(taken)
    assert first == evaluate.everywhere(taken) == evaluator_of(model, problem, data).everywhere(taken)


@pytest.mark.parametrize("changed", ["weights", "function", "targets"])
def test_a_search_with_another_loss_is_another_search(tmp_path, changed):
    model, graph, scores, data = case()
    given = {"evaluations": 60, "checkpoint": tmp_path / "search.json"}
    if changed == "targets":  # of a kind that is no tensor
        data = [(x, y.tolist()) for x, y in data]

    def loss(factor):
        if changed == "weights":
            return nn.CrossEntropyLoss(weight=torch.tensor([1.0, factor, 1.0, 1.0, 1.0]))
        if changed == "function":
            return lambda found, y: F.cross_entropy(found, y, label_smoothing=factor / 100)
        return lambda found, y: F.cross_entropy(found, torch.tensor(y))

    for _ in range(2):
        search(model, graph, scores, data, sc.Budget(macs=0.5), loss(1.0), **given)
    if changed == "targets":
        data = [(x, y[::-1]) for x, y in data]
    for macs in (0.5, 0.4):  # also under another budget
        with pytest.raises(SecateurError, match="of another search, with another "):
            search(model, graph, scores, data, sc.Budget(macs=macs), loss(9.0), **given)


def test_a_checkpoint_holds_the_searches_of_several_budgets(tmp_path, interrupted):
    model, graph, scores, data = case()
    given, path = {"evaluations": 60}, tmp_path / "search.json"
    budgets = (sc.Budget(macs=0.5), sc.Budget(macs=0.3))
    whole = [search(model, graph, scores, data, budget, **given)[0] for budget in budgets]
    calls = interrupted(Evaluator, "_rise", 10**6)
    for _ in range(2):
        bandit, work = sc.Bandit(checkpoint=path, **given), sc.Workload(model, data, "cross_entropy")
        assert [sc.allocate(graph, scores, budget, strategy=bandit, work=work) for budget in budgets] == whole
        again = [search(model, graph, scores, data, budget, checkpoint=path, **given)[0] for budget in budgets]
        assert again == whole
    assert len(json.loads(path.read_text())["searches"]) == 2
    assert len(calls) < 2 * 60 + 6 * (60 // 4 + 1)  # after the first time there is the comparison alone


def test_what_was_measured_of_the_whole_network_serves_the_next_budget(monkeypatch):
    model, graph, scores, data = case()
    work, seen, loss = sc.Workload(model, data, "cross_entropy"), [], Evaluator._loss
    monkeypatch.setattr(
        Evaluator, "_loss", lambda self, weights, batch: seen.append(not weights) or loss(self, weights, batch)
    )
    for macs in (0.5, 0.3):
        sc.allocate(graph, scores, sc.Budget(macs=macs), strategy=sc.Bandit(evaluations=60), work=work)
    assert sum(seen) == len(data)
    assert work.forwards == len(data) + len(seen) - sum(seen)


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
    with torch.no_grad():
        model.heads[2].weight.mul_(30)
        model.heads[3].weight.mul_(30)
        data = [(x, model(x).argmax(1)) for x in torch.randn(3, 16, 8)]  # what goes of the wide ones is missed
    graph = sc.trace(model, inputs)
    scores, budget = sc.score(model, graph, "magnitude"), sc.Budget(params=0.7, round_to=1)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_SAVES", 0.0)
    calls = interrupted(Evaluator, "_rise", 10**6)
    given = {"evaluations": 60}
    whole = search(model, graph, scores, data, budget, **given)
    assert "cannot be cut" in str(whole[0].skipped) and len(calls) > 60  # there was a second search
    given["checkpoint"] = tmp_path / "search.json"
    interrupted(Evaluator, "_rise", len(calls) - left)
    with pytest.raises(KeyboardInterrupt):
        search(model, graph, scores, data, budget, **given)
    assert search(model, graph, scores, data, budget, **given) == whole


def test_what_no_group_has_a_choice_for_was_looked_for_all_the_same():
    model, graph, scores, data = case()
    work = sc.Workload(model, data, "cross_entropy")
    bandit = sc.Bandit(evaluations=100, ratios=(1.0, 1.001))
    sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=bandit, work=work)
    found = work.facts["search"]
    assert found["table"] == [] and 0 < found["forwards"] <= 100
    assert "no group has a choice of widths" in work.remarks[0]


def test_minutes_that_are_up_in_the_start_leave_what_was_tried_on_whole_batches(monkeypatch):
    model, graph, scores, data = case()
    problem = problem_of(graph, scores, sc.Budget(macs=0.5))
    evaluate, groups = evaluator_of(model, problem, data), len(graph.groups)
    asked, order, starts = [], np.random.default_rng(0).permutation(len(data))[::-1], []
    answer = Loop._answer
    monkeypatch.setattr(
        Loop, "_answer", lambda self, *given: starts.append(given[0].start.tolist()) or answer(self, *given)
    )

    def late(share):
        asked.append(share)
        return len(asked) > 2 * groups + 1 and share < 0.5

    monkeypatch.setattr(sc.Bandit, "_timer", lambda self, work: late)
    _, found = search(model, graph, scores, data, sc.Budget(macs=0.5), evaluations=400, minutes=1)
    assert found["started"] == "sensitivity"
    tried = tried_alone(problem, 400 // 3)
    rises = [evaluate.on([alone(problem, *one) for one in own], order[:2].tolist()).mean(1) for own in tried]
    assert starts == [least_rise(measured(problem, tried, rises)).tolist()]


def test_without_a_play_the_start_is_the_answer():
    model, graph, scores, data = case()
    work = sc.Workload(model, data, "cross_entropy")
    hurried = sc.Bandit(evaluations=100, minutes=1e-9, start="uniform")
    plan = sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=hurried, work=work)
    assert plan.removed == sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy="uniform").removed
    found = work.facts["search"]
    assert sum(row["plays"] for row in found["table"]) == 0
    assert found["late"] and "the minutes were up" in " ".join(work.remarks)
    _, found = search(model, graph, scores, data, sc.Budget(macs=0.5), evaluations=100, start="uniform")
    assert not found["late"]


@pytest.mark.parametrize(("evaluations", "minutes", "started"), [(60, None, "sensitivity"), (60, 1e-9, "uniform")])
def test_where_there_is_no_time_for_sensitivities_the_start_is_uniform(evaluations, minutes, started, recwarn):
    model, graph, scores, data = case()
    given = {"evaluations": evaluations, "minutes": minutes}
    _, found = search(model, graph, scores, data, sc.Budget(macs=0.5), **given)
    assert (found["started"], found["start"]) == (started, "sensitivity")
    assert [str(w.message).startswith("bandit: too few evaluations") for w in recwarn] == [True] * (
        started == "uniform"
    )


def test_where_sensitivities_are_too_many_the_start_is_uniform_and_says_so():
    many = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 5)).eval()
    data = [(torch.randn(8, 6), torch.randint(0, 5, (8,)))]
    graph = sc.trace(many, data[0][0])
    scores = sc.score(many, graph, "magnitude")
    with pytest.warns(sc.SecateurWarning, match="so the search began at uniform widths"):  # a third are 20 forwards
        _, found = search(many, graph, scores, data, sc.Budget(macs=0.5), evaluations=60)
    assert found["started"] == "uniform" and found["forwards"] <= 60
    with pytest.raises(SecateurError, match="evaluations=23 are too few to try two widths of every group; give 24"):
        sc.allocate(
            graph, scores, sc.Budget(macs=0.5), strategy=sc.Sensitivity(evaluations=23), model=many, data=data,
            loss="cross_entropy",
        )  # fmt: skip


def test_a_search_that_is_interrupted_while_it_looks_for_a_start_ends_the_same(tmp_path, monkeypatch, interrupted):
    model, graph, scores, data = case()
    budget, given = sc.Budget(macs=0.5), {"evaluations": 150}
    whole = search(model, graph, scores, data, budget, **given)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_SAVES", 0.0)
    given["checkpoint"] = tmp_path / "search.json"
    calls = interrupted(Evaluator, "_rise", 40)
    with pytest.raises(KeyboardInterrupt):
        search(model, graph, scores, data, budget, **given)
    (state,) = json.loads(given["checkpoint"].read_text())["searches"].values()
    assert len(state["rises"]) > 0 and state["plays"] is None
    assert search(model, graph, scores, data, budget, **given) == whole
    assert len(calls) == 40 + whole[1]["forwards"] - state["done"]


def test_nominated_is_what_looks_best_within_the_budget():
    _, graph, scores, _ = case()
    problem = problem_of(graph, scores, sc.Budget(macs=0.5))
    arms = ArmTable(problem, uniform_items(problem), (0.4, 0.7, 1.0, 1.3, 1.7))
    rng = np.random.default_rng(0)
    for _ in range(20):
        worth = np.cumsum(rng.random((len(arms.sizes), max(arms.sizes))), 1)  # wider is better, unevenly
        every = np.stack(np.meshgrid(*map(np.arange, arms.sizes), indexing="ij"), -1).reshape(-1, len(arms.sizes))
        looks = worth[np.arange(len(arms.sizes)), every].sum(1)
        met = [problem.meter.met(problem.widths(arms.taken(chosen))) for chosen in every]
        best = np.sort(looks[met])[::-1]
        found = arms.nominated(worth, arms.price(worth), 5)
        own = [worth[np.arange(len(chosen)), chosen].sum() for chosen in found]
        assert all(problem.meter.met(problem.widths(arms.taken(chosen))) for chosen in found)
        assert own == sorted(own, reverse=True)
        assert len({tuple(chosen) for chosen in found}) == 5
        assert own[0] == pytest.approx(best[0])
        assert own[0] >= worth[np.arange(len(worth)), arms.best(worth, arms.price(worth))].sum()


def test_no_more_forwards_are_made_than_allowed_and_the_last_are_a_comparison(monkeypatch):
    model, graph, scores, data = case()
    data = data * 5
    calls, rise = [], Evaluator._rise

    def counted(self, taken, number, batch):
        calls.append((taken.tobytes(), number))
        return rise(self, taken, number, batch)

    monkeypatch.setattr(Evaluator, "_rise", counted)
    _, found = search(model, graph, scores, data, sc.Budget(macs=0.5), evaluations=200)
    assert len(calls) == found["forwards"] <= 200
    assert found["forwards"] > 200 - 28  # a block of plays, if there is no room for it
    first = (200 // 3 // (2 * 8 + 8)) * (2 * 8 + 8)  # sensitivities: of three groups eight widths each
    plays = first + 16 + sum(row["plays"] for row in found["table"] if row["group"] == found["table"][0]["group"])
    assert 150 - 28 < plays <= 150
    tried = {taken: [batch for t, batch in calls[plays:] if t == taken] for taken, _ in calls[plays:]}
    most = [sorted(batches) for batches in tried.values() if len(batches) == max(map(len, tried.values()))]
    assert 2 <= len(most) < len(tried)  # the start and the last ones
    assert all(batches == most[0] for batches in most)  # on the same batches, each once
    assert len(set(most[0])) == len(most[0])


def test_a_search_starts_at_what_sensitivity_finds_and_plays_near_what_looks_best(monkeypatch):
    moved, priced, seen, answer = [], [], [], Loop._answer

    def caught(self, arms, plays, *given):
        seen.append((self.history, arms, plays.bandit.known.copy(), plays.bandit.favourite.copy()))
        return answer(self, arms, plays, *given)

    monkeypatch.setattr(Loop, "_answer", caught)
    for seed in range(3):
        model, graph, scores, data = case(seed)
        with torch.no_grad():
            model[-1].weight.mul_(30)
            data = [(x, model(x).argmax(1)) for x, _ in data]  # so that what goes is missed, and the budget has a price
        problem = problem_of(graph, scores, sc.Budget(macs=0.5))
        _, found = search(model, graph, scores, data, sc.Budget(macs=0.5), evaluations=500, seed=seed)
        history, arms, known, favourite = seen.pop()
        evaluate = evaluator_of(model, problem, data)
        tried = tried_alone(problem, 500 // 3)
        rises = [[evaluate.everywhere(alone(problem, *one)) for one in own] for own in tried]
        assert len(history.rises) == 4 * len(tried)  # four batches: each was looked at once
        for group, here in enumerate(rises):
            own = np.mean([history.rises[group, batch] for batch in range(4)], 0)
            assert own == pytest.approx(here, abs=1e-5)
        assert arms.start.tolist() == least_rise(measured(problem, tried, rises)).tolist()
        assert found["losses"][0] == pytest.approx(evaluate.everywhere(fill(problem, arms.start)), abs=1e-5)
        price = -known[arms.cost != 0] / arms.cost[arms.cost != 0]  # one for all
        assert price == pytest.approx(price[0])
        assert problem.meter.met(problem.widths(arms.taken(favourite)))
        moved.append(favourite.tolist() != arms.start_arms.tolist())
        priced.append(price[0] > 0)
    assert any(moved) and any(priced)


def test_blocks_that_do_not_fit_are_not_played():
    model, graph, scores, data = case()
    ratios = [1 + number / 20 for number in range(-18, 20)]
    plan, found = search(
        model, graph, scores, data, sc.Budget(macs=0.5), evaluations=32, ratios=ratios, dueling=True, start="uniform"
    )
    assert found["forwards"] <= 32
    assert plan.removed == sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy="uniform").removed


def test_prune_searches_by_name_and_says_what_it_found(tmp_path):
    model, graph, _, data = case()
    given = {"data": data, "loss": "cross_entropy", "repair": "none"}
    bandit = {"name": "bandit", "evaluations": 60, "checkpoint": tmp_path / "search.json"}
    result = sc.prune(model, data[0][0], sc.Budget(macs=0.5), strategy=bandit, **given)
    assert result.after.macs <= 0.5 * result.before.macs
    assert set(result.facts["search"]) == {
        "start", "started", "forwards", "late", "table", "price", "explained", "doubts", "losses", "better",
    }  # fmt: skip
    assert json.loads(json.dumps(result.facts)) == result.facts
    assert result.facts["forwards"] == 4 + 4 + result.facts["search"]["forwards"]  # of the scores, and of the whole
    again = sc.prune(model, data[0][0], sc.Budget(macs=0.5), strategy=bandit, **(given | {"data": iter(data)}))
    assert again.plan == result.plan
    for options, message in (
        ({"strategy": "bandit", "loss": None, "criterion": "magnitude"}, "bandit needs data= .* and loss="),
        ({"strategy": {"name": "bandit", "evaluations": 1}}, "from 32 on"),
        ({"strategy": {"name": "bandit", "evaluation": 100}}, "did you mean 'evaluations'"),
        ({"strategy": "bandi"}, "did you mean 'bandit'"),
    ):
        with pytest.raises(SecateurError, match=message):
            sc.prune(model, data[0][0], sc.Budget(macs=0.5), **(given | options))
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
    worth = whole.fit()
    assert (worth == pieces.fit()).all()
    for own, part in zip(worth, parts, strict=True):
        assert own[: len(part)] - own[0] == pytest.approx(part - part[0], abs=0.02)  # RIDGE plays of 4,000
    assert whole.explained > 0.999
    noisy = Effects(sizes)
    noisy.add(plays, rewards + (rewards if dueling else true).std() * rng.standard_normal(4000), batches)
    noisy.fit()
    assert 0.4 < noisy.explained < 0.6
    nothing = []  # of pure noise a fit to few plays would explain a lot
    for start in range(0, 4000, 80):
        few, some = Effects(sizes), slice(start, start + 80)
        few.add(plays[some], rng.standard_normal(80), batches[some])
        few.fit()
        nothing.append(few.explained)
    assert np.mean(nothing) < 0.1


@pytest.mark.parametrize("count", [1, 3, 40, 1000])
def test_effects_are_the_least_squares_with_an_unknown_for_every_arm_and_batch(count):
    rng, sizes = np.random.default_rng(1), [4, 3, 5]
    plays, rewards, batches = rng.integers(0, sizes, (200, 3)), rng.standard_normal(200), rng.integers(0, count, 200)
    effects = Effects(sizes)
    effects.add(plays, rewards, batches)
    columns = [np.eye(size)[plays[:, factor]] for factor, size in enumerate(sizes)] + [np.ones((200, 1))]
    design = np.concatenate([*columns, np.eye(count)[batches]], 1)
    penalty = np.diag(np.concatenate([np.full(12, 1.0), [1e-9], np.full(count, 3.0)]))
    found = np.linalg.solve(design.T @ design + penalty, design.T @ rewards)
    worth = effects.fit()
    assert np.concatenate([worth[0, :4], worth[1, :3], worth[2]]) == pytest.approx(found[:12], abs=1e-9)


def test_effects_of_what_was_hardly_played_are_small_and_of_what_was_not_are_none():
    effects = Effects([3, 2])
    assert not effects.fit().any()
    effects.add(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), np.array([1.0, 0.0, 0.0, -1.0]), [0, 0, 0, 0])
    worth = effects.fit()
    assert worth[0, 2] == worth[1, 2] == 0
    assert 0 < worth[0, 0] < 0.5 and worth[0, 1] == pytest.approx(-worth[0, 0])


def test_what_is_tried_is_the_masked_network_where_weights_are_normalised():
    """A transposed convolution loses outputs that its weight norm is taken over: other outputs stay what they were."""
    torch.manual_seed(0)
    layers = nn.Conv1d(4, 6, 3), nn.ReLU(), weight_norm(nn.ConvTranspose1d(6, 8, 3)), nn.Tanh(), nn.Conv1d(8, 3, 1)
    model, x = nn.Sequential(*layers).double().eval(), torch.randn(2, 4, 9, dtype=torch.float64)
    graph = sc.trace(model, x)
    problem = problem_of(graph, sc.score(model, graph), sc.Budget(channels=0.5))
    evaluator = evaluator_of(model, problem, [(x, torch.zeros(2, 9, dtype=torch.long))])
    taken = problem.least
    gone = problem.start - problem.widths(taken)
    plan = sc.make_plan(graph, {graph.groups[i].name: order[: gone[i]] for i, order in problem.orders.items()})
    assert len(plan.weight_norms) == 1 and {"0", "2"} == plan.removed.keys()
    with torch.no_grad():
        tried = functional_call(model, evaluator.masked_weights(taken), (x,))
        assert torch.allclose(tried, sc.masked(model, plan)(x), atol=1e-12, rtol=0)
