"""How little of a transformer must stay: the least MACs and parameters that an exact plan can reach, as a table.

Small random-init models of ``transformers``, those of tests/tracing/transformer_networks.py; embeddings and heads are
counted too, since they lose the channels of the residual stream. Nothing is trained or timed, so one run is enough::

    python bench/reach.py
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tracing"))
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]

from transformer_networks import NETWORKS, made  # noqa: E402

import secateur as sc  # noqa: E402


def main() -> None:
    rows = []
    for name in NETWORKS:
        model, inputs, outputs = made(name)
        least = sc.trace(model, inputs, outputs=outputs).feasible()
        rows.append([least[unit][0] / least[unit][1] for unit in ("macs", "params")])
        print(f"| {name} | {rows[-1][0]:.3f} | {rows[-1][1]:.3f} |", flush=True)
    print(f"| median | {statistics.median(r[0] for r in rows):.3f} | {statistics.median(r[1] for r in rows):.3f} |")


if __name__ == "__main__":
    main()
