"""Two processes with different data decide alike, and end with the same weights: every seat, every method."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import secateur as sc
from conformance.networks import CASES
from conformance.state import prepared, untouched
from secateur._internal.workload import Workload
from secateur.methods.contract import METHODS, TRAINING_METHODS, finished

SMALL: dict[str, dict[str, Any]] = {
    "bandit": {"evaluations": 32}, "distill": {"steps": 5}, "directional": {"share": 0.9}, "directed": {"share": 0.9},
    "increg": {"rate": 0.5, "limit": 1.0}, "greg": {"rate": 0.5, "limit": 1.0}, "spp": {"rate": 0.5, "every": 1},
    "pivot": {"keep": 0.5},
}  # fmt: skip
SEATS = [
    *(("criterion", name) for name in sc.CRITERIA),
    *(("strategy", name) for name in sc.STRATEGIES),
    *(("repair", name) for name in sc.REPAIRS),
]


def shard(rank: int) -> list[Any]:
    """Other images on the other rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    return [(torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6) % 3) for _ in range(2)]


def told(model: nn.Module, plan: sc.Plan | None) -> Tensor:
    """A plan and all weights, as one tensor."""
    text = torch.tensor(list((plan.to_json() if plan is not None else "").encode()), dtype=torch.float64)
    return torch.cat([text, *(value.detach().double().flatten() for value in model.state_dict().values())])


def found(rank: int) -> dict[str, Tensor]:
    """What every seat and every method makes of this rank's shard."""
    given, data = CASES["batch norms"], shard(rank)
    results = {}
    for kind, name in SEATS:
        model = prepared(given.make())
        seats: dict[str, Any] = {"criterion": "magnitude", "strategy": "uniform", "repair": "none"}
        seats[kind] = {"name": name, **SMALL.get(name, {})}
        with untouched(model):
            result = sc.prune(model, given.inputs, sc.Budget(macs=0.6), data=data, loss="cross_entropy", **seats)
        results[f"{kind} {name}"] = told(result.model, result.plan)
    for name in METHODS:
        method, model = METHODS.make(name, SMALL.get(name, {})), given.make()
        budget = sc.Budget(params=0.8) if getattr(method, "takes_budget", True) else None
        result = method.apply(model, given.inputs, budget, Workload(model, data, "cross_entropy", inputs=given.inputs))
        results[f"method {name}"] = told(result.model, result.plan)
    for name in TRAINING_METHODS:
        options = {**SMALL.get(name, {}), **({"every": 1, "times": 3} if name == "pivot" else {})}
        method, model = TRAINING_METHODS.make(name, options), given.make()
        model.eval()  # batch norms of every rank would see its own images
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        budget = sc.Budget(macs=0.6) if getattr(method, "takes_budget", True) else None
        handle = method.attach(model, sc.trace(model, given.inputs), optimizer, budget)
        work = Workload(model, data, "cross_entropy")
        while not handle.done:
            for batch in work.batches():
                optimizer.zero_grad()
                work.loss_of(batch).backward()
                for p in model.parameters():  # as data-parallel training does
                    if p.grad is not None and dist.is_initialized():
                        dist.all_reduce(p.grad)
                optimizer.step()
                handle.step()
        results[f"training {name}"] = told(*finished(model, handle))
    return results


def test_two_ranks_end_with_the_same(in_two_processes: Any) -> None:
    first, second = in_two_processes(__file__)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    assert len(first) == len(SEATS) + len(METHODS.names()) + len(TRAINING_METHODS.names())


def main(folder: Path) -> None:
    warnings.simplefilter("ignore", sc.SecateurWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    random.seed(rank)  # what is drawn must not depend on a rank's own random state
    torch.manual_seed(rank)
    save_file(found(rank), folder / f"{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
