"""Two processes whose data, and even scores, differ keep the same widths: those that rank 0 decides."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import secateur as sc

STRATEGIES = {
    "uniform": sc.Uniform(), "threshold": sc.Threshold(), "global": sc.Global(),
    "sensitivity": sc.Sensitivity(evaluations=100), "bandit": sc.Bandit(evaluations=80),
}  # fmt: skip


def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    generator = torch.Generator().manual_seed(1)
    return model, [(torch.randn(16, 6, generator=generator), torch.arange(16) % 3) for _ in range(4)]


def random_scores(graph, seed):
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(len(group), generator=generator) for group in graph.groups}


def widths(data, seed):
    """By strategy, the widths and which channels stay."""
    model, _ = case()
    graph = sc.trace(model, torch.zeros(1, 6))
    for name, strategy in STRATEGIES.items():
        plan = sc.allocate(
            graph, random_scores(graph, seed), sc.Budget(macs=0.5), strategy=strategy, model=model, data=data,
            loss="cross_entropy",
        )  # fmt: skip
        gone = torch.zeros(len(graph.groups), 16, dtype=torch.bool)
        for i, group in enumerate(graph.groups):
            gone[i, list(plan.removed.get(group.name, ()))] = True
        yield name, torch.tensor(graph.kept(plan)), gone


def test_every_strategy_is_here():
    assert sorted(STRATEGIES) == sc.STRATEGIES.names()


def test_two_processes_keep_the_widths_that_one_with_all_of_the_data_would(in_two_processes):
    first, second = in_two_processes(__file__)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name, kept, gone in widths(case()[1], seed=0):
        assert torch.equal(first[f"{name} kept"], kept) and torch.equal(first[f"{name} gone"], gone)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    number = dist.get_rank()
    found = {}
    for name, kept, gone in widths(case()[1][2 * number : 2 * number + 2], seed=number):
        found |= {f"{name} kept": kept, f"{name} gone": gone}
    save_file(found, f"{sys.argv[1]}/{number}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
