"""Two processes, each with half of every batch, prune to the same network as one with the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import secateur as sc

HANDLES = {
    "increg": lambda *a: sc.IncReg(*a, budget=sc.Budget(params=0.6), rate=0.1, limit=1.0),
    "spp": lambda *a: sc.SPP(*a, budget=sc.Budget(params=0.6), rate=0.1, every=1),
}


def pruned(rank, ranks):
    """The weights that both methods end with, by name."""
    found = {}
    for method, make in HANDLES.items():
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)]
        model = nn.Sequential(*layers).double()
        x, y = torch.randn(24, 2, 6, 6, dtype=torch.float64), torch.arange(24) % 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        handle = make(model, sc.trace(model, x[:1]), optimizer)
        trained = DistributedDataParallel(model) if ranks > 1 else model
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(x[rank::ranks]), y[rank::ranks]).backward()
            optimizer.step()
            handle.step()
        assert handle.done
        small = sc.cut(model, handle.plan())
        found |= {f"{method} {name}": p.detach().contiguous() for name, p in small.named_parameters()}
    return found


def test_two_processes_prune_as_one_does(in_two_processes):
    ranks = in_two_processes(__file__)
    one = pruned(0, 1)
    assert ranks[0].keys() == ranks[1].keys() == one.keys()
    for name, tensor in one.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-9, atol=1e-11)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    save_file(pruned(dist.get_rank(), 2), Path(sys.argv[1]) / f"{dist.get_rank()}.safetensors")
    dist.destroy_process_group()
