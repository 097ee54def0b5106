import errno
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur as sc
from secateur._internal.errors import BadFile
from secateur.allocation.latency import sampler
from secateur.allocation.search import checkpoint
from secateur.allocation.search.evaluator import Evaluator
from secateur.lab import data, recipe
from secateur.lab.models.registry import build
from secateur.lab.recipe.shipped import shipped
from secateur.lab.run import folder, table
from secateur.lab.run.api import run
from secateur.lab.training.loop import _Run as TrainingRun
from secateur.methods.gradual import GradualPruner
from secateur.methods.pivoting import Pivoting

SDPRUN = {"name": "sdprun", "c": 0.3, "weights": "sqrt"}
ALL_STAGES = {
    "name": "all stages",
    "device": "cpu",
    "threads": 1,
    "data": {"name": "digits", "batch_size": 64, "validation": 0.5},
    "model": {"name": "digits_cnn", "options": {"width": 0.25}},
    "train": {"optimizer": SDPRUN, "epochs": 4, "lr": 0.2, "baseline": True},
    "prune": {"method": "zero"},
    "finetune": {"optimizer": {"momentum": 0.9}, "epochs": 2, "lr": 0.01},
    "measure": {"batch_sizes": [1], "repeats": 2},
}
TAYLOR = {
    "name": "taylor",
    "device": "cpu",
    "threads": 1,
    "data": {"name": "digits", "batch_size": 64},
    "model": {"name": "digits_cnn", "options": {"width": 0.25}},
    "train": {"epochs": 1, "lr": 0.1},
    "prune": {
        "budget": {"macs": 0.5},
        "criterion": "taylor",
        "strategy": "global",
        "repair": "recalibrate",
        "batches": 2,
    },
    "measure": {"batch_sizes": [1], "repeats": 1},
}
PROCESSES = multiprocessing.get_context("forkserver")  # its children have imported all already
PROCESSES.set_forkserver_preload(["secateur.lab.run", "secateur.lab.recipe", "sklearn.datasets"])


def made(given: dict[str, Any], **sections: Any) -> recipe.Recipe:
    """A recipe with some of its sections changed; ``None`` leaves one out."""
    return recipe.validate({key: value for key, value in {**given, **sections}.items() if value is not None})


def timeless(found: Any) -> Any:
    """Everything but what was timed."""
    if isinstance(found, dict):
        return {k: timeless(v) for k, v in found.items() if k != "seconds" and not k.startswith("latency")}
    return [timeless(item) for item in found] if isinstance(found, list) else found


def weights(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "whole"
    return out, run(made(ALL_STAGES), out, progress=False)


def test_every_stage_is_kept_and_loads(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    whole, cut = (sc.load(out / "seed-0" / stage) for stage in ("trained", "tuned"))
    assert sorted(p.name for p in (out / "seed-0").iterdir()) == [
        "baseline", "measured.json", "pruned", "trained", "tuned"
    ]  # fmt: skip
    seed = result["seeds"]["0"]
    for model, column in ((sc.load(out / "seed-0" / "baseline"), "before"), (cut, "after")):
        assert sc.trace(model, torch.zeros(1, 1, 8, 8)).macs() == seed[column]["macs"]
        assert sum(p.numel() for p in model.parameters()) == seed[column]["params"]
    removed = sum(a - b for a, b in seed["stages"]["pruned"]["widths"].values())
    assert removed == seed["stages"]["pruned"]["removed"] > 0
    assert seed["stages"]["pruned"]["difference"] < 1e-5
    assert len(list(whole.parameters())) == len(list(cut.parameters()))


def test_run_json_says_all_that_a_reader_needs(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    assert json.loads((out / folder.FILE).read_text()) == result and result["finished"]
    assert folder.dump(recipe.validate(result["recipe"])) == folder.dump(made(ALL_STAGES))
    assert result["versions"]["torch"] == torch.__version__
    assert "lossless" in result["data"] and result["platform"] and result["threads"] == 1
    history = result["seeds"]["0"]["stages"]["trained"]["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4] and "validation_accuracy" in history[0]


def test_the_test_accuracy_is_that_of_the_kept_model(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    digits = data.load("digits", validation=0.5)
    for stage, column in (("baseline", "before"), ("tuned", "after")):
        model = sc.load(out / "seed-0" / stage).eval()
        with torch.no_grad():
            right = [(model(x).argmax(1) == y).sum() for x, y in digits.loader("test", 500)]
        assert result["seeds"]["0"][column]["test_accuracy"] == pytest.approx(float(sum(right)) / len(digits.test))


def test_a_finished_run_is_not_done_again(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert run(made(ALL_STAGES, name="renamed"), out, progress=False) == result
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_sdprun_with_c_0_is_its_baseline(tmp_path: Path) -> None:
    train = {**ALL_STAGES["train"], "optimizer": {**SDPRUN, "c": 0.0}, "epochs": 1}
    run(made(ALL_STAGES, train=train, prune=None, finetune=None), tmp_path, progress=False)
    kept = [load_file(tmp_path / "seed-0" / stage / "model.safetensors") for stage in ("baseline", "trained")]
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())


def test_sdprun_stops_at_its_budget_and_says_so_if_it_does_not_get_there(tmp_path: Path) -> None:
    settings = {**SDPRUN, "budget": {"macs": 0.6}, "exclude": ["conv1"]}
    train = {**ALL_STAGES["train"], "optimizer": settings, "baseline": False}
    told: list[str] = []
    out = tmp_path / "met"
    result = run(made(ALL_STAGES, train=train, finetune=None), out, progress=False, say=told.append)
    assert result["seeds"]["0"]["stages"]["trained"]["reached"] is True
    assert result["seeds"]["0"]["after"]["macs"] <= 0.6 * result["seeds"]["0"]["before"]["macs"]
    before, after = result["seeds"]["0"]["stages"]["pruned"]["widths"]["conv1"]
    assert before == after
    assert not any("was not reached" in line for line in told)
    train = {**train, "optimizer": {**settings, "c": 1e-6}, "epochs": 1}
    short = made(ALL_STAGES, train=train, prune=None, finetune=None)
    result = run(short, tmp_path / "not", progress=False, say=told.append)
    assert result["seeds"]["0"]["stages"]["trained"]["reached"] is False
    assert any("was not reached in 1 epochs with c=1e-06: give a larger c" in line for line in told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"budget": {"macs": 0.001}}, "the budget cannot be met"), ({"exclude": ["conv7"]}, "unknown group.*conv7")],
    ids=str,
)
def test_what_sdprun_cannot_do_is_told_before_any_work(tmp_path: Path, changes: dict, message: str) -> None:
    given = made(ALL_STAGES, train={**ALL_STAGES["train"], "optimizer": {**SDPRUN, **changes}})
    with pytest.raises(sc.SecateurError, match=message):
        run(given, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def killed_and_resumed(out: Path, moments: list[float], given: recipe.Recipe | None = None) -> int:
    """Kill the run at these moments (seconds after it began), then let it end; how many kills came before its end."""
    given, codes = given or made(ALL_STAGES), []
    for moment in (*moments, None):
        process = PROCESSES.Process(target=run, args=(given, out), kwargs={"progress": False})
        process.start()
        process.join(moment)
        process.kill()
        process.join()
        codes.append(process.exitcode)
    assert codes[-1] == 0 and set(codes) <= {0, -signal.SIGKILL}
    return codes.count(-signal.SIGKILL)


def check_same(out: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    whole, result = finished
    assert timeless(folder.read(out)) == timeless(result)
    assert weights(out) == weights(whole)
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*checkpoints*"))


def duration(tmp_path: Path) -> float:
    """Seconds that an uninterrupted run takes in a process of its own."""
    first = PROCESSES.Process(target=int)  # starts the server, which imports everything
    first.start()
    first.join()
    start = time.monotonic()
    killed_and_resumed(tmp_path / "timed", [])
    return time.monotonic() - start


def test_killed_three_times_it_ends_the_same(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    draw, whole = random.Random(0), duration(tmp_path)
    moments = sorted(draw.uniform(0.2, 0.8) * whole for _ in range(3))
    for sooner in (1, 2, 4, 8):  # the run that was timed may have been slower than these are
        out = tmp_path / f"run-{sooner}"
        kills = killed_and_resumed(out, [moment / sooner for moment in moments])
        check_same(out, finished)
        if kills:
            return
    pytest.fail("no kill came before the end of the run")


@pytest.mark.slow
@pytest.mark.parametrize("part", [i / 10 for i in range(10)])
def test_killed_at_any_moment_it_ends_the_same(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, part: float
) -> None:
    moment = (part + random.Random(part).uniform(0, 0.1)) * duration(tmp_path)
    killed_and_resumed(tmp_path / "run", [moment])
    check_same(tmp_path / "run", finished)


def test_stopped_between_any_two_stages_it_ends_the_same(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("seed-"):
            seen.append(line)
            if len(seen) == calls:
                raise KeyboardInterrupt

    calls = 0
    while not (tmp_path / "seed-0" / "measured.json").exists():
        calls, seen = 2, []
        try:
            run(made(ALL_STAGES), tmp_path, progress=False, say=stop)
        except KeyboardInterrupt:
            continue
    run(made(ALL_STAGES), tmp_path, progress=False)
    check_same(tmp_path, finished)


def test_a_folder_in_which_a_process_was_killed_at_once(tmp_path: Path) -> None:
    (tmp_path / f"{folder.FILE}.1.tmp").write_text("{")
    (tmp_path / "seed-0" / "baseline").mkdir(parents=True)
    with pytest.raises(sc.SecateurError, match="it holds other files"):  # a run.json comes before any seed
        run(made(TAYLOR), tmp_path, progress=False)
    (tmp_path / "seed-0" / "baseline").rmdir()
    (tmp_path / "seed-0").rmdir()
    assert run(made(TAYLOR), tmp_path, progress=False)["finished"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.REPORT, folder.FILE, "seed-0"]


@pytest.mark.parametrize(
    "prune",
    [
        {"method": {"name": "eigendamage", "fisher": "exact"}, "budget": {"params": 0.5}, "batches": 2},
        {
            "criterion": {"name": "kron_obs", "damping": 0.1},
            "repair": "compensate",
            "budget": {"macs": 0.5},
            "batches": 2,
        },
        {"criterion": {"name": "obd", "samples": 2}, "repair": "refit", "budget": {"params": 0.5}, "batches": 2},
    ],
    ids=["eigendamage", "kron_obs", "obd"],
)
def test_second_order_methods_run_and_load(tmp_path: Path, prune: dict[str, Any]) -> None:
    result = run(made(TAYLOR, prune=prune), tmp_path, progress=False)["seeds"]["0"]
    ((unit, fraction),) = prune["budget"].items()
    assert result["after"][unit] <= fraction * result["before"][unit]
    small = sc.load(tmp_path / "seed-0" / "pruned")
    assert sum(p.numel() for p in small.parameters()) == result["after"]["params"]


@pytest.mark.parametrize(
    "prune",
    [
        {"criterion": "taylor", "budget": {"macs": 0.3, "params": 0.5}, "batches": 2, "rounds": 3},
        {
            "method": {"name": "eigendamage", "separable": "cp", "rule": "threshold", "limit": 0.9},
            "budget": {"params": 0.3, "macs": 0.5}, "batches": 2, "rounds": 2,
        },
    ],
    ids=["taylor", "eigendamage"],
)  # fmt: skip
def test_rounds_reach_the_budget_in_equal_factors(tmp_path: Path, prune: dict[str, Any]) -> None:
    finetune = {"optimizer": {"momentum": 0.9}, "epochs": 1, "lr": 0.01}
    seed = run(made(TAYLOR, prune=prune, finetune=finetune), tmp_path, progress=False)["seeds"]["0"]
    rounds = prune["rounds"]
    columns = [*(f"round {k}" for k in range(1, rounds)), "after"]
    for number, column in enumerate(columns, 1):
        for unit, fraction in prune["budget"].items():
            assert seed[column][unit] <= fraction ** (number / rounds) * seed["before"][unit]
    parts = {part for number in range(1, rounds) for part in (f"pruned-{number}", f"tuned-{number}")}
    assert {p.name for p in (tmp_path / "seed-0").iterdir()} == parts | {
        "baseline", "pruned", "tuned", "measured.json"
    }  # fmt: skip
    for number, column in enumerate(columns, 1):
        small = sc.load(tmp_path / "seed-0" / ("tuned" if column == "after" else f"tuned-{number}"))
        assert sum(p.numel() for p in small.parameters()) == seed[column]["params"]
    if "method" in prune:
        assert [next(iter(step)) for step in sc.record(small)] == ["eigendamage"] * rounds + ["separate"]


GENTLE = {
    "increg": {"rate": 0.2, "limit": 1.0},
    "spp": {"rate": 0.2, "every": 1},
}


def gently(method: str, **changes: Any) -> dict[str, Any]:
    train = {"optimizer": {"momentum": 0.9}, "epochs": 2, "lr": 0.05, "schedule": "constant"}
    options = changes or GENTLE[method]
    return {"method": {"name": method, **options}, "budget": {"macs": 0.6}, "train": train}


@pytest.mark.parametrize("gradual", [True, False])
def test_pivoting_runs_packs_loads_and_ends_the_same_when_stopped_in_between(
    tmp_path: Path, gradual: bool, monkeypatch: pytest.MonkeyPatch, interrupted: Any
) -> None:
    def milliseconds(ways: Any, _: Any) -> dict[str, float]:  # what is fastest must not change from run to run
        return {name: 1.0 if name == "dense" else 0.1 for name in ways}

    monkeypatch.setattr(importlib.import_module("secateur.surgery.blocks.packing"), "milliseconds", milliseconds)
    prune: dict[str, Any] = {"method": {"name": "pivot", "keep": 0.25}}
    if gradual:
        prune["method"] |= {"every": 5, "times": 8}
        prune["train"] = {"optimizer": {"momentum": 0.9}, "epochs": 2, "lr": 0.05, "schedule": "constant"}
    recipe = made(TAYLOR, model={"name": "digits_cnn"}, prune=prune, finetune={"epochs": 2, "lr": 0.01})
    said: list[str] = []
    whole = run(recipe, tmp_path / "whole", progress=False, say=said.append)
    assert any(line.startswith("left whole: conv1 (keep=0.25 of 32 x 1") for line in said)
    seed = whole["seeds"]["0"]
    assert 0.25 * seed["before"]["macs"] < seed["after"]["macs"] < 0.35 * seed["before"]["macs"]
    assert seed["stages"]["finished"]["packed"]
    assert set(seed["stages"]["pruned"]["left whole"]) == {"conv1"}
    packed = sc.load(tmp_path / "whole" / "seed-0" / "finished")
    assert [next(iter(step)) for step in sc.record(packed)] == ["pivot", "pack"]
    images = torch.rand(3, 1, 8, 8)
    assert torch.allclose(packed(images), sc.load(tmp_path / "whole" / "seed-0" / "tuned")(images), atol=1e-4)
    interrupted(Pivoting, "step", 30)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "again", progress=False)
    assert timeless(run(recipe, tmp_path / "again", progress=False)) == timeless(whole)
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


def test_a_search_of_widths_runs_and_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: Any
) -> None:
    prune = {
        "criterion": "magnitude", "budget": {"macs": 0.5}, "strategy": {"name": "bandit", "evaluations": 80},
        "repair": "recalibrate", "batches": 4,
    }  # fmt: skip
    recipe = made(TAYLOR, prune=prune)
    whole = run(recipe, tmp_path / "whole", progress=False)
    seed = whole["seeds"]["0"]
    assert seed["after"]["macs"] <= 0.5 * seed["before"]["macs"]
    assert seed["stages"]["pruned"]["search"]["table"]
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_SAVES", 0.0)
    calls = interrupted(Evaluator, "_rise", 50)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "again", progress=False)
    assert timeless(run(recipe, tmp_path / "again", progress=False)) == timeless(whole)
    assert len(calls) < 50 + 60  # all of it again would be 88 more
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


def test_a_budget_in_milliseconds_is_measured_once_and_goes_by_the_recipes_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = {"criterion": "magnitude", "budget": {"latency_ms": 1e-6}}
    with pytest.raises(sc.SecateurError, match="latency_ms=1e-06 is asked for, and the least that was"):
        run(made(TAYLOR, prune=impossible), tmp_path / "impossible", progress=False)
    assert not (tmp_path / "impossible").exists() or not list((tmp_path / "impossible").rglob("*.safetensors"))
    module = importlib.import_module("secateur.lab.run.pruning")
    latency = importlib.import_module("secateur.allocation.latency.api")
    counted, prune, measure = [], module.pruned_at, latency.measured_model

    def counting(stopwatch: Any, graph: Any, settings: sc.LatencySettings, **given: Any) -> Any:
        counted.append((settings.samples, stopwatch.where(graph)["inputs"][0][0], settings.threads))
        return measure(stopwatch, graph, settings, **given)

    monkeypatch.setattr(latency, "measured_model", counting)
    monkeypatch.setattr(module, "TIMED", 6)
    budget = {"latency_ms": 1000.0, "macs": 0.5}
    recipe = made(TAYLOR, prune=TAYLOR["prune"] | {"budget": budget}, measure={"batch_sizes": [4], "threads": 1})

    def stop(*args: Any, **given: Any) -> Any:
        prune(*args, **given)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "pruned_at", stop)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "again", progress=False)
    assert counted == [(4, 4, 1), (6, 4, 1)]  # networks at the door, and for the answer; batch size, threads
    monkeypatch.setattr(module, "pruned_at", prune)
    seed = run(recipe, tmp_path / "again", progress=False)["seeds"]["0"]
    assert len(counted) == 2  # the rest was on disk
    assert seed["after"]["macs"] <= 0.5 * seed["before"]["macs"]
    assert seed["stages"]["pruned"]["latency_ms"]["after"] <= 1000


def test_a_search_within_milliseconds_goes_on_where_it_was_interrupted_however_unsteady_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: Any
) -> None:
    rng, slower = np.random.default_rng(), [1.0]

    def noisy(models: Any, inputs: Any, repeats: int, warm_up: int, turns: int, backend: str) -> np.ndarray:
        weights = np.array([sum(tensor.numel() for tensor in model.parameters()) for model in models])
        return slower[0] * weights[:, None, None] / weights[0] * rng.uniform(0.9, 1.1, (len(models), turns, 1))

    monkeypatch.setattr(sampler, "in_turn", noisy)
    monkeypatch.setattr(importlib.import_module("secateur.lab.run.pruning"), "TIMED", 6)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_SAVES", 0.0)
    calls = interrupted(Evaluator, "_rise", 50)
    prune = {
        "criterion": "magnitude", "budget": {"latency_ms": 0.7}, "strategy": {"name": "bandit", "evaluations": 80},
        "repair": "recalibrate", "batches": 4,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(made(TAYLOR, prune=prune), tmp_path, progress=False)
    slower[0] = 1000.0  # today the machine does what it did before only by what was kept
    seed = run(made(TAYLOR, prune=prune), tmp_path, progress=False)["seeds"]["0"]
    assert seed["stages"]["pruned"]["search"]["table"]
    assert len(calls) < 50 + 60  # all of it again would be 88 more


def test_pivoting_that_the_training_is_too_short_for_is_told_before_any_work(tmp_path: Path) -> None:
    train = {"optimizer": {"momentum": 0.9}, "epochs": 2, "lr": 0.05}
    for options, message in (({"keep": 0.25}, "are 46 steps, and pivot takes"), ({"keep": 0.001}, "no layer can have")):
        prune = {"method": {"name": "pivot", **options}, "train": train}
        with pytest.raises(sc.SecateurError, match=message):
            run(made(TAYLOR, prune=prune), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", GENTLE)
def test_gentle_methods_run_load_and_end_the_same_when_stopped_in_between(
    tmp_path: Path, method: str, interrupted: Any
) -> None:
    recipe = made(TAYLOR, prune=gently(method), finetune={"epochs": 1, "lr": 0.01})
    whole = run(recipe, tmp_path / "whole", progress=False)
    seed = whole["seeds"]["0"]
    assert seed["after"]["macs"] <= 0.6 * seed["before"]["macs"]
    assert seed["stages"]["pruned"]["difference"] < 1e-5
    assert seed["stages"]["pruned"]["steps"] <= 2 * 23
    interrupted(GradualPruner, "step", 30)  # in the second epoch; the first has left a checkpoint
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "again", progress=False)
    assert list((tmp_path / "again" / "seed-0" / "pruned-checkpoints").iterdir())
    assert timeless(run(recipe, tmp_path / "again", progress=False)) == timeless(whole)
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (gently("increg", rate=0.01, limit=1.0), "are 46 steps, and increg takes [0-9]+ at least"),
        (gently("spp", rate=0.05, every=180), "or a smaller every than 180"),
        (gently("increg", rate=0.2, limit=100.0), "must stay below 3.8"),
        (gently("spp", exclude=["conv9"]), "conv9"),
    ],
)
def test_what_gentle_methods_cannot_do_is_told_before_any_work(tmp_path: Path, prune: dict, message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        run(made(TAYLOR, prune=prune), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_rounds_that_were_interrupted_end_the_same(tmp_path: Path) -> None:
    recipe = made(TAYLOR, prune={"criterion": "magnitude", "budget": {"params": 0.5}, "rounds": 2})
    whole = run(recipe, tmp_path / "whole", progress=False)

    def stop(line: str) -> None:
        if line == "seed-0: pruned":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "again", progress=False, say=stop)
    assert timeless(run(recipe, tmp_path / "again", progress=False)) == timeless(whole)
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


def test_a_budget_that_bottlenecks_cannot_meet_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(sc.SecateurError, match="cannot be met"):
        run(
            made(TAYLOR, prune={"method": "eigendamage", "budget": {"params": 0.001}}), tmp_path / "out", progress=False
        )
    assert not (tmp_path / "out").exists()


def test_seeds_differ_and_are_summed_up(tmp_path: Path) -> None:
    result = run(made(TAYLOR, seeds=[0, 1]), tmp_path, progress=False)
    rows = [result["seeds"][seed] for seed in ("0", "1")]
    values = [row["after"]["test_accuracy"] for row in rows]
    mean, sd = result["summary"]["after"]["test_accuracy"].values()
    assert mean == pytest.approx(sum(values) / 2) and sd == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert all(row["after"]["macs"] <= 0.5 * row["before"]["macs"] for row in rows)
    kept = weights(tmp_path)
    assert kept["seed-0/baseline/model.safetensors"] != kept["seed-1/baseline/model.safetensors"]
    assert table(result).row_count == 5


def test_weights_instead_of_training(tmp_path: Path) -> None:
    model = build("digits_cnn", width=0.25)
    sc.save(model, tmp_path / "w-3")
    changes = {"train": None, "model": {**TAYLOR["model"], "weights": str(tmp_path / "w-{seed}")}, "seeds": [3]}
    run(made(TAYLOR, **changes), tmp_path / "out", progress=False)
    back = sc.load(tmp_path / "out" / "seed-3" / "baseline")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def images(*shape: int, classes: int = 10, value: float = 0.0, number: int = 20) -> data.Dataset:
    split = data.Split(torch.full((number, *shape), value), torch.arange(number) % classes)
    return data.Dataset("mine", split, None, split, classes)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("mine")
    module.wrong_shape = lambda: images(3, 8, 8)
    module.many_classes = lambda: images(1, 8, 8, classes=20)
    module.not_a_number = lambda: images(1, 8, 8, value=float("nan"))
    module.empty = lambda: images(1, 8, 8, number=0)
    module.linear = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


OWN = {"options": {"width": 0.25}, "name": "digits_cnn"}
REFUSED = {
    "images of another shape": ({"data": {"name": "mine:wrong_shape"}}, r"example inputs \(\[1, 3, 8, 8\]"),
    "too few outputs": ({"data": {"name": "mine:many_classes"}}, r"\[1, 10\], and \[1, 20\] is due"),
    "an empty data set": ({"data": {"name": "mine:empty"}}, "no image in it"),
    "NaN images": ({"data": {"name": "mine:not_a_number"}}, "the loss is nan in epoch 1, step 1"),
    "a learning rate too high": ({"train": {"epochs": 1, "lr": 1e30}}, "the loss is .* smaller learning rate"),
    "no such data": ({"data": {"name": "mine:none"}}, "has no 'none'"),
    "no files of the data": ({"data": {"name": "mnist", "root": "/nowhere"}}, "/nowhere holds no mnist"),
    "nothing to remove": ({"model": {"name": "mine:linear"}}, "no removable channel"),
    "unknown option": ({"model": {**OWN, "options": {"widht": 2}}}, "did you mean 'width'"),
    "a budget that cannot be met": ({"prune": {"criterion": "random", "budget": {"macs": 1e-4}}}, "feasible are"),
    "no such weights": ({"train": None, "model": {**OWN, "weights": "none.safetensors"}}, "no such file"),
    "a group that is not there": (
        {"prune": {"criterion": "random", "budget": {"macs": 0.5, "at_least": {"conv4": 2}}}},
        "did you mean 'conv3'|did you mean 'conv",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_leaves_nothing(case: str, mine: types.ModuleType, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(sc.SecateurError, match=message):
        run(made(TAYLOR, **changes), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_run(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    changed = {**ALL_STAGES["train"], "optimizer": {**SDPRUN, "c": 0.1}}
    with pytest.raises(sc.SecateurError, match=r"another run \(train.optimizer.c 0.3, now 0.1\).*--fresh"):
        run(made(ALL_STAGES, train=changed), out, progress=False)


def test_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(sc.SecateurError, match="it holds other files"):
            run(made(TAYLOR), tmp_path, fresh=fresh, progress=False)
    with pytest.raises(sc.SecateurError, match="it is a file"):
        run(made(TAYLOR), tmp_path / "thesis.tex", progress=False)
    (tmp_path / folder.FILE).write_text("{")
    with pytest.raises(sc.SecateurError, match="is damaged"):
        run(made(TAYLOR), tmp_path, fresh=True, progress=False)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_fresh_replaces_another_run_and_nothing_else(tmp_path: Path) -> None:
    unpruned = {"prune": None, "train": {"epochs": 1, "lr": 0.1}}
    run(made(TAYLOR, **unpruned), tmp_path, progress=False)
    (tmp_path / "thesis.tex").write_text("mine")
    result = run(made(TAYLOR, **unpruned, seeds=[1]), tmp_path, fresh=True, progress=False)
    assert list(result["seeds"]) == ["1"] and not (tmp_path / "seed-0").exists()
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_another_version_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write(tmp_path, {"recipe": folder.dump(made(TAYLOR)), "versions": {"torch": "1.0"}, "finished": False})
    with pytest.raises(sc.SecateurError, match=r"begun with other versions .torch 1.0; now"):
        run(made(TAYLOR), tmp_path, progress=False)


def test_a_run_from_before_a_setting_was_there_is_the_same_run(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, result = finished
    older = json.loads(json.dumps(result))
    del older["recipe"]["prune"]["rounds"]
    folder.write(tmp_path, older)
    assert run(made(ALL_STAGES), tmp_path, progress=False) == older


def test_separable_where_no_convolution_can_be_or_is_a_bottleneck(tmp_path: Path) -> None:
    prune = {
        "method": {"name": "eigendamage", "separable": "svd", "layers": ["head"]}, "budget": {"params": 0.99},
        "batches": 2,
    }  # fmt: skip
    with pytest.raises(sc.SecateurError, match="is a convolution; leave it out"):
        run(made(TAYLOR, prune=prune), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    prune["method"]["layers"] = ["conv1", "head"]
    said = []
    found = run(made(TAYLOR, prune=prune), tmp_path / "out", progress=False, say=said.append)["seeds"]["0"]["stages"]
    assert found["pruned"]["separated"] == [] and list(found["pruned"]["bottlenecks"]) == ["head"]
    assert any(line.startswith("separable: ") for line in said)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with folder.held(tmp_path / "out"), pytest.raises(sc.SecateurError, match="another process is at work"):
        run(made(TAYLOR), tmp_path / "out", progress=False)


def test_a_damaged_stage_says_what_to_delete(tmp_path: Path) -> None:
    run(made(TAYLOR), tmp_path, progress=False)
    (tmp_path / folder.FILE).unlink()
    (tmp_path / "seed-0" / "measured.json").unlink()
    folder.write(tmp_path, {"recipe": folder.dump(made(TAYLOR)), "versions": folder.versions(), "finished": False})
    (tmp_path / "seed-0" / "pruned" / "model.safetensors").write_bytes(b"")
    with pytest.raises(sc.SecateurError, match=r"delete .*pruned to have this stage done again"):
        run(made(TAYLOR), tmp_path, progress=False)
    assert (tmp_path / "seed-0" / "baseline").exists()  # what is done stays


def test_on_a_full_disk_what_was_done_stays_and_with_room_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = made(TAYLOR, train={"epochs": 4, "lr": 0.1})
    whole = run(given, tmp_path / "whole", progress=False)
    sync, written = os.fsync, []

    def fills_up(handle: int) -> None:
        written.append(handle)
        if len(written) > 6:  # run.json and two checkpoints, each a file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fills_up)
    with pytest.raises(
        BadFile, match=r"No space left on device.*bytes are to be written.*run the same again"
    ) as caught:
        run(given, tmp_path / "again", progress=False)
    assert "\n" not in str(caught.value)
    kept = list((tmp_path / "again" / "seed-0" / "baseline-checkpoints").iterdir())
    assert len(kept) == 2 and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    epochs, plain = [], TrainingRun.pass_once
    monkeypatch.setattr(TrainingRun, "pass_once", lambda own, *args: (epochs.append(own.epoch), plain(own, *args)))
    assert timeless(run(given, tmp_path / "again", progress=False)) == timeless(whole)
    assert epochs == [2, 3]  # those before had been kept
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


def test_one_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(sc.SecateurError, match="accelerate launch"):
        run(made(TAYLOR), tmp_path / "out", progress=False)


@pytest.mark.slow
def test_the_digits_recipe_survives_ten_kills(tmp_path: Path) -> None:
    """The run of ``make demo``, each time killed once at a random moment and begun again."""
    given = recipe.read(shipped()["digits-sdprun"])
    start = time.monotonic()
    killed_and_resumed(tmp_path / "whole", [], given)
    whole = time.monotonic() - start
    finished = tmp_path / "whole", folder.read(tmp_path / "whole")
    draw = random.Random(0)
    kills = 0
    for i in range(10):
        kills += killed_and_resumed(tmp_path / str(i), [draw.uniform(0.05, 0.95) * whole], given)
        check_same(tmp_path / str(i), finished)
    assert kills >= 8  # a few may have come too late on a busy machine
