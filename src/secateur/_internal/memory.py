"""How much memory is free, where the machine says so."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where it is not known.

    Args:
        device: a GPU, or what uses the machine's memory: there the limit of a container counts too (cgroup, version 2).
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, and not in use
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type != "cpu":
        return None
    found = []
    with suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError):  # "max" is no number: there is no limit
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        used -= int(stat.get("inactive_file", 0))  # what was read from files is let go of when memory is wanted
        found.append(max(limit - used, 0))
    return min(found, default=None)
