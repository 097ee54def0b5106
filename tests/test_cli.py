import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import secateur as sc
from secateur import cli
from secateur.lab import data, models, run
from secateur.lab.models.registry import build

RECIPE = """
name: small
about: a test
device: cpu
threads: 1
data: {name: digits, batch_size: 64}
model: {name: digits_cnn, options: {width: 0.25}}
train: {epochs: 1, lr: 0.1}
prune: {method: magnitude, budget: {macs: 0.5}}
measure: {batch_sizes: [1], repeats: 1}
"""

IMAGE = torch.zeros(1, 1, 8, 8)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "r.yaml").write_text(RECIPE)
    return str(tmp_path / "r.yaml")


def called(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_a_run_prints_its_table_and_again_when_it_is_finished(recipe: str, tmp_path: Path) -> None:
    first = called("run", recipe, "train.lr=0.05", "--out", tmp_path / "out")
    assert first.exit_code == 0, first.output
    for word in ("test accuracy", "parameters", "MACs", "file size", "latency, batch 1", "before", "after", "lossless"):
        assert word in first.output
    again = called("run", recipe, "train.lr=0.05", "--out", tmp_path / "out")
    assert again.exit_code == 0 and "this run is finished" in again.output
    table = first.output[first.output.index("test accuracy") :]
    assert table in again.output


def test_the_folder_is_named_after_the_recipe(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert called("run", recipe, "prune={}", "--quiet").exit_code == 0
    assert (tmp_path / "runs" / "small" / "run.json").exists()


BAD = {
    "unknown key": (["train.epoch=3"], "did you mean 'epochs'"),
    "budget of 0": (["prune.budget.macs=0"], "keeps nothing"),
    "budget of -1": (["prune.budget.macs=-1"], "keeps nothing"),
    "budget of 1.5": (["prune.budget.macs=1.5"], "keeps more than everything"),
    "budget of NaN": (["prune.budget.macs=.nan"], "not a number"),
    "two budgets that contradict": (["prune.budget.macs=0.5", "prune.budget.macs=0.3"], "contradicts"),
    "a budget that cannot be met": (["prune.budget.macs=0.00001"], "feasible are"),
    "unknown method": (["prune.method=magnitud"], "did you mean 'magnitude'"),
    "unknown model": (["model.name=digits_cn"], "did you mean 'digits_cnn'"),
    "unknown data": (["data.name=digit"], "did you mean 'digits'"),
    "images of another shape": (["model.name=lenet5", "model.options={}"], "fails on the example inputs"),
    "NaN loss": (["train.lr=1e30"], "the loss is"),
    "no such weights": (["train=null", "model.weights=none"], "no such file"),
    "not an override": (["epochs"], "key=value is expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_nothing_written(case: str, recipe: str, tmp_path: Path) -> None:
    overrides, message = BAD[case]
    result = called("run", recipe, *overrides, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == cli.BAD_INPUT, result.output
    assert message in result.stderr and result.stderr.count("\n") == 1 and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digits-sdprn"], "did you mean 'digits-sdprun'"),
        (["run", "nowhere/r.yaml"], "there is no such file"),
        (["inspect", "lenet"], "did you mean 'lenet5'"),
        (["inspect", "lenet5", "width=2"], "option of model 'lenet5'"),
        (["inspect", "lenet5", "width"], "OPTION=VALUE is expected"),
        (["inspect", "lenet5", "--input", "1,3,28,28"], "fails on the example inputs"),
        (["inspect", "lenet5", "--input", "1,x"], "positive whole numbers"),
        (["inspect", "nowhere_at_all:make"], "cannot import"),
        (["inspect", "."], "not a directory that secateur saved"),
        (["list", "model"], "did you mean 'models'"),
    ],
)
def test_bad_arguments_are_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = called(*arguments)
    assert result.exit_code == cli.BAD_INPUT, result.output
    assert message in result.stderr and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["rum"], ["run"], ["run", "x", "--outt", "y"], ["inspect"]])
def test_wrong_usage(arguments: list[str]) -> None:
    result = called(*arguments)
    assert result.exit_code == cli.BAD_INPUT and "Usage" in result.stderr


def test_an_interruption_says_how_to_go_on(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    result = called("run", recipe, "--out", tmp_path / "out")
    assert result.exit_code == cli.INTERRUPTED and "the same command goes on" in result.stderr


def test_a_bug_keeps_its_traceback(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run", lambda *_, **__: 1 / 0)
    result = called("run", recipe, "--out", tmp_path / "out")
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)


def test_list_names_everything() -> None:
    lines = dict(line.split(": ", 1) for line in called("list").output.splitlines())
    assert lines["models"].split(", ") == list(models.MODELS) and lines["data"].split(", ") == list(data.DATA)
    assert {"taylor", "dead", "none"} <= set(lines["methods"].split(", "))
    assert "digits-sdprun" in lines["recipes"]
    assert called("list", "data").output == f"data: {', '.join(data.DATA)}\n"


@pytest.mark.parametrize("name", ["digits_cnn", "lenet_300_100", "resnet20"])
def test_inspect_shows_a_built_in_model(name: str) -> None:
    result = called("inspect", name)
    assert result.exit_code == 0 and "removable channels" in result.output


def test_inspect_reads_saved_models_and_options(tmp_path: Path) -> None:
    model = build("digits_cnn", width=0.5)
    small = sc.prune(model, IMAGE, method="magnitude", budget=sc.Budget(channels=0.5)).model
    sc.save(small, tmp_path)
    assert called("inspect", tmp_path).output.strip() == sc.trace(small, IMAGE).summary()
    assert called("inspect", "digits_cnn", "width=0.5").output.strip() == sc.trace(model, IMAGE).summary()


def test_as_a_program(recipe: str, tmp_path: Path) -> None:
    """Exit code, streams and imports of the installed command itself."""
    code = (
        "import sys, secateur;"
        "assert not {'accelerate', 'sklearn', 'pyarrow', 'matplotlib', 'pydantic'} & set(sys.modules);"
        "from secateur.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "run", recipe, "train.epoch=3", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("secateur: recipe ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
