import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import forked
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
prune: {budget: {macs: 0.5}, criterion: magnitude, repair: none}
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
    "unknown criterion": (["prune.criterion=magnitud"], "did you mean 'magnitude'"),
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


LISTS = ("models", "data", "criteria", "strategies", "repairs", "methods", "optimizers", "schedules", "recipes")


def test_list_names_everything() -> None:
    lines = dict(line.split(": ", 1) for line in called("list").output.splitlines())
    assert lines["models"].split(", ") == list(models.MODELS) and lines["data"].split(", ") == list(data.DATA)
    assert {"increg", "pivot", "zero"} <= set(lines["methods"].split(", "))
    for kind, registry in (("criteria", sc.CRITERIA), ("strategies", sc.STRATEGIES), ("repairs", sc.REPAIRS)):
        assert lines[kind].split(", ") == registry.names()
    assert {"adam", "adamw", "sdprun", "sgd"} <= set(lines["optimizers"].split(", "))
    assert "digits-sdprun" in lines["recipes"]
    assert called("list", "data").output == f"data: {', '.join(data.DATA)}\n"


@pytest.mark.parametrize("name", ["digits_cnn", "lenet_300_100", "resnet20"])
def test_inspect_shows_a_built_in_model(name: str) -> None:
    result = called("inspect", name)
    assert result.exit_code == 0 and "removable channels" in result.output


def test_inspect_reads_saved_models_and_options(tmp_path: Path) -> None:
    model = build("digits_cnn", width=0.5)
    small = sc.prune(model, IMAGE, sc.Budget(channels=0.5)).model
    sc.save(small, tmp_path)
    assert called("inspect", tmp_path).output.strip() == sc.trace(small, IMAGE).summary()
    assert called("inspect", "digits_cnn", "width=0.5").output.strip() == sc.trace(model, IMAGE).summary()


def test_export_writes_what_it_tells(tmp_path: Path) -> None:
    sc.save(sc.prune(build("digits_cnn", width=0.5), IMAGE, sc.Budget(channels=0.5)).model, tmp_path / "small")
    for arguments, name in ((["digits_cnn", "width=0.5"], "a.onnx"), ([tmp_path / "small"], "b.pt2")):
        result = called("export", *arguments, "--out", tmp_path / name)
        assert result.exit_code == 0 and "largest difference to the model" in result.output
        assert (tmp_path / name).exists()
    result = called("export", "digits_cnn", "--out", tmp_path / "c.bin")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "a file that ends with .onnx or .pt2 or .py or .txt is expected" in result.stderr
    result = called("export", "digits_cnn", "--fixed", "--unchecked", "--to", "program", "--out", tmp_path / "c.bin")
    assert "dims that are free: none\nnot checked against the model" in result.output


MINE = """
from torch import nn

def make(width=8, classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))

print("imported")
"""


def test_a_factory_in_the_current_folder_is_run_saved_and_inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program of its own, whose folder is not the current one; and nothing a file names is imported unasked."""
    (tmp_path / "nets_at_home.py").write_text(MINE)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("{name: digits_cnn, options: {width: 0.25}}",
                                                    "{name: nets_at_home:make, options: {width: 12}}"))  # fmt: skip
    done = program("run", "r.yaml", "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    stage = "out/seed-0/pruned"
    head = json.loads((tmp_path / stage / "secateur.json").read_text())
    assert head["model"] == {"name": "nets_at_home:make", "options": {"width": 12}}
    asked = program("inspect", stage, folder=tmp_path)
    assert asked.returncode == 2 and "imported" not in asked.stdout and asked.stderr.count("\n") == 1
    command = f"secateur inspect {stage} --build nets_at_home:make width=12"
    assert asked.stderr.strip().endswith(command)
    found = program(*command.split()[1:], folder=tmp_path)
    assert found.returncode == 0 and "removable channels" in found.stdout, found.stderr
    wrong = program("inspect", stage, "--build", "nets_at_home:make", folder=tmp_path)
    assert wrong.returncode == 2 and "saved from another model" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "SAVED"], "does not say what made it: name the factory, secateur inspect SAVED --build"),
        (["inspect", "SAVED", "--build", "torch.nn:Linear", "in_features=4", "out_features=2"], "another model"),
        (["inspect", "SAVED", "--build", "torch.nn:Linear", "in_features=4"], "missing a required argument: 'out_fea"),
        (["inspect", "SAVED", "--build", "torch.nn:Linear", "in_features=4", "out_features=3"], "--input 1,3,32,32"),
        (["inspect", "digits_cnn", "--build", "torch.nn:Linear"], "belongs to a directory that was saved"),
        (["inspect", "SAVED", "width=2"], "takes no options, unless --build"),
    ],
)
def test_what_inspect_must_know_it_asks_for(arguments: list[str], message: str, tmp_path: Path) -> None:
    sc.save(torch.nn.Linear(4, 3), tmp_path / "x")
    result = called(*(str(tmp_path / "x") if word == "SAVED" else word for word in arguments))
    assert result.exit_code == 2 and message.replace("SAVED", str(tmp_path / "x")) in result.stderr
    assert result.stderr.count("\n") == 1


def program(
    *arguments: object, folder: Path | None = None, terminal: int | None = None
) -> subprocess.CompletedProcess[str]:
    """``secateur`` as a program; with ``terminal``, its output goes to one of so many columns."""
    settings = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "LINES", "FORCE_COLOR"}}
    settings["NO_COLOR"] = "1"
    if terminal is None:
        return forked.run(forked.command, *arguments, environment=settings, folder=folder)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, terminal, 0, 0))
    process = forked.start(forked.command, arguments, [theirs] * 3, environment=settings, folder=folder)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # what the other end's closing is told as
        while part := os.read(ours, 65536):
            seen += part
    os.close(ours)
    process.join()
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen.decode()).replace("\r\n", "\n")
    return subprocess.CompletedProcess(arguments, process.exitcode or 0, text, "")


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize(
    "arguments", [["list"], ["inspect", "resnet8"], ["inspect", "digits_cnn"], ["-h"], ["run", "-h"], ["inspect", "-h"]]
)
def test_on_a_terminal_no_line_is_too_long(arguments: list[str], columns: int) -> None:
    done = program(*arguments, terminal=columns)
    assert done.returncode == 0
    assert max(len(line) for line in done.stdout.splitlines()) <= columns
    word = {"list": "cifar10-resnet20-eigendamage-iterative", "-h": "Usage"}.get(arguments[-1], "removable")
    assert word in done.stdout


@pytest.mark.parametrize("columns", [40, 80])
def test_the_table_of_a_run_fits_and_cuts_no_number(columns: int, recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert called("run", recipe, "seeds=[0, 1]", "--out", out, "--quiet").exit_code == 0
    done = program("run", recipe, "seeds=[0, 1]", "--out", "out", folder=tmp_path, terminal=columns)
    assert done.returncode == 0 and max(len(line) for line in done.stdout.splitlines()) <= columns
    assert "…" not in done.stdout and "test accuracy" in done.stdout
    found = json.loads((out / "run.json").read_text())["summary"]
    for column in ("before", "after"):
        assert f"{found[column]['macs']['mean']:,.0f}" in done.stdout


@pytest.fixture
def nothing_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.lab.run.estimate.LONG", 0.0)


def test_what_takes_hours_asks_before_it_begins(recipe: str, tmp_path: Path, nothing_is_short: None) -> None:
    out = tmp_path / "out"
    refused = called("run", recipe, "--out", out)
    assert refused.exit_code == cli.BAD_INPUT and refused.stderr.count("\n") == 1 and not out.exists()
    assert re.search(
        r"takes (about|under) .* on cpu, 1 thread, estimated from .* timed now .*--yes begins", refused.stderr
    )
    wanted = called("run", recipe, "--out", out, "--yes")
    assert wanted.exit_code == 0
    again = called("run", recipe, "--out", out)  # finished: there is nothing to ask
    assert again.exit_code == 0


def test_a_run_that_was_begun_goes_on_unasked(
    recipe: str, tmp_path: Path, nothing_is_short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on: an estimate that comes out larger today must not stand in its way."""
    begun = iter([True])

    def stop(line: str) -> None:
        if "pruned" in line and next(begun, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_say", lambda quiet: stop)
    assert called("run", recipe, "--out", tmp_path / "out", "--yes").exit_code == cli.INTERRUPTED
    assert called("run", recipe, "--out", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("columns", [40, 80])
def test_a_dry_run_tells_the_stages_and_writes_nothing(columns: int, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("train:", "seeds: [3, 4]\ntrain:"))
    done = program("run", "r.yaml", "--dry-run", folder=tmp_path, terminal=columns)
    assert done.returncode == 0, done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    assert max(len(line) for line in done.stdout.splitlines()) <= columns
    for seed in (3, 4):
        assert f"seed {seed}:\n  baseline: 1 epochs of" in done.stdout
    for word in ("pruned: criterion", "measured: accuracy", "in all on cpu, 1 thread", "timed", "not counted"):
        assert word in done.stdout


def test_a_dry_run_refuses_what_a_run_refuses(recipe: str, tmp_path: Path) -> None:
    for case in ("a budget that cannot be met", "images of another shape", "no such weights"):
        overrides, message = BAD[case]
        result = called("run", recipe, *overrides, "--out", tmp_path / "out", "--dry-run")
        assert result.exit_code == cli.BAD_INPUT and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_where_there_is_no_terminal_lists_are_one_line_each() -> None:
    done = program("list")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(LISTS)


def test_the_version_and_both_ways_to_ask_for_help() -> None:
    assert called("--version").output == f"secateur {sc.__version__}\n"
    for command in ([], ["run"], ["inspect"], ["list"]):
        short, long = called(*command, "-h"), called(*command, "--help")
        assert short.exit_code == long.exit_code == 0 and short.output == long.output and "Usage" in short.output


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "secateur", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"secateur {sc.__version__}\n"


def test_help_comes_at_once() -> None:
    """In under a second, the best of a few; and without PyTorch, which takes longer than that by itself."""
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "secateur", "--help"], capture_output=True, check=True)
        took.append(time.perf_counter() - begun)
        if took[-1] < 1:
            break
    assert min(took) < 1
    code = "import sys; from secateur.cli import app; app(['-h'], standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_sigterm_ends_a_run_like_an_interruption(recipe: str, tmp_path: Path) -> None:
    """One line, its own exit code, and the same command goes on: what a batch system needs."""
    words = ["run", recipe, "train.epochs=20", "--out", tmp_path / "out"]
    with (tmp_path / "stdout").open("w+") as out, (tmp_path / "stderr").open("w+") as err:
        process = forked.start(forked.command, words, [out.fileno(), out.fileno(), err.fileno()])
    while process.is_alive() and not list((tmp_path / "out").glob("seed-0/baseline-checkpoints/*.safetensors")):
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    stdout, stderr = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == cli.TERMINATED == 143 and stdout == ""
    assert stderr.splitlines()[-1] == "terminated: the same command goes on where it was" and "Traceback" not in stderr
    kept = sorted((tmp_path / "out" / "seed-0" / "baseline-checkpoints").iterdir())
    assert kept and not list(tmp_path.rglob("*.tmp"))
    done = called("run", recipe, "train.epochs=20", "--out", tmp_path / "out")
    assert done.exit_code == 0 and "epoch 1/20" not in done.stderr


def test_where_there_is_no_terminal_there_are_no_bars_but_a_line_an_epoch(recipe: str, tmp_path: Path) -> None:
    own = ("train.epochs=3", "data.validation=0.2", "prune.budget.round_to=8")
    done = program("run", recipe, *own, "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [
        re.match(r"epoch (\d)/3: loss [\d.]+, validation accuracy [\d.]+, [\d.]+ s$", line)[1] for line in epochs
    ] == [*"123"]
    told = "widths that are multiples of 8 use 88% of what the budget allows: Budget(round_to=1) would use more of it"
    assert lines == ["seed-0: baseline", *epochs, "seed-0: pruned", told, "seed-0: measured"]
    quiet = program("run", recipe, "train.epochs=3", "--out", "again", "--quiet", folder=tmp_path)
    assert quiet.returncode == 0 and quiet.stderr == "" and "\x1b" not in quiet.stdout + done.stderr


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
