"""``secateur sweep``: the product of settings, each a run in a folder of its own, what they share done once.

``OUT/cells/NAME`` is a run (:mod:`secateur.lab.run`) of one seed, which ``secateur run``, ``report`` and ``compare``
know; ``OUT/trained`` holds each network that was trained, once, from which all that prune it begin. Runs of the same
network are one job, one after the other, and share what is found of it: factors, and the scores of a criterion. Jobs
run in processes, or on the machines of a Ray cluster that see the same folders. A killed sweep goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
from pydantic import BaseModel

from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.extras import extra
from secateur._internal.files import make_folder, write_atomically
from secateur.lab.comparing import entry_of_run, told_apart
from secateur.lab.recipe.reading import value_of
from secateur.lab.recipe.sections import Recipe, name_of
from secateur.lab.recipe.shipped import read_named
from secateur.lab.run import folder
from secateur.lab.run.api import run
from secateur.lab.run.setting import Sharing
from secateur.lab.run.stages import training_key
from secateur.report.comparison import Comparison, Entry
from secateur.report.page import write_page

BASELINES = ("random", "magnitude")
"""Criteria that ride along: whoever is not better than these is not good."""
FILE, CELLS, TRAINED, TABLE = "sweep.json", "cells", "trained", "table.md"
LONGEST = 120
"""A folder's name is no longer."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its settings, without the seed.
        others: of those that are not the criterion's.
        overrides: the recipe's settings that it changes, as ``key=value``.
        seed: its seed.
        recipe: all of its settings.
    """

    name: str
    others: str
    overrides: tuple[str, ...]
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> str:
        """The name of its folder."""
        name = f"{self.name},seed={self.seed}"
        plain = re.sub(r"[^\w.,=:+\-\[\]{}]", "-", name, flags=re.ASCII)
        if plain == name and len(plain) <= LONGEST:
            return plain
        return f"{plain[: LONGEST - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"  # no two are called alike

    def command(self, given: str, out: Path) -> str:
        """What does it again by itself."""
        words = [word for word in self.overrides if not word.startswith("seeds=")]
        where = out / CELLS / self.folder
        return shlex.join(["secateur", "run", given, *words, f"seeds=[{self.seed}]", "--out", str(where)])

    @property
    def job(self) -> tuple[str, int]:
        """Cells of the same job prune the same network."""
        section = self.recipe.train
        key = "" if section is None else training_key(self.recipe, section, self.seed)
        return key, self.seed


@dataclass(frozen=True)
class Sweep:
    """What is to be done.

    Attributes:
        given: the recipe, a path or a name.
        cells: the runs.
        notes: what whoever reads the table should know.
    """

    given: str
    cells: Sequence[Cell]
    notes: Sequence[str] = ()

    def jobs(self, parts: int) -> list[list[Cell]]:
        """The cells of each job; those of one network are several jobs where there would be fewer than can run."""
        alike: dict[Any, list[Cell]] = {}
        for cell in self.cells:
            alike.setdefault(cell.job, []).append(cell)
        if len(alike) >= parts:
            return list(alike.values())
        finer: dict[Any, list[Cell]] = {}
        for cell in self.cells:
            who = json.dumps([cell.recipe.prune.criterion, cell.recipe.prune.method], sort_keys=True)
            finer.setdefault((cell.job, who), []).append(cell)
        return list(finer.values())


# ------------------------------------------------------------------------------------------------------- what is to be


def read_sweep(given: str, words: Sequence[str], *, baselines: bool = True) -> Sweep:
    """The product of settings.

    Args:
        given: a recipe, a path or a name.
        words: ``key=value``, and ``key=[a,b]`` for several values; of a setting that is a list itself, a list of lists.
        baselines: let random and magnitude ride along.

    Raises:
        SecateurError: what is wrong with any of the recipes; twice the same settings.
    """
    fixed, varied = [], {}
    for word in words:
        key, values = _values(word)
        if values is None:
            fixed.append(word)
        elif key in varied:
            raise SecateurError(f"{word!r}: {key} is given twice; give all its values in one list")
        else:
            varied[key] = values
    seeds = varied.pop("seeds", None)
    combinations = [dict(zip(varied, one, strict=True)) for one in itertools.product(*varied.values())]
    notes = []
    if baselines:
        more, why = _with_baselines(given, fixed, combinations)
        combinations, notes = [*combinations, *more], [*([why] if why else [])]
    cells = []
    for one in combinations:
        overrides = _words(fixed, one)
        recipe = read_named(given, overrides)
        for seed in recipe.seeds if seeds is None else seeds:
            own = read_named(given, [*(o for o in overrides if not o.startswith("seeds=")), f"seeds=[{seed}]"])
            cells.append(Cell(_name(one), _name(_without_criterion(one)), tuple(overrides), int(seed), own))
    names = [cell.folder for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SecateurError(f"sweep: {twice[0]} is asked for twice; give each value once")
    return Sweep(given, cells, notes)


def _values(word: str) -> tuple[str, list[Any] | None]:
    """The key of a word, and its values if there are several."""
    key, equals, _ = word.partition("=")
    if not equals:
        raise SecateurError(f"{word!r}: key=value is expected, such as prune.budget.macs=[0.5,0.3]")
    value = value_of(word)
    if not isinstance(value, list):
        return key, None
    if key != "seeds" and _is_list(key) and not (value and all(isinstance(one, list) for one in value)):
        return key, None
    if not value:
        raise SecateurError(f"{word!r}: no value is given")
    if len({json.dumps(one, sort_keys=True) for one in value}) < len(value):
        raise SecateurError(f"{word!r}: a value is given twice")
    return key, value


def _is_list(key: str) -> bool:
    """Whether a setting is a list and nothing else."""
    kind: Any = Recipe
    for part in key.split("."):
        options = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
        if not options or part not in options[0].model_fields:
            return False
        kind = options[0].model_fields[part].annotation
    some = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return all(get_origin(one) is list or one is type(None) for one in some)


def _with_baselines(
    given: str, fixed: Sequence[str], combinations: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], str]:
    """The combinations in which random and magnitude decide, that are not among the others; why there are none."""
    found: list[dict[str, Any]] = []
    known: set[str] = set()
    recipes = [read_named(given, _words(fixed, one)) for one in combinations]
    for one, recipe in zip(combinations, recipes, strict=True):
        known.add(json.dumps([_without_criterion(one), name_of(recipe.prune.criterion)], sort_keys=True))
    for one, recipe in zip(combinations, recipes, strict=True):
        if recipe.prune.method is not None:
            return [], "random and magnitude do not ride along: a method decides by itself what goes."
        if recipe.prune.budget is None:
            return [], "random and magnitude do not ride along: nothing is pruned after the training."
        for criterion in BASELINES:
            other = _without_criterion(one)
            key = json.dumps([other, criterion], sort_keys=True)
            if key not in known:
                known.add(key)
                found.append({"prune.criterion": criterion, **other})
    return found, ""


def _without_criterion(one: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if not _of_criterion(key)}


def _of_criterion(key: str) -> bool:
    return key == "prune.criterion" or key.startswith("prune.criterion.")


def _words(fixed: Sequence[str], one: Mapping[str, Any]) -> list[str]:
    """The overrides of a combination; what it says of the criterion is said instead of what is fixed."""
    own = any(_of_criterion(key) for key in one)
    kept = [word for word in fixed if not (own and _of_criterion(word.partition("=")[0]))]
    return [*kept, *(f"{key}={json.dumps(value)}" for key, value in one.items())]


def _name(one: Mapping[str, Any]) -> str:
    """Settings in a few words: the last parts of their keys, longer where two would be the same."""
    keys = list(one)
    short = {key: key.rpartition(".")[2] for key in keys}
    for key in keys:
        if list(short.values()).count(short[key]) > 1:
            short[key] = key
    return ",".join(f"{short[key]}={_said(one[key])}" for key in keys) or "recipe"


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


# ---------------------------------------------------------------------------------------------------------- how it runs


@dataclass
class Done:
    """What is there so far.

    Attributes:
        runs: cell -> what its ``run.json`` holds.
        failures: cell -> why.
    """

    runs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def sweep(
    what: Sweep, out: Path, *, jobs: int = 1, ray: bool = False, progress: bool = True, say: Say = lambda line: None,
    show: Callable[[Comparison, int, int], None] = lambda table, done, of: None,
) -> Comparison:  # fmt: skip
    """Do what is not done yet.

    Args:
        what: from :func:`read_sweep`.
        out: the folder.
        jobs: how many run at a time.
        ray: on a Ray cluster, that of ``RAY_ADDRESS`` or one that is started here, instead of in processes.
        progress: show bars, where one job runs at a time.
        say: is told what is done.
        show: is given the table, and how many cells of how many are done, whenever one is.

    Returns:
        The table: a row for each combination of settings, mean and standard deviation over its seeds. It is also in
        ``table.md``, ``report.html`` and ``sweep.json``.

    Raises:
        SecateurError: the folder holds something else, or another sweep is at work in it.
    """
    _check_place(what, out)
    with folder.held(out):
        folder.write_json(out / FILE, {"recipe": what.given, "cells": [c.folder for c in what.cells]})
        make_folder(out / CELLS)
        done = Done()
        groups = what.jobs(jobs)
        arguments = [
            [(cell.recipe.model_dump(mode="json"), cell.command(what.given, out), cell.folder) for cell in group]
            for group in groups
        ]
        threads = torch.get_num_threads() if jobs > 1 or ray else None
        call = partial(_job, str(out.absolute()), threads, str(Path.cwd()))
        remarks = list(what.notes)
        if jobs > 1 or ray:
            several = f"{jobs} runs" if jobs > 1 else "others, perhaps on several machines,"
            remarks.append(f"Timed while {several} ran at a time: latencies are rough; `secateur measure` times anew.")
        for name, found, why in _results(call, arguments, jobs, ray, progress, say):
            if found is not None:
                done.runs[name] = found
            else:
                done.failures[name] = why
                say(f"{name}: failed: {why}")
            table = tabulated(what, done, remarks)
            _write(table, out, what.given)
            show(table, len(done.runs) + len(done.failures), len(what.cells))
        table = tabulated(what, done, remarks)
        _write(table, out, what.given)
    return table


def _check_place(what: Sweep, out: Path) -> None:
    """Raise if a folder holds something else than this sweep."""
    if not out.exists():
        return
    if not out.is_dir() or (not (out / FILE).exists() and any(p.suffix != ".tmp" for p in out.iterdir())):
        raise SecateurError(f"--out {out}: it holds something else; give a new folder")
    if (out / FILE).exists():
        try:
            before = json.loads((out / FILE).read_text("utf-8"))["recipe"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadFile(f"{out / FILE} is damaged ({error}): give another folder, or delete it") from error
        if before != what.given:
            raise SecateurError(f"--out {out}: it holds a sweep of {before}, not of {what.given}; give another folder")


def tabulated(what: Sweep, done: Done, remarks: Sequence[str] = ()) -> Comparison:
    """The cells that are done, those of one combination together."""
    entries, failures = [], {}
    for name in dict.fromkeys(cell.name for cell in what.cells):
        seeds: dict[str, Any] = {}
        first: Mapping[str, Any] | None = None
        for cell in what.cells:
            if cell.name != name:
                continue
            if cell.folder in done.runs:
                first = first or done.runs[cell.folder]
                seeds |= done.runs[cell.folder]["seeds"]
            elif cell.folder in done.failures:
                failures[f"{name}, seed {cell.seed}"] = done.failures[cell.folder]
        if first is not None:
            entries.append(entry_of_run(name, {**first, "seeds": seeds}))
    remarks = [*remarks, *_no_better(what, entries)]
    return Comparison(told_apart(entries), failures or ({} if entries else {"all": "nothing is done yet"}), remarks)


def _no_better(what: Sweep, entries: Sequence[Entry]) -> list[str]:
    """Who is no better than random, with the same other settings."""
    cells = {cell.name: cell for cell in what.cells}
    worse = []
    for entry in entries:
        cell = cells[entry.name]
        for other in entries:
            alike = cells[other.name]
            if alike.others != cell.others or name_of(alike.recipe.prune.criterion) != "random" or other is entry:
                continue
            for m in entry.measured:
                sign = 1 if m.higher else -1
                mine, its = ([sign * v for v in e.after.get(m.test, ())] for e in (entry, other))
                if mine and its and sum(mine) / len(mine) <= sum(its) / len(its):
                    worse.append(entry.name)
    return [f"No better than random here: {'; '.join(worse)}."] if worse else []


def _write(table: Comparison, out: Path, given: str) -> None:
    write_atomically(out / TABLE, table.markdown().encode())
    write_page(table.page(title=f"Sweep of {given}"), out / folder.REPORT)


Given = tuple[Mapping[str, Any], str, str]
"""A cell's settings, the words of its command, its folder."""
Result = tuple[str, Mapping[str, Any] | None, str]
"""A cell's folder, what its ``run.json`` holds, or why there is none."""


def _job(out: str, threads: int | None, where: str, cells: Sequence[Given]) -> list[Result]:
    """The cells of one network, one after the other, in a process of its own."""
    if threads is not None:
        torch.set_num_threads(threads)
    if where not in sys.path:  # models and data of the user's own are found from the folder that the command is in
        sys.path.insert(0, where)
    return list(_in_turn(Path(out), cells, progress=False, say=lambda line: None))


def _in_turn(out: Path, cells: Sequence[Given], *, progress: bool, say: Say) -> Iterator[Result]:
    """The cells of one network; an error of one is no error of the others."""
    sharing = Sharing((out / TRAINED).absolute())
    for recipe, command, name in cells:
        at = out / CELLS / name
        told = partial(_told, say, name)
        try:
            found = run(
                Recipe.model_validate(recipe), at, progress=progress, say=told,
                command=command, sharing=sharing,
            )  # fmt: skip
            yield name, found, ""
        except SecateurError as error:
            yield name, None, str(error)
        except Exception as error:  # a bug, in a model of the user's own perhaps: its row says so
            make_folder(at)
            (at / "traceback.txt").write_text(traceback.format_exc(), "utf-8")
            yield name, None, f"{type(error).__name__}: {error} (traceback.txt in {at})"


def _told(say: Say, name: str, line: str) -> None:
    say(f"{name}: {line.partition(': ')[2] if line.startswith('seed-') else line}")


def _results(
    call: Callable[..., list[Result]], arguments: Sequence[Any], jobs: int, ray: bool, progress: bool, say: Say
) -> Iterator[Result]:
    """What the cells give, as they are done."""
    if ray:
        yield from _on_ray(call, arguments, jobs)
    elif jobs == 1:
        out, *_ = call.args  # type: ignore[attr-defined]
        for cells in arguments:
            yield from _in_turn(Path(out), cells, progress=progress, say=say)
    else:
        with ProcessPoolExecutor(jobs, get_context("spawn"), _end_with_parent) as pool:
            waiting: set[Future[list[Result]]] = {pool.submit(call, cells) for cells in arguments}
            try:
                while waiting:
                    ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for one in ready:
                        yield from one.result()
            except BrokenProcessPool as error:
                raise SecateurError(
                    "sweep: one of its processes was killed, for want of memory perhaps: the same command goes on; "
                    "--jobs with fewer needs less"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _end_with_parent() -> None:
    """End when the process does that started this one: whoever goes on finds nobody at work."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(call: Callable[..., list[Result]], arguments: Sequence[Any], jobs: int) -> Iterator[Result]:
    """The same on a Ray cluster, whose machines see the same folders."""
    with extra("ray", "sweep --ray"):
        import ray

    def job(cells: Sequence[Given]) -> list[Result]:  # it wants a function, and a partial is none
        return call(cells)

    started = not ray.is_initialized()
    if started:
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if os.environ.get("RAY_ADDRESS"):  # a cluster that is there has its own number of CPUs
            ray.init(**quiet)
        else:
            ray.init(num_cpus=jobs, include_dashboard=False, **quiet)
    try:
        task = ray.remote(num_cpus=1)(job)
        waiting = [task.remote(cells) for cells in arguments]
        while waiting:
            ready, waiting = ray.wait(waiting)
            for one in ready:
                yield from ray.get(one)
    finally:
        if started:
            ray.shutdown()
