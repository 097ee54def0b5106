"""Two processes with different data get the same scores, weights and plan; and those of one that has all data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur.repair.contract import REPAIRS
from secateur.scoring.contract import CRITERIA

FISHERS = ("obd", "obs", "kron_obd", "kron_obs", "schur", "directional", "compensate", "directed")
SHARDS = {0: [(0, 6), (6, 10)], 1: [(10, 13), (13, 16), (16, 20)]}
"""Which examples the batches of each process are of; both have ten."""


class Network(nn.Module):
    """A stream with a block on it, and an expert for larger images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.wide, self.back = nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.Conv2d(8, 6, 1)
        self.expert, self.other, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        large = x.shape[-1] > 5
        x = self.norm(self.first(x)).relu()
        x = (x + self.back(self.wide(x).relu())).mean((2, 3))
        y = self.other(x)
        if large:
            y = y + self.expert(x)
        return self.head(y.relu())


def batches(ranks):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 2, 5, 5, generator=generator, dtype=torch.float64), torch.arange(20) % 3
    x[10:] *= 2
    return [(x[a:b], y[a:b]) for rank in ranks for a, b in SHARDS[rank]]


def settings(name, **options):
    return {"name": name, **({"fisher": "empirical"} if name in FISHERS else {}), **options}


def found(data):
    """All that is found with this data, by name."""
    model = Network().eval()
    graph = sc.trace(model, data[0][0][:2])
    result = {}
    for name in CRITERIA:
        scores = sc.score(model, graph, settings(name), data=data, loss="cross_entropy")
        result |= {f"{name} {group}": values for group, values in scores.items()}
        if name in FISHERS:
            drawn = sc.score(model, graph, name, data=data, loss="cross_entropy")
            result |= {f"drawn {name} {group}": values for group, values in drawn.items()}
    plan = sc.make_plan(graph, {"first": [1], "wide": [0]})
    for name in REPAIRS:
        small = sc.cut(model, plan)
        options = {"refit": {"examples": 20}, "distill": {"steps": 6}}.get(name, {})
        facts = sc.apply_repair(model, small, plan, settings(name, **options), data=data, loss="cross_entropy")
        result |= {f"{name} {key}": value for key, value in small.state_dict().items()}
        result[f"{name} left"] = text(str(sorted(facts.get("left whole", {}).items())))
    small = sc.cut(model, plan)
    sc.apply_repair(model, small, plan, sc.Refit(examples=20, positions=70), data=data)  # some of all positions
    result |= {f"refit, some {key}": value for key, value in small.state_dict().items()}
    for criterion in ("taylor", "kron_obs"):
        pruned = sc.prune(
            model, data[0][0][:2], sc.Budget(params=0.6), criterion=settings(criterion), data=data,
            loss="cross_entropy", repair=settings("refit", examples=20),
        )  # fmt: skip
        result[f"{criterion} plan"] = text(pruned.plan.to_json())
        result |= {f"{criterion} pruned {key}": value for key, value in pruned.model.state_dict().items()}
    return {name: value.detach().clone().contiguous() for name, value in result.items()}


def of_unequal_images(size):
    """Only the examples of one process reach the expert, and no process alone could be asked for all of them."""
    model = Network().eval()
    data = [(torch.nn.functional.interpolate(x, (size, size)), y) for x, y in batches((size - 5,))]
    graph = sc.trace(model, torch.zeros(1, 2, 6, 6, dtype=torch.float64))
    plan = sc.make_plan(graph, {"first": [1]})
    small = sc.cut(model, plan)
    left = sc.refit(model, small, plan, data, examples=20)
    assert not left
    result = {f"unequal {name}": value for name, value in small.state_dict().items()}
    assert not torch.equal(small.expert.weight, sc.cut(model, plan).expert.weight)
    for name in ("obd", "kron_obs"):
        scores = sc.score(model, graph, settings(name), data=data, loss="cross_entropy")
        result |= {f"unequal {name} {group}": values for group, values in scores.items()}
    return result


def refused(rank):
    """What each process is told where the second batch of the other one is bad: nobody waits for the other."""
    model = Network().eval()
    good, bad = batches((0,)), [batches((0,))[0], (torch.zeros(3, 1, 5, 5, dtype=torch.float64), torch.zeros(3).long())]
    graph = sc.trace(model, good[0][0][:2])
    plan, told = sc.make_plan(graph, {"first": [1]}), []
    verbs = [
        *(lambda data, n=n: sc.score(model, graph, n, data=data, loss="cross_entropy") for n in ("taylor", "kron_obs")),
        *(
            lambda data, n=n: sc.apply_repair(model, sc.cut(model, plan), plan, n, data=data, loss="cross_entropy")
            for n in ("recalibrate", "refit", "compensate")
        ),
        lambda data: sc.null_space_projector(model, data, "cross_entropy", basis="lanczos", k=3),
    ]
    for verb in verbs:
        try:
            verb(bad if rank == 1 else good)
            told.append("nothing")
        except sc.SecateurError as error:
            told.append(str(error))
    return {f"refused {number}": text(one) for number, one in enumerate(told)}


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def whole():
    return found(batches((0, 1)))


def test_two_processes_find_what_one_does_with_all_data(in_two_processes, whole):
    one, two = in_two_processes(__file__)
    assert one.keys() == two.keys()
    for name in [name for name in one if name.startswith("refused")]:
        mine, theirs = (bytes(found.pop(name).tolist()).decode() for found in (two, one))
        assert "batch 1 " in mine
        assert "does not fit the model" in mine
        assert theirs == f"process 1: {mine}"
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    assert {name for name in one if "unequal" not in name} == whole.keys()
    for name, value in whole.items():
        if "drawn" not in name and not name.startswith("distill"):  # a step takes a batch of each process
            torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_it_matters_that_the_data_of_both_are_used(whole):
    alone = found(batches((0,)))
    for name in ("taylor first", "kron_obs wide", "recalibrate norm.running_mean", "refit back.weight"):
        assert not torch.allclose(alone[name], whole[name], rtol=1e-3), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    everything = found(batches((rank,))) | of_unequal_images(5 + rank) | refused(rank)
    save_file(everything, Path(sys.argv[1]) / f"{rank}.safetensors")
    dist.destroy_process_group()
