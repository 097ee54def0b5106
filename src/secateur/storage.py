"""Saving and loading: weights as safetensors, everything else as JSON, never pickle.

A directory holds the weights, in one file or in several (:mod:`secateur._internal.shards`), and ``secateur.json``: what
was done to which model, and the names and checksums of the weights' files. The JSON is replaced last, so a crash at any
moment leaves the old save or the new one. A ``README.md`` says to whoever finds it what it is. ``load`` builds the
original anew, replays the record on it and fills in the weights, a tensor at a time.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from secateur._internal import built_in, shards
from secateur._internal.errors import BadFile, SecateurError, unknown
from secateur._internal.files import make_folder, write_atomically
from secateur._internal.importing import import_string, is_import_string
from secateur._internal.records import record
from secateur._internal.wrappers import unwrapped
from secateur.plan import Plan
from secateur.surgery.blocks import packing, pivots
from secateur.surgery.channels import cut
from secateur.surgery.low_rank import bottleneck, separable
from secateur.tracing.graph import fingerprint

VERSION = 1
FILE, README = "secateur.json", "README.md"
WEIGHTS = re.compile(r"model(-\d+)?(\.\d{5}-of-\d{5})?\.safetensors")

Replay = Callable[[nn.Module, Any], nn.Module]
REPLAY: dict[str, Replay] = {
    "cut": lambda model, plan: cut(model, Plan.from_json(plan)),
    "eigendamage": bottleneck.replay,
    "merge_bases": lambda model, _: bottleneck.merge_bases(model),
    separable.SEPARATE: separable.replay,
    pivots.PIVOT: pivots.replay,
    packing.PACK: packing.replay,
}
"""How each kind of step in a record is done again: ``(model, JSON text) -> the next model``.

The JSON of every kind has a ``fingerprint``: that of the model the step was made for.
"""


def save(model: nn.Module, directory: str | Path, *, notes: Mapping[str, Any] | None = None) -> None:
    """Write a model: its weights, what was done to it, and what it was made by, as far as that is known.

    Args:
        model: a model, cut or not; nothing of it is changed. Of a model that is compiled, data parallel or averaged
            (``torch.compile``, ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel``), the model inside is
            written.
        directory: made if it is not there; an earlier save in it is replaced, other files stay.
        notes: anything JSON can hold, kept beside.

    Raises:
        BadFile: a directory that cannot be written, because the disk is full, say; an earlier save is still there then.
        SecateurError: something that is no model, tensors without data or of a kind that safetensors cannot hold, state
            that is not a tensor, notes that are not JSON.
    """
    if not isinstance(model, nn.Module):
        raise SecateurError(f"save: an nn.Module is expected, a {type(model).__name__} was given")
    model = unwrapped(model, "save")
    folder = Path(directory)
    tensors = _tensors(model, "save")
    _warn_not_finite(tensors)
    steps, before, original = record(model), _before(folder), _original(model)
    head: dict[str, Any] = {
        "secateur": VERSION,
        "model": _origin(model, original),
        "original": original,
        "record": steps,
        "final": fingerprint(model),
        "dtypes": {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in _not_stored(model)},
        "notes": dict(notes or {}),
    }
    try:
        json.dumps(head, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SecateurError(f"save(notes): what JSON can hold is expected ({error})") from error
    made = not folder.exists()
    make_folder(folder)
    try:
        written = shards.write(folder, _free_stem(folder), tensors)
    except (safetensors.SafetensorError, RuntimeError, KeyError, ValueError) as error:
        if made:
            folder.rmdir()
        if isinstance(error, SecateurError):
            raise
        raise SecateurError(f"save: a tensor of this model cannot be stored ({error})") from error
    try:
        head["weights"] = _named(written)
        write_atomically(folder / FILE, json.dumps(head, indent=1, allow_nan=False).encode())
    except BadFile:
        for file in written:  # nothing refers to them, and they take up room
            (folder / file).unlink(missing_ok=True)
        raise
    if _is_ours(folder / README):  # what is for others comes after what load needs
        write_atomically(folder / README, readme(model, head).encode())
    if len(written) > 1:
        write_atomically(folder / shards.INDEX, shards.index(tensors, list(written)))
    for file in before - written.keys():
        (folder / file).unlink(missing_ok=True)
    if len(written) == 1 and len(before) > 1:
        (folder / shards.INDEX).unlink(missing_ok=True)


def load(directory: str | Path, build: Callable[[], nn.Module] | str | None = None) -> nn.Module:
    """Read a model that :func:`save` wrote. Nothing is unpickled, and no code is run but ``build`` and secateur's own.

    A file that names a function is never believed: what it says can make one of the built-in networks, by name, and
    nothing else.

    Args:
        directory: what was given to ``save``.
        build: makes the original, as it was before anything was cut: a function without arguments, the name of a
            built-in model, or ``package.module:factory``; not needed if the model began as a built-in one. Its weights
            do not matter.

    Returns:
        The model in the mode, and on the device, in which ``build`` made it.

    Raises:
        BadFile: no such directory, not secateur's, written by a later version, or damaged; the message says which.
        SecateurError: ``build`` is needed and missing, makes another model, or is none of the above.
    """
    folder = Path(directory)
    head = read_head(folder)
    weights = shards.checked(folder, _checksums(head["weights"]), FILE)
    model = _build(folder, head, build)
    for number, step in enumerate(head["record"]):
        kind, what = _step(folder, step, number)
        try:
            model = REPLAY[kind](model, what)
        except _DAMAGED as error:
            reason = error if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}"
            raise BadFile(
                f"{folder}: step {number + 1} of its record, {kind!r}, cannot be replayed: {reason}"
            ) from error
    if fingerprint(model) != head["final"]:
        raise BadFile(
            f"{folder}: replaying its record gives other shapes than were saved: {FILE} is damaged, or secateur "
            "has changed"
        )
    _fill(folder, model, weights)
    for name, buffer in _not_stored(model):  # a mean that was subtracted in half precision, say, still is
        dtype = getattr(torch, str(head.get("dtypes", {}).get(name)), None)
        if isinstance(dtype, torch.dtype):
            buffer.data = buffer.data.to(dtype)
    return model


_DAMAGED = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RuntimeError, RecursionError)
"""What a step that somebody else wrote, or a disk has spoiled, can make a replay raise."""


def load_weights(path: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` makes, with weights from a safetensors file of its state, or an index of several, or from a save.

    Raises:
        BadFile: no such file, a damaged one, or weights of another model.
    """
    path = Path(path)
    if path.is_dir():
        return load(path, build)
    if not path.is_file():
        raise BadFile(f"weights {path}: there is no such file; a safetensors file or a saved directory is expected")
    try:
        weights = shards.unchecked(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise BadFile(f"weights {path}: not a readable safetensors file ({error})") from error
    model = build()
    _fill(path, model, weights)
    return model


def read_head(directory: str | Path) -> dict[str, Any]:
    """What ``secateur.json`` says, checked: ``model``, ``original``, ``record``, ``final``, ``weights``, ``notes``.

    Raises:
        BadFile: no such directory, or not secateur's; a file of a later version, or a damaged one.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise BadFile(f"{folder}: there is no such directory")
    if not (folder / FILE).is_file():
        raise BadFile(f"{folder}: not a directory that secateur saved: it has no {FILE}{_saves_below(folder)}")
    try:
        head = json.loads((folder / FILE).read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BadFile(f"{folder / FILE} is damaged: it cannot be read as JSON ({error})") from error
    if not isinstance(head, dict) or "secateur" not in head:
        raise BadFile(f"{folder / FILE} was not written by secateur: it has no 'secateur' entry")
    if head["secateur"] != VERSION:
        raise BadFile(
            f"{folder / FILE} has version {head['secateur']!r}, this release knows version {VERSION}: use a newer "
            "secateur"
        )
    kinds: dict[str, type] = {"original": str, "record": list, "final": str, "weights": dict, "notes": dict}
    kinds |= {"dtypes": dict} if "dtypes" in head else {}  # earlier saves have none
    wrong = [key for key, kind in kinds.items() if not isinstance(head.get(key), kind)]
    wrong += [] if _is_origin(head.get("model")) else ["model"]
    if wrong or not _is_weights(head["weights"]):
        raise BadFile(f"{folder / FILE} is damaged: {', '.join(wrong) or 'weights'} is missing or not as expected")
    return head


def _saves_below(folder: Path) -> str:
    """Where saves are, for whoever gave the folder of a whole run."""
    found = sorted(str(path.parent) for path in [*folder.glob(f"*/{FILE}"), *folder.glob(f"*/*/{FILE}")])
    more = ", ..." if len(found) > 3 else ""
    return f"; these below it are: {', '.join(found[:3])}{more}" if found else ""


def _is_origin(given: Any) -> bool:
    """Nothing, or a name and options; what they may do is decided where they are used."""
    if given is None:
        return True
    return isinstance(given, dict) and isinstance(given.get("name"), str) and isinstance(given.get("options"), dict)


def _is_weights(given: Mapping[str, Any]) -> bool:
    """The file is one of this directory: no path leads out of it."""
    files = _checksums(given)
    return bool(files) and all(
        isinstance(file, str) and isinstance(digest, str) and WEIGHTS.fullmatch(file) for file, digest in files.items()
    )


def _checksums(weights: Mapping[str, Any]) -> dict[str, str]:
    """The files of the weights and their checksums, as ``secateur.json`` says them."""
    several = weights.get("files")
    if isinstance(several, dict):
        return dict(several)
    return {weights["file"]: weights["sha256"]} if "file" in weights and "sha256" in weights else {}


def _named(written: Mapping[str, str]) -> dict[str, Any]:
    """The same, to be said."""
    if len(written) > 1:
        return {"files": dict(written)}
    return {"file": next(iter(written)), "sha256": next(iter(written.values()))}


def _tensors(model: nn.Module, verb: str) -> dict[str, Tensor]:
    """What is stored: parameters and persistent buffers, shared ones once, under their first name."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise SecateurError(f"{verb}: {name!r} of the model's state is a {type(value).__name__}, not a tensor")
        if value.is_meta:
            raise SecateurError(f"{verb}: {name!r} of the model is on the meta device: it has no data")
        tensors.setdefault(id(value), (name, value))
    return dict(tensors.values())


def _not_stored(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that ``build`` makes, and no file holds."""
    stored = model.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in stored]


def _original(model: nn.Module) -> str:
    """The fingerprint of what the model was before the first step of its record."""
    steps = record(model)
    return str(json.loads(next(iter(steps[0].values())))["fingerprint"]) if steps else fingerprint(model)


def _warn_not_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [
        n for n, t in tensors.items() if t.is_floating_point() and not math.isfinite(float(t.detach().double().sum()))
    ]
    if bad:
        warnings.warn(f"save: not all values of {', '.join(bad)} are finite", stacklevel=3)


def _origin(model: nn.Module, original: str) -> dict[str, Any] | None:
    """What the model was made by: name and options of a built-in model, or of a user's own factory.

    None if nobody knows, if a built-in model was changed by other hands since, or if the options of a user's own are
    nothing that JSON can hold.
    """
    origin = built_in.origin(model)
    if origin is None:
        return None
    if is_import_string(origin["name"]):
        try:
            json.dumps(origin, allow_nan=False)
        except (TypeError, ValueError):
            return None
        return origin
    with torch.device("meta"):
        fresh = fingerprint(built_in.make(**origin))
    return origin if fresh == original else None


def _before(folder: Path) -> set[str]:
    """The weights of an earlier save in the folder, which are the only ones that may go."""
    try:
        return set(_checksums(read_head(folder)["weights"]))
    except BadFile:
        return set()


def _free_stem(folder: Path) -> str:
    """What the weights' names begin with: no weights in the folder do."""
    number, stem = 0, "model"
    while any(folder.glob(f"{stem}.safetensors")) or any(folder.glob(f"{stem}.*.safetensors")):
        number, stem = number + 1, f"model-{number + 1}"
    return stem


MARK = "<!-- written by secateur.save; an edited file without this line stays -->"


def _is_ours(path: Path) -> bool:
    """Whether nobody else has written a file."""
    try:
        return not path.exists() or MARK in path.read_text("utf-8")
    except (OSError, ValueError):
        return False


def readme(model: nn.Module, head: Mapping[str, Any]) -> str:
    """What a save says to whoever finds it: what it is, before and after, and how it is loaded.

    Args:
        model: the model.
        head: what ``secateur.json`` says.
    """
    kind, origin = type(model).__name__, head["model"]
    builtin = origin is not None and not is_import_string(origin["name"])
    build = "" if builtin else ", build=make_model"
    rows = _before_and_after(model, head)
    made = "" if builtin else "from ... import make_model          # what makes the original, with any weights\n"
    steps = ", ".join(dict.fromkeys(kind for step in head["record"] for kind in step)) or "nothing"
    exports = "\n".join(
        f"secateur export . --out model.{end}{'' if builtin else ' --build package.module:make_model'}"
        for end in ("onnx", "pt2", "py")
    )
    return PAGE.format(
        kind=kind, mark=MARK, steps=steps, table="\n".join(rows), made=made, build=build, exports=exports
    )


PAGE = """# {kind}

{mark}

A {kind} of PyTorch that was made smaller by secateur (what was done to it: {steps}).

{table}

With secateur:

```python
import secateur as sc
{made}
model = sc.load("."{build})
```

Without it, export once to a file that needs neither secateur nor the class of the model; it is compared with the model
before it is there:

```
{exports}
```

The weights are plain safetensors, by the names of the smaller model's `state_dict()`. `secateur.json` says what was
removed from what. Nothing here is a pickle.
"""


def _before_and_after(model: nn.Module, head: Mapping[str, Any]) -> list[str]:
    """A table of what it has, and of what is known of before."""
    after = {"parameters": sum(p.numel() for p in model.parameters())}
    before = {"parameters": _parameters_before(model, head["record"])}
    for column, name in ((before, "before"), (after, "after")):
        noted = head["notes"].get(name)
        if isinstance(noted, dict) and isinstance(noted.get("macs"), int):
            column["MACs"] = noted["macs"]
    lines = ["| | before | after |", "|---|---|---|"]
    for unit, now in after.items():
        whole = before.get(unit)
        share = f" ({now / whole:.1%})" if whole else ""
        lines.append(f"| {unit} | {f'{whole:,}' if whole else 'not known'} | {now:,}{share} |")
    return lines


def _parameters_before(model: nn.Module, steps: Sequence[Mapping[str, str]]) -> int | None:
    """How many parameters the original had, if channels were all that went."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    for step in reversed(steps):
        ((kind, text),) = step.items()
        if kind != "cut":
            return None
        for name, dims in json.loads(text)["slices"].items():
            for dim, gone in dims.items():
                if name in shapes:
                    shapes[name][int(dim)] += len(gone)
    return sum(math.prod(shape) for shape in shapes.values())


def _build(folder: Path, head: Mapping[str, Any], build: Callable[[], nn.Module] | str | None) -> nn.Module:
    """The original: what the caller's ``build`` makes, or the built-in model that the file names."""
    with torch.random.fork_rng(devices=[]):  # the fresh weights do not matter, the caller's random state does
        model = _from_file(folder, head["model"]) if build is None else _from_caller(build)
    if not isinstance(model, nn.Module):
        raise SecateurError(f"load(build): it made a {type(model).__name__}, not an nn.Module")
    model = unwrapped(model, "load(build)")
    if record(model):
        raise SecateurError("load(build): it made a model that has been cut already; make the original")
    if fingerprint(model) != head["original"]:
        raise SecateurError(
            f"{folder} was saved from another model: names or shapes of the tensors of the {type(model).__name__} that "
            "was built are not the original's"
        )
    return model


def _from_caller(build: Any) -> Any:
    if isinstance(build, nn.Module):
        raise SecateurError(
            f"load(build): a {type(build).__name__} that is made already is given, and it would be changed: give the "
            "function that makes it, load(directory, build=make_model)"
        )
    if isinstance(build, str):
        return import_string("load(build)", build)() if is_import_string(build) else built_in.make(build, {})
    if not callable(build):
        raise SecateurError(
            f"load(build): a function that makes the model, or the name of a built-in one, is expected, not a "
            f"{type(build).__name__}"
        )
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        raise SecateurError(
            f"load(build): it is called without arguments, and {error}: wrap it, build=lambda: make_model(...)"
        ) from error
    except ValueError:  # something written in C does not tell
        pass
    return build()


def _from_file(folder: Path, saved: Mapping[str, Any] | None) -> nn.Module:
    """The built-in model that a file names; never a path into code, which a foreign file could make us run."""
    if saved is None:
        raise SecateurError(
            f"{folder} does not begin with a built-in model: load(..., build=make_model) needs a function that makes it"
        )
    if is_import_string(saved["name"]):
        raise SecateurError(
            f"{folder} was made by {saved['name']}, which is not one of the built-in models, and no code that a file "
            "names is run: if you trust it, import it yourself and give it, load(..., build=make_model)"
        )
    try:
        return built_in.make(saved["name"], saved["options"])
    except SecateurError as error:
        raise BadFile(f"{folder / FILE} is damaged or of a later version: {error}") from error


def _step(folder: Path, step: Any, number: int) -> tuple[str, Any]:
    if not isinstance(step, dict) or len(step) != 1:
        raise BadFile(f"{folder / FILE} is damaged: step {number + 1} of its record is not one kind of step")
    ((kind, what),) = step.items()
    if kind not in REPLAY:
        raise BadFile(str(unknown(f"step in the record of {folder}", kind, REPLAY)))
    return kind, what


def _fill(path: Path, model: nn.Module, weights: shards.Weights) -> None:
    """Copy the weights in, all names and shapes checked before the first."""
    own = _tensors(model, "load")
    missing, extra = sorted(own.keys() - weights.names), sorted(weights.names - model.state_dict().keys())
    shapes = [
        f"{name} {list(weights.shapes[name])} where {list(t.shape)} is due"
        for name, t in own.items()
        if name in weights.names and weights.shapes[name] != t.shape
    ]
    if missing or extra or shapes:
        parts = [("missing", missing), ("too many", extra), ("of wrong shape", shapes)]
        raise BadFile(
            f"{path}: the weights do not fit the model: "
            + "; ".join(f"{word}: {', '.join(names[:5])}" for word, names in parts if names)
        )
    with torch.no_grad():
        for name, tensor in own.items():
            read = weights[name]
            if tensor.dtype != read.dtype:
                tensor.data = tensor.data.to(read.dtype)
            tensor.data.copy_(read)
