"""``run``: a recipe carried out in a folder, from where it stands to the end."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.files import make_folder
from secateur.lab.data.dataset import Dataset
from secateur.lab.data.own import SPLITS
from secateur.lab.data.registry import SOURCES, load, stand_in
from secateur.lab.recipe.sections import Recipe
from secateur.lab.run import folder, stages
from secateur.lab.run.estimate import Estimate, estimate
from secateur.lab.run.setting import Setting, Sharing
from secateur.lab.run.table import summary
from secateur.measure.latency import threads_set
from secateur.report.of_run import page_of_run
from secateur.report.page import write_page


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    fresh: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
    agree: Callable[[Estimate], None] | None = None,
    command: str = "",
    sharing: Sharing | None = None,
) -> dict[str, Any]:
    """Carry out a recipe, or go on with it where an earlier call was interrupted.

    On the CPU the result does not depend on interruptions, bit for bit; only times do, and what a budget in
    ``latency_ms`` makes of them. The global random states are set from the seeds.

    Args:
        recipe: from :func:`secateur.lab.recipe.read`.
        out: the folder to keep everything in: ``run.json``, ``report.html``, and ``seed-N/STAGE`` with a model that
            :func:`secateur.load` reads.
        fresh: replace another run in the folder.
        progress: show progress bars.
        say: is told each stage as it begins.
        agree: is told what a new run is going to do and how long that takes, before anything is written; it may raise.
        command: what does this again, for the report.
        sharing: what runs that differ in how they prune do once (:mod:`secateur.lab.sweep`).

    Returns:
        What ``run.json`` holds.

    Raises:
        BadFile: what was kept is damaged, or cannot be kept, because the disk is full, say; with more room, the same
            call goes on.
        SecateurError: what the recipe asks for cannot be done (told before anything is written), a loss that is not
            finite, a folder that holds something else or is in use.
    """
    out = Path(out)
    _check_alone()
    before = folder.earlier(out, recipe, fresh=fresh)
    if before is not None and before["finished"]:
        if not (out / folder.REPORT).exists():  # it was finished before there were such pages, or just before this one
            write_page(page_of_run(before, out), out / folder.REPORT)
        return before
    with threads_set(recipe.threads) as threads:
        setting = _setting(recipe, load, progress, say, sharing)
        data, accelerator = setting.data, setting.accelerator
        stages.check_setting(setting, new=before is None)
        if agree is not None and before is None:
            agree(estimate(setting, threads=threads))
        new = not out.exists()
        with folder.held(out):
            folder.sweep(out)
            if fresh:
                folder.clear(out)
            begun = {
                "recipe": folder.dump(recipe),
                "command": command,
                "versions": folder.versions(),
                "cpu": _cpu(),
                "platform": f"{platform.platform()} {platform.machine()}",
                "device": str(accelerator.device),
                "threads": threads,
                "data": data.notes,
                "examples": {s: len(found) for s in SPLITS if (found := getattr(data, s)) is not None},
                "metric": asdict(setting.metric.shown),
                "finished": False,
            }
            if before is None:
                folder.write(out, begun)
            try:
                return _finish(setting, out, begun)
            except BadFile:  # a full disk, say: all that is kept can be gone on with
                raise
            except SecateurError:
                if before is None and not any(out.glob("seed-*/*/secateur.json")):  # nothing that could be gone on with
                    folder.clear(out)
                    if new:
                        out.rmdir()
                raise


def dry_run(recipe: Recipe, out: str | Path, *, fresh: bool = False) -> Estimate:
    """What :func:`run` would do, checked as far as it can be without work, and how long it would take.

    Nothing is written, and no data are read that are not small (:func:`secateur.lab.data.registry.stand_in`).

    Args:
        recipe: as for :func:`run`.
        out: likewise; where a run is there that goes on, the stages that it has done are counted as done.
        fresh: likewise.

    Raises:
        SecateurError: what :func:`run` would raise before any work.
    """
    out = Path(out)
    _check_alone()
    before = folder.earlier(out, recipe, fresh=fresh)
    with threads_set(recipe.threads) as threads:
        setting = _setting(recipe, stand_in, progress=False, say=lambda line: None)
        stages.check_setting(setting, new=False)
        found = estimate(setting, None if before is None else out, threads=threads)
    missing = setting.data.notes if recipe.data.name in SOURCES else ""
    return replace(found, remarks=[missing]) if missing else found


def _check_alone() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SecateurError(
            "a run is one process; under `accelerate launch`, call secateur.lab.training.loop.fit instead"
        )


def _setting(
    recipe: Recipe, load_data: Callable[..., Dataset], progress: bool, say: Callable[[str], None],
    sharing: Sharing | None = None,
) -> Setting:  # fmt: skip
    """What all stages share, with the data on the recipe's device."""
    accelerator = Accelerator(cpu=recipe.device == "cpu")
    section = recipe.data
    data = load_data(
        section.name, root=section.root, device=accelerator.device, validation=section.validation,
        options=section.options,
    )  # fmt: skip
    return Setting(recipe, data, accelerator, progress, say, sharing)


def _finish(setting: Setting, out: Path, begun: dict[str, Any]) -> dict[str, Any]:
    seeds = {}
    for seed in setting.recipe.seeds:
        at = out / f"seed-{seed}"
        make_folder(at)
        seeds[str(seed)] = stages.one_seed(setting, seed, at)
    folder.write(
        out, {**begun, "finished": True, "summary": summary(list(seeds.values()), setting.metric.shown), "seeds": seeds}
    )
    found = folder.read(out)
    write_page(page_of_run(found, out), out / folder.REPORT)
    return found


def _cpu() -> str:
    """What the CPU calls itself, where that can be known."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
