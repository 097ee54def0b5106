import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import auto
from secateur._internal.errors import SecateurError, SecateurWarning
from secateur._internal.workload import Workload
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build
from secateur.repair.directed import directed_weights
from secateur.tracing.slices import sliced

IMAGE = torch.zeros(1, 1, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return build("digits_cnn", width=0.25)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(load("digits").loader("validation", 64))


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "bn_scale", "random"])
def test_one_call_is_the_four_steps(model: nn.Module, criterion: str) -> None:
    given = {"data": batches(), "loss": nn.functional.cross_entropy}
    budget = sc.Budget(macs=0.5)
    result = sc.prune(model, IMAGE, budget, criterion=criterion, strategy="uniform", repair="none", **given)
    graph = sc.trace(model, IMAGE)
    scores = sc.score(model, graph, criterion, **given)
    plan = sc.allocate(graph, scores, budget, strategy="uniform")
    assert result.plan == plan
    assert result.before.macs == graph.macs() and result.after.macs == graph.macs(plan) <= 0.5 * graph.macs()
    assert result.after.params == sum(p.numel() for p in result.model.parameters())
    assert result.after.channels == int(graph.widths.sum()) - len(plan)
    assert all(torch.equal(result.scores[name], values) for name, values in scores.items())
    for ours, theirs in zip(result.model.parameters(), sc.cut(model, plan).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_data_it_works(model: nn.Module) -> None:
    result = sc.prune(model, IMAGE, sc.Budget(macs=0.5))
    assert result.after.macs <= 0.5 * result.before.macs
    chosen = result.facts["chosen"]
    assert chosen["criterion"]["name"] == "magnitude" and chosen["repair"] == [{"name": "none"}]
    assert result.facts["forwards"] == 0


def test_auto_is_what_the_facts_say(model: nn.Module) -> None:
    given = {"data": batches()[:2], "loss": "cross_entropy"}
    result = sc.prune(model, IMAGE, sc.Budget(macs=0.5), **given)
    chosen = result.facts["chosen"]
    assert [chosen["criterion"]["name"], chosen["strategy"]["name"]] == ["schur", "global"]
    assert [repair["name"] for repair in chosen["repair"]] == ["refit"]
    again = sc.prune(
        model, IMAGE, sc.Budget(macs=0.5), **given, criterion={"name": "schur", "fisher": "outputs"},
        strategy="global", repair="refit",
    )  # fmt: skip
    assert again.plan == result.plan
    for one, two in zip(again.model.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(one, two)
    nothing = sc.prune(model, IMAGE, sc.Budget(macs=0.5)).facts["chosen"]
    assert [nothing["criterion"]["name"], nothing["repair"][0]["name"]] == ["magnitude", "none"]


def test_the_default_needs_neither_labels_nor_a_loss(model: nn.Module) -> None:
    bare = [x for x, _ in batches()]
    alone = sc.prune(model, IMAGE, sc.Budget(macs=0.5), data=bare)
    both = sc.prune(model, IMAGE, sc.Budget(macs=0.5), data=batches(), loss="cross_entropy")
    assert alone.plan == both.plan and alone.facts["chosen"] == both.facts["chosen"]
    with pytest.raises(sc.SecateurError, match="a tensor of targets is expected"):
        sc.prune(model, IMAGE, sc.Budget(macs=0.5), data=bare, criterion="taylor", loss="cross_entropy")
    with pytest.raises(sc.SecateurError, match="loss"):
        sc.prune(model, IMAGE, sc.Budget(macs=0.5), data=bare, loss="cross_entrpy")


class Several(nn.Module):
    """A forward that returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Two outputs."""
        found = self.leave(self.enter(x).relu())
        return {"scores": found, "doubled": 2 * found}


class Ids(Several):
    """A forward that returns whole numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """The best class of each."""
        return super().forward(x)["scores"].argmax(-1)


def test_of_several_tensors_the_loss_says_which_count_and_without_one_all_do() -> None:
    torch.manual_seed(0)
    model, data = Several().eval(), [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(3)]

    def loss(outputs: dict[str, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs["scores"], y)

    chosen = sc.prune(model, data[0][0], sc.Budget(macs=0.5), data=data, loss=loss).facts["chosen"]
    assert [chosen["criterion"]["name"], chosen["criterion"]["fisher"]] == ["schur", "empirical"]
    given: dict[str, Any] = {"data": data, "criterion": {"name": "schur", "fisher": "outputs", "samples": 400}}
    for chosen in (
        sc.prune(model, data[0][0], sc.Budget(macs=0.5), data=data).facts["chosen"],
        sc.prune(model, data[0][0], sc.Budget(macs=0.5), data=data, loss=loss, outputs=lambda y: y["scores"]).facts[
            "chosen"
        ],
    ):
        assert [chosen["criterion"]["name"], chosen["criterion"]["fisher"]] == ["schur", "outputs"]
    both = sc.prune(model, data[0][0], sc.Budget(macs=0.5), **given).scores
    one = sc.prune(model, data[0][0], sc.Budget(macs=0.5), **given, outputs=lambda y: y["scores"]).scores
    assert both is not None
    assert one is not None
    size = torch.stack([model(x)["scores"].square().mean() for x, _ in data]).mean()
    ratio = (both["enter"] * size / one["enter"]).median()  # each in units of its own size, they move alike
    torch.testing.assert_close(ratio, 2 * torch.ones_like(ratio), rtol=0.25, atol=0)
    with pytest.raises(sc.SecateurError, match="the forward returns no tensor of real numbers, and there is no loss"):
        auto.fisher(Workload(Ids().eval(), data))
    with pytest.raises(sc.SecateurError, match="fisher='outputs': the forward returns no tensor of real numbers"):
        sc.kronecker_factors(Ids().eval(), data, fisher="outputs")


class Embedded(nn.Module):
    """A group that no linear reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(10, 30), nn.Linear(6, 4)
        self.wide, self.scores = nn.Linear(30, 2), nn.Parameter(torch.randn(12, 3))
        self.first = nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A matrix product with a bare parameter reads what the second linear writes."""
        return self.first(self.inner(x)).relu() @ self.scores


def test_where_the_criterion_cannot_judge_enough_another_is_taken_and_told() -> None:
    torch.manual_seed(0)
    model = Embedded().eval()
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(3)]
    given = {"data": data, "loss": "cross_entropy"}
    with pytest.warns(
        sc.SecateurWarning, match="criterion='auto': 'taylor' is taken and not 'schur': it has no scores for "
    ):
        result = sc.prune(model, data[0][0], sc.Budget(channels=0.3), **given)
    assert result.facts["chosen"]["criterion"]["name"] == "taylor"
    assert result.facts["chosen"]["strategy"]["name"] == "uniform"
    mild = sc.prune(model, data[0][0], sc.Budget(channels=0.9), **given)
    assert mild.facts["chosen"]["criterion"]["name"] == "schur"


class Bare(nn.Module):
    """All that reads channels are parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 12), nn.Parameter(torch.randn(12, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The only linear reads what is given."""
        return self.enter(x).relu() @ self.leave


def test_where_the_criterion_can_judge_nothing_another_is_taken_and_told() -> None:
    torch.manual_seed(0)
    model, data = Bare().eval(), [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(3)]
    with pytest.warns(sc.SecateurWarning, match="'taylor' is taken and not 'schur': no channel is read by a linear"):
        result = sc.prune(model, data[0][0], sc.Budget(channels=0.5), data=data, loss="cross_entropy")
    assert result.facts["chosen"]["criterion"]["name"] == "taylor" and result.after.channels == 6


def test_the_table_says_what_the_graph_counts(model: nn.Module) -> None:
    result = sc.prune(model, IMAGE, sc.Budget(channels=0.5))
    rows = {line.split()[0]: line.split()[1:] for line in result.table().splitlines()[1:]}
    assert rows["macs"][:2] == [f"{result.before.macs:,}", f"{result.after.macs:,}"]
    assert rows["channels"] == ["40", "20", "50.0%"]
    kept = result.graph.kept(result.plan)
    assert [int(rows[g.name][1]) for g in result.graph.groups] == kept.tolist()
    share = f"{result.after.macs / result.before.macs:.1%}"
    assert share in repr(result) and repr(result).count("\n") == 0
    assert f"<td>{result.after.macs:,}</td>" in result._repr_html_()


def test_recalibration_is_that_of_the_verb(model: nn.Module) -> None:
    given = {"criterion": "magnitude", "data": batches()}
    budget = sc.Budget(macs=0.5)
    plain = sc.prune(model, IMAGE, budget, repair="none", **given)
    fresh = sc.prune(model, IMAGE, budget, repair="recalibrate", **given)
    assert not torch.equal(plain.model.bn1.running_mean, fresh.model.bn1.running_mean)
    sc.recalibrate(plain.model, batches())
    assert torch.equal(plain.model.bn1.running_mean, fresh.model.bn1.running_mean)


def never(*_: object, **__: object) -> None:
    raise AssertionError("work was begun")


@dataclass(frozen=True)
class Never:
    """A criterion that must not be asked."""

    def scores(self, graph: object, work: object) -> None:
        never()


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (sc.Budget(macs=0.5), {"criterion": "tailor"}, "did you mean 'taylor'"),
        (None, {"criterion": "taylor"}, "a Budget is expected"),
        (0.5, {"criterion": "taylor"}, "a Budget is expected"),
        (sc.Budget(macs=0.5), {"criterion": Never(), "strategy": "globl"}, "did you mean 'global'"),
        (sc.Budget(macs=0.5), {"criterion": Never(), "repair": "refti"}, "did you mean 'refit'"),
        (sc.Budget(macs=1e-6), {"criterion": Never()}, "budget cannot be met: macs=.*feasible are"),
        (sc.Budget(macs=0.5), {"criterion": Never(), "repair": "recalibrate"}, "recalibrate needs data="),
        (sc.Budget(macs=0.5), {"criterion": "taylor"}, "taylor needs data=.*and loss="),
        (
            sc.Budget(macs=0.5),
            {"criterion": {"name": "random", "sed": 1}},
            "criterion 'random' 'sed'.*'seed'",
        ),
        (sc.Budget(macs=0.5), {"criterion": never}, "settings with a method scores"),
        (sc.Budget(macs=0.5), {"criterion": Never(), "exclude": "conv7"}, "conv7"),
        (sc.Budget(macs=0.5), {"criterion": Never(), "batches": 0}, "batches=0: a whole number from 1 on"),
    ],
)
def test_bad_input_is_told_before_any_work(model: nn.Module, budget: object, options: dict, message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        sc.prune(model, IMAGE, budget, **options)


def test_errors_that_callers_tell_apart(model: nn.Module) -> None:
    with pytest.raises(sc.InfeasibleBudget):
        sc.prune(model, IMAGE, sc.Budget(macs=1e-6))
    with pytest.raises(sc.NothingToPrune):
        sc.prune(nn.Linear(3, 2), torch.zeros(1, 3), sc.Budget(macs=0.5))
    with pytest.raises(sc.BadBatch):
        sc.prune(model, IMAGE, sc.Budget(macs=0.5), data=[], loss="cross_entropy")


@pytest.mark.parametrize("macs", [0, -1, 1.5, math.nan, "half", True])
def test_bad_budgets(macs: object) -> None:
    with pytest.raises(sc.SecateurError, match="a fraction of the original"):
        sc.Budget(macs=macs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "empty"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))], r"inputs of shape \[2, 3, 8, 8\]"),
        ([(torch.full((2, 1, 8, 8), math.nan), torch.zeros(2, dtype=torch.int64))], "the outputs of batch 0 are nan"),
        (3, "something that gives batches is expected"),
        (["a"], "batches are tensors, pairs"),
    ],
    ids=["empty", "shape", "NaN", "no data", "no batches"],
)
def test_bad_data(model: nn.Module, given: object, message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        sc.prune(model, IMAGE, sc.Budget(macs=0.5), data=given, loss=nn.functional.cross_entropy)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"fails on the example inputs \(\[1, 3, 8, 8\] float32\)"),
        (torch.zeros(1, 1, 8, 8, device="meta"), "the model is on cpu, the example inputs are on meta"),
        ([1, 2], "a tensor, a tuple or a dict"),
    ],
    ids=["shape", "device", "list"],
)
def test_bad_example_inputs(model: nn.Module, inputs: object, message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        sc.prune(model, inputs, sc.Budget(macs=0.5))


@dataclass(frozen=True)
class Ordered:
    """A criterion of a user's own: the last channels matter most."""

    def scores(self, graph: sc.ChannelGraph, work: sc.Workload) -> dict[str, torch.Tensor]:
        return {g.name: torch.arange(len(g), dtype=torch.float64) for g in graph.groups}


def test_a_model_on_another_device(model: nn.Module) -> None:
    model.to("meta")
    with pytest.raises(sc.SecateurError, match="the model is on meta, the example inputs are on cpu"):
        sc.prune(model, IMAGE, sc.Budget(macs=0.5))
    with pytest.raises(sc.SecateurError, match="without weights that could be judged"):
        sc.prune(model, IMAGE.to("meta"), sc.Budget(macs=0.5))
    small = sc.prune(model, IMAGE.to("meta"), sc.Budget(macs=0.5), criterion="random").model
    assert all(p.is_meta for p in small.parameters())


def test_what_stays_makes_up_for_what_goes(model: nn.Module) -> None:
    given = {"data": batches(), "loss": "cross_entropy", "criterion": sc.KronOBS(fisher="exact")}
    budget = sc.Budget(channels=0.7)
    plain = sc.prune(model, IMAGE, budget, repair="none", **given)
    better = sc.prune(model, IMAGE, budget, repair=sc.Compensate(fisher="exact"), **given)
    assert plain.plan.removed == better.plan.removed
    assert plain.facts["forwards"] == better.facts["forwards"] == len(batches())  # the factors serve both
    pairs = zip(plain.model.parameters(), better.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_the_smaller_model_is_fitted_if_asked_for(model: nn.Module) -> None:
    budget, given = sc.Budget(channels=0.7), {"criterion": "magnitude", "strategy": "global"}
    plain, better = (sc.prune(model, IMAGE, budget, repair=r, data=batches(), **given) for r in ("none", "refit"))
    sc.refit(model, plain.model, plain.plan, batches())
    for one, two in zip(plain.model.state_dict().values(), better.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert better.facts["left whole"] == {}
    with pytest.raises(sc.SecateurError, match="refit needs data"):
        sc.prune(model, IMAGE, budget, repair="refit", **given)
    once = sc.prune(
        model, IMAGE, budget, repair="refit", data=iter(batches()), **given
    )  # an iterator's batches are kept
    for one, two in zip(once.model.state_dict().values(), better.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_repairs_one_after_the_other(model: nn.Module) -> None:
    budget, given = sc.Budget(channels=0.7), {"criterion": "magnitude", "data": batches(), "loss": "cross_entropy"}
    both = sc.prune(model, IMAGE, budget, repair=["compensate", "recalibrate"], **given)
    small = sc.cut(model, both.plan)
    sc.apply_repair(model, small, both.plan, ["compensate", "recalibrate"], data=batches(), loss="cross_entropy")
    for one, two in zip(small.state_dict().values(), both.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("mode", ["valley", "radial"])
def test_directed_also_moves_what_stays(model: nn.Module, mode: str) -> None:
    budget, data = sc.Budget(macs=0.7), batches()[:2]
    options = {"batches": 2, "share": 0.95, "soft": True}
    given = {"data": data, "loss": "cross_entropy", "criterion": sc.Directional(**options), "strategy": "global"}
    result = sc.prune(model, IMAGE, budget, repair=sc.Directed(mode=mode, **options), **given)
    graph = sc.trace(model, IMAGE)
    flat = sc.null_space_projector(model, data, "cross_entropy", **options)
    scores = sc.score(model, graph, sc.Directional(**options), data=data, loss="cross_entropy")
    plan = sc.allocate(graph, scores, budget, strategy="global")
    assert result.facts["flat"] == flat.facts
    assert result.plan == plan
    moved = directed_weights(model, plan, flat, mode=mode)
    small, plain = dict(result.model.named_parameters()), dict(sc.cut(model, plan).named_parameters())
    for name, ours in small.items():
        wanted = sliced(moved[name], plan.slices.get(name, {})) if name in moved else plain[name]
        torch.testing.assert_close(ours, wanted)
    with pytest.raises(sc.SecateurError, match="did you mean 'valley'"):
        sc.Directed(mode="vale")
    with pytest.raises(sc.SecateurError, match="needs data="):
        sc.prune(model, IMAGE, budget, criterion="directional")


def test_layers_that_are_excluded_or_frozen_keep_their_channels(model: nn.Module) -> None:
    budget = sc.Budget(macs=0.6)
    result = sc.prune(model, IMAGE, budget, exclude=["conv1"])
    assert "conv1" not in result.plan.removed and "excluded" in result.plan.skipped["conv1"]
    model.conv2.requires_grad_(False)
    result = sc.prune(model, IMAGE, budget)
    assert "conv2" not in result.plan.removed and "require" in result.plan.skipped["conv2"]
    with pytest.raises(sc.InfeasibleBudget):
        sc.prune(model, IMAGE, sc.Budget(macs=0.1), exclude=[nn.Conv2d])


def test_approximate_cuts_are_told_with_their_difference() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    groups = {g.name: g.exact for g in sc.trace(encoder, x).groups}
    if all(groups.values()):
        pytest.skip("every group of this network is exact")
    with pytest.warns(sc.SecateurWarning, match="differs from the masked one by"):
        result = sc.prune(encoder, x, sc.Budget(macs=0.6), approximate=True)
    assert result.facts["approximate"]["difference"] > 1e-4
    assert not any(groups[name] for name in result.facts["approximate"]["groups"])


def test_what_takes_long_is_told_before_it_begins(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    data = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(4)]
    given = {"data": data, "loss": "cross_entropy"}
    assert not sc.prune(model, data[0][0], sc.Budget(macs=0.5), **given).facts["notices"]
    seen = []

    def scored(*_):
        raise SecateurError("it has begun")

    monkeypatch.setattr("secateur.auto.LONG", 0.0)
    monkeypatch.setattr("secateur.auto.first_that_reaches", scored)
    model.register_forward_hook(lambda *_: seen.append(model.training))
    told = pytest.warns(SecateurWarning, match="minutes, by a forward of the first of 4 batches: fewer batches=")
    with told, pytest.raises(SecateurError, match="it has begun"):
        sc.prune(model, data[0][0], sc.Budget(macs=0.5), **given)
    assert model.training and not seen[-1]


class Labelled(nn.Module):
    """A forward that cannot do without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss and the scores."""
        scores = self.leave(self.enter(x).relu())
        return {"loss": nn.functional.cross_entropy(scores, labels), "scores": scores}


def test_the_first_forward_has_labels_where_the_model_computes_its_loss() -> None:
    torch.manual_seed(0)
    model = Labelled().eval()
    data = [{"x": torch.randn(16, 6), "labels": torch.randint(0, 3, (16,))} for _ in range(3)]
    result = sc.prune(
        model, data[0], sc.Budget(macs=0.5), data=data, outputs=lambda found: found["scores"], repair="none"
    )
    assert result.facts["chosen"]["criterion"]["name"] == "schur"
