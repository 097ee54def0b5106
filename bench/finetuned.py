"""One-shot methods with fine-tuning, small: EigenDamage against C-OBS, Kron-OBD and Kron-OBS (arXiv 1905.05934).

The published protocol in small, for two cores: the trained ResNet-20s of ``bench/checkpoints``, 60 and 80 % of the
parameters gone, then three epochs (one cycle, SGD, 0.02) where the paper has 150 of a wider ResNet-32. ``one pass``
cuts at once; ``iterative`` in three rounds of equal ratio with an epoch after each, so that both train for as long. All
methods take the same 3,200 training images for their curvature (exact Fisher), without augmentation. ``secateur`` and
``secateur.hybrid`` are the defaults of :func:`secateur.prune` and :func:`secateur.hybrid`, with data alone. Nothing is
tuned on the test set. Rows that are there are not run again; a training that was stopped goes on from ``--work``::

    python bench/finetuned.py --seeds 0 1 2
    python bench/finetuned.py --table
"""

from __future__ import annotations

import argparse
import time
import warnings
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from oneshot import HERE, smaller
from rows import Row, Rows
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build, example_input
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy
from secateur.measure.counting import counted
from tables import cell

NETWORK, DATA, BATCH, SEEN = "resnet20", "cifar10", 128, 25
PARAMS = (0.4, 0.2)
EPOCHS, ROUNDS, LR, WEIGHT_DECAY = 3, 3, 0.02, 1e-4
METHODS = ("magnitude", "obs", "kron_obd", "kron_obs", "eigendamage", "secateur", "secateur.hybrid")
PASSES = {"one pass": 1, "iterative": ROUNDS}


def trained(model: nn.Module, epochs: int, seed: int, work: Path) -> None:
    """Train in place; goes on where it was stopped."""
    data = load(DATA, validation=0.1)  # as the networks were trained
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY)
    batches = data.loader("train", BATCH, shuffle=True, augment=True, seed=100 + seed)
    fit(
        model, optimizer, batches, epochs=epochs, schedule="one_cycle", progress=False, checkpoint_dir=work,
        channels_last=True,
    )  # fmt: skip


def one(method: str, passes: str, fraction: float, seed: int, work: Path) -> Row:
    """From the trained network to the fine-tuned small one."""
    model, inputs = build(NETWORK), torch.zeros(example_input(NETWORK))
    model.load_state_dict(load_file(HERE / "checkpoints" / f"{NETWORK}_{DATA}_seed{seed}.safetensors"))
    full, rounds = counted(model.eval(), inputs), PASSES[passes]
    data = load(DATA, validation=0.1)
    images = list(islice(data.loader("train", BATCH, shuffle=True, seed=seed), SEEN))
    test, seconds, untrained = list(data.loader("test", 500)), 0.0, None
    for number in range(1, rounds + 1):
        start = time.perf_counter()
        now = counted(model, inputs)["params"] / full["params"]
        model = smaller(method, model, inputs, fraction ** (number / rounds) / now, images)
        seconds += time.perf_counter() - start
        untrained = untrained or accuracy(model.eval(), test)
        trained(model, EPOCHS // rounds, seed + 10 * number, work / str(number))
        model.eval()
    left = {unit: n / full[unit] for unit, n in counted(model, inputs).items()}
    return {
        "network": NETWORK, "method": method, "passes": passes, "fraction": fraction, "seed": seed, **left,
        "seconds": round(seconds, 1), "untrained": untrained, "validation": accuracy(
            model, list(data.loader("validation", 500))
        ), "test": accuracy(model, test),
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """Means and spreads over the seeds; the first cut before any training in brackets."""
    heads = [f"{p}, {f:.0%} of the parameters" for p in PASSES for f in PARAMS]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    most = len({row["seed"] for row in rows})
    for method in METHODS:
        cells = []
        for passes in PASSES:
            for fraction in PARAMS:
                own = [r for r in rows if (r["method"], r["passes"], r["fraction"]) == (method, passes, fraction)]
                found = cell([100 * r["test"] for r in own], most, 1)
                first = f" ({cell([100 * r['untrained'] for r in own], len(own), 1)})" if own else ""
                cells.append(found + first)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=list(PASSES))
    parser.add_argument("--work", type=Path, default=Path("runs/finetuned"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "finetuned.json")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = Rows(
        given.out, images=SEEN * BATCH, epochs=EPOCHS, lr=LR, weight_decay=WEIGHT_DECAY, rounds=ROUNDS,
        note="CIFAR-10 is stored as JPEG", torch=torch.__version__,
    )  # fmt: skip
    wanted = [(s, p, f, m) for s in given.seeds for p in given.passes for f in PARAMS for m in given.methods]
    for seed, passes, fraction, method in [] if given.table else wanted:
        key = {"network": NETWORK, "method": method, "passes": passes, "fraction": fraction, "seed": seed}
        if not rows.has(key):
            row = one(method, passes, fraction, seed, given.work / f"{method}-{passes}-{fraction:g}-{seed}")
            rows.add(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    print(table(rows.rows))


if __name__ == "__main__":
    main()
