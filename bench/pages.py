"""Every table of the pages that is made of ``bench/results/*.json``: one command writes them all, a test compares.

A page says ``<!-- table: NAME -->``, then the table, then ``<!-- end -->``; ``NAME`` is one of ``TABLES``. Nothing is
run here, and no number is typed. ``published.py`` and ``real.py`` write their own parts::

    python bench/pages.py --write
    python bench/pages.py widths
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

import backends
import tables
from oneshot import HERE

DOCS = HERE.parent / "docs"
PLACE = re.compile(r"<!-- table: (?P<name>[\w.-]+) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {}
Row = dict[str, Any]
NETWORKS = {"lenet_300_100": "LeNet-300-100", "lenet5": "LeNet-5", "resnet20": "ResNet-20", "resnet8": "ResNet-8"}


@cache
def results(name: str) -> dict[str, Any]:
    """All that a file of results holds."""
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return found


def rows_of(name: str, **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in results(name)["rows"] if all(row.get(key) == value for key, value in wanted.items())]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation; nothing where nothing was measured."""
    if not values:
        return "-"
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def named(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a table."""

    def register(make: Callable[[], str]) -> Callable[[], str]:
        TABLES[name] = make
        return make

    return register


# -------------------------------------------------------------------------------------------------- one-shot methods


def best_norms(row: Row) -> float | None:
    """Test accuracy (%) with norms as they are or re-estimated, the better one; None where a method refused."""
    found = [row[key] for key in ("test", "test_recalibrated") if row.get(key) is not None]
    return 100 * max(found) if found else None


def recalibrated(row: Row) -> float | None:
    """With the norms re-estimated, where there are any."""
    value = row.get("test_recalibrated", row.get("test"))
    return None if value is None else 100 * value


DAMAGE = (
    "eigendamage", "eigendamage_ekfac", "eigendamage_threshold", "kron_obs", "kron_obd", "obs", "obd", "taylor",
    "magnitude", "random",
)  # fmt: skip


def by_budget(
    file: str, network: str, unit: str, methods: Sequence[str], value: Callable[[Row], float | None]
) -> dict[tuple[str, float], list[float]]:
    """Method and budget to one value a seed."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for row in rows_of(file, network=network, unit=unit):
        number = value(row) if row["method"] in methods else None
        if number is not None:
            found[row["method"], row["fraction"]].append(number)
    return found


def damage(network: str, unit: str) -> str:
    """All one-shot methods at all budgets; the best of each is bold."""
    found = by_budget("damage", network, unit, DAMAGE, recalibrated)
    fractions = sorted({fraction for _, fraction in found}, reverse=True)
    best = {f: max(statistics.mean(v) for (_, g), v in found.items() if g == f) for f in fractions}

    def cell(method: str, fraction: float) -> str:
        values = found.get((method, fraction), [])
        text = spread(values)
        return f"**{text}**" if values and statistics.mean(values) == best[fraction] else text

    rows = [[method, *(cell(method, f) for f in fractions)] for method in DAMAGE]
    return table(["method", *(f"{100 * f:g} %" for f in fractions)], rows)


def fitted(network: str, unit: str, words: str) -> str:
    """EigenDamage as it is, and fitted."""
    methods = {"plain": "eigendamage", "fitted": "eigendamage_refit"}
    plain = by_budget("damage", network, unit, ["eigendamage"], best_norms)
    found = plain | by_budget("damage", network, unit, ["eigendamage_refit"], lambda row: 100 * row["test"])
    fractions = sorted({fraction for _, fraction in found}, reverse=True)
    rows = [[name, *(spread(found[method, f]) for f in fractions)] for name, method in methods.items()]
    return table([f"{NETWORKS[network]}{words}, {UNITS[unit]}", *(f"{100 * f:g} %" for f in fractions)], rows)


UNITS = {"params": "parameters", "macs": "MACs"}
for _network in ("lenet_300_100", "lenet5", "resnet20"):
    for _unit in UNITS:
        TABLES[f"damage.{_network}.{_unit}"] = partial(damage, _network, _unit)
        _words = ", first 2,500 test images" if _network == "resnet20" else ""
        TABLES[f"fitted.{_network}.{_unit}"] = partial(fitted, _network, _unit, _words)

DIRECTIONAL = (
    "magnitude", "taylor", "taylor + consumers", "selection", "radial", "valley", "magnitude + refit", "taylor + refit",
    "valley + refit", "valley, one lambda + refit",
)  # fmt: skip


def directional(network: str) -> str:
    """Directional pruning and refit, nothing trained."""
    found = {
        (unit, *key): values
        for unit in UNITS
        for key, values in by_budget("directional", network, unit, DIRECTIONAL, _as_compared).items()
    }
    budgets = sorted({(u, f) for u, _, f in found}, key=lambda b: (list(UNITS).index(b[0]), -b[1]))
    rows = [[m, *(spread(found[u, m, f]) for u, f in budgets)] for m in DIRECTIONAL]
    return table(["method", *(f"{100 * f:g} % {u}" for u, f in budgets)], rows)


def _as_compared(row: Row) -> float:
    return 100 * row["test"] if "refit" in row["method"] else recalibrated(row) or 0.0


for _network in ("lenet5", "resnet20"):
    TABLES[f"directional.{_network}"] = partial(directional, _network)


PEERS = (
    "secateur", "secateur.hybrid", "secateur, by the loss", "secateur, by the loss, round_to=1",
    *(f"torch-pruning/{c}/{s}" for c in ("magnitude", "taylor", "bn_scale", "hessian") for s in ("global", "layer")),
)  # fmt: skip
MACS = (0.7, 0.5, 0.3)


def peer_values(method: str, macs: float, value: str = "test") -> list[float]:
    """Test accuracy (%) of a method of ``bench/peers.py``, one number a seed."""
    return [100 * row[value] for row in rows_of("peers", method=method, fraction=macs) if value in row]


@named("peers")
def peers() -> str:
    """Beside torch-pruning, before and after two epochs of training."""
    rows = [
        [m, *(spread(peer_values(m, f)) for f in MACS),
         *(spread(peer_values(m, f, "trained")).replace("-", "open") for f in MACS)]
        for m in PEERS
    ]  # fmt: skip
    return table(["", *(f"{100 * f:g} %" for f in MACS), *(f"{100 * f:g} %, trained" for f in MACS)], rows)


@named("peers.best")
def peers_best() -> str:
    """The same in three rows: ours, and the best of theirs at each budget."""
    theirs = [max(statistics.mean(peer_values(m, f)) for m in PEERS if m.startswith("torch-pruning")) for f in MACS]
    rows = [
        ["`sc.hybrid`, channels and bottlenecks", *(spread(peer_values("secateur.hybrid", f)) for f in MACS)],
        ["`sc.prune`, the default", *(spread(peer_values("secateur", f)) for f in MACS)],
        ["the best of eight settings of torch-pruning", *(f"{value:.1f}" for value in theirs)],
    ]
    return table(["ResNet-20, CIFAR-10, 85.1 % whole", *(f"{100 * f:g} % of the MACs" for f in MACS)], rows)


CONFIGURATIONS = (
    "hybrid/auto", "auto+distill", "auto", "outputs/global/refit", "schur/global/refit", "schur/uniform/refit",
    "schur/global/none", "schur/threshold/refit", "schur/sensitivity/refit", "obs/global/refit",
    "kron_obs/global/refit",
    "taylor/global/refit", "taylor/uniform/refit", "taylor/uniform/none", "taylor/global/none",
    "taylor/sensitivity/refit", "magnitude/global/refit", "magnitude/uniform/refit", "magnitude/uniform/none",
    "schur/global/recalibrate", "schur/uniform/recalibrate", "obs/global/recalibrate", "kron_obs/global/compensate",
    "kron_obs/global/none", "taylor/global/recalibrate", "taylor/uniform/recalibrate", "magnitude/global/recalibrate",
    "magnitude/uniform/recalibrate", "eigendamage/none", "eigendamage/refit", "hybrid/refit", "hybrid/refit+distill",
    "outputs/global/refit+distill", "hybrid/refit+distill_more", "outputs/global/refit+distill_more",
    "magnitude/uniform/distill",
)  # fmt: skip


def ablation(network: str) -> str:
    """Criteria, strategies and repairs, nothing trained."""
    return tables.table(rows_of("ablation", network=network), "test", 100, 1, list(CONFIGURATIONS)) + "\n"


for _network in ("resnet20", "resnet8", "lenet5", "lenet_300_100", "small_vit"):
    TABLES[f"ablation.{_network}"] = partial(ablation, _network)


@named("stories")
def stories() -> str:
    """The same of a Llama, nats a token."""
    return tables.table(results("stories")["rows"], "nats", 1, 2, list(CONFIGURATIONS)) + "\n"


@named("rounds")
def rounds() -> str:
    """EigenDamage in rounds, with fine-tuning."""
    rows = []
    for stage in dict.fromkeys(row["stage"] for row in results("rounds")["rows"]):
        some = rows_of("rounds", stage=stage)
        sizes = [f"{100 * statistics.mean(row[unit] for row in some):.1f} %" for unit in UNITS]
        name = "round 4" if stage == "after" else stage
        rows.append([name, *sizes, f"{spread([100 * row['test'] for row in some], 2)} %"])
    return table(["after", "parameters", "MACs", "test accuracy"], rows)


# --------------------------------------------------------------------------------------------------- while training


def sdprun(network: str) -> str:
    """SDPrun by its strength, one number a seed."""
    rows = []
    for c in sorted({row["c"] for row in rows_of("sdprun_mnist", network=network)}):
        some = sorted(rows_of("sdprun_mnist", network=network, c=c), key=lambda row: row["seed"])
        numbers = [" / ".join(f"{100 * row[key]:.2f}" for row in some) for key in ("macs", "test", "validation")]
        rows.append([f"{c:g}", str(len(some)), *numbers])
    return table(["c", "seeds", "MACs (%)", "test accuracy (%)", "held-out accuracy (%)"], rows)


for _network in ("lenet_300_100", "lenet5"):
    TABLES[f"sdprun.{_network}"] = partial(sdprun, _network)


@named("valley")
def valley() -> str:
    """The loss between SGD and SDPrun."""
    rows = []
    for row in results("valley")["rows"]:
        line, curve = row["line"]["rows"], row["curve"]["rows"]
        ends = [curve[0]["train_loss"], curve[-1]["train_loss"]]
        rows.append([
            f"{NETWORKS[row['network']]}, {row['seed']}", f"{100 * row['macs']:.1f} %",
            ", ".join(f"{100 * value:.2f}" for value in row["test"].values()),
            ", ".join(f"{value:.5f}" for value in ends), f"{row['highest']:.5f}", f"{row['allowed']:.5f}",
            f"{max(point['train_loss'] for point in line):.3f}",
        ])  # fmt: skip
    head = ["network, seed", "MACs left", "test SGD, SDPrun (%)", "loss at both ends", "highest between", "allowed",
            "highest on the straight line"]  # fmt: skip
    return table(head, rows)


def gentle(network: str, methods: dict[str, str]) -> str:
    """Gradual pruning against one-shot magnitude, test and held-out accuracy."""
    rows = []
    for macs in sorted({row["macs"] for row in rows_of("gentle", network=network)}, reverse=True):
        cells = []
        for method in methods:
            some = rows_of("gentle", network=network, macs=macs, method=method)
            held_out = statistics.mean(100 * row["validation"] for row in some) if some else 0.0
            cells.append(f"{spread([100 * row['test'] for row in some], 2)} ({held_out:.2f})" if some else "-")
        rows.append([f"{100 * macs:g} % of the MACs", *cells])
    return table(["test (held-out) accuracy, %", *methods.values()], rows)


TABLES["gentle.lenet5"] = partial(
    gentle, "lenet5", {"magnitude": "magnitude", "increg": "IncReg", "greg1": "GReg-1", "spp": "SPP"}
)
TABLES["gentle.resnet8"] = partial(gentle, "resnet8", {"magnitude": "magnitude", "increg": "IncReg", "spp": "SPP"})


def pivoting(network: str, title: str, words: dict[str, str]) -> str:
    """Dense blocks after fine-tuning."""
    rows = []
    for method, name in words.items():
        some = rows_of("pivoting", network=network, method=method)
        macs = 100 * statistics.mean(row["macs"] for row in some)
        rows.append([name, spread([100 * row["test"] for row in some], 2), f"{macs:.1f}"])
    return table([title, "test accuracy (%)", "MACs (%)"], rows)


_BUNDLES = {"weights": "weights", "8 bundles": "8 bundles"}
TABLES["pivoting.lenet_300_100"] = partial(
    pivoting, "lenet_300_100", "LeNet-300-100, MNIST",
    {**_BUNDLES, "bundles": "bundles (4, the default)", "gradual": "gradual (bundles)", "diagonal": "diagonal",
     "growth": "growth", "channels": "channels", "bundles, Fisher": "bundles, Fisher"},
)  # fmt: skip
TABLES["pivoting.lenet5"] = partial(
    pivoting, "lenet5", "LeNet-5, MNIST",
    {**_BUNDLES, "diagonal": "diagonal", "bundles": "bundles (1 in the convolution, 4 in the linear layer)",
     "gradual": "gradual (bundles)", "channels": "channels"},
)  # fmt: skip
TABLES["pivoting.resnet8"] = partial(
    pivoting, "resnet8", "ResNet-8, CIFAR-10 (stored as JPEG)",
    {"weights": "weights", "8 bundles": "8 bundles (of four rows or more)",
     "bundles": "bundles (the default: 1, in the last stage 2)", "channels": "channels"},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- widths

SEARCH = {
    "uniform": "uniform", "global": "global", "threshold": "threshold", "sensitivity": "sensitivity, greedy",
    "random": "random search", "bandit": "**bandit**", "duels": "**duels**",
}  # fmt: skip


def search(network: str, title: str) -> str:
    """Widths by a search, norms re-estimated, and after an epoch of fine-tuning where that was done."""
    budgets = sorted({row["macs"] for row in rows_of("search", network=network)}, reverse=True)

    def cell(method: str, macs: float) -> str:
        some = rows_of("search", network=network, method=method, macs=macs)
        tuned = [100 * row["test_tuned"] for row in some if row.get("test_tuned") is not None]
        return spread([100 * row["test"] for row in some], 2) + (f" ({spread(tuned, 2)})" if tuned else "")

    rows = [[name, *(cell(method, macs) for macs in budgets)] for method, name in SEARCH.items()]
    return table([title, *(f"{100 * macs:g} % of the MACs" for macs in budgets)], rows)


TABLES["search.lenet5"] = partial(search, "lenet5", "LeNet-5, MNIST (99.32 before)")
TABLES["search.resnet20"] = partial(search, "resnet20", "ResNet-20, CIFAR-10, stored as JPEG (85.12 ± 0.19 before)")


@named("latency")
def latency() -> str:
    """Budgets in milliseconds."""
    names = {"resnet20": "ResNet-20, 32 images", "resnet50-like": "ResNet-50-like, one image"}
    rows = []
    for row in results("latency")["rows"]:
        numbers = [100 * row[key] for key in ("error", "fit", "allowed", "again", "macs")]
        told = [f"{n:.1f}" if at != 2 else f"{n:.0f}" for at, n in enumerate(numbers)]
        rows.append([names.get(row["network"], row["network"]), str(row["round_to"]), *told])
    head = ["network", "multiples of", "fit's error (%)", "by the fit (%)", "allowed (%)", "measured again (%)",
            "MACs (%)"]  # fmt: skip
    return table(head, rows)


@named("widths")
def widths() -> str:
    """Widths by a search, from predicted rises."""
    rows = []
    for method in ("global", "sensitivity", "random", "bandit", "bandit, repaired", "duels"):

        def cell(network: str, fraction: float, digits: int, method: str = method) -> str:
            some = [100 * r["test"] for r in rows_of("widths", network=network, method=method, fraction=fraction)]
            few = f" ({len(some)} seed{'s' * (len(some) > 1)})" if len(some) < 3 else ""
            return spread(some, digits) + few

        seconds = [row["seconds"] for row in rows_of("widths", network="resnet20", method=method)]
        rows.append([
            method, cell("resnet20", 0.5, 1), cell("resnet20", 0.3, 1), f"{statistics.median(seconds):.0f}",
            cell("lenet5", 0.5, 2), cell("lenet5", 0.3, 2),
        ])  # fmt: skip
    return table(["widths by", "ResNet-20, 50 % of the MACs", "30 %", "seconds", "LeNet-5, 50 %", "30 %"], rows)


# ---------------------------------------------------------------------------------------------------------- the bandit

PLAYERS = {
    "radius 12": "factored, the theory's radius (12)", "radius 1": "factored, tuned radius (1)",
    "duels": "factored, duels, the same radius",
    "joint UCB1": "UCB1, one arm for each of the 256 combinations",
    "joint UCB1, tuned": "the same, its bonus as much smaller as the tuned radius is",
    "joint elimination": "successive elimination of combinations",
    "factor UCB1": "UCB1 for every factor by itself", "uniform": "uniform play",
}  # fmt: skip


def last_regrets(what: str, player: str, sizes: list[int] | None = None) -> tuple[np.ndarray, float]:
    """The regret of all repetitions in the end, and how many were wrong then."""
    some = [r for r in rows_of("regret", what=what, player=player) if sizes is None or r["sizes"] == sizes]
    regret = np.array([one[-1] for row in some for one in row["regret"]])
    right = [one for row in some for one in row["right"]]
    return regret, 1 - float(np.mean(right))


@named("regret.players")
def regret_players() -> str:
    """Regret by player."""
    rows = []
    for player, name in PLAYERS.items():
        regret, wrong = last_regrets("players", player)
        low, high = np.percentile(regret, (10, 90))
        median = f"{np.median(regret):,.0f}"
        median = f"**{median}**" if player == "radius 1" else median
        told = f"{median} ({low:,.0f} to {high:,.0f}; {regret.max():,.0f})"
        rows.append([name, told, "-" if player == "uniform" else f"{100 * wrong:.0f} %"])
    return table(["player", "regret", "wrong in the end"], rows)


@named("regret.radius")
def regret_radius() -> str:
    """Regret by radius."""
    radii = (12, 4, 1, 0.5, 0.25, 0.1)
    found = [last_regrets("tuning", f"radius {radius:g}") for radius in radii]
    return table(
        ["radius", *(f"{radius:g}" for radius in radii)],
        [
            ["regret, median", *(f"{np.median(regret):,.0f}" for regret, _ in found)],
            ["regret, worst of 100", *(f"{regret.max():,.0f}" for regret, _ in found)],
            ["wrong in the end", *(f"{100 * wrong:.0f} %" for _, wrong in found)],
        ],
    )


# ------------------------------------------------------------------------------------------------------------- speed


@named("backends")
def by_backend() -> str:
    """Half of the MACs, by backend."""
    return backends.table(results("backends")["rows"]).split("\n\n")[0] + "\n"


def packed_cell(some: list[Row], keep: float, batches: Sequence[int]) -> str:
    found = {row["batch"]: row["speedup"] for row in some if row["keep"] == keep}
    return " / ".join(f"{found[b]:.2f}" for b in batches) if len(found) == len(batches) else "-"


@named("packed")
def packed() -> str:
    """Packed layers and networks: how many times as fast."""
    rows, names = [], {"vgg16": "VGG-16", "vgg16_bn": "VGG-16", "resnet20": "ResNet-20"}
    every = results("packed")["rows"]
    for threads, kinds in ((1, ("linear", "convolution", "network")), (2, ("network",))):
        for kind in kinds:
            for width, size in dict.fromkeys((r["width"], r.get("size")) for r in every if r["kind"] == kind):
                name = names.get(str(width)) or f"{kind} {width:,}"
                name += f" ({size} x {size})" if kind == "convolution" else ""
                for layout in ("bundles", "diagonal"):
                    some = [
                        r for r in every
                        if (r["kind"], r["width"], r["layout"], r["threads"]) == (kind, width, layout, threads)
                    ]  # fmt: skip
                    cells = [packed_cell(some, keep, (1, 32, 256)) for keep in (0.5, 0.25, 0.125)]
                    rows.append([f"{name}, {layout}{', two threads' if threads > 1 else ''}", *cells])
    return table(["layer, layout", "1/2, batch 1 / 32 / 256", "1/4", "1/8"], rows)


# --------------------------------------------------------------------------------------------------------- the pages


def written(text: str) -> str:
    """A page with its tables made anew."""

    def anew(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise SystemExit(f"no table is called {name}; there are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}<!-- end -->"

    return PLACE.sub(anew, text)


def main() -> None:
    """Write all, or print some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="TABLE", help="print these")
    parser.add_argument("--write", action="store_true", help="write all into the pages")
    parser.add_argument("--check", action="store_true", help="fail where a page says something else")
    given = parser.parse_args()
    for name in given.names:
        if name not in TABLES:
            parser.error(f"no table is called {name}; there are {', '.join(TABLES)}")
        sys.stdout.write(TABLES[name]())
    pages = [HERE.parent / "README.md", *sorted(DOCS.glob("*.md"))]
    for page in pages if given.write or given.check else ():
        before = page.read_text()
        after = written(before)
        if given.check and before != after:
            raise SystemExit(f"{page.name} does not say what bench/results do: python bench/pages.py --write")
        if before != after:
            page.write_text(after)


if __name__ == "__main__":
    main()
