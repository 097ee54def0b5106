"""The command line, ``secateur``: a function a command.

Bad input ends with exit code 2 and one message on stderr, a sweep with runs that failed with 1, an interruption with
130, and SIGTERM with 143. Anything else is a bug of ours and keeps its traceback. Results go to stdout; what is said
meanwhile goes to stderr. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from shutil import get_terminal_size
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur import __version__
from secateur._internal.errors import SecateurError, unknown
from secateur._internal.importing import current_folder_importable

if TYPE_CHECKING:
    from secateur.lab.run.estimate import Estimate

app = typer.Typer(
    help="Structured pruning for PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOptions = Annotated[
    list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...", help="The model's options, such as width=2.")
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="[NAME=]SIZES[:DTYPE[:HIGH]]",
        help="An example input, such as 1,3,32,32 or input_ids=1,16:int64:100; again for the next.",
    ),
]  # fmt: skip
Inputs = Annotated[
    str | None, typer.Option("--inputs", metavar="MODULE:FUNCTION", help="What gives the example inputs instead.")
]
Factory = Annotated[
    str | None,
    typer.Option(metavar="MODULE:FACTORY", help="What makes the original of a saved directory; it is imported."),
]
Weights = Annotated[Path | None, typer.Option(help="Of the model: a safetensors file, or a saved directory.")]
Outputs = Annotated[
    str | None, typer.Option(help="Which of what the forward returns: logits, 0, or a path such as heads.keyword.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]
MODEL = "A built-in model, package.module:factory, torchvision:NAME, timm:NAME, hf:PATH_OR_NAME, or a saved directory."

FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143
_SAME = "the same command goes on where it was"


def main() -> None:
    """The entry point of ``secateur`` and of ``python -m secateur``."""
    app(prog_name="secateur")


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Structured pruning for PyTorch."""


@app.command("run")
def run_command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that `secateur list` shows.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as train.epochs=3.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the run; default: runs/NAME.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace another run in that folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the table.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the stages and about how long they take; writes nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Begin even what is going to take hours.")] = False,
) -> None:
    """Train or load, prune, fine-tune, measure and save. Killed, the same command goes on where it was."""
    with told(_SAME):
        from rich.console import Console

        from secateur.lab.recipe.shipped import read_named
        from secateur.lab.run import folder, run, table
        from secateur.lab.run.api import dry_run as only_told

        description = read_named(recipe, overrides or ())
        where = out if out is not None else Path("runs") / description.name
        if dry_run:
            _show("\n".join(only_told(description, where, fresh=fresh).lines()))
            return
        done = folder.earlier(where, description, fresh=fresh)
        if done is not None and done["finished"]:
            _show(f"{where}: this run is finished (--fresh does it again)")
        command = shlex.join(["secateur", "run", recipe, *(overrides or ()), "--out", str(where)])
        result = run(
            description, where, fresh=fresh, progress=not quiet, say=_say(quiet), agree=None if yes else _refuse_long,
            command=command,
        )  # fmt: skip
        console = Console()
        console.print(table(result, console.width))
        _show(f"everything is in {where}; {where / folder.REPORT} is a page to read")


@app.command("prune")
def prune_command(
    model: Annotated[str, typer.Argument(help=MODEL)],
    options: ModelOptions = None,
    out: Annotated[Path, typer.Option(help="The folder that the result is saved in.")] = Path("small"),
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What may remain: macs=0.5, params=, latency_ms=, alike=true."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="MODULE:LOADER", help="Batches, or a function that gives them.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="cross_entropy, mse, model, or MODULE:FUNCTION.")] = None,
    weights: Weights = None,
    evaluate: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Of the model; its numbers are told before and after.")
    ] = None,
    finetune: Annotated[int, typer.Option(min=0, help="Epochs of training after pruning.")] = 0,
    lr: Annotated[float, typer.Option(help="Learning rate of the fine-tuning (AdamW, one cycle).")] = 1e-3,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Groups or modules that stay whole; again for more.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="One that does it all, such as hybrid.")] = None,
    criterion: Annotated[str, typer.Option(help="Which channels matter least.")] = "auto",
    strategy: Annotated[str, typer.Option(help="How many every group keeps.")] = "auto",
    repair: Annotated[str, typer.Option(help="How what stays makes up for what goes.")] = "auto",
    outputs: Outputs = None,
    shape: Input = None,
    inputs: Inputs = None,
    build: Factory = None,
    examples: Annotated[int, typer.Option(min=1, help="In the inputs that are traced, and timed.")] = 1,
    batches: Annotated[int, typer.Option(min=1, help="Of the data that any step of pruning uses, at most.")] = 100,
    approximate: Annotated[bool, typer.Option("--approximate", help="Also cut groups that are not exact.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace what is in that folder.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model of your own, fine-tune and save it. Killed, the same command goes on where it was."""
    with told("the same command without --fresh goes on where it was" if fresh else _SAME):
        from secateur.lab.given import Source
        from secateur.lab.own import Question, answer, as_text

        limits = _once([_option(text, "--budget", "macs=0.5") for text in budget or ()])
        if not limits:
            raise SecateurError("--budget KEY=VALUE is needed, such as --budget macs=0.5")
        source = Source(model, _options_of(options), build, weights, tuple(shape or ()), inputs)
        question = Question(
            source, data, loss, limits, method, criterion, strategy, repair, tuple(exclude or ()), outputs, approximate,
            batches, examples, evaluate, finetune, lr, seed, device, threads,
        )  # fmt: skip
        with _others_on_stderr(as_json):
            facts = answer(question, out, fresh=fresh, progress=not quiet, say=_say(quiet))
        _show_as(facts, as_text(facts), as_json)
        if not as_json:
            _show(f"{out}: secateur.load reads it; secateur export {out} writes it for where it runs")


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help=MODEL)],
    options: ModelOptions = None,
    shape: Input = None,
    inputs: Inputs = None,
    build: Factory = None,
    outputs: Outputs = None,
    as_json: AsJson = False,
) -> None:
    """Show which channels can be removed, which cannot, and why."""
    with told("nothing was changed"):
        from secateur.lab.given import Source
        from secateur.lab.inspecting import graph_data, inspected

        source = Source(model, _options_of(options), build, None, tuple(shape or ()), inputs)
        graph = inspected(source, outputs)
        _show_as(graph_data(graph), graph.summary(), as_json)


@app.command("export")
def export_command(
    model: Annotated[str, typer.Argument(help=MODEL)],
    options: ModelOptions = None,
    out: Annotated[
        Path, typer.Option(help="The file: .onnx is ONNX, .pt2 a torch.export program, .py plain PyTorch.")
    ] = Path("model.onnx"),
    to: Annotated[
        str | None,
        typer.Option(help="onnx, program, python or hf (a folder of transformers)."),
    ] = None,
    shape: Input = None,
    inputs: Inputs = None,
    build: Factory = None,
    weights: Weights = None,
    outputs: Outputs = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX.")] = None,
    fixed: Annotated[bool, typer.Option("--fixed", help="The batch has the example's size and no other.")] = False,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Do not compare with the model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as a file that runs without its class and without secateur, and check it."""
    with told("nothing was written"):
        from secateur.lab.given import Source
        from secateur.lab.inspecting import exported, exported_data

        source = Source(model, _options_of(options), build, weights, tuple(shape or ()), inputs)
        how: dict[str, Any] = {"to": to, "opset": opset, "dynamic": not fixed, "check": not unchecked}
        done = exported(source, out, outputs, **how)
        _show_as(exported_data(done), str(done), as_json)


@app.command("measure")
def measure_command(
    model: Annotated[str, typer.Argument(help=MODEL)],
    options: ModelOptions = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="eager, compile or onnxruntime; again for more. Default: eager.")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Of the CPU; again for more.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Examples in the inputs; again for more.")] = None,
    shape: Input = None,
    inputs: Inputs = None,
    build: Factory = None,
    weights: Weights = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Time a model; a saved one in turn with the original that it was made of."""
    with told("nothing was changed"):
        from secateur.lab.given import Source
        from secateur.lab.inspecting import comparison_data, timed

        source = Source(model, _options_of(options), build, weights, tuple(shape or ()), inputs)
        found = timed(source, backend or ["eager"], threads or [], batch or [], progress=not quiet)
        _show_as(comparison_data(found), str(found), as_json)


@app.command("report")
def report_command(
    what: Annotated[Path, typer.Argument(help="The folder of a run, or one that `secateur prune` has saved.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in that folder.")] = None,
) -> None:
    """Write a page that a person reads: one HTML file that needs nothing else."""
    with told("nothing was written"):
        from secateur.lab.reporting import report

        _show(str(report(what, out)))


@app.command("compare")
def compare_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Finished runs, or what `secateur prune` has saved.")
    ],
    kind: Annotated[str | None, typer.Option("--format", help="table, markdown, csv, latex, json or html.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write it to this file; .md, .csv, .tex, .json and .html say the format.")
    ] = None,
) -> None:
    """Put runs side by side: a table for the terminal, a paper or a program, or a page with figures."""
    with told("nothing was written"):
        from secateur.lab.comparing import compare, written

        width = get_terminal_size().columns if sys.stdout.isatty() else None
        _show_table(written(compare(runs), kind, out, width))


@app.command("sweep")
def sweep_command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that `secateur list` shows.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=[A,B]]...", help="Settings and their values; all combinations are run."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the sweep; default: sweeps/RECIPE.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs at a time.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="On a Ray cluster: that of RAY_ADDRESS, or one of this machine.")
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Without random and magnitude, which ride along otherwise.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run all combinations of settings. Killed, the same command goes on; what failed is a row, and is tried again."""
    with told(_SAME):
        from secateur.lab.comparing import terminal_table
        from secateur.lab.run import folder
        from secateur.lab.sweep import TABLE, read_sweep, sweep

        what = read_sweep(recipe, settings or (), baselines=not alone)
        where = out if out is not None else Path("sweeps") / Path(recipe).stem
        say = _say(quiet)
        for note in what.notes:
            say(note)
        say(f"{len(what.cells)} runs in {where}")
        table = sweep(
            what, where, jobs=jobs, ray=ray, progress=not quiet and sys.stderr.isatty(), say=say,
            show=lambda table, done, of: say(f"{done} of {of} done; {where / TABLE} is the table so far"),
        )  # fmt: skip
        _show_table(terminal_table(table, get_terminal_size().columns if sys.stdout.isatty() else None))
        _show(f"everything is in {where}; {where / folder.REPORT} is a page to read")
        if table.failures:
            typer.echo(f"{len(table.failures)} of {len(what.cells)} runs failed; their rows say why", err=True)
            raise typer.Exit(FAILED)


@app.command("list")
def list_command(
    kind: Annotated[str | None, typer.Argument(help="One of the lists alone, such as models.")] = None,
) -> None:
    """List what there is: models, data, criteria, strategies, methods, optimizers, schedules, recipes."""
    with told("nothing was changed"):
        from secateur.allocation.contract import STRATEGIES
        from secateur.lab.data.registry import DATA
        from secateur.lab.models.registry import MODELS
        from secateur.lab.recipe.shipped import shipped
        from secateur.lab.training.optimizers.contract import OPTIMIZERS
        from secateur.lab.training.schedule import SCHEDULES
        from secateur.methods.contract import METHODS, TRAINING_METHODS
        from secateur.repair.contract import REPAIRS
        from secateur.scoring.contract import CRITERIA

        lists = {
            "models": list(MODELS),
            "data": list(DATA),
            "criteria": list(CRITERIA),
            "strategies": list(STRATEGIES),
            "repairs": list(REPAIRS),
            "methods": sorted({*METHODS, *TRAINING_METHODS}),
            "optimizers": list(OPTIMIZERS),
            "schedules": list(SCHEDULES),
            "recipes": sorted(shipped()),
        }
        if kind is not None and kind not in lists:
            raise unknown("list", kind, lists)
        for name, entries in lists.items():
            if kind in (None, name):
                _show(f"{name}: {', '.join(entries)}")


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: what a batch system or a container sends before it kills."""


@contextmanager
def told(word: str) -> Iterator[None]:
    """Turn bad input, interruptions and SIGTERM into one message and an exit code.

    Args:
        word: what an interruption leaves behind.
    """
    try:
        with _sigterm_raises(), current_folder_importable():
            yield
    except SecateurError as error:
        typer.echo(f"secateur: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except Terminated as error:
        typer.echo(f"terminated: {word}", err=True)
        raise typer.Exit(TERMINATED) from error
    except KeyboardInterrupt as error:
        typer.echo(f"interrupted: {word}", err=True)
        raise typer.Exit(INTERRUPTED) from error


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated` meanwhile, so that everything is left as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # only that one may say what a signal does
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _options_of(given: list[str] | None) -> dict[str, Any]:
    return _once([_option(text) for text in given or ()])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Names and values, none of which is named twice."""
    found = dict(pairs)
    for name in found:
        if sum(other == name for other, _ in pairs) > 1:
            raise SecateurError(f"{name}= is given twice; give it once")
    return found


def _option(text: str, what: str = "option", such_as: str = "width=2") -> tuple[str, Any]:
    """An option's name and value: a number, true, false, null or a list as in JSON, or else a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        kind = "OPTION=VALUE" if what == "option" else "KEY=VALUE"
        raise SecateurError(f"{what} {text!r}: {kind} is expected, such as {such_as}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


@contextmanager
def _others_on_stderr(on: bool) -> Iterator[None]:
    """Let what a user's own functions print go to stderr, so that JSON is all that programs read."""
    with redirect_stdout(sys.stderr) if on else nullcontext():
        yield


def _show_as(data: Any, text: str, as_json: bool) -> None:
    """Print JSON for programs, or text for people."""
    if as_json:
        typer.echo(json.dumps(data, indent=1))
    else:
        _show(text)


def _show_table(drawn: Any) -> None:
    """Print a table of rich, in a file as wide as it needs to be, or text as it is."""
    if isinstance(drawn, str):
        typer.echo(drawn)
        return
    from rich.console import Console

    from secateur.lab.run.table import needs

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(needs(drawn), 80))
    console.print(drawn)


def _refuse_long(found: Estimate) -> None:
    """Begin nothing that takes hours unless that is wanted."""
    from secateur.lab.run.estimate import LONG, in_words

    if found.seconds > LONG:
        raise SecateurError(
            f"this run takes {in_words(found.seconds)} on {found.where}, estimated {found.how}: --yes begins it "
            "nevertheless, --dry-run shows its stages"
        )


def _say(quiet: bool) -> Callable[[str], None]:
    return (lambda line: None) if quiet else (lambda line: typer.secho(line, err=True, dim=True))


def _show(text: str) -> None:
    """Print lines: on a terminal broken to its width, elsewhere as they are, for other programs to read."""
    if sys.stdout.isatty():
        text = broken(text, get_terminal_size().columns)
    typer.echo(text)


def broken(text: str, width: int) -> str:
    """Lines of at most so many signs; what is left of a line follows further in."""
    lines = [
        textwrap.wrap(line, width, subsequent_indent=" ", break_on_hyphens=False) if len(line) > width else [line]
        for line in text.splitlines()
    ]
    return "\n".join(part for parts in lines for part in parts)
