"""A folder that plain ``transformers`` loads: weights, and a configuration that says the widths that are left.

Nothing here knows an architecture. A configuration is looked for: a number of it is changed, the class is built anew
without weights, and its tensors tell whether they are nearer to the cut model's. What the shapes leave open, fewer
heads or smaller ones, the outputs decide.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._internal.batches import tensors_in
from secateur._internal.errors import SecateurError
from secateur._internal.records import record
from secateur._internal.state import fork_rng_of
from secateur.shipping.parity import compared
from secateur.shipping.programs import Exportable, first_line, quiet, with_free_sizes
from secateur.tracing.display import LONGEST, listed
from secateur.tracing.graph import role

Where = tuple[str | int, ...]
"""Where a configuration has a number: names of attributes, and places in lists."""
Changes = dict[Where, Any]
Shapes = dict[str, tuple[int, ...]]
Place = tuple[str, int]
"""A tensor, and one of its dims."""
MOST_BUILT = 400
"""So many configurations are built, at most."""
KEEP = "keep the model with secateur.save, and load it with secateur.load"
SAME = 1e-2
"""Of what other kernels are allowed, the part that the same class is: it adds up in the same order."""


def check_model(model: nn.Module) -> None:
    """Raise if it is no model of ``transformers``, or one that holds layers of ours."""
    if not hasattr(model, "save_pretrained") or not hasattr(getattr(model, "config", None), "to_dict"):
        raise SecateurError(
            f"export(to='hf'): a model of transformers is expected, a {type(model).__name__} has no configuration; "
            "secateur.save keeps any model"
        )
    ours = [(path, type(m).__name__) for path, m in model.named_modules() if type(m).__module__.startswith("secateur.")]
    if ours:
        paths = listed([f"{path} is a {kind}" for path, kind in ours], LONGEST, 4)
        raise SecateurError(
            f"export(to='hf'): {paths}, which transformers does not know. Prune without it (exclude= what writes the "
            f"residual stream, whose norms become others), or {KEEP}"
        )


def write_folder(what: Exportable, where: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Write a cut model as a folder of ``transformers``, read it again, and see that it computes the same.

    Args:
        what: the cut model and example inputs.
        where: the folder; files of an earlier save in it are replaced once all is well.

    Returns:
        How far outputs are apart, see :func:`secateur.shipping.parity.compared`, and what the configuration now says.

    Raises:
        SecateurError: no configuration says these widths, or none computes the same.
    """
    model: Any = what.model
    check_model(model)
    free = with_free_sizes(what)
    search = Search(type(model), model.config, shapes_of(model))
    wrong: SecateurError | None = None
    for changes in search.found():
        folder = Path(tempfile.mkdtemp(prefix=f".{where.name}.", dir=where.absolute().parent))
        try:
            told = changes | _fractions(model, changes)
            with fork_rng_of(model.parameters()):  # the class draws weights before it is given these
                _save(model, told, folder)
            apart = compared(
                free, set(free.sizes), partial(_run, type(model), folder, what), allowed=SAME, otherwise=KEEP
            )
            _move(folder, where)
        except SecateurError as error:
            wrong = wrong or error
        else:
            now = model.config
            return apart, {".".join(map(str, at)): [value_at(now, at), value] for at, value in told.items()}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    raise wrong or SecateurError(unsaid(search, _groups(model)))


def _save(model: Any, changes: Changes, folder: Path) -> None:
    """Save the weights of a cut model with a configuration that says its widths.

    Raises:
        SecateurError: modules remember numbers that the configuration does not say, or it does not bear them.
    """
    with telling_nothing():
        before = _on_meta(type(model), model.config)
        made: Any = type(model)(changed(model.config, changes))
        made.to(next(model.parameters()).dtype)
        made.load_state_dict({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
        if getattr(model, "generation_config", None) is not None:
            made.generation_config = copy.deepcopy(model.generation_config)
        cut = {(path, name): value for path, name, value, _ in _others(model, before)}
        differ = [f"{p}.{n} is {v}, not {o}" for p, n, v, o in _others(made, model) if (p, n) in cut]
        if differ:
            raise SecateurError(
                f"export(to='hf'): {listed(differ, LONGEST, 3)}, by the nearest {type(model.config).__name__}; leave "
                f"these channels whole (exclude=), or {KEEP}"
            )
        try:
            made.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:
            cause = error.__cause__ or error
            raise SecateurError(
                f"export(to='hf'): transformers does not save it ({type(cause).__name__}: {first_line(cause)}); "
                f"Budget(round_to=...) may help, or {KEEP}"
            ) from error


def _run(kind: Any, folder: Path, what: Exportable, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """What the saved model gives, read as ``transformers`` reads it."""
    with telling_nothing(), torch.no_grad(), fork_rng_of(what.model.parameters()):
        again = kind.from_pretrained(folder).eval()
        args, kwargs = what.given([tensor.cpu() for tensor in tensors])
        return tensors_in(again(*args, **kwargs))


def _move(folder: Path, where: Path) -> None:
    """Put files into their folder, the configuration last; weights of an earlier save go."""
    if not where.exists():
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)  # a temporary folder is for its owner alone
        os.replace(folder, where)
        return
    new = sorted(folder.iterdir(), key=lambda file: file.name == "config.json")
    for file in new:
        os.replace(file, where / file.name)
    for old in where.glob("model*.safetensors*"):
        if old.name not in {file.name for file in new}:
            old.unlink()


def _groups(model: nn.Module) -> list[str]:
    """The groups that were cut, as far as the model remembers."""
    steps = [json.loads(text) for step in record(model) for kind, text in step.items() if kind == "cut"]
    return [name for step in steps for name in step.get("removed", {})]


class Search:
    """Configurations whose class has tensors of some shapes.

    Args:
        kind: the class.
        config: the configuration that it had.
        want: the shapes.
    """

    def __init__(self, kind: type[nn.Module], config: Any, want: Shapes) -> None:
        self.kind, self.config, self.want = kind, config, want
        try:
            self.whole = shapes_of(_on_meta(kind, config))
        except Exception as error:  # whatever a class of the user's asks for
            raise SecateurError(
                f"export(to='hf'): {kind.__name__} cannot be built from its configuration alone "
                f"({type(error).__name__}: {first_line(error)}); {KEEP}"
            ) from error
        self._built: dict[tuple[tuple[Where, Any], ...], Shapes | None] = {(): self.whole}

    def found(self) -> Iterator[Changes]:
        """All that have these shapes, each once, in what they say otherwise."""
        seen: list[Changes] = []
        for changes in self._from({}):
            if changes not in seen:
                seen.append(changes)
                yield changes

    def nearest(self) -> Shapes:
        """The shapes of one that says as much as any does, where none says all."""
        changes: Changes = {}
        left = differences(self.whole, self.want)
        while left:
            at = left.pop(0)
            for more in self._steps(changes, at):
                changes = more
                left = [other for other in left if other in differences(self._shapes(more) or {}, self.want)]
                break
        return self._shapes(changes) or self.whole

    def _from(self, changes: Changes) -> Iterator[Changes]:
        have = self._shapes(changes)
        wrong = differences(have, self.want) if have is not None else []
        if have is not None and have.keys() == self.want.keys() and not wrong:
            yield changes
        for at in wrong[:1]:
            for more in self._steps(changes, at):
                yield from self._from(more)

    def _steps(self, changes: Changes, at: Place) -> Iterator[Changes]:
        """Changes that let one length be what it is to be, and no other be wrong that is right."""
        have = self._shapes(changes) or {}
        (name, dim), wrong = at, set(differences(have, self.want))
        if len(have.get(name, ())) != len(self.want[name]):
            return
        for more in self._candidates(changes, have[name][dim], self.want[name][dim]):
            new = self._shapes(changes | more)
            if new is not None and new.keys() == have.keys():
                left = set(differences(new, self.want))
                if left < wrong and at not in left:
                    yield changes | more

    def _candidates(self, changes: Changes, have: int, want: int) -> Iterator[Changes]:
        """What may bring a length from what it is to what is wanted."""
        now = changed(self.config, changes)
        known = [(at, value) for at, value in numbers(now) if at not in changes]
        unsaid = [at for at, value in known if value is None] + [(name,) for name in unread(self.kind, now)]
        said = [(at, int(value)) for at, value in known if value and isinstance(value, int)]
        for at, value in said:
            if have % value == 0 and want % (have // value) == 0:
                yield {at: want // (have // value)}
        yield from ({at: want} for at in unsaid)
        for at, part in known:
            if isinstance(part, float):  # of another width, which is rounded down
                share = part * want / have
                yield from ({at: more} for more in (share, math.nextafter(share, math.inf)))
        for at, value in said:  # what is not said follows from another, as the size of a head does from their number
            if have % value == 0 and want % (have // value) == 0:
                yield from ({at: want // (have // value), other: have // value} for other in unsaid)

    def _shapes(self, changes: Changes) -> Shapes | None:
        key = tuple(sorted(changes.items(), key=str))
        if key not in self._built and len(self._built) >= MOST_BUILT:
            return None
        if key not in self._built:
            try:
                self._built[key] = shapes_of(_on_meta(self.kind, changed(self.config, changes)))
            except Exception:  # whatever a class says of a configuration that it does not bear
                self._built[key] = None
        return self._built[key]


def _on_meta(kind: Any, config: Any) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"), telling_nothing():
        model: nn.Module = kind(config)
    return model


def unread(kind: Any, config: Any) -> list[str]:
    """What a class asks of a configuration that does not say it, as ``getattr(config, "head_dim", None)`` does."""
    asked: dict[str, None] = {}

    def missing(self: Any, name: str) -> Any:
        asked[name] = None
        raise AttributeError(name)

    watched = copy.deepcopy(config)
    watched.__class__ = type(type(config).__name__, (type(config),), {"__getattr__": missing})
    with suppress(Exception):
        _on_meta(kind, watched)
    return [name for name in asked if not name.startswith("_")]


def shapes_of(model: nn.Module) -> Shapes:
    """The shapes of all that a model saves."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def differences(have: Shapes, want: Shapes) -> list[Place]:
    """The tensors and dims whose lengths differ; of tensors with other dims all."""
    return [
        (name, dim)
        for name, shape in want.items()
        for dim, length in enumerate(shape)
        if len(have.get(name, ())) != len(shape) or have[name][dim] != length
    ]


def numbers(config: Any, above: Where = ()) -> Iterator[tuple[Where, float | None]]:
    """All numbers of a configuration, of those in it and in lists, and what is not said."""
    for name, value in vars(config).items():
        at = (*above, name)
        if name.startswith("_") or isinstance(value, bool):
            continue
        if value is None or isinstance(value, (int, float)):
            yield at, value
        elif isinstance(value, list):
            yield from (((*at, i), v) for i, v in enumerate(value) if isinstance(v, int) and not isinstance(v, bool))
        elif hasattr(value, "to_dict") and not above:
            yield from numbers(value, at)


def value_at(config: Any, at: Where) -> Any:
    """What a configuration has there."""
    for step in at:
        config = config[step] if isinstance(step, int) else getattr(config, step, None)
    return config


def changed(config: Any, changes: Mapping[Where, Any]) -> Any:
    """A copy of a configuration with other values."""
    new = copy.deepcopy(config)
    for (*above, last), value in changes.items():
        owner = value_at(new, tuple(above))
        if isinstance(last, int):
            owner[last] = value
        else:
            setattr(owner, last, value)
    return new


def _fractions(model: Any, changes: Changes) -> Changes:
    """What modules of a cut model have otherwise of fractions, such as the epsilon of a norm, in its configuration."""
    plain = _on_meta(type(model), changed(model.config, changes))
    found: Changes = {}
    for _, _, new, old in _others(model, plain):
        if isinstance(new, float):
            found |= {at: new for at, own in numbers(model.config) if isinstance(own, float) and own == old}
    return found


def _others(one: nn.Module, other: nn.Module) -> list[tuple[str, str, Any, Any]]:
    """Where modules of one model remember numbers that those of another have otherwise: path, name, and both."""
    modules = dict(other.named_modules())
    return [
        (path, name, value, against)
        for path, module in one.named_modules()
        for name, value in vars(module).items()
        if type(value) in (int, float)
        and type(against := getattr(modules.get(path), name, None)) is type(value)
        and value != against
    ]


def unsaid(search: Search, cut: Collection[str]) -> str:
    """Why there is no configuration, and what can be done.

    Args:
        search: what was looked for.
        cut: the names of the groups that were cut.
    """
    layers: dict[str, tuple[int, int]] = {}
    for name, dim in differences(search.whole, search.want):
        layers.setdefault(name.rpartition(".")[0] or name, (search.whole[name][dim], search.want[name][dim]))
    changed_ones = {name: layers[path] for name in cut if (path := name.partition("#")[0]) in layers} or layers
    wrong = {name.rpartition(".")[0] or name for name, _ in differences(search.nearest(), search.want)}
    unsaid_ones = {(role(name), whole) for name, (whole, _) in changed_ones.items() if name.partition("#")[0] in wrong}
    shown = {name: of for name, of in changed_ones.items() if (role(name), of[0]) in unsaid_ones}
    by_role: dict[tuple[str, int], list[str]] = {}
    for name, (whole, _) in shown.items():
        by_role.setdefault((role(name), whole), []).append(name)
    several = [common(own) for own in by_role.values() if len({shown[name][1] for name in own}) > 1]
    ways = (
        f"let all layers end alike (Budget(..., alike=True), or alike={several[:4]})"
        if several
        else f"leave them whole (exclude={list(dict.fromkeys(map(common, by_role.values())))[:4]})"
    )
    names = listed([f"{name} ({width} of {whole})" for name, (whole, width) in shown.items()], LONGEST, 6)
    return (
        f"export(to='hf'): no number of {type(search.config).__name__} says these widths: {names}. There are two ways "
        f"out: {ways}; or {KEEP}"
    )


def common(names: Sequence[str]) -> str:
    """A pattern of names: the one there is, or the last parts that all have in common."""
    if len(names) == 1:
        return names[0]
    backwards = zip(*(reversed(name.split(".")) for name in names), strict=False)
    alike = list(takewhile(lambda parts: len(set(parts)) == 1, backwards))
    return ".".join(["*", *(parts[0] for parts in reversed(alike))])


@contextmanager
def telling_nothing() -> Iterator[None]:
    """Without what ``transformers`` tells and shows."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with quiet():
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
