"""Benches by the dozen: ``make bench`` those that fit in a quarter of an hour on two cores, ``make bench-full`` all.

Each is a script of this folder in a process of its own, and writes its file in ``bench/results`` anew, or goes on with
rows that are missing; then all tables of the pages are made of what is there. What fails is told at the end, and is no
reason to stop. Nothing else should run meanwhile: times are measured::

    python bench/run.py                # the quick ones
    python bench/run.py --full         # all, days on two cores; killed, the same command goes on
    python bench/run.py --list
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time

import torch

from oneshot import HERE
from secateur import __version__

QUICK = ("step.py", "meta.py", "trace.py")
"""Written anew each time: they measure the code as it is now."""
FULL = (
    "factors.py", "latency.py", "milliseconds.py", "backends.py", "rounding.py", "int8.py", "packed.py", "regret.py",
    "sdprun_mnist.py", "valley.py", "directional.py", "damage.py lenet_300_100 lenet5 resnet20", "rounds.py",
    "blocks.py", "pivoting.py", "gentle.py accuracy cost", "search.py", "widths.py resnet20 lenet5", "stories.py",
    "ablation.py resnet20 lenet5 lenet_300_100", "peers.py", "finetuned.py", "real.py",
)  # fmt: skip
"""Rows that are there are not run again: delete them to have them anew."""
WRITTEN = ("published.py --write", "pages.py --write")


def run(command: str) -> tuple[bool, float]:
    """Whether a script ended well, and how many seconds it took."""
    begun = time.monotonic()
    script, *words = command.split()
    done = subprocess.run([sys.executable, str(HERE / script), *words], check=False)
    return done.returncode == 0, time.monotonic() - begun


def main() -> None:
    """Run them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all of them")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    given = parser.parse_args()
    commands = [*QUICK, *(FULL if given.full else ()), *WRITTEN]
    if given.list:
        print("\n".join(f"python bench/{command}" for command in commands))
        return
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"secateur {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, {machine}")
    failed = []
    for command in commands:
        well, seconds = run(command)
        print(f"{command}: {'done' if well else 'failed'}, {seconds:.0f} s", flush=True)
        failed += [] if well else [command]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
