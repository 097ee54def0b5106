"""How well the cheap projectors on flat directions know what the exact one knows, and what the cheap one costs.

``rank``: Spearman's rank correlation of the channels' flatness ``s`` with the exact projector's, on networks trained on
digits until they fit them well (short) or wholly (long), three seeds, against Gauss and Newton's matrix and the
Hessian.
``cost``: the time of ``directional_scores`` with the Kronecker-factored projector over that of its factors alone, on a
network of the size of ResNet-50, medians in one run. Writes ``bench/results/flat.json``::

    python bench/flat.py rank cost
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from networks import RESNETS, ResNet

RESULTS = Path(__file__).parent / "results" / "flat.json"
CHEAP: dict[str, dict[str, Any]] = {
    "kfe hard": {"basis": "kfe", "fisher": "exact"},
    "kfe soft": {"basis": "kfe", "fisher": "exact", "soft": True},
    "kfe soft ekfac": {"basis": "kfe", "fisher": "exact", "soft": True, "ekfac": True},
    "lanczos 50": {"basis": "lanczos", "k": 50},
    "lanczos 100": {"basis": "lanczos", "k": 100},
    "lanczos 400": {"basis": "lanczos", "k": 400},
}
LENGTHS = {"short": {"epochs": 60, "momentum": 0.0}, "long": {"epochs": 60, "momentum": 0.9}}


def perceptron() -> nn.Module:
    """64-24-16-10."""
    layers = [nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)]
    return nn.Sequential(*layers)


def convolutional() -> nn.Module:
    """Two convolutions and a linear."""
    layers = [nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


def rank(make: Callable[[], nn.Module], length: str, seed: int) -> dict[str, Any]:
    """One network's correlations."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:300, None] / 16, torch.tensor(digits.target)[:300]
    torch.manual_seed(seed)
    model = make()
    setting = LENGTHS[length]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=setting["momentum"])
    for _ in range(int(setting["epochs"])):
        for part in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    graph, data = sc.trace(model, x[:2]), [(x, y)]

    def flatness(**options: Any) -> tuple[Tensor, Any]:
        flat = sc.null_space_projector(model, data, "cross_entropy", **options)
        return torch.cat(list(sc.directional_scores(model, graph, flat).values())), flat.facts

    row: dict[str, Any] = {"network": make.__name__, "length": length, "seed": seed}
    row["loss"] = float(F.cross_entropy(model(x), y).detach())
    exact = {}
    for matrix in ("gauss_newton", "hessian"):
        exact[matrix], facts = flatness(basis="exact", matrix=matrix)
        row[f"steep {matrix}"] = facts["steep"]
    row["both"] = float(spearmanr(exact["gauss_newton"], exact["hessian"]).statistic)
    for name, options in CHEAP.items():
        for matrix, theirs in exact.items():
            own = options | ({"matrix": matrix} if options["basis"] == "lanczos" else {})
            row[f"{name}: {matrix}"] = float(spearmanr(theirs, flatness(**own)[0]).statistic)
    return row


def cost(repeats: int = 3) -> dict[str, Any]:
    """What the scores cost beyond the factors, ResNet-50 on 8 batches of 8 images of 224 x 224."""
    torch.manual_seed(0)
    model = ResNet(RESNETS[50]).eval()
    data = [(torch.randn(8, 3, 224, 224), torch.randint(0, 1000, (8,))) for _ in range(8)]
    graph = sc.trace(model, data[0][0][:1])
    times: dict[str, list[float]] = {"factors": [], "scores": []}
    for _ in range(repeats):
        start = time.perf_counter()
        sc.kronecker_factors(model, data, "cross_entropy")
        times["factors"].append(time.perf_counter() - start)
        start = time.perf_counter()
        sc.directional_scores(model, graph, sc.null_space_projector(model, data, "cross_entropy", soft=True))
        times["scores"].append(time.perf_counter() - start)
    found = {name: statistics.median(values) for name, values in times.items()}
    return {"images": 64, **found, "ratio": found["scores"] / found["factors"]}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["rank", "cost"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "rank" in given.what:
        rows = kept.setdefault("rank", [])
        for make in (perceptron, convolutional):
            for length in LENGTHS:
                for seed in range(3):
                    if any((r["network"], r["length"], r["seed"]) == (make.__name__, length, seed) for r in rows):
                        continue
                    rows.append(rank(make, length, seed))
                    RESULTS.write_text(json.dumps(kept, indent=1))
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    if "cost" in given.what:
        kept["cost"] = cost()
        RESULTS.write_text(json.dumps(kept, indent=1))
        print(kept["cost"])


if __name__ == "__main__":
    main()
