"""What a run is going to do is told as it is then done, and how long that takes about as long as it then takes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc
from secateur.lab import data, recipe
from secateur.lab.data.registry import stand_in
from secateur.lab.models.registry import build
from secateur.lab.run import dry_run, run
from secateur.lab.run.estimate import Cost, in_words, stages_of

BASE: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "data": {"name": "digits", "batch_size": 64, "validation": 0.5},
    "model": {"name": "digits_cnn", "options": {"width": 0.25}},
    "train": {"epochs": 1, "lr": 0.1},
    "measure": {"batch_sizes": [1, 4], "repeats": 2},
}
TUNE = {"epochs": 1, "lr": 0.01}
SDPRUN = {"optimizer": "sdprun", "epochs": 1, "lr": 0.1}
HALF = {"budget": {"macs": 0.5}, "criterion": "magnitude", "repair": "none"}
CASES: dict[str, dict[str, Any]] = {
    "nothing is pruned": {},
    "at once": {"prune": HALF, "finetune": TUNE},
    "in rounds": {"prune": {**HALF, "rounds": 2}, "finetune": TUNE},
    "weights that are given": {"train": None, "model": {**BASE["model"], "weights": "WEIGHTS"}, "prune": HALF},
    "pruned in training": {"train": SDPRUN, "prune": {"method": "zero"}},
    "beside its baseline": {"train": {**SDPRUN, "baseline": True}, "prune": {"method": "zero"}},
    "beside its baseline, not cut": {"train": {**SDPRUN, "baseline": True}},
    "a method with a last step": {
        "model": {"name": "digits_cnn"},
        "prune": {"method": {"name": "pivot", "keep": 0.25}},
    },
}


def made(changes: dict[str, Any], folder: Path) -> recipe.Recipe:
    given = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    if "weights" in given["model"]:
        sc.save(build("digits_cnn", width=0.25), folder / "weights")
        given["model"] = {**given["model"], "weights": str(folder / "weights")}
    return recipe.validate(given)


@pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")  # an untrained network has no zero channels, say
@pytest.mark.parametrize("case", CASES)
def test_the_stages_are_those_that_are_then_done(case: str, tmp_path: Path) -> None:
    given = made(CASES[case], tmp_path)
    told: list[str] = []
    run(given, tmp_path / "out", progress=False, say=told.append)
    done = [line.removeprefix("seed-0: ") for line in told if line.startswith("seed-0: ")]
    digits = data.load("digits", validation=0.5)
    assert [stage.name for stage in stages_of(given, digits, Cost(1.0, 0.0, ""))] == done
    again = dry_run(given, tmp_path / "again")
    assert [stage.name for stage in again.stages[0]] == done and not any(s.done for s in again.stages[0])


def test_the_times_are_multiples_of_what_was_measured(tmp_path: Path) -> None:
    """Counted by hand: 719 training images are 12 batches, 718 are held out, and the test set has 360."""
    digits = data.load("digits", validation=0.5)
    train, held_out, test = (len(part) for part in (digits.train, digits.validation, digits.test))
    steps = -(-train // 64)
    given = made({"train": {"epochs": 3, "lr": 0.1}, "prune": {**HALF, "criterion": "taylor", "batches": 5},
                  "finetune": {"epochs": 2, "lr": 0.1}}, tmp_path)  # fmt: skip
    found = {s.name: s.seconds for s in stages_of(given, digits, Cost(10.0, 0.01, ""))}
    assert found == {
        "baseline": pytest.approx(3 * (steps * 10.0 + held_out * 0.01)),
        "pruned": pytest.approx(5 * 10.0),
        "tuned": pytest.approx(2 * (steps * 10.0 + held_out * 0.01)),
        "measured": pytest.approx(2 * (test + held_out + (1 + 4) * 2) * 0.01),
    }
    without = made({"prune": HALF}, tmp_path)  # magnitude looks at no data
    assert {s.name: s.seconds for s in stages_of(without, digits, Cost(10.0, 0.01, ""))}["pruned"] == 0


def test_what_is_done_is_not_counted_again(tmp_path: Path) -> None:
    given = made({"prune": HALF, "seeds": [0, 1]}, tmp_path)

    def stop(line: str) -> None:
        if line == "seed-0: pruned":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(given, tmp_path / "out", progress=False, say=stop)
    files = sorted((tmp_path / "out").rglob("*"))
    found = dry_run(given, tmp_path / "out")
    assert sorted((tmp_path / "out").rglob("*")) == files
    assert [(s.name, s.done) for s in found.stages[0]] == [("baseline", True), ("pruned", False), ("measured", False)]
    assert not any(s.done for s in found.stages[1])
    left = [s.seconds for stages in found.stages.values() for s in stages if not s.done]
    assert (
        found.seconds == pytest.approx(sum(left)) and "  baseline: 1 epochs of 12 steps with sgd, done" in found.lines()
    )
    assert not any(s.done for s in dry_run(given, tmp_path / "out", fresh=True).stages[0])


def test_a_run_takes_about_as_long_as_was_estimated(tmp_path: Path) -> None:
    """Within a factor of eight: the machine may be busy with something else, seconds are not milliseconds."""
    given = made({"train": {"epochs": 15, "lr": 0.1}}, tmp_path)
    told = []
    begun = time.perf_counter()
    run(given, tmp_path / "out", progress=False, agree=told.append)
    assert 1 / 8 < told[0].seconds / (time.perf_counter() - begun) < 8


def test_a_slow_step_is_extrapolated_from_a_few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = __import__("secateur.lab.run.estimate", fromlist=["estimate"])
    monkeypatch.setattr(estimate, "_ENOUGH", 0.0)
    found = dry_run(made({}, tmp_path), tmp_path / "out")
    assert "from 8 images both ways, times 8 for a training step of a batch" in found.how


def test_the_estimate_changes_nothing_of_the_run(tmp_path: Path) -> None:
    given = made({"prune": HALF}, tmp_path)
    run(given, tmp_path / "asked", progress=False, agree=lambda found: None)
    run(given, tmp_path / "unasked", progress=False)
    for stage in ("baseline", "pruned"):
        a, b = (sc.load(tmp_path / out / "seed-0" / stage) for out in ("asked", "unasked"))
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_large_data_are_neither_read_nor_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("secateur.lab.data.registry.folders", lambda root: iter([tmp_path] if root is None else [root]))
    monkeypatch.setattr("secateur.lab.data.registry.fetch", lambda *_: pytest.fail("it was fetched"))
    found = stand_in("cifar10", validation=0.1)
    assert (len(found.train), len(found.validation), len(found.test)) == (45_000, 5_000, 10_000)
    assert found.image == (3, 32, 32) and found.classes == 10 and "is not here" in found.notes
    assert sum(t.untyped_storage().nbytes() for t in (found.train.images, found.test.images)) < 10_000
    with pytest.raises(sc.SecateurError, match="holds no mnist"):
        stand_in("mnist", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_times_are_told_as_people_say_them() -> None:
    told = {0.2: "under 1 s", 40: "about 40 s", 1500: "about 25 min", 25_000: "about 7 hours", 5e6: "about 58 days"}
    assert {seconds: in_words(seconds) for seconds in told} == told
