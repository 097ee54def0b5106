"""Regret of the factored bandit on additive problems: against others, in time, in the number and sizes of factors.

Rewards are the sum of every factor's part and Gaussian noise of standard deviation 0.3; all players are told a spread
of 0.5. ``players``: four factors of four arms, parts evenly spaced from 0 to 1/4, 100,000 rounds, with the theory's
radius and the tuned one (the least at which no run lost twice the median, on other seeds, ``tuning``). ``sizes``: more
factors, more arms, each factor's best arm 0.1 better than its others, so that nothing but the sizes changes. Chunks
of repetitions that are there are not run again::

    python bench/regret.py tuning players sizes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rows import Rows
from secateur.allocation.search.bandit import FactoredBandit, Player
from secateur.allocation.search.baselines import FactorUCB, JointUCB, SuccessiveElimination, Uniform

RESULTS = Path(__file__).parent / "results" / "regret.json"
NOISE, SPREAD, CHUNK = 0.3, 0.5, 10
MARKS = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
RADII = (12, 4, 1, 0.5, 0.25, 0.1)
TUNED = 1
PLAYERS: dict[str, Callable[[Any, int], Player]] = {
    **{
        f"radius {r:g}": lambda sizes, seed, r=r: FactoredBandit(sizes, radius=r, spread=SPREAD, seed=seed)
        for r in RADII
    },
    "duels": lambda sizes, seed: FactoredBandit(sizes, radius=TUNED, spread=SPREAD, dueling=True, seed=seed),
    "factor UCB1": lambda sizes, seed: FactorUCB(sizes, spread=SPREAD),
    "joint UCB1": lambda sizes, seed: JointUCB(sizes, spread=SPREAD),
    "joint UCB1, tuned": lambda sizes, seed: JointUCB(sizes, spread=SPREAD * (TUNED / 12) ** 0.5),
    "joint elimination": lambda sizes, seed: SuccessiveElimination(sizes, spread=SPREAD, seed=seed),
    "uniform": lambda sizes, seed: Uniform(sizes, seed=seed),
}
FOUR = (4, 4, 4, 4)
GAP = 0.1
SIZES = [(4,) * count for count in (1, 2, 4, 8, 16)] + [(size,) * 4 for size in (2, 8, 16)]


def one(player: Player, rounds: int, seed: int, even: bool) -> tuple[list[float], bool]:
    """Cumulative pseudo-regret at the marks (the mean of both in a duel), and whether the best was found."""
    rng = np.random.default_rng(seed)
    spaced = [np.linspace(0, 1, size) / len(player.sizes) if even else GAP * np.eye(size)[0] for size in player.sizes]
    parts = [rng.permutation(part) for part in spaced]
    most = sum(part.max() for part in parts)
    marks = [mark for mark in MARKS if mark <= rounds]
    found, total = [], 0.0
    while player.rounds < rounds:
        before, asked = player.rounds, player.ask(1000)
        true = sum(part[asked[..., factor]] for factor, part in enumerate(parts))
        noise = NOISE * rng.standard_normal(true.shape)
        rewards = true + noise
        player.tell(rewards if rewards.ndim == 1 else rewards[:, 0] - rewards[:, 1])
        lost = np.cumsum(most - (true if true.ndim == 1 else true.mean(1)))
        while len(found) < len(marks) and marks[len(found)] <= player.rounds:
            found.append(total + float(lost[marks[len(found)] - before - 1]))
        total += float(lost[-1])
    return found, bool(all(part[arm] == part.max() for part, arm in zip(parts, player.best(), strict=True)))


def report(rows: list[dict[str, Any]]) -> None:
    """Medians over repetitions, and how often the answer was wrong."""
    for what in ("tuning", "players", "sizes"):
        own = [r for r in rows if r["what"] == what]
        for name, sizes in dict.fromkeys((r["player"], tuple(r["sizes"])) for r in own):
            chunks = [r for r in own if r["player"] == name and tuple(r["sizes"]) == sizes]
            regret = np.array([x for r in chunks for x in r["regret"]])
            wrong = 1 - np.mean([x for r in chunks for x in r["right"]])
            low, middle, high, most = np.percentile(regret[:, -1], (10, 50, 90, 100))
            title = f"{what:8} {'x'.join(map(str, sizes)):24} {name:18} {len(regret):3} repetitions"
            found = f"{middle:.0f} ({low:.0f} to {high:.0f}, most {most:.0f})"
            print(f"{title}, regret at {chunks[0]['rounds']:,}: {found}, wrong {wrong:.0%}")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["tuning", "players", "sizes"])
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    kept = Rows(given.out, None, noise=NOISE, spread=SPREAD, gap=GAP, marks=MARKS, tuned=TUNED)
    theory_and_tuned = (f"radius {RADII[0]}", f"radius {TUNED:g}")
    others = [name for name in PLAYERS if not name.startswith("radius")]
    cases = [("tuning", f"radius {r:g}", FOUR, 30_000, 1000) for r in RADII]
    cases += [("players", name, FOUR, 100_000, 0) for name in (*theory_and_tuned, *others)]
    cases += [("sizes", theory_and_tuned[1], sizes, 100_000, 0) for sizes in SIZES]
    for first in range(0, given.repetitions, CHUNK):
        for what, name, sizes, rounds, base in cases:
            key = {"what": what, "player": name, "sizes": list(sizes), "rounds": rounds, "first": base + first}
            if what not in given.what or kept.has(key):
                continue
            seeds = range(base + first, base + first + CHUNK)
            runs = [one(PLAYERS[name](sizes, seed), rounds, seed, what != "sizes") for seed in seeds]
            kept.add(key | {"regret": [found for found, _ in runs], "right": [right for _, right in runs]})
            print(key, [round(found[-1]) for found, _ in runs], flush=True)
    report(kept.rows)


if __name__ == "__main__":
    main()
