"""Against torch-pruning 1.6.1 (``pip install -e '.[bench]'``): same networks, same images, equal MACs.

Its magnitude, Taylor, BN-scale and Hessian criteria, global and layer by layer; what it leaves is the widest network
whose MACs are within the budget, found by bisection of its ratio. All see the same 3,200 training images, without
augmentation, and of all networks the norms are re-estimated on them, where that is not worse on these images than what
they come with. Then all are trained for two epochs alike. Its Hessian keeps the squared gradients of the last example
alone (``accumulate_grad`` looks up a name among parameters); here it is given the mean over all, which is what its
documentation means. Rows that are there are not run again; several processes may share the work::

    python bench/peers.py --seeds 0 1 2 --epochs 2 --device cuda --part 0/4
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from oneshot import HERE
from rows import Rows
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build, example_input
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy
from secateur.measure.counting import counted

NETWORK, DATA, IMAGES = "resnet20", "cifar10", 3200
MACS = (0.7, 0.5, 0.3)
CRITERIA = ("magnitude", "taylor", "bn_scale", "hessian")
THEIRS = tuple(f"torch-pruning/{c}/{scope}" for c in CRITERIA for scope in ("global", "layer"))
OURS: dict[str, dict[str, Any]] = {
    "secateur": {},
    "secateur.hybrid": {"hybrid": True},
    "secateur, by the loss": {"criterion": "schur"},
    "secateur, by the loss, round_to=1": {"criterion": "schur", "round_to": 1},
}
LR, WEIGHT_DECAY, BATCH = 0.02, 5e-4, 128


@dataclass(frozen=True, eq=False)
class Images:
    """What all see."""

    batches: list[Any]


def torch_pruning(criterion: str, scope: str, model: nn.Module, inputs: Tensor, images: Images, macs: int) -> nn.Module:
    """The widest network that torch-pruning gives within so many MACs."""
    import torch_pruning as tp

    def made(ratio: float) -> nn.Module:
        small = copy.deepcopy(model).train(False)
        importance = {
            "magnitude": tp.importance.GroupMagnitudeImportance,
            "taylor": tp.importance.GroupTaylorImportance,
            "bn_scale": tp.importance.BNScaleImportance,
            "hessian": tp.importance.GroupHessianImportance,
        }[criterion]()
        for name, p in small.named_parameters():
            p.grad = None if criterion in ("magnitude", "bn_scale") else gradients[name].clone()
            if criterion == "hessian":
                importance._accu_grad[p], importance._counter[p] = squares[name].clone(), 1
        last = [m for m in small.modules() if isinstance(m, nn.Linear)]
        pruner = tp.pruner.BasePruner(
            small, inputs, importance=importance, global_pruning=scope == "global", pruning_ratio=ratio,
            ignored_layers=last,
        )  # fmt: skip
        pruner.step()
        for p in small.parameters():
            p.grad = None
        return small

    gradients = gradients_of(model, images) if criterion in ("taylor", "hessian") else {}
    squares = squares_of(model, images) if criterion == "hessian" else {}
    low, high, best = 0.0, 1.0, None
    for _ in range(12):
        ratio = (low + high) / 2
        try:
            small = made(ratio)
            fits = counted(small, inputs)["macs"] <= macs
        except Exception:  # whole layers gone
            small, fits = None, True
        if fits:
            high, best = ratio, small if small is not None else best
        else:
            low = ratio
    assert best is not None
    return best


@lru_cache(maxsize=1)
def gradients_of(model: nn.Module, images: Images) -> dict[str, Tensor]:
    """The gradients of the mean loss."""
    return _summed(model, images.batches, lambda g: g)


@lru_cache(maxsize=1)
def squares_of(model: nn.Module, images: Images) -> dict[str, Tensor]:
    """The mean over examples of the squared gradients of each."""
    return _summed(
        model, [(x[i : i + 1], y[i : i + 1]) for x, y in images.batches for i in range(len(x))], torch.square
    )


def _summed(model: nn.Module, batches: list[Any], of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    weights = dict(model.named_parameters())
    found, total = dict.fromkeys(weights, torch.zeros(())), sum(len(x) for x, _ in batches)
    for x, y in batches:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(weights.values()))
        for name, g in zip(weights, gradients, strict=True):
            found[name] = found[name] + of(g) * (len(x) / total)
    return found


def networks(
    model: nn.Module, inputs: Tensor, images: Images, fraction: float
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Each method, with what makes its network."""
    macs = int(fraction * counted(model, inputs)["macs"])
    for name, given in OURS.items():
        budget = sc.Budget(macs=fraction, round_to=given.get("round_to", "auto"))
        criterion = given.get("criterion", "auto")

        def ours(budget: sc.Budget = budget, criterion: str = criterion, both: bool = "hybrid" in given) -> nn.Module:
            if both:
                return sc.hybrid(model, inputs, budget, data=images.batches).model
            return sc.prune(model, inputs, budget, data=images.batches, loss="cross_entropy", criterion=criterion).model

        yield name, ours
    for name in THEIRS:
        criterion, scope = name.split("/")[1:]
        yield name, lambda c=criterion, s=scope: torch_pruning(c, s, model, inputs, images, macs)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--macs", type=float, nargs="+", default=list(MACS))
    parser.add_argument("--epochs", type=int, default=0, help="of training afterwards")
    parser.add_argument("--device", default="cpu", help="where that training happens")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods alone")
    parser.add_argument("--part", default="0/1", help="which of how many processes this is")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "peers.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    part, parts = map(int, given.part.split("/"))
    rows = Rows(
        given.out, network=NETWORK, data=DATA, images=IMAGES, lr=LR, weight_decay=WEIGHT_DECAY,
        note="CIFAR-10 is stored as JPEG", python=sys.version.split()[0], torch=torch.__version__,
    )  # fmt: skip
    data = load(DATA)
    there = data.to(given.device)
    inputs, number = torch.zeros(example_input(NETWORK)), 0
    for seed in given.seeds:
        model = build(NETWORK)
        model.load_state_dict(load_file(HERE / "checkpoints" / f"{NETWORK}_{DATA}_seed{seed}.safetensors"))
        model.eval()
        images = Images(list(islice(data.loader("train", 64, shuffle=True), IMAGES // 64)))
        full = counted(model, inputs)
        for fraction in given.macs:
            for method, make in networks(model, inputs, images, fraction):
                number += 1
                if given.only and method not in given.only:
                    continue
                key = {"seed": seed, "method": method, "fraction": fraction, "epochs": given.epochs}
                if number % parts != part or rows.has(key):
                    continue
                start = time.perf_counter()
                small = make().eval()
                row = {**key, "seconds": round(time.perf_counter() - start, 2)}
                row |= {unit: n / full[unit] for unit, n in counted(small, inputs).items()}
                small = better_norms(small, images.batches).to(given.device)
                tested = there.loader("test", 500)
                row["test"] = accuracy(small, tested)
                if given.epochs:
                    optimizer = torch.optim.SGD(
                        small.parameters(), lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
                    )
                    loader = there.loader("train", BATCH, shuffle=True, augment=True, seed=seed)
                    fit(small, optimizer, loader, epochs=given.epochs, schedule="cosine", progress=False)
                    row["trained"] = accuracy(small.eval(), tested)
                    row["device"] = torch.cuda.get_device_name() if given.device == "cuda" else given.device
                rows.add(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def better_norms(small: nn.Module, images: list[Any]) -> nn.Module:
    """The network with its norms re-estimated, if the given images bear that out."""
    other = copy.deepcopy(small)
    sc.recalibrate(other, images, batches=len(images))
    return max((small, other), key=lambda one: accuracy(one, images))


if __name__ == "__main__":
    main()
