"""What wants a GPU, in pieces of less than ten minutes, the most valuable first; rows as they come.

A piece that is finished is not run again: give the rows that an earlier call brought back as ``--before``. What does
not fit into ``--minutes`` any more is not begun, which is told; how long a piece takes is told by the seconds of an
epoch, which are measured first. Training: the data set on the card, augmentation there, channels last, bfloat16 by
autocast (weights and optimizer in float32), ``torch.compile``. Accuracy of cut networks, on JPEG images: only
differences within a run count. Pieces:

- ``checks``: cut against masked on the card in three precisions and compiled, the same plan as on the CPU, a step of
  SDPrun over one of SGD, a pass for Kronecker factors over a plain one, packed against dense blocks;
- ``epochs``: seconds an epoch of VGG-16 and WRN-28-10;
- ``sdprun``: VGG-16, to 30 % of the MACs while it trains, and SGD with the same seed and schedule (arXiv 2107.05328);
- ``eigendamage``: a ResNet-32 four times as wide, in rounds, to a tenth of the parameters and an eighth of the MACs;
- ``one pass``: VGG-19 and ResNet-32 with 60 and 90 % of the parameters gone, against the baselines of arXiv 1905.05934;
- ``wide``: WRN-28-10 by SDPrun.

::

    python bench/gpu.py --minutes 9 --out "$OUT/gpu.json"
    python bench/gpu.py --minutes 9 --out "$OUT/gpu.json" --before gpu.json       # goes on
    python bench/gpu.py --dry --out /tmp/dry.json                                 # two steps of everything, on a CPU
"""

from __future__ import annotations

import argparse
import copy
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import factors
import secateur as sc
import step
from networks import RESNETS, ResNet
from oneshot import smaller
from rows import Rows
from secateur.lab.data.dataset import Dataset, Split
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy
from secateur.measure.counting import counted

HERE = Path(__file__).parent
SHAPE = (1, 3, 32, 32)
BATCH, LR = 128, 0.1
C, MU = 5e-4, 0.6
"""Of gRDA's experiments (arXiv 2006.09358); the paper's are not public."""


class NoTimeError(Exception):
    """What comes next takes longer than is left."""


@dataclass
class Bench:
    """What all pieces share.

    Attributes:
        device: where everything runs.
        data: the images, on it.
        rows: what was found.
        until: when the time is up.
        epochs: of a training from scratch.
        seeds: how many.
        dry: two steps of everything, with narrow networks.
        seconds: of an epoch, by network and width, as measured.
    """

    device: torch.device
    data: Dataset
    rows: Rows
    until: float
    epochs: int
    seeds: int
    dry: bool
    seconds: dict[tuple[str, float], float] = field(default_factory=dict)

    def make(self, name: str, width: float = 1.0) -> nn.Module:
        """A new network on the device, narrow where it is dry."""
        model = build(name, width=max(width / 8, 0.25) if self.dry else width)
        return model.to(self.device, memory_format=torch.channels_last)

    def images(self, seed: int = 0) -> list[Any]:
        """Training images for scores and curvature."""
        return list(islice(self.data.loader("train", BATCH, shuffle=True, seed=seed), 2 if self.dry else 25))

    def left(self, seconds: float, what: str) -> None:
        """Raise if there is not so much time left."""
        if time.monotonic() + seconds > self.until:
            raise NoTimeError(f"{what} takes about {seconds:.0f} s, and {self.until - time.monotonic():.0f} s are left")

    def has(self, **key: Any) -> bool:
        """Whether there is such a row."""
        return self.rows.has(key)

    def keep(self, **row: Any) -> None:
        """Write a row, and show it."""
        self.rows.add(row)
        print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def cuda(self) -> None:
        """Wait for the card."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def trained(bench: Bench, model: nn.Module, optimizer: Any, epochs: int, schedule: str, seed: int) -> float:
    """Train in place, so many epochs; the seconds that the last one took."""
    batches = bench.data.loader("train", BATCH, shuffle=True, augment=True, seed=seed)
    accelerator = Accelerator(mixed_precision="bf16", cpu=bench.device.type == "cpu")
    history = fit(
        model, optimizer, batches, epochs=epochs, schedule=schedule, accelerator=accelerator, progress=False,
        channels_last=True, compile=not bench.dry,
    )  # fmt: skip
    model.eval()
    return float(history[-1]["seconds"])


def sgd(model: nn.Module, lr: float = LR, decay: float = 5e-4) -> torch.optim.Optimizer:
    """The usual one."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay, nesterov=True)


def tested(bench: Bench, model: nn.Module) -> float:
    """Test accuracy, float32."""
    return accuracy(model, list(bench.data.loader("test", 500)))


# --------------------------------------------------------------------------------------------------------------- pieces


def checks(bench: Bench) -> None:
    """(a) What the tests hold on a CPU, on the card."""
    for name, found in _checks(bench):
        if not bench.has(piece="checks", name=name):
            value, target, better = found()
            ok = value <= target if better == "at most" else value >= target
            bench.keep(piece="checks", name=name, value=value, target=f"{better} {target:g}", ok=bool(ok))


def _checks(bench: Bench) -> Iterator[tuple[str, Callable[[], tuple[float, float, str]]]]:
    def masked_against_cut(network: str, dtype: torch.dtype) -> float:
        torch.manual_seed(0)
        model = bench.make(network).eval()
        sc.recalibrate(model, bench.images()[:2])
        model = model.to(dtype)
        graph = sc.trace(model, torch.zeros(SHAPE, dtype=dtype, device=bench.device))
        plan = sc.allocate(graph, sc.score(model, graph, "magnitude"), sc.Budget(macs=0.5))
        small = sc.cut(model, plan)
        x = bench.images()[0][0][:32].to(dtype)
        return float(sc.check(model, small, plan, x))

    for network in ("resnet20", "vgg16_bn"):
        for dtype, target in ((torch.float64, 1e-10), (torch.float32, 1e-3), (torch.bfloat16, 0.1)):
            yield (
                f"cut against masked, {network}, {str(dtype).removeprefix('torch.')}",
                lambda n=network, d=dtype, t=target: (masked_against_cut(n, d), t, "at most"),
            )

    def compiled() -> tuple[float, float, str]:
        torch.manual_seed(0)
        model = bench.make("resnet20").eval()
        small = sc.prune(model, torch.zeros(SHAPE, device=bench.device), sc.Budget(macs=0.5)).model
        x = bench.images()[0][0][:32]
        with torch.no_grad():
            return float((torch.compile(small)(x) - small(x)).abs().max() / small(x).abs().max()), 1e-2, "at most"

    def same_plan() -> tuple[float, float, str]:
        torch.manual_seed(0)
        model, data = bench.make("resnet20").eval(), bench.images()
        sc.recalibrate(model, data)
        budget, x = sc.Budget(macs=0.5, round_to=1), torch.zeros(SHAPE)
        here = sc.prune(model, x.to(bench.device), budget, data=data)
        there = sc.prune(copy.deepcopy(model).cpu(), x, budget, data=[(a.cpu(), b.cpu()) for a, b in data])
        widths = [result.graph.kept(result.plan) for result in (here, there)]  # type: ignore[union-attr]
        return float(abs(widths[0] - widths[1]).sum() / sum(widths[1])), 0.02, "at most"

    def sdprun_step() -> tuple[float, float, str]:
        torch.manual_seed(0)
        model = ResNet((1, 1, 1, 1) if bench.dry else RESNETS[50])
        graph = sc.trace(model, torch.randn(1, 3, 64, 64))
        model = step.with_gradients(model.to(bench.device))
        other = step.with_gradients(copy.deepcopy(model))
        ours = sc.SDPrun(model, graph, lr=0.1, c=C, mu=MU)
        theirs = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, foreach=True)
        return step.measure(ours, theirs, bench.device, 2 if bench.dry else 100)["ratio"], 1.05, "at most"

    def one_pass_for_factors() -> tuple[float, float, str]:
        torch.manual_seed(0)
        model, batches = bench.make("vgg16_bn").eval(), bench.images()[:3]
        times: dict[str, list[float]] = {"plain": [], "channel": []}
        for number in range(2 if bench.dry else 7):
            for name, of in times.items():
                bench.cuda()
                start = time.perf_counter()
                factors.CONTENDERS[name](model, batches)
                bench.cuda()
                if number:
                    of.append(time.perf_counter() - start)
        return statistics.median(times["channel"]) / statistics.median(times["plain"]), 1.5, "at most"

    def packed() -> tuple[float, float, str]:
        torch.manual_seed(0)
        size = 64 if bench.dry else 4096
        model = nn.Sequential(nn.Linear(size, size, bias=False)).to(bench.device).eval()
        x = torch.randn(512, size, device=bench.device)
        result = sc.pivot(model, x[:1], keep=0.25, exclude=())
        fast = sc.pack(result.model, x[:1])
        found = sc.compare_latency({"dense": result.model, "packed": fast}, x, turns=3)
        return float(next(r["speed_up"] for r in found.as_data() if r["model"] == "packed")), 2.0, "at least"

    yield "compiled against eager, cut ResNet-20, relative", compiled
    yield "channels kept otherwise than on the CPU, ResNet-20 by default, part", same_plan
    yield "a step of SDPrun over one of SGD, ResNet-50", sdprun_step
    yield "a pass for Kronecker factors over a plain one, VGG-16", one_pass_for_factors
    yield "a quarter of a linear as dense blocks, times as fast", packed


def epochs(bench: Bench) -> None:
    """Seconds an epoch, by which everything else is planned."""
    networks = (("vgg16_bn", 1.0), ("wrn_28_10", 10.0), ("resnet32", 4.0), ("vgg19_bn", 1.0), ("resnet32", 1.0))
    for network, width in networks:
        key = ("epochs", network, width)
        row = next((r for r in bench.rows.rows if (r["piece"], r.get("network"), r.get("width")) == key), None)
        if row is None:
            torch.manual_seed(0)
            model = bench.make(network, width)
            seconds = trained(bench, model, sgd(model), 2, "constant", 0)  # the first compiles
            bench.keep(piece="epochs", network=network, width=width, seconds=seconds)
        else:
            seconds = row["seconds"]
        bench.seconds[network, width] = seconds


def by_sdprun(bench: Bench, piece: str, network: str, width: float, fraction: float) -> None:
    """SDPrun to a part of the MACs, and SGD with the same seed, schedule and order."""
    for seed in range(bench.seeds):
        for c in (0.0, C):
            key = {"piece": piece, "network": network, "seed": seed, "c": c, "epochs": bench.epochs}
            if bench.has(**key):
                continue
            bench.left(1.2 * bench.epochs * bench.seconds[network, width] + 40, f"{network}, c = {c:g}, seed {seed}")
            torch.manual_seed(seed)
            model, start = bench.make(network, width), time.perf_counter()
            graph = sc.trace(model, torch.zeros(SHAPE, device=bench.device))
            budget = {"budget": sc.Budget(macs=fraction)} if c else {}
            optimizer = sc.SDPrun(model, graph, lr=LR, c=c, mu=MU, weights="sqrt", **budget)
            trained(bench, model, optimizer, bench.epochs, "grda", seed)
            plan = sc.zero_channels(model, graph)
            small = sc.cut(model, plan)
            x = bench.images()[0][0]
            bench.keep(
                **key, macs=graph.macs(plan) / graph.macs(), params=graph.params(plan) / graph.params(),
                difference=float(sc.check(model, small, plan, x)), test=tested(bench, small),
                seconds=time.perf_counter() - start,
            )  # fmt: skip


def sdprun(bench: Bench) -> None:
    """(b) The published headline."""
    by_sdprun(bench, "sdprun", "vgg16_bn", 1.0, 0.3)


def wide(bench: Bench) -> None:
    """(e) WRN-28-10."""
    by_sdprun(bench, "wide", "wrn_28_10", 10.0, 0.4)


def dense(bench: Bench, network: str, width: float, seed: int) -> tuple[nn.Module, float]:
    """A network trained from scratch, its accuracy a row of its own."""
    torch.manual_seed(seed)
    model = bench.make(network, width)
    trained(bench, model, sgd(model), bench.epochs, "cosine", seed)
    return model, tested(bench, model)


def eigendamage(bench: Bench) -> None:
    """(c) A wide ResNet-32 in seven rounds."""
    rounds, after = (2, 1) if bench.dry else (7, max(2, bench.epochs // 8))
    network, x = "resnet32", torch.zeros(SHAPE, device=bench.device)
    for seed in range(bench.seeds):
        key = {"piece": "eigendamage", "network": network, "seed": seed, "epochs": bench.epochs, "rounds": rounds}
        if bench.has(**key):
            continue
        bench.left(
            (bench.epochs + rounds * after) * bench.seconds[network, 4.0] * 1.2 + 40 + 25 * rounds,
            f"{network}, seed {seed}",
        )
        start = time.perf_counter()
        model, before = dense(bench, network, 4.0, seed)
        full = counted(model, x)
        for number in range(1, rounds + 1):
            now = counted(model, x)
            part = {
                unit: min(1.0, goal ** (number / rounds) * full[unit] / now[unit])
                for unit, goal in (("params", 0.5 if bench.dry else 0.1), ("macs", 0.6 if bench.dry else 0.125))
            }
            model = sc.eigendamage(
                model, x, sc.Budget(**part, round_to=1), data=bench.images(seed), loss="cross_entropy", repair="refit"
            ).model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            trained(bench, model, sgd(model, 0.02, 1e-4), after, "one_cycle", seed + number)
        left = {unit: n / full[unit] for unit, n in counted(model, x).items()}
        test = tested(bench, model)
        bench.keep(**key, after=after, **left, before=before, test=test, seconds=time.perf_counter() - start)


def one_pass(bench: Bench) -> None:
    """(d) Sixty and ninety percent of the parameters gone at once, with the paper's baselines."""
    after, x = max(2, bench.epochs // 6), torch.zeros(SHAPE, device=bench.device)
    for network, width in (("vgg19_bn", 1.0), ("resnet32", 1.0)):
        for seed in range(bench.seeds):
            of_all = {"piece": "one pass", "network": network, "seed": seed, "epochs": bench.epochs}
            methods = ("obs", "kron_obd", "kron_obs", "eigendamage", "secateur")
            fractions = (0.4,) if bench.dry else (0.4, 0.1)
            keys = [of_all | {"method": m, "fraction": f} for f in fractions for m in methods]
            missing = [key for key in keys if not bench.has(**key)]
            if not missing:
                continue
            seconds = bench.seconds[network, width]
            bench.left(1.2 * (bench.epochs + after) * seconds + 60, f"{network}, seed {seed}")
            model, before = dense(bench, network, width, seed)
            full = counted(model, x)
            for key in missing:
                bench.left(1.2 * after * seconds + 30, f"{network}, {key['method']}")
                start = time.perf_counter()
                small = smaller(str(key["method"]), model, x, float(key["fraction"]), bench.images(seed))  # type: ignore[arg-type]
                took = time.perf_counter() - start
                left = {unit: n / full[unit] for unit, n in counted(small, x).items()}
                first = tested(bench, small)
                trained(bench, small, sgd(small, 0.02, 1e-4), after, "one_cycle", 100 + seed)
                test = tested(bench, small)
                bench.keep(**key, after=after, **left, before=before, untrained=first, test=test, seconds=took)


PIECES: dict[str, Callable[[Bench], None]] = {
    "checks": checks, "epochs": epochs, "sdprun": sdprun, "eigendamage": eigendamage, "one pass": one_pass,
    "wide": wide,
}  # fmt: skip


def drawn(device: torch.device) -> Dataset:
    """Images that say nothing, for a dry run."""
    g = torch.Generator().manual_seed(0)
    splits = [
        Split(torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8), torch.arange(n) % 10)
        for n in (2 * BATCH, 10, 500)
    ]
    data = Dataset("drawn", splits[0], splits[1], splits[2], 10, (0.5,) * 3, (0.25,) * 3, "random numbers")
    return data.to(device)


def main() -> None:
    """Run what is missing, as far as the time goes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call")
    parser.add_argument("--epochs", type=int, default=60, help="of a training from scratch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pieces", nargs="+", default=list(PIECES), choices=list(PIECES), metavar="PIECE")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--before", type=Path, help="rows of an earlier call")
    parser.add_argument("--dry", action="store_true", help="two steps of everything, narrow networks, no data set")
    given = parser.parse_args()
    if given.before is not None and not given.out.exists():
        if not given.before.exists():
            parser.error(f"--before: there is no file {given.before}")
        given.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(given.before, given.out)
    until = time.monotonic() + 60 * given.minutes
    if not (given.dry or torch.cuda.is_available()):
        parser.error("there is no GPU here; --dry runs two steps of everything on a CPU")
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = not given.dry
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    rows = Rows(
        given.out, card=card, torch=torch.__version__, batch=BATCH, lr=LR, c=C, mu=MU, dry=given.dry,
        note="CIFAR-10 is stored as JPEG; bfloat16 autocast",
    )  # fmt: skip
    data = drawn(device) if given.dry else load("cifar10", validation=0.1).to(device)
    bench = Bench(
        device, data, rows, until, 1 if given.dry else given.epochs, 1 if given.dry else given.seeds, given.dry
    )
    rows.state(left=[])
    wanted = [name for name in PIECES if name in {*given.pieces, "epochs"}]
    for name in wanted:
        try:
            PIECES[name](bench)
        except NoTimeError as short:
            rows.state(left=[*rows.fact("left", []), f"{name}: {short}"])
            print(f"{name}: {short}", flush=True)
    print("nothing is left" if not rows.fact("left") else "the same command with --before goes on")


if __name__ == "__main__":
    main()
