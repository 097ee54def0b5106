"""Two processes go by the clock of the first: what they fit and what they cut is the same."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import secateur as sc


def test_two_processes_have_one_clock(in_two_processes):
    first, second = in_two_processes(__file__)
    assert all(torch.equal(first[name], second[name]) for name in first)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 60), nn.Tanh(), nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 3)).eval()
    data = [(torch.randn(16, 6), torch.arange(16) % 3) for _ in range(3)]
    graph = sc.trace(model, data[0][0])
    timing = sc.Timing(model, graph, samples=5, progress=False)
    search = sc.Search(model, data, evaluations=60, progress=False)
    budget = sc.Budget(latency_ms=0.9 * timing.whole)
    plan = sc.allocate(graph, sc.score(model, graph, "magnitude"), budget, strategy=search, timing=timing)
    parts = torch.tensor([part for _, part in timing.samples], dtype=torch.float64)
    save_file({"kept": torch.tensor(graph.kept(plan)), "parts": parts}, f"{sys.argv[1]}/{dist.get_rank()}.safetensors")
    dist.barrier()  # the last that was told may still be under way
    dist.destroy_process_group()
