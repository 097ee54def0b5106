"""What the six systems' papers say, and what is measured here: published, ours, difference, state.

The published side is facts with their source; of arXiv 2107.05328, 1807.01488 and 1712.01084 the abstract alone is
public, so that no table can be quoted. Our side is read from ``bench/results``; what is not there keeps its row and
says what it wants. ``--write`` puts the table into ``docs/results.md``; a test holds that it is what this prints::

    python bench/published.py --write
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import Rows

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
BEGIN, END = "<!-- published: written by bench/published.py -->", "<!-- published: end -->"
GPU = "open: wants a GPU, `python bench/gpu.py --pieces {}`"
IMAGENET = "open: wants ImageNet and days of several GPUs; no recipe is here"


@dataclass(frozen=True)
class Ours:
    """What was measured here.

    Attributes:
        number: it.
        difference: to the published one, or to the baseline of the same run.
        state: "same setting", or what is different.
    """

    number: str
    difference: str
    state: str


@dataclass(frozen=True)
class Claim:
    """A row of a paper.

    Attributes:
        system: whose it is.
        source: where it stands.
        setting: network, data, what was asked.
        number: what was found.
        ours: what was measured here; None if nothing was.
        wants: what ours wants where there is nothing.
    """

    system: str
    source: str
    setting: str
    number: str
    ours: Callable[[], Ours | None]
    wants: str


def results(name: str) -> list[dict[str, Any]]:
    """The rows of a bench."""
    return Rows(HERE / "results" / f"{name}.json").rows


def mean(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else " (1 seed)"
    return f"{statistics.mean(values):.{digits}f}{spread}"


def on_a_card(piece: str) -> Callable[[], Ours | None]:
    """SDPrun against SGD, or EigenDamage before and after, from ``bench/gpu.py``."""

    def found() -> Ours | None:
        rows = [r for r in results("gpu") if r["piece"] == piece]
        if piece == "eigendamage" and rows:
            lost = [100 * (r["test"] - r["before"]) for r in rows]
            params, macs = (statistics.mean(1 / r[unit] for r in rows) for unit in ("params", "macs"))
            return Ours(
                f"{params:.1f}x fewer parameters, {macs:.1f}x MACs",
                f"{mean(lost)} points",
                f"{rows[0]['epochs']} epochs, JPEG",
            )
        pruned = {r["seed"]: r for r in rows if r["c"]}
        pairs = [(pruned[r["seed"]], r) for r in rows if not r["c"] and r["seed"] in pruned]
        if not pairs:
            return None
        left = 100 * statistics.mean(a["macs"] for a, _ in pairs)
        return Ours(
            f"{mean([100 * a['test'] for a, _ in pairs])} % at {left:.0f} % of the MACs",
            f"{mean([100 * (a['test'] - b['test']) for a, b in pairs])} points to SGD",
            f"{pairs[0][0]['epochs']} epochs, JPEG",
        )

    return found


def sdprun_on_mnist() -> Ours | None:
    """The strengths that the recipes take."""
    found = []
    for network, c in (("lenet_300_100", 0.006), ("lenet5", 0.13)):
        rows = [r for r in results("sdprun_mnist") if r["network"] == network]
        plain, pruned = ({r["seed"]: r for r in rows if r["c"] == strength} for strength in (0, c))
        both = [(pruned[s], plain[s]) for s in pruned if s in plain]
        if not both:
            return None
        macs = 100 * statistics.mean(a["macs"] for a, _ in both)
        reached = f"{mean([100 * a['test'] for a, _ in both])} % at {macs:.0f} % of the MACs"
        found.append((reached, mean([100 * (a["test"] - b["test"]) for a, b in both])))
    return Ours(
        f"LeNet-300-100 {found[0][0]}; LeNet-5 {found[1][0]}",
        f"{found[0][1]}; {found[1][1]} points to SGD",
        "in small: MNIST, 20 and 30 epochs",
    )


def eigendamage_against(fraction: float) -> Callable[[], Ours | None]:
    """EigenDamage and the best of the channel-wise ones, fine-tuned."""

    def found() -> Ours | None:
        rows = [r for r in results("finetuned") if r["passes"] == "one pass" and r["fraction"] == fraction]
        by = {
            m: [100 * r["test"] for r in rows if r["method"] == m]
            for m in ("eigendamage", "obs", "kron_obd", "kron_obs")
        }
        if not all(by.values()):
            return None
        other = max((m for m in by if m != "eigendamage"), key=lambda m: statistics.mean(by[m]))
        name = {"obs": "C-OBS", "kron_obd": "Kron-OBD", "kron_obs": "Kron-OBS"}[other]
        return Ours(
            f"{mean(by['eigendamage'])} %",
            f"{statistics.mean(by['eigendamage']) - statistics.mean(by[other]):+.2f} points to "
            f"{name}, the best of them",
            "in small: ResNet-20 on JPEG images, 3 epochs",
        )

    return found


def gradual(method: str) -> Callable[[], Ours | None]:
    """IncReg or SPP against one-shot magnitude, as many epochs."""

    def found() -> Ours | None:
        for network in ("resnet20", "resnet8", "lenet5"):
            rows = [r for r in results("gentle") if r["network"] == network and r["macs"] == 0.5]
            ours, plain = ({r["seed"]: r["test"] for r in rows if r["method"] == m} for m in (method, "magnitude"))
            both = [100 * (ours[s] - plain[s]) for s in ours if s in plain]
            if both:
                return Ours(
                    f"{network}, half of the MACs: {mean([100 * v for v in ours.values()])} %",
                    f"{mean(both)} points to one-shot magnitude, fine-tuned as long",
                    "in small: 6 epochs",
                )
        return None

    return found


def packed() -> Ours | None:
    """Linear layers of 4,096, 32 inputs at a time."""
    rows = [
        r
        for r in results("packed")
        if (r["kind"], r["width"], r["batch"], r["threads"], r["layout"]) == ("linear", 4096, 32, 1, "bundles")
    ]
    if not rows:
        return None
    by = {r["reduction"]: r["speedup"] for r in rows}
    return Ours(
        "linear 4,096, 32 inputs: " + ", ".join(f"{by[n]:.1f}x of {n:g}x" for n in sorted(by)),
        f"{min(by[n] / n for n in by):.2f} of linear at least",
        "same claim: one thread of a CPU",
    )


def regret() -> Ours | None:
    """How much the regret grows from 10,000 to 100,000 rounds, with the radius that is used."""
    grown = [
        one[6] / one[4]
        for r in results("regret")
        if r["what"] == "players" and r["player"] == "radius 1"
        for one in r["regret"]
        if one[4]
    ]
    if not grown:
        return None
    return Ours(
        f"4 factors of 4: {statistics.median(grown):.2f}x the regret in 10x the rounds",
        "log 100,000 / log 10,000 = 1.25",
        "same claim: rank-one rewards, constants of ours",
    )


CLAIMS = (
    Claim(
        "EigenDamage",
        "arXiv 1905.05934, abstract",
        "ResNet-32 four times as wide, CIFAR-10, iterative",
        "10x fewer parameters, 8x fewer FLOPs at negligible loss",
        on_a_card("eigendamage"),
        GPU.format("eigendamage"),
    ),
    *(
        Claim(
            "EigenDamage",
            "arXiv 1905.05934, abstract and released settings",
            f"one pass, {1 - f:.0%} of the parameters gone, fine-tuned, against C-OBS, Kron-OBD, Kron-OBS",
            "improvements largest for hard data and networks",
            eigendamage_against(f),
            'open: `python bench/finetuned.py`; in full `python bench/gpu.py --pieces "one pass"`',
        )
        for f in (0.4, 0.2)
    ),
    Claim(
        "SDPrun",
        "arXiv 2107.05328, abstract",
        "VGG-16, CIFAR-10, no retraining",
        "93.97 % (pixel-exact images)",
        on_a_card("sdprun"),
        GPU.format("sdprun"),
    ),
    Claim(
        "SDPrun",
        "arXiv 2107.05328, abstract",
        "DNN, MNIST: the same valley as SGD",
        "no number is public",
        sdprun_on_mnist,
        "open: `python bench/sdprun_mnist.py`",
    ),
    Claim(
        "SDPrun's solver, gRDA",
        "logs of arXiv 2006.09358's code",
        "WRN-28-10, CIFAR-10, 200 epochs, mu 0.6",
        "94.50 %, SGD 94.17 ± 0.11 %, 2.9 % of the weights",
        on_a_card("wide"),
        GPU.format("wide"),
    ),
    Claim(
        "IncReg",
        "its release's page (arXiv 1811.08390)",
        "VGG-16, ImageNet, 5x fewer FLOPs of convolutions",
        "top-1 70.62 -> 67.62 %",
        lambda: None,
        IMAGENET,
    ),
    Claim(
        "IncReg",
        "its release's page (arXiv 1811.08390)",
        "ResNet-50, ImageNet, 2x",
        "top-1 72.92 -> 72.47 %",
        lambda: None,
        IMAGENET,
    ),
    Claim(
        "IncReg",
        "arXiv 1811.08390",
        "small networks",
        "no number is quoted here",
        gradual("increg"),
        "open: `python bench/gentle.py accuracy`",
    ),
    Claim(
        "SPP",
        "arXiv 1709.06994, abstract",
        "AlexNet, ImageNet, 4x",
        "-0.3 points of top-5",
        lambda: None,
        IMAGENET,
    ),
    Claim(
        "SPP",
        "arXiv 1709.06994, abstract",
        "VGG-16, ImageNet, 4x",
        "-0.8 points of top-5",
        lambda: None,
        IMAGENET,
    ),
    Claim(
        "SPP",
        "arXiv 1709.06994, abstract",
        "ResNet-50, ImageNet, 2x",
        "-0.8 points of top-5",
        lambda: None,
        IMAGENET,
    ),
    Claim(
        "SPP",
        "arXiv 1709.06994",
        "small networks",
        "no number is quoted here",
        gradual("spp"),
        "open: `python bench/gentle.py accuracy`",
    ),
    Claim(
        "Matrix pivoting",
        "arXiv 1712.01084, abstract",
        "speed against the reduction of coefficients",
        "close to linear",
        packed,
        "open: `python bench/packed.py`",
    ),
    Claim(
        "Factored bandits",
        "arXiv 1807.01488, abstract",
        "regret, actions from a product of factors",
        "bounds that match up to constants, logarithmic in time",
        regret,
        "open: `python bench/regret.py`",
    ),
)


def table() -> str:
    """A row a claim."""
    lines = ["| system | published | ours | difference | state |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        found = claim.ours()
        own = f"{found.number} | {found.difference} | {found.state}" if found else f"- | - | {claim.wants}"
        lines.append(f"| {claim.system} | {claim.setting}: {claim.number} ({claim.source}) | {own} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/results.md")
    given = parser.parse_args()
    print(table())
    if given.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
