"""The figures of the documentation, drawn from the results in ``bench/results``; their tables are printed.

::

    python bench/figures.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from safetensors.torch import load_file

from secateur.lab.landscape.mode_connectivity import Plane
from secateur.report.mode_connectivity import draw_plane, draw_spectrum
from secateur.report.search import draw_search
from secateur.surgery.blocks.pattern import find_pattern

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FIGURES = HERE.parent / "docs" / "figures"
TITLES = {"lenet_300_100": "LeNet-300-100", "lenet5": "LeNet-5", "resnet20": "ResNet-20"}
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
    rows = [r for r in json.loads((HERE / "results" / "sdprun_mnist.json").read_text())["rows"] if not r.get("budget")]
    names = [name for name in TITLES if any(row["network"] == name for row in rows)]
    figure, panels = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.5), squeeze=False, layout="constrained")
    for axes, name in zip(panels[0], names, strict=True):
        trade_off(axes, [row for row in rows if row["network"] == name], TITLES[name])
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / "sdprun_mnist.png", dpi=150, metadata={"Software": None})


# method -> colour and line
STYLES = {
    "eigendamage": ("#0b5fa5", "-"), "eigendamage_ekfac": ("#0b5fa5", "--"), "eigendamage_threshold": ("#5aa9e6", ":"),
    "kron_obs": ("#b5410a", "-"), "kron_obd": ("#b5410a", "--"), "obs": ("#e8924a", "-"), "obd": ("#e8924a", "--"),
    "taylor": ("#2f7d32", "-"), "magnitude": ("#333333", "-"), "random": ("#bbbbbb", "-"),
}  # fmt: skip
Curve = dict[float, tuple[float, float, float]]


def curve(rows: list[dict[str, Any]], network: str, method: str, unit: str) -> Curve:
    """Budget -> what remains (%), mean test accuracy and its standard deviation (%), where all seeds met the budget."""
    mine = [r for r in rows if (r["network"], r["method"], r["unit"]) == (network, method, unit)]
    found = {}
    for fraction in sorted({r["fraction"] for r in mine}, reverse=True):
        here = [r for r in mine if r["fraction"] == fraction]
        if any("refused" in r for r in here):
            continue
        accuracies = [100 * r.get("test_recalibrated", r["test"]) for r in here]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        found[fraction] = 100 * statistics.mean(r[unit] for r in here), statistics.mean(accuracies), spread
    return found


def damage() -> None:
    """All one-shot methods without fine-tuning, over parameters and over MACs; networks that are through."""
    rows = json.loads((HERE / "results" / "damage.json").read_text())["rows"]
    names = [n for n in TITLES if {r["method"] for r in rows if r["network"] == n} >= set(STYLES)]
    figure, panels = plt.subplots(2, len(names), figsize=(4.6 * len(names), 7), squeeze=False, layout="constrained")
    for j, name in enumerate(names):
        for i, (unit, words) in enumerate((("params", "parameters"), ("macs", "MACs"))):
            axes = panels[i][j]
            print(f"\n{TITLES[name]}, {words}\n")
            for method, (colour, line) in STYLES.items():
                points = curve(rows, name, method, unit)
                if points:
                    x, y, sd = zip(*points.values(), strict=True)
                    axes.errorbar(
                        x, y, sd, color=colour, linestyle=line, marker="o", markersize=3, linewidth=1.3, elinewidth=0.6,
                        label=method.replace("_", " "),
                    )  # fmt: skip
            print_table(rows, name, unit)
            axes.set(xscale="log", xlabel=f"{words} that remain (%)", ylabel="test accuracy (%)", title=TITLES[name])
            low = min(100 * r[unit] for r in rows if r["network"] == name and unit in r)
            ticks = [tick for tick in (5, 10, 20, 40, 80) if tick > 0.9 * low]
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(FIGURES / "damage.png", dpi=130, metadata={"Software": None})


def print_table(rows: list[dict[str, Any]], network: str, unit: str) -> None:
    """One network's accuracies as a table in Markdown."""
    curves = {method: curve(rows, network, method, unit) for method in STYLES}
    fractions = sorted({f for points in curves.values() for f in points}, reverse=True)
    print("| method | " + " | ".join(f"{100 * f:g} %" for f in fractions) + " |")
    print("|---|" + "---|" * len(fractions))
    for method, points in curves.items():
        best = [f for f in points if points[f][1] >= max(c[f][1] for c in curves.values() if f in c) - 1e-9]
        cells = [f"{points[f][1]:.1f} ± {points[f][2]:.1f}" if f in points else "-" for f in fractions]
        marked = [f"**{c}**" if f in best else c for c, f in zip(cells, fractions, strict=True)]
        print(f"| {method} | " + " | ".join(marked) + " |")


def valley() -> None:
    """SGD's and SDPrun's solution: along the curve between them, the plane, the spectrum; and the table."""
    rows = json.loads((HERE / "results" / "valley.json").read_text())["rows"]
    names = [name for name in TITLES if any(row["network"] == name for row in rows)]
    figure, panels = plt.subplots(2, len(names), figsize=(4.6 * len(names), 6), squeeze=False, layout="constrained")
    for j, name in enumerate(names):
        for row in (row for row in rows if row["network"] == name):
            for kind, line in (("line", ":"), ("curve", "-")):
                points = row[kind]["rows"]
                way = [point["u"] for point in points]
                label = {"line": "straight", "curve": "trained curve"}[kind] if row["seed"] == 0 else None
                for i, (key, factor) in enumerate((("train_loss", 1), ("test_error", 100))):
                    values = [factor * point[key] for point in points]
                    panels[i][j].plot(way, values, line, color=BLUE, alpha=0.7, linewidth=1.2, label=label)
        panels[0][j].set(title=TITLES[name], ylabel="training loss", yscale="log")
        panels[1][j].set(ylabel="test error (%)")
        for axes in panels[:, j]:
            axes.set_xticks([0, 1], ["SGD", "SDPrun"])
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(FIGURES / "valley.png", dpi=130, metadata={"Software": None})
    print(
        "\n| network, seed | MACs left | test SGD, SDPrun | loss at both | highest between | allowed | straight line |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda r: (list(TITLES).index(r["network"]), r["seed"])):
        ends = [row["curve"]["rows"][i]["train_loss"] for i in (0, -1)]
        highest = max(point["train_loss"] for point in row["line"]["rows"])
        print(
            f"| {TITLES[row['network']]}, {row['seed']} | {row['macs']:.1%} | "
            f"{100 * row['test']['SGD']:.2f}, {100 * row['test']['SDPrun']:.2f} | {ends[0]:.5f}, {ends[1]:.5f} | "
            f"{row['highest']:.5f} | {row['allowed']:.5f} | {highest:.3f} |"
        )
    for row in rows:
        if "plane" in row:
            seen = {key: value for key, value in row["plane"].items() if key != "trainings"}
            drawn = draw_plane(
                Plane(**seen, axes=({}, {}, {})), ends=("SGD", "SDPrun"), paths=row["plane"]["trainings"]
            )
            drawn.savefig(FIGURES / "valley_plane.png", dpi=130, metadata={"Software": None})
            found = row["eigenvalues"]
            drawn = draw_spectrum(torch.tensor(found["values"]), steep=found["steep"])
            drawn.savefig(FIGURES / "valley_spectrum.png", dpi=130, metadata={"Software": None})


def rounds() -> None:
    """EigenDamage in rounds: accuracy over what remains."""
    rows = json.loads((HERE / "results" / "rounds.json").read_text())["rows"]
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.5), layout="constrained")
    for axes, (unit, words) in zip(panels, (("params", "parameters"), ("macs", "MACs")), strict=True):
        for seed in sorted({row["seed"] for row in rows}):
            points = [(100 * row[unit], 100 * row["test"]) for row in rows if row["seed"] == seed]
            axes.plot(*zip(*points, strict=True), "o-", color=BLUE, alpha=0.6, markersize=4, linewidth=1.2)
        axes.set(xlabel=f"{words} that remain (%)", ylabel="test accuracy (%)", title="ResNet-20, two epochs a round")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / "rounds.png", dpi=130, metadata={"Software": None})
    print("\n| after | parameters | MACs | test accuracy |\n|---|---|---|---|")
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        cells = [[100 * row[key] for row in own] for key in ("params", "macs", "test")]
        spread = statistics.stdev(cells[2]) if len(own) > 1 else 0.0
        means = [statistics.mean(values) for values in cells]
        print(f"| {stage} | {means[0]:.1f} % | {means[1]:.1f} % | {means[2]:.2f} ± {spread:.2f} % |")


def directional() -> None:
    """The table of directional pruning and refit, once a network."""
    rows = json.loads((HERE / "results" / "directional.json").read_text())["rows"]
    for name, title in TITLES.items():
        own = [row for row in rows if row["network"] == name and row["method"] != "dense"]
        budgets = list(dict.fromkeys((row["unit"], row["fraction"]) for row in own))
        if not own:
            continue
        print(f"\n{title}\n\n| method | " + " | ".join(f"{100 * f:g} % {u}" for u, f in budgets) + " |")
        print("|---|" + "---|" * len(budgets))
        for method in dict.fromkeys(row["method"] for row in own):
            cells = []
            for unit, fraction in budgets:
                here = [r for r in own if (r["method"], r["unit"], r["fraction"]) == (method, unit, fraction)]
                if any("refused" in r for r in here) or len(here) < 3:  # never means over different seeds
                    cells.append("-")
                    continue
                # refit sets the norms' statistics itself; for all others they are re-estimated
                values = [
                    100 * (r["test"] if "refit" in method else r.get("test_recalibrated", r["test"])) for r in here
                ]
                cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(here) > 1 else 0:.1f}")
            print(f"| {method} | " + " | ".join(cells) + " |")


def flat() -> None:
    """The table of the projectors: rank correlations with the exact ones, least to largest of the seeds."""
    rows = json.loads((HERE / "results" / "flat.json").read_text())["rank"]
    names = list(dict.fromkeys(key.split(":")[0] for key in rows[0] if ":" in key))
    print("\n| network | loss | against | " + " | ".join(names) + " |\n|---|---|---|" + "---|" * len(names))
    for network, length in dict.fromkeys((row["network"], row["length"]) for row in rows):
        own = [row for row in rows if (row["network"], row["length"]) == (network, length)]
        loss = f"{min(row['loss'] for row in own):.3f} to {max(row['loss'] for row in own):.3f}"
        for matrix in ("gauss_newton", "hessian"):
            values = [[row[f"{name}: {matrix}"] for row in own] for name in names]
            cells = " | ".join(f"{min(v):.2f} to {max(v):.2f}" for v in values)
            print(f"| {network} | {loss} | {matrix} | {cells} |")


def pivoting() -> None:
    """A trained layer, the blocks that hold most of its energy, and the same with rows and columns by block."""
    weight = load_file(HERE / "checkpoints" / "lenet_300_100_mnist_seed0.safetensors")["fc2.weight"]
    table = weight.double().square().numpy()
    kinds = {"bundles": find_pattern(table, 0.25, layout="bundles", blocks=4)}
    kinds["diagonal"] = find_pattern(table, 0.25, layout="diagonal")
    size = table**0.25  # of the squares: the root of the size, so that small weights can be seen
    figure, panels = plt.subplots(5, 1, figsize=(7.5, 9.5), layout="constrained")
    drawn = [("100 x 300 weights of a trained layer (the root of their size)", size)]
    for kind, pattern in kinds.items():
        part = f"{kind}: a quarter of the weights, {pattern.captured(table):.0%} of their energy"
        own = size[pattern.rows.flatten()]
        mask = pattern.mask()[pattern.rows.flatten()]
        order = np.argsort(np.argmax(mask[:: pattern.rows.shape[1]], 0) + len(mask) * ~mask.any(0), kind="stable")
        drawn += [(part, size * pattern.mask()), ("the same, rows and columns by block", (own * mask)[:, order])]
    for axes, (title, values) in zip(panels, drawn, strict=True):
        axes.imshow(values, cmap="Blues", aspect="auto", interpolation="nearest", vmax=float(size.max()))
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(xticks=[], yticks=[])
    figure.savefig(FIGURES / "pivoting.png", dpi=110, metadata={"Software": None})


def regret() -> None:
    """Regret in time, and against the number of combinations."""
    found = json.loads((HERE / "results" / "regret.json").read_text())
    marks, rows = found["marks"], found["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    players = list(dict.fromkeys(row["player"] for row in rows if row["what"] == "players"))
    for number, name in enumerate(players):
        values = np.array([x for r in rows if (r["what"], r["player"]) == ("players", name) for x in r["regret"]])
        low, middle, high = np.percentile(values, (10, 50, 90), axis=0)
        title = {"radius 12": "factored, theory", f"radius {found['tuned']:g}": "factored, tuned"}.get(name, name)
        left.plot(marks, middle, color=f"C{number}", label=title, linewidth=1.5)
        left.fill_between(marks, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
    left.set(xscale="log", yscale="log", xlabel="rounds", ylabel="regret", title="four factors of four arms")
    left.legend(fontsize=7, frameon=False)
    own = [row for row in rows if row["what"] == "sizes"]
    for sizes in dict.fromkeys(tuple(row["sizes"]) for row in own):
        values = [x[-1] for r in own if tuple(r["sizes"]) == sizes for x in r["regret"]]
        wrong, crowded = sum(sizes) - len(sizes), len(sizes) == 1  # its name would lie upon its neighbour's
        right.plot(wrong, np.median(values), "o", color=BLUE if sizes[0] == 4 else GREY)
        right.annotate(f"{len(sizes)} x {sizes[0]}", (wrong, float(np.median(values))), (-9, 7) if crowded else (6, -3),
                       fontsize=7, textcoords="offset points")  # fmt: skip
    right.set(xlabel="arms that are not the best of their factor", ylabel="regret after 100,000 rounds",
              title="factors x arms", xlim=(0, 66), ylim=0)  # fmt: skip
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / "regret.png", dpi=130, metadata={"Software": None})


def search() -> None:
    """What the search learned of a ResNet-20 at half of the MACs."""
    rows = json.loads((HERE / "results" / "search.json").read_text())["rows"]
    wanted = {"network": "resnet20", "method": "bandit", "macs": 0.5, "seed": 0}
    for row in rows:
        if wanted.items() <= row.items():
            draw_search(row["table"]).savefig(FIGURES / "search.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    sdprun_mnist()
    damage()
    directional()
    rounds()
    valley()
    flat()
    pivoting()
    if (HERE / "results" / "regret.json").exists():
        regret()
    if (HERE / "results" / "search.json").exists():
        search()
