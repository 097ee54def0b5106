"""Two processes that see different images, each with its own weights: what is decided is decided by the first."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur.methods.sdprun import SDPrun

HANDLES = {
    "increg": lambda *a, seed: sc.IncReg(*a, sc.Budget(params=0.6), rate=0.1, limit=1.0),
    "greg": lambda *a, seed: sc.GReg(*a, sc.Budget(params=0.6), rule="greg2", pick=0.05, rate=0.1, limit=1.0),
    "spp": lambda *a, seed: sc.SPP(*a, sc.Budget(params=0.6), rate=0.1, every=1, seed=seed),
}


def network(rank):
    """The networks of two processes that were not told to begin alike; their data are others too."""
    torch.manual_seed(rank)
    layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(12, 2, 6, 6, dtype=torch.float64), torch.arange(12) % 3
    return model, sc.trace(model, x[:1]), x, y


class Tied(nn.Module):
    """Only hidden channels can go: the others are those of the input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(*size) for size in ((20, 24), (24, 20), (20, 20), (20, 3)))

    def forward(self, x):
        x = x + self.b(self.a(x).relu())
        return self.d(x + self.c(x))


def steps(model, optimizer, handle, x, y, count):
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if handle is not optimizer:
            handle.step()
        yield


def decided(rank):
    """What each method decided, by name."""
    found = {}
    for name, make in HANDLES.items():
        model, graph, x, y = network(rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        handle = make(model, graph, optimizer, seed=rank)  # a seed of its own, as data loaders have
        masks = []
        for _ in steps(model, optimizer, handle, x, y, 60):
            masks.append(handle.masked.clone() if name == "spp" else handle.penalty.clone())
        assert handle.done
        found |= {f"{name} pruned": handle.pruned, f"{name} steps": torch.tensor([handle.steps])}
        found[f"{name} on the way"] = torch.stack(masks)
        widths = [len(kept) for kept in handle.plan().removed.values()]
        found[f"{name} widths"] = torch.tensor(widths)
    model, graph, x, y = network(rank)
    optimizer = SDPrun(model, graph, lr=0.1, c=2.0, mu=0.7, budget=sc.Budget(params=0.6))
    held = [
        torch.tensor([optimizer.reached, optimizer.param_groups[0]["g"]], dtype=torch.float64)
        for _ in steps(model, optimizer, optimizer, x, y, 80)
    ]
    found["sdprun"] = torch.stack(held)
    model, _, x, y = network(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = sc.Pivoting(model, 0.5, every=3, times=4)
    for _ in steps(model, optimizer, handle, x, y, 12):
        pass
    found |= {f"pivot {n}": torch.from_numpy(p.mask()) for n, p in handle.patterns.items()}
    torch.manual_seed(0)  # all have the network, and a shard of the data
    model, x = Tied().double().eval(), torch.randn(2, 200, 20, dtype=torch.float64)[rank]
    result = sc.hybrid(model, x[:1], sc.Budget(params=0.5, round_to=1), data=[x])
    assert result.facts["bottlenecks"] and any(kept < n for n, kept in result.facts["widths"].values())
    found |= {f"hybrid {n}": p.detach().contiguous() for n, p in result.model.named_parameters()}
    return found


def test_what_goes_is_what_the_first_process_says(in_two_processes):
    one, other = in_two_processes(__file__)
    assert one.keys() == other.keys()
    assert bool(one["sdprun"][-1, 0]), "the budget was never reached, so nothing was decided"
    assert {name.split()[0] for name in one} == {*HANDLES, "sdprun", "pivot", "hybrid"}
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    save_file(decided(dist.get_rank()), Path(sys.argv[1]) / f"{dist.get_rank()}.safetensors")
    dist.destroy_process_group()
