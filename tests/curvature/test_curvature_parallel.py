"""Two processes, each with its part of the data, get the factors and moments that one gets from all of it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from secateur._internal.workload import Workload
from secateur.curvature.eigenbasis import eigenbasis_of, identity_basis, second_moments
from secateur.curvature.fisher import Fisher
from secateur.curvature.kronecker import kronecker_factors


def factors(data):
    """All that is measured of one small network, by name."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).double()
    found = {}
    for form in ("channel", "full"):
        curvature = kronecker_factors(model, data, "cross_entropy", fisher="empirical", form=form)
        assert curvature.examples == 11
        bases = {name: identity_basis(one.layer) for name, one in curvature.items()}
        bases = second_moments(Workload(model, data, "cross_entropy"), bases, Fisher("empirical")).bases
        for name, one in curvature.items():
            basis = eigenbasis_of(one)
            found |= {f"{form} {name} a": one.a, f"{form} {name} g": one.g, f"{form} {name} values": basis.a}
            found[f"{form} {name} moments"] = bases[name].moments
    return {name: tensor.contiguous() for name, tensor in found.items()}


def batches():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(11, 2, 5, 5, generator=generator, dtype=torch.float64), torch.arange(11) % 3
    return [(x[i : i + 3], y[i : i + 3]) for i in range(0, 11, 3)]  # three of 3 and one of 2


def test_two_processes_measure_what_one_does(in_two_processes):
    ranks = in_two_processes(__file__)
    one = factors(batches())
    assert ranks[0].keys() == ranks[1].keys() == one.keys()
    for name, tensor in one.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-6, atol=1e-12)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mine = batches()[dist.get_rank() :: 2]
    save_file(factors(mine), Path(sys.argv[1]) / f"{dist.get_rank()}.safetensors")
    dist.destroy_process_group()
