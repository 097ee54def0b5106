"""Two processes with a shard of the data each find what one process with all of the data finds."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.allocation.search import checkpoint
from secateur.allocation.search.evaluator import Evaluator

SHARDS = (slice(0, 2), slice(2, 5))
"""Of five batches the first process has two, the second three."""


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 6, generator=generator), torch.arange(16) % 3) for _ in range(5)]


def found(data, *, scores_by=1.0, **settings):
    """The widths, what was learned, and how many forwards of narrower networks this process made itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    graph = sc.trace(model, torch.zeros(1, 6))
    scores = {name: scores_by * values for name, values in sc.score(model, graph, "magnitude").items()}
    made, rise = [], Evaluator._rise
    Evaluator._rise = lambda self, *given: made.append(0) or rise(self, *given)
    work = sc.Workload(model, data, "cross_entropy")
    try:
        # enough minutes: the processes ask each other whether they are up
        bandit = sc.Bandit(**({"evaluations": 120, "minutes": 10} | settings))
        kept = graph.kept(sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=bandit, work=work))
    finally:
        Evaluator._rise = rise
    learned = work.facts["search"]
    return {
        "kept": torch.tensor(kept),
        "gaps": torch.tensor([row["gap"] for row in learned["table"]], dtype=torch.float64),
        "plays": torch.tensor([row["plays"] for row in learned["table"]]),
        "losses": torch.tensor(learned["losses"], dtype=torch.float64),
        "facts": torch.tensor(list(str(learned).encode()), dtype=torch.uint8),
        "forwards": torch.tensor(len(made)),
    }


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in ("kept", "gaps", "plays", "losses", "facts"))


def test_two_processes_find_what_one_finds(in_two_processes, tmp_path):
    one = found(batches(), checkpoint=tmp_path / "one.json")
    ranks = in_two_processes(__file__)
    for rank in ranks:
        assert same(rank, one)
        assert bool(rank["resumed"]) and bool(rank["told"]) and bool(rank["first scores"])
    made = [int(rank["forwards"]) for rank in ranks]
    assert sum(made) == int(one["forwards"]) and min(made) > 0.25 * sum(made)  # each made those of its own batches
    assert {path.name for path in tmp_path.glob("*.json")} == {"one.json", "two.json"}
    again = found(batches(), checkpoint=tmp_path / "two.json")  # one process goes on where two were
    assert same(again, one) and int(again["forwards"]) < 40


def full_disk(path, content):
    raise sc.BadFile(f"{path} cannot be written: no space left")


def errors(number, own, folder):
    """What each process is told where one of them fails, or they differ."""
    wrong_shape = [(torch.zeros(16, 5), own[0][1]), *own[1:]]
    for given in (
        {"data": own, "seed": number},
        {"data": own, "evaluations": 120 + number},
        {"data": [] if number else own},
        {"data": wrong_shape if number else own},
    ):
        try:
            found(**given)
            yield ""
        except SecateurError as error:
            yield str(error)
    checkpoint.write_atomically = full_disk  # which only the first process does
    try:
        found(own, checkpoint=folder / "full.json")
    except SecateurError as error:
        yield str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, number = Path(sys.argv[1]), dist.get_rank()
    own = batches()[SHARDS[number]]
    mine = found(own, checkpoint=folder / "two.json")
    dist.barrier()
    again, of_one = found(own, checkpoint=folder / "two.json"), found(own, checkpoint=folder / "one.json")
    mine["resumed"] = torch.tensor(all(same(other, mine) and int(other["forwards"]) < 40 for other in (again, of_one)))
    mine["first scores"] = torch.tensor(same(found(own, scores_by=1.0 if number == 0 else -1.0), mine))
    told = list(errors(number, own, folder))
    here, there = "", f"process {1 - number}: "
    due = [(here, "the processes differ")] * 2
    due += [(here if number else there, "no batches were given"), (here if number else there, "does not fit the model")]
    due += [(there if number else here, "no space left")]
    mine["told"] = torch.tensor(
        all(text.startswith(by) and part in text for (by, part), text in zip(due, told, strict=True))
    )
    save_file(mine, folder / f"{number}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
