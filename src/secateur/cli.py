"""The command line: ``secateur run``, ``inspect`` and ``list``.

Bad input ends with exit code 2 and one message on stderr; an interruption with 130. Anything else is a bug of ours and
keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur._internal.errors import SecateurError, unknown

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Structured pruning for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BAD_INPUT, INTERRUPTED = 2, 130
RECIPES = Path(__file__).resolve().parent / "lab" / "recipes"


def main() -> None:
    """The entry point of ``secateur``."""
    app()


@app.command("run")
def run_command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that `secateur list` shows.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as train.epochs=3.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the run; default: runs/NAME.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace another run in that folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the table.")] = False,
) -> None:
    """Train or load, prune, fine-tune, measure and save. Killed, the same command goes on where it was."""
    with told("the same command goes on where it was"):
        from rich.console import Console

        from secateur.lab.recipe.reading import read
        from secateur.lab.run import folder, table
        from secateur.lab.run.api import run

        description = read(find_recipe(recipe), overrides or ())
        where = out if out is not None else Path("runs") / description.name
        console = Console()
        done = folder.earlier(where, description, fresh=fresh)
        if done is not None and done["finished"]:
            console.print(f"{where}: this run is finished (--fresh does it again)", soft_wrap=True)
        result = run(description, where, fresh=fresh, progress=not quiet, say=_say(console, quiet))
        console.print(table(result))
        console.print(f"everything is in {where}", soft_wrap=True)


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="A built-in model, package.module:factory, or a saved directory.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...", help="The model's options, such as width=2.")
    ] = None,
    shape: Annotated[str | None, typer.Option("--input", help="Shape of an example input, such as 1,3,32,32.")] = None,
) -> None:
    """Show which channels can be removed, which cannot, and why."""
    with told("nothing was changed"):
        import torch

        from secateur.lab.models.registry import build, example_input
        from secateur.lab.recipe.yaml_text import parse_yaml
        from secateur.storage import load, read_head
        from secateur.tracing.api import trace

        given = {}
        for text in options or ():
            key, equals, value = text.partition("=")
            if not key or not equals:
                raise SecateurError(f"option {text!r}: OPTION=VALUE is expected, such as width=2")
            given[key] = parse_yaml(value, f"option {text!r}")
        name = model
        if Path(model).is_dir():
            built = read_head(model)["model"]
            if given:
                raise SecateurError(f"{model} is a saved model: it takes no options")
            network = load(model)
            name, given = built["name"], built["options"]
        else:
            network = build(model, **given)
        sizes = _sizes(shape) if shape is not None else example_input(name, **given)
        typer.echo(trace(network, torch.zeros(sizes)).summary())


@app.command("list")
def list_command(
    kind: Annotated[str | None, typer.Argument(help="One of the lists alone, such as models.")] = None,
) -> None:
    """List what there is: models, data, criteria, strategies, methods, optimizers, schedules, recipes."""
    with told("nothing was changed"):
        from secateur.allocation.contract import STRATEGIES
        from secateur.lab.data.registry import DATA
        from secateur.lab.models.registry import MODELS
        from secateur.lab.recipe.sections import OPTIMIZERS
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
                typer.echo(f"{name}: {', '.join(entries)}")


@contextmanager
def told(word: str) -> Iterator[None]:
    """Turn bad input and interruptions into one message and an exit code."""
    try:
        yield
    except SecateurError as error:
        typer.echo(f"secateur: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as error:
        typer.echo(f"interrupted: {word}", err=True)
        raise typer.Exit(INTERRUPTED) from error


def shipped() -> dict[str, Path]:
    """The recipes that come with the project, by name; empty where it is installed without them."""
    return {path.stem: path for path in RECIPES.glob("*.yaml")}


def find_recipe(given: str) -> Path:
    """The file that is meant: a path, or the name of a shipped recipe.

    Raises:
        SecateurError: neither.
    """
    path = Path(given)
    if path.is_file():
        return path
    known = shipped()
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1 or not known:
        raise SecateurError(
            f"recipe {given!r}: there is no such file; `secateur list recipes` shows those that are here"
        )
    if given not in known:
        raise unknown("recipe", given, known)
    return known[given]


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise SecateurError(f"--input {text!r}: positive whole numbers are expected, such as 1,3,32,32")
    return sizes


def _say(console: Console, quiet: bool) -> Callable[[str], None]:
    return (lambda line: None) if quiet else (lambda line: console.print(line, style="dim", highlight=False))
