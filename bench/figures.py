"""The figures of the documentation, drawn from the results in ``bench/results``.

::

    python bench/figures.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FIGURES = HERE.parent / "docs" / "figures"
TITLES = {"lenet_300_100": "LeNet-300-100", "lenet5": "LeNet-5"}
BLUE, GREY = "#0b5fa5", "#777777"


def trade_off(axes: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Test accuracy over the MACs that remain: one dot a seed, a line through the means."""
    strengths = sorted({row["c"] for row in rows})
    dense = 100 * statistics.mean(row["test"] for row in rows if row["c"] == 0)
    means = []
    for c in strengths:
        points = [(100 * row["macs"], 100 * row["test"]) for row in rows if row["c"] == c]
        axes.plot(*zip(*points, strict=True), "o", color=BLUE, alpha=0.35, markersize=4, markeredgewidth=0)
        means.append(tuple(statistics.mean(values) for values in zip(*points, strict=True)))
        axes.annotate(
            f"c = {c:g}" if c else "SGD", means[-1], (4, -11), textcoords="offset points", fontsize=8, color=GREY
        )
    axes.plot(*zip(*means, strict=True), color=BLUE, linewidth=1.5)
    axes.axhline(dense - 0.3, color=GREY, linewidth=0.8, linestyle="--")
    axes.annotate("SGD - 0.3 points", (100, dense - 0.3), (0, 3), textcoords="offset points", ha="right", fontsize=8)
    axes.axvline(30, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 115), xlabel="MACs that remain (%)", ylabel="test accuracy (%)", title=title)
    axes.spines[["top", "right"]].set_visible(False)


def sdprun_mnist() -> None:
    """SDPrun against SGD on MNIST, the whole curve."""
    rows = json.loads((HERE / "results" / "sdprun_mnist.json").read_text())["rows"]
    names = [name for name in TITLES if any(row["network"] == name for row in rows)]
    figure, panels = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.5), squeeze=False, layout="constrained")
    for axes, name in zip(panels[0], names, strict=True):
        trade_off(axes, [row for row in rows if row["network"] == name], TITLES[name])
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / "sdprun_mnist.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    sdprun_mnist()
