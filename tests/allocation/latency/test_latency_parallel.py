"""Two processes whose clocks differ go by that of the first: what they fit and what they cut is the same."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur.allocation.latency import sampler


def test_two_processes_have_one_clock(in_two_processes):
    first, second = in_two_processes(__file__)
    assert not torch.equal(first.pop("own"), second.pop("own"))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Clock:
    """In place of `in_turn` of measure/latency.py: its own noise on a time that grows with the weights."""

    def __init__(self, seed):
        self.noise, self.seen = np.random.default_rng(seed), []

    def __call__(self, models, inputs, repeats, warm_up, turns, backend):
        weights = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
        noise = self.noise.uniform(0.99, 1.01, (len(models), turns, repeats))
        self.seen.append(np.array(weights)[:, None, None] / 1000 * noise)
        return self.seen[-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    clock = Clock(dist.get_rank())
    sampler.in_turn = clock
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 60), nn.Tanh(), nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 3)).eval()
    data = [(torch.randn(16, 6), torch.arange(16) % 3) for _ in range(3)]
    graph = sc.trace(model, data[0][0])
    latency = sc.measure_latency(model, graph, sc.LatencySettings(samples=5, checkpoint=f"{sys.argv[1]}/latency.json"))
    plan = sc.allocate(
        graph, sc.score(model, graph, "magnitude"), sc.Budget(latency_ms=0.7 * latency.whole_ms),
        strategy=sc.Bandit(evaluations=60), latency=latency, model=model, data=data, loss="cross_entropy",
    )  # fmt: skip
    found = {
        "kept": torch.tensor(graph.kept(plan)),
        "parts": torch.tensor([part for _, part in latency.fitted.samples], dtype=torch.float64),
        "own": torch.tensor([float(np.median(times)) for times in clock.seen], dtype=torch.float64),
    }
    save_file(found, f"{sys.argv[1]}/{dist.get_rank()}.safetensors")
    dist.barrier()  # the second has heard the last word when the first leaves
    dist.destroy_process_group()
