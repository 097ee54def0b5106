import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build

IMAGE = torch.zeros(1, 1, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return build("digits_cnn", width=0.25)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(load("digits").loader("validation", 64))


@pytest.mark.parametrize("method", ["magnitude", "taylor", "bn_scale", "random"])
def test_one_call_is_the_four_steps(model: nn.Module, method: str) -> None:
    loss = nn.functional.cross_entropy
    budget = sc.Budget(macs=0.5)
    result = sc.prune(model, IMAGE, method=method, budget=budget, data=batches(), loss_fn=loss, strategy="uniform")
    graph = sc.trace(model, IMAGE)
    scores = sc.score(model, graph, method, data=batches(), loss_fn=loss)
    plan = sc.allocate(graph, scores, budget, strategy="uniform")
    assert result.plan == plan
    assert result.before.macs == graph.macs() and result.after.macs == graph.macs(plan) <= 0.5 * graph.macs()
    assert result.after.params == sum(p.numel() for p in result.model.parameters())
    assert result.after.channels == int(graph.widths.sum()) - len(plan)
    assert all(torch.equal(result.scores[name], values) for name, values in scores.items())
    for ours, theirs in zip(result.model.parameters(), sc.cut(model, plan).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_table_says_what_the_graph_counts(model: nn.Module) -> None:
    result = sc.prune(model, IMAGE, method="magnitude", budget=sc.Budget(channels=0.5))
    rows = {line.split()[0]: line.split()[1:] for line in result.table().splitlines()[1:]}
    assert rows["macs"][:2] == [f"{result.before.macs:,}", f"{result.after.macs:,}"]
    assert rows["channels"] == ["40", "20", "50.0%"]
    kept = result.graph.kept(result.plan)
    assert [int(rows[g.name][1]) for g in result.graph.groups] == kept.tolist()


def test_dead_channels_go_and_nothing_changes(model: nn.Module) -> None:
    with torch.no_grad():
        for name in ("conv2", "bn2"):
            for p in model.get_submodule(name).parameters():
                p[3:7] = 0
    result = sc.prune(model, IMAGE, method="dead")
    assert dict(result.plan.removed) == {"conv2": [3, 4, 5, 6]}
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), result.model.eval()(x))


def test_recalibration_is_that_of_the_verb(model: nn.Module) -> None:
    given = {"method": "magnitude", "budget": sc.Budget(macs=0.5)}
    plain, fresh = sc.prune(model, IMAGE, **given), sc.prune(model, IMAGE, **given, data=batches(), recalibrate=True)
    assert not torch.equal(plain.model.bn1.running_mean, fresh.model.bn1.running_mean)
    sc.recalibrate(plain.model, batches())
    assert torch.equal(plain.model.bn1.running_mean, fresh.model.bn1.running_mean)


def never(*_: object, **__: object) -> None:
    raise AssertionError("work was begun")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tailor", "budget": sc.Budget(macs=0.5)}, "did you mean 'taylor'"),
        ({"method": "taylor"}, "a Budget is expected"),
        ({"method": "taylor", "budget": 0.5}, "a Budget is expected"),
        ({"method": "dead", "budget": sc.Budget(macs=0.5)}, "leave the budget out"),
        ({"method": "dead", "batches": 3}, "option of method 'dead'"),
        ({"method": never, "budget": sc.Budget(macs=0.5), "strategy": "globl"}, "did you mean 'global'"),
        ({"method": never, "budget": sc.Budget(macs=1e-6)}, "budget cannot be met: macs=.*feasible are"),
        ({"method": never, "budget": sc.Budget(macs=0.5), "recalibrate": True}, "recalibrate=True"),
        ({"method": "random", "budget": sc.Budget(macs=0.5), "sed": 1}, "does not take this option"),
    ],
)
def test_bad_input_is_told_before_any_work(model: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        sc.prune(model, IMAGE, **options)


@pytest.mark.parametrize("macs", [0, -1, 1.5, math.nan, "half", True])
def test_bad_budgets(macs: object) -> None:
    with pytest.raises(sc.SecateurError, match="a fraction of the original"):
        sc.Budget(macs=macs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "empty"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))], r"inputs of shape \[2, 3, 8, 8\]"),
        ([(torch.full((2, 1, 8, 8), math.nan), torch.zeros(2, dtype=torch.int64))], "the loss of batch 0 is nan"),
        ([torch.zeros(2, 1, 8, 8)], "batches .inputs, targets. are expected"),
    ],
    ids=["empty", "shape", "NaN", "no targets"],
)
def test_bad_data(model: nn.Module, given: list, message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        sc.prune(model, IMAGE, budget=sc.Budget(macs=0.5), data=given, loss_fn=nn.functional.cross_entropy)


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
        sc.prune(model, inputs, method="magnitude", budget=sc.Budget(macs=0.5))


def test_a_model_on_another_device(model: nn.Module) -> None:
    model.to("meta")
    with pytest.raises(sc.SecateurError, match="the model is on meta, the example inputs are on cpu"):
        sc.prune(model, IMAGE, method="dead")
    small = sc.prune(model, IMAGE.to("meta"), method=ordered, budget=sc.Budget(macs=0.5)).model
    assert all(p.is_meta for p in small.parameters())


def ordered(model: nn.Module, graph: sc.ChannelGraph, data: object, loss_fn: object) -> dict[str, torch.Tensor]:
    return {g.name: torch.arange(len(g), dtype=torch.float64) for g in graph.groups}


def test_what_stays_makes_up_for_what_goes(model: nn.Module) -> None:
    given = {"budget": sc.Budget(channels=0.7), "data": batches(), "loss_fn": "cross_entropy"}
    plain = sc.prune(model, IMAGE, method="kron_obs", **given, fisher="exact")
    better = sc.prune(model, IMAGE, method="kron_obs", compensate=True, **given, fisher="exact")
    assert plain.plan.removed == better.plan.removed
    pairs = zip(plain.model.parameters(), better.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    with pytest.raises(sc.SecateurError, match="have factors"):
        sc.prune(model, IMAGE, method="taylor", compensate=True, **given)


def test_the_smaller_model_is_fitted_if_asked_for(model: nn.Module) -> None:
    given = {"method": "magnitude", "budget": sc.Budget(channels=0.7)}
    plain, better = (sc.prune(model, IMAGE, refit=refit, data=batches(), **given) for refit in (False, True))
    sc.refit(model, plain.model, plain.plan, batches())
    for one, two in zip(plain.model.state_dict().values(), better.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert better.facts == {"not refitted": {}}
    with pytest.raises(sc.SecateurError, match=r"prune\(refit=True\) needs data"):
        sc.prune(model, IMAGE, refit=True, **given)
    assert sc.prune(model, IMAGE, refit=True, data=iter(batches()), **given).facts == {"not refitted": {}}
    with pytest.raises(sc.SecateurError, match="an iterator ends after one pass"):
        sc.prune(
            model, IMAGE, refit=True, data=iter(batches()), loss_fn="cross_entropy", **given | {"method": "taylor"}
        )


@pytest.mark.parametrize("mode", ["valley", "radial"])
def test_directional_also_moves_what_stays(model: nn.Module, mode: str) -> None:
    budget, data = sc.Budget(macs=0.7), batches()[:2]
    options = {"batches": 2, "share": 0.95, "soft": True}
    result = sc.prune(
        model, IMAGE, method="directional", budget=budget, data=data, loss_fn="cross_entropy", mode=mode, **options
    )
    graph = sc.trace(model, IMAGE)
    flat = sc.null_space_projector(model, data, "cross_entropy", **options)
    plan = sc.allocate(graph, sc.score(model, graph, "directional", flat=flat), budget)
    assert result.facts["flat"] == flat.facts
    assert result.plan == plan
    assert graph.macs(plan) <= 0.7 * graph.macs()
    for ours, theirs, plain in zip(
        result.model.parameters(),
        sc.cut(sc.directed(model, plan, flat, mode=mode), plan).parameters(),
        sc.cut(model, plan).parameters(),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
        assert ours.shape == plain.shape
    with pytest.raises(sc.SecateurError, match="did you mean 'valley'"):
        sc.prune(model, IMAGE, method="directional", budget=budget, data=data, loss_fn="cross_entropy", mode="vale")
    with pytest.raises(sc.SecateurError, match="needs data="):
        sc.prune(model, IMAGE, method="directional", budget=budget)
    with pytest.raises(sc.SecateurError, match="leave one of them out"):
        sc.prune(model, IMAGE, method="directional", budget=budget, flat=flat, share=0.5)
