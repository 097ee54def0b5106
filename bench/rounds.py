"""The curve of a recipe that prunes in rounds: what remains and what it reaches, by round and seed.

Takes the folders of its runs (one of all seeds, or one a seed) and writes ``bench/results/rounds.json``::

    secateur run cifar10-resnet20-eigendamage-iterative --out runs/iterative
    python bench/rounds.py runs/iterative
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "rounds.json"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """One row a seed and stage of the finished seeds of a run."""
    recipe = json.loads((folder / "run.json").read_text())["recipe"]["name"]
    found = []
    for path in sorted(folder.glob("seed-*/measured.json")):
        measured = json.loads(path.read_text())
        full = measured["before"]
        for stage, metrics in measured.items():
            found.append({
                "recipe": recipe, "seed": int(path.parent.name.removeprefix("seed-")), "stage": stage,
                "params": metrics["params"] / full["params"], "macs": metrics["macs"] / full["macs"],
                "validation": metrics.get("validation_accuracy"), "test": metrics["test_accuracy"],
            })  # fmt: skip
    return found


def main() -> None:
    """Collect, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args()
    rows = [row for folder in given.folders for row in rows_of(folder)]
    if not rows:
        parser.error("no seed of these runs is finished")
    RESULTS.write_text(json.dumps({"note": "CIFAR-10 is stored as JPEG", "rows": rows}, indent=1))
    for row in rows:
        shares = f"{row['params']:7.1%} {row['macs']:7.1%}"
        print(f"{row['recipe']:40} {row['seed']} {row['stage']:8} {shares} {row['test']:.4f}")


if __name__ == "__main__":
    main()
