"""A sweep: the product of settings, what is shared done once, and ended at any moment it goes on to the same table."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from secateur import cli
from secateur.lab.recipe.shipped import read_named
from secateur.lab.run import run
from secateur.lab.run.setting import Sharing
from secateur.lab.sweep import Done, read_sweep, tabulated

SMALL = ["train.epochs=1", "finetune=null", "model.options.width=0.25", "measure.batch_sizes=[1]", "measure.repeats=1"]
GRID = ["prune.criterion=[taylor,auto]", "prune.budget.macs=[0.6,0.4]", "seeds=[0,1]"]
SWEEP = [sys.executable, "-m", "secateur", "sweep", "digits-taylor", *SMALL, *GRID]


def called(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def without_times(out: Path) -> list[str]:
    """The table of a sweep without its milliseconds, which are others each time."""
    rows = [line.split("|") for line in (out / "table.md").read_text().splitlines() if line.startswith("|")]
    kept = [at for at, name in enumerate(rows[0]) if "times as fast" not in name]
    return ["|".join(row[at] for at in kept) for row in rows]


def test_the_product_of_settings_and_who_rides_along() -> None:
    found = read_sweep("digits-taylor", [*SMALL, *GRID])
    assert len(found.cells) == (2 + 2) * 2 * 2
    names = [cell.name for cell in found.cells]
    assert "criterion=taylor,macs=0.6" in names and "criterion=random,macs=0.4" in names
    assert {cell.recipe.measure.batch_sizes[0] for cell in found.cells} == {1}
    assert len(read_sweep("digits-taylor", [*SMALL, *GRID], baselines=False).cells) == 8
    alike = read_sweep("digits-taylor", ["prune.criterion=[random,magnitude]"])
    assert len(alike.cells) == 2, "what is asked for does not ride along again"
    lists = read_sweep(
        "digits-taylor", ["measure.batch_sizes=[[1],[2,4]]", "prune.exclude=[[],[conv1]]"], baselines=False
    )
    assert [c.recipe.measure.batch_sizes for c in lists.cells] == [[1], [1], [2, 4], [2, 4]]
    assert [c.recipe.prune.exclude for c in lists.cells] == [[], ["conv1"]] * 2
    method = read_sweep("digits-eigendamage", ["prune.budget.params=[0.5,0.3]"])
    assert len(method.cells) == 2 and "do not ride along" in method.notes[0]


def test_names_of_folders_are_unique_and_short_enough() -> None:
    found = read_sweep("digits-taylor", ["train.lr=[0.1,0.2]", "finetune.lr=[0.01]", f"name=[{'x' * 150},{'y' * 150}]"])
    names = [cell.folder for cell in found.cells]
    assert len(set(names)) == len(names) and max(map(len, names)) <= 120


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    found = called("sweep", "digits-taylor", *SMALL, *GRID, "--out", out, "--quiet")
    assert found.exit_code == 0, found.output
    return out


def test_trainings_are_done_once_and_every_cell_is_what_it_is_alone(swept: Path, tmp_path: Path) -> None:
    assert len(list((swept / "trained").iterdir())) == 2
    for criterion in ("auto", "taylor"):
        cell = json.loads((swept / "cells" / f"criterion={criterion},macs=0.4,seed=1" / "run.json").read_text())
        recipe = read_named(
            "digits-taylor", [*SMALL, f"prune.criterion={criterion}", "prune.budget.macs=0.4", "seeds=[1]"]
        )
        alone = run(recipe, tmp_path / criterion, progress=False)
        for stage in ("before", "after", "layers"):
            one, other = (json.loads(json.dumps(r["seeds"]["1"][stage])) for r in (cell, alone))
            for found in (one, other):
                if stage != "layers":
                    del found["latency"]
            assert one == other
        one, other = (r["seeds"]["1"]["stages"]["pruned"] for r in (cell, alone))
        assert one == other, "also what it says that it took"


def test_the_table_has_means_over_seeds_and_its_forms(swept: Path) -> None:
    rows = without_times(swept)
    assert len(rows) == 2 + 8
    first = json.loads((swept / "cells" / "criterion=taylor,macs=0.6,seed=0" / "run.json").read_text())
    second = json.loads((swept / "cells" / "criterion=taylor,macs=0.6,seed=1" / "run.json").read_text())
    mean = sum(r["seeds"][s]["after"]["test_accuracy"] for r, s in ((first, "0"), (second, "1"))) / 2
    assert f"{100 * mean:.2f}" in rows[2] and "| 2 |" in rows[2]
    assert "<circle" in (swept / "report.html").read_text()
    cells = sorted((swept / "cells").iterdir())
    compared = called("compare", *cells, "--format", "json")
    assert compared.exit_code == 0 and len(json.loads(compared.output)["entries"]) == 16


def test_again_nothing_is_done(swept: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (swept / "cells").rglob("run.json")}
    assert called("sweep", "digits-taylor", *SMALL, *GRID, "--out", swept, "--quiet").exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in (swept / "cells").rglob("run.json")}


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_it_goes_on_to_the_same_table(swept: Path, tmp_path: Path, jobs: int) -> None:
    command = [
        sys.executable,
        "-m",
        "secateur",
        "sweep",
        "digits-taylor",
        *SMALL,
        *GRID,
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--quiet", "--jobs", str(jobs)]
    going = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("cells/*/report.html"))) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(going.pid, signal.SIGKILL)
    going.wait()
    done = len(list((tmp_path / "out").glob("cells/*/report.html")))
    assert 3 <= done < 16
    time.sleep(1.5)  # its processes see that it is gone
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert without_times(tmp_path / "out") == without_times(swept)
    assert ("latencies are rough" in (tmp_path / "out" / "table.md").read_text()) == (jobs > 1)


def test_what_fails_is_a_row_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*SMALL, "train.lr=[0.1,1e30]"]
    found = called("sweep", "digits-taylor", *words, "--out", tmp_path / "out", "--quiet", "--alone")
    assert found.exit_code == 1 and "failed: " in found.output and "the loss is" in found.output
    assert "1 of 2 runs failed" in found.output
    assert "failed" in (tmp_path / "out" / "table.md").read_text()
    (tmp_path / "broken_net.py").write_text("def make(**_):\n    raise ZeroDivisionError('mine')\n")
    monkeypatch.chdir(tmp_path)
    words = [*SMALL[:2], "model.name=[digits_cnn,broken_net:make]", "model.options={}"]
    found = called("sweep", "digits-taylor", *words, "--out", tmp_path / "other", "--quiet", "--alone")
    assert found.exit_code == 1 and "mine" in found.output


def test_on_a_ray_cluster(swept: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    command = [
        sys.executable,
        "-m",
        "secateur",
        "sweep",
        "digits-taylor",
        *SMALL,
        *GRID,
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "--quiet", "--ray", "--jobs", "2"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert without_times(tmp_path / "out") == without_times(swept)


BAD = {
    "no value": (["prune.budget.macs=[]"], "no value is given"),
    "a value twice": (["prune.budget.macs=[0.5,0.5]"], "given twice"),
    "a key twice": (["prune.budget.macs=[0.5]", "prune.budget.macs=[0.3]"], "given twice"),
    "a wrong value": (["prune.budget.macs=[0.5,1.5]"], "keeps more than everything"),
    "an unknown key": (["prune.budge.macs=[0.5,0.4]"], "did you mean 'budget'"),
    "no key": (["macs"], "key=value is expected"),
    "a seed twice": (["seeds=[0,0]"], "given twice"),
    "no such recipe": (["--"], "did you mean"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_nothing_is_written(case: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, told = BAD[case]
    recipe = "digits-tailor" if case == "no such recipe" else "digits-taylor"
    found = called("sweep", recipe, *words)
    assert found.exit_code == 2 and told in found.output and found.output.count("secateur:") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    found = called("sweep", "digits-taylor", *SMALL, "--out", tmp_path)
    assert found.exit_code == 2 and "holds something else" in found.output
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_nothing_done_yet_is_a_table_too() -> None:
    table = tabulated(read_sweep("digits-taylor", []), Done())
    assert "nothing is done yet" in table.markdown()


def test_a_network_that_differs_shares_nothing(tmp_path: Path) -> None:
    from secateur.lab.models.registry import build

    sharing = Sharing(tmp_path)
    first, second = build("digits_cnn"), build("digits_cnn")
    model, known = sharing.of(first, "data")
    known["x"] = 1
    assert model is first and sharing.of(first, "data")[1] is known
    assert sharing.of(second, "data") == (second, {})
    assert sharing.of(second, "other data")[1] == {}


def test_the_criterion_may_be_fixed_and_baselines_ride_along_once() -> None:
    found = read_sweep("digits-taylor", ["prune.criterion=taylor", "prune.budget.macs=[0.5,0.3]"])
    assert [c.recipe.prune.criterion for c in found.cells] == ["taylor"] * 2 + ["random", "magnitude"] * 2
    found = read_sweep("digits-taylor", ["prune.criterion=[{name: taylor},{name: magnitude}]"])
    assert [c.recipe.prune.criterion for c in found.cells] == [{"name": "taylor"}, {"name": "magnitude"}, "random"]
    found = read_sweep("digits-taylor", ["prune.criterion.name=[taylor,magnitude]"])
    assert len(found.cells) == 3


def test_names_that_no_folder_can_have_and_commands_that_run(tmp_path: Path) -> None:
    found = read_sweep("digits-taylor", ['name=["a\\u0000b","a/b","a-b","漢字"]', "seeds=3"], baselines=False)
    names = [cell.folder for cell in found.cells]
    assert len(set(names)) == 4 and all(re.fullmatch(r"[\x21-\x7e]+", name) and "/" not in name for name in names)
    found = read_sweep("digits-taylor", ["prune.criterion=[{name: taylor}]", "seeds=3"], baselines=False)
    words = shlex.split(found.cells[0].command("digits-taylor", tmp_path))
    assert words[:3] == ["secateur", "run", "digits-taylor"]
    again = read_named(words[2], words[3:-2])
    assert again == found.cells[0].recipe and words[-1].startswith(str(tmp_path))


MINE = """
import torch
from torch import nn
from torch.nn import functional as F

def net(act="relu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), {"relu": nn.ReLU, "tanh": nn.Tanh}[act](), nn.Linear(24, 10))

def squared(outputs, targets):
    return (outputs.softmax(1) - F.one_hot(targets, 10)).square().sum(1).mean()

def accuracy(model, batches):
    return sum(100 * float((model(x).argmax(1) == y).float().mean()) for x, y in batches) / len(batches)
"""
OWN = """
device: cpu
threads: 1
data: {name: digits, batch_size: 64, validation: 0.2}
model: {name: "mine:net"}
train: {epochs: 1, lr: 0.1}
prune: {budget: {macs: 0.5}, criterion: taylor, repair: none}
measure: {batch_sizes: [1], repeats: 1}
"""


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("varied", ["loss=[cross_entropy,mine:squared]", "model.options.act=[relu,tanh]"])
def test_what_differs_is_not_shared(
    varied: str, trained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "own.yaml").write_text(OWN)
    if not trained:  # the same weights for all
        save_file(importlib.import_module("mine").net().state_dict(), tmp_path / "w.safetensors")
        (tmp_path / "own.yaml").write_text(
            OWN.replace('"mine:net"', '"mine:net", weights: w.safetensors').replace("train:", "#")
        )
    assert called("sweep", "own.yaml", varied, "--alone", "--quiet", "--out", "s").exit_code == 0
    key, _, values = varied.partition("=")
    for value in values.strip("[]").split(","):
        assert called("run", "own.yaml", f"{key}={value}", "--quiet", "--out", value.replace(":", "-")).exit_code == 0
        alone = json.loads((tmp_path / value.replace(":", "-") / "run.json").read_text())["seeds"]["0"]
        (cell,) = (p for p in (tmp_path / "s" / "cells").iterdir() if f"={value}," in p.name)
        found = json.loads((cell / "run.json").read_text())["seeds"]["0"]
        assert found["stages"]["pruned"] == alone["stages"]["pruned"]
        assert found["after"]["test_accuracy"] == alone["after"]["test_accuracy"]
    sys.modules.pop("mine", None)


def test_metrics_that_are_called_alike_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "own.yaml").write_text(OWN)
    words = ["measure.metric=[null,mine:accuracy]", "--alone", "--quiet", "--out", "s"]
    assert called("sweep", "own.yaml", *words).exit_code == 0
    text = (tmp_path / "s" / "table.md").read_text()
    assert "test accuracy [2] before" in text and "Different metrics are called accuracy" in text
    (cell,) = (tmp_path / "s" / "cells").glob("metric=mine*")
    html = (cell / "report.html").read_text()
    assert "accuracy held out (%)" not in html and "accuracy held out" in html
    sys.modules.pop("mine", None)


def test_forwards_are_those_of_the_run_alone(tmp_path: Path) -> None:
    words = [*SMALL, "prune.repair=refit", "prune.criterion=auto"]
    varied = ["prune.budget.macs=[0.6,0.5]", "prune.strategy=[sensitivity,global]"]
    assert (
        called("sweep", "digits-taylor", *words, *varied, "--alone", "--quiet", "--out", tmp_path / "s").exit_code == 0
    )
    for cell in (tmp_path / "s" / "cells").iterdir():
        run_ = json.loads((cell / "run.json").read_text())
        again = shlex.split(run_["command"])[1:-1]
        assert called(*again, tmp_path / "alone" / cell.name, "--quiet").exit_code == 0
        alone = json.loads((tmp_path / "alone" / cell.name / "run.json").read_text())
        one, other = (r["seeds"]["0"]["stages"]["pruned"] for r in (run_, alone))
        assert one["forwards"] == other["forwards"] and one["notices"] == other["notices"], cell.name


def test_jobs_of_one_network_wait_for_its_training(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "secateur", "sweep", "digits-taylor", "train.epochs=8", *SMALL[1:]]
    command += ["prune.criterion=[taylor,magnitude]", "--alone", "--jobs", "2", "--quiet", "--out", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr


def test_the_folder_of_another_sweep_is_refused_and_one_that_has_just_begun_is_not(swept: Path, tmp_path: Path) -> None:
    found = called("sweep", "digits-spp", "seeds=[0,1]", "--out", swept)
    assert found.exit_code == 2 and "holds a sweep of digits-taylor" in found.output
    (tmp_path / "sweep.json.1.tmp").write_text("")
    words = [*SMALL, "--alone", "--quiet", "--out", tmp_path]
    assert called("sweep", "digits-taylor", *words).exit_code == 0
