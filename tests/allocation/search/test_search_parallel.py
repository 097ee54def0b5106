"""Two processes share the evaluations of a search, and find what one finds."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.allocation.search.evaluator import Evaluator


def found(folder=None, seed=1, batches=3):
    """The widths, what was learned, and how many forwards this process made itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    graph = sc.trace(model, torch.zeros(1, 6))
    scores = sc.score(model, graph, "magnitude")
    generator = torch.Generator().manual_seed(seed)
    data = [(torch.randn(16, 6, generator=generator), torch.arange(16) % 3) for _ in range(batches)]
    made, rise = [], Evaluator._rise
    Evaluator._rise = lambda self, *given: made.append(0) or rise(self, *given)
    try:
        # enough minutes: the processes ask each other whether they are up
        search = sc.Search(
            model, data, evaluations=120, minutes=10, progress=False,
            checkpoint=None if folder is None else Path(folder) / "search.json",
        )  # fmt: skip
        kept = graph.kept(sc.allocate(graph, scores, sc.Budget(macs=0.5), strategy=search))
    finally:
        Evaluator._rise = rise
    return {
        "kept": torch.tensor(kept),
        "gaps": torch.tensor([row["gap"] for row in search.table], dtype=torch.float64),
        "plays": torch.tensor([row["plays"] for row in search.table]),
        "forwards": torch.tensor(len(made)),
    }


def test_two_processes_find_what_one_finds(in_two_processes, tmp_path):
    ranks, one = in_two_processes(__file__), found()
    for rank in ranks:
        assert all(torch.equal(rank[name], one[name]) for name in ("kept", "gaps", "plays"))
    assert abs(int(ranks[0]["forwards"]) - int(ranks[1]["forwards"])) < 0.2 * int(one["forwards"])
    assert int(ranks[0]["forwards"]) + int(ranks[1]["forwards"]) == int(one["forwards"])
    assert all(bool(rank["resumed"]) and bool(rank["differ"]) for rank in ranks)
    assert [path.name for path in tmp_path.glob("*.json")] == ["search.json"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mine = found(sys.argv[1])
    dist.barrier()  # the first process has written the last checkpoint
    again = found(sys.argv[1])
    mine["resumed"] = torch.tensor(torch.equal(again["kept"], mine["kept"]) and int(again["forwards"]) < 20)
    told = []
    number = dist.get_rank()
    for given in ({"seed": number}, {"batches": 3 + number}, {"folder": None if number else sys.argv[1]}):
        try:
            found(**given)
        except SecateurError as error:
            told.append("the processes differ" in str(error))
    mine["differ"] = torch.tensor(told == [True, True, True])
    save_file(mine, Path(sys.argv[1]) / f"{dist.get_rank()}.safetensors")
    dist.destroy_process_group()
