"""Tables of results as Markdown: mean and standard deviation over the seeds, a row a method, a column a budget.

::

    python bench/tables.py ablation resnet20
    python bench/tables.py stories --value nats --scale 1 --digits 2
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from typing import Any

from oneshot import HERE
from rows import Rows

UNITS = {"macs": "MACs", "params": "parameters"}


def cell(values: list[float], seeds: int, digits: int) -> str:
    """Mean and spread; how many seeds, where some are missing."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    missing = f" ({len(values)} seed{'s' * (len(values) > 1)})" if len(values) < seeds else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{missing}"


def table(rows: list[dict[str, Any]], value: str, scale: float, digits: int, order: list[str]) -> str:
    """The table of one network's rows."""
    found: dict[tuple[str, str, float], dict[int, float]] = defaultdict(dict)
    seconds: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if value in row and row["method"] != "dense":
            found[row["method"], row.get("unit", "params"), row["fraction"]][row["seed"]] = scale * row[value]
            seconds[row["method"]] += [row["seconds"]] if "seconds" in row else []
    budgets = sorted({key[1:] for key in found}, key=lambda b: (b[0], -b[1]))
    methods = sorted(seconds, key=lambda m: order.index(m) if m in order else len(order))
    most = len({row["seed"] for row in rows})
    lines = [
        "| configuration | " + " | ".join(f"{100 * f:g} % of the {UNITS[u]}" for u, f in budgets) + " | seconds |",
        "|---" * (len(budgets) + 2) + "|",
    ]
    for method in methods:
        cells = [cell(list(found[method, *budget].values()), most, digits) for budget in budgets]
        took = f"{statistics.median(seconds[method]):.0f}" if seconds[method] else "-"
        lines.append(f"| `{method}` | {' | '.join(cells)} | {took} |")
    return "\n".join(lines)


def main() -> None:
    """Print one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", help="a file in bench/results, without .json")
    parser.add_argument("network", nargs="?")
    parser.add_argument("--value", default="test")
    parser.add_argument("--scale", type=float, default=100)
    parser.add_argument("--digits", type=int, default=1)
    parser.add_argument("--first", nargs="*", default=[], help="methods in this order, before the others")
    given = parser.parse_args()
    rows = [r for r in Rows(HERE / "results" / f"{given.results}.json").rows if r.get("network") == given.network]
    print(table(rows, given.value, given.scale, given.digits, given.first))


if __name__ == "__main__":
    main()
