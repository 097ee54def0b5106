"""``secateur prune``: a model of one's own, pruned, fine-tuned and saved by one command that can be interrupted.

Beside the folder that is asked for there is ``NAME.unfinished`` meanwhile: the question, the pruned model, and the
checkpoints of the fine-tuning. The same command goes on from there; the answer is in its folder only once it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur import storage as store
from secateur._internal.batches import Inputs, examples_of, some_of
from secateur._internal.checks import check_positive
from secateur._internal.errors import BadFile, NothingToPrune, SecateurError, unknown
from secateur._internal.files import make_folder
from secateur._internal.shards import checksum
from secateur._internal.workload import Workload
from secateur.allocation.budget import Budget, budget_from
from secateur.allocation.latency.sampler import LatencySettings
from secateur.lab.given import INPUT, Source, data_of, described, evaluation_of, loss_of, outputs_of
from secateur.lab.run.folder import REPORT, held, versions, write_json
from secateur.measure.latency import file_size, threads_set
from secateur.methods.contract import METHODS
from secateur.pruning import BATCHES, prune
from secateur.report.of_answer import page_of_answer
from secateur.report.page import write_page
from secateur.result import Result

FILE, PRUNED, CHECKPOINTS = "question.json", "pruned", "checkpoints"
SEATS = ("criterion", "strategy", "repair")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """What a command asks.

    Attributes:
        source: the model and its inputs.
        data: ``package.module:loader``, batches or what gives them; None for pruning without data.
        loss: a name, or ``package.module:function``.
        budget: what may remain, as the arguments of :class:`secateur.Budget`.
        method: instead of the three seats, one that does it all.
        criterion: see :func:`secateur.prune`, as all up to ``approximate``.
        strategy: likewise.
        repair: likewise.
        exclude: likewise.
        outputs: which outputs matter, see :func:`secateur.lab.given.outputs_of`.
        approximate: likewise.
        batches: of the data that any step may use.
        examples: in the inputs that are traced, and timed where the budget is in milliseconds.
        evaluate: ``package.module:function`` of the model, told before, between and after.
        finetune: epochs after pruning.
        lr: of the fine-tuning, by AdamW with one cycle of the learning rate.
        seed: of all that is random.
        device: ``cpu``, ``cuda``, ...
        threads: of the CPU; None for as many as are set.
    """

    source: Source
    data: str | None = None
    loss: str | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None
    criterion: str = "auto"
    strategy: str = "auto"
    repair: str = "auto"
    exclude: Sequence[str] = ()
    outputs: str | None = None
    approximate: bool = False
    batches: int = BATCHES
    examples: int = 1
    evaluate: str | None = None
    finetune: int = 0
    lr: float = 1e-3
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None

    def as_data(self) -> dict[str, Any]:
        """As JSON holds it."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return found


class Answering:
    """What is needed to answer a question, each made once and checked before any work.

    Args:
        question: what is asked.
        progress: show how far it is.
        say: is told what is done, and what whoever reads it should know.
    """

    def __init__(self, question: Question, *, progress: bool, say: Say) -> None:
        self.question, self.progress, self.say = question, progress, say
        self.budget: Budget = budget_from(question.budget)
        self.data: Iterable[Any] | None = None if question.data is None else data_of(question.data)
        self.loss, self.outputs = loss_of(question.loss), outputs_of(question.outputs)
        self.evaluate = evaluation_of(question.evaluate)
        if question.method is not None:
            if question.method not in METHODS:
                raise unknown("method", question.method, METHODS)
            given = [f"--{seat}" for seat in SEATS if getattr(question, seat) != "auto"]
            if given:
                raise SecateurError(
                    f"--method {question.method} decides itself what goes; leave {', '.join(given)} out"
                )
        check_positive("--lr", question.lr)
        if question.finetune and (self.data is None or self.loss is None):
            self._refuse_finetune()
        if question.finetune and not hasattr(self.data, "__len__"):
            raise SecateurError(
                f"--finetune: --data {question.data} has no length; give a DataLoader or a list of batches"
            )

    def _refuse_finetune(self) -> None:
        labelled = self.data is not None and Workload(nn.Module(), self.data).first.labelled
        if not labelled:
            raise SecateurError("--finetune needs --data with targets, and --loss")

    @cached_property
    def device(self) -> torch.device:
        """Where it runs."""
        try:
            device = torch.device(self.question.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise SecateurError(f"--device {self.question.device}: it cannot be used ({error})") from error
        return device

    @cached_property
    def model(self) -> nn.Module:
        """The model as it is before."""
        torch.manual_seed(self.question.seed)
        return self.question.source.network("prune").to(self.device)

    @cached_property
    def inputs(self) -> Inputs:
        """Example inputs on the device, as many as are asked for."""
        work = None if self.data is None else Workload(self.model, self.data)
        found = self.question.source.example(self.model, None if work is None else work.first.inputs)
        wanted = min(self.question.examples, examples_of(found))
        found = some_of(found, torch.arange(wanted)) if wanted < examples_of(found) else found
        return tree_map(lambda v: v.to(self.device) if isinstance(v, Tensor) else v, found)

    def measured(self, model: nn.Module) -> dict[str, float | None]:
        """What the user's own function says of a model, on which it works in eval mode."""
        if self.evaluate is None:
            return {}
        modes = {module: module.training for module in model.modules()}
        try:
            with torch.no_grad():
                return self.evaluate(model.eval())
        finally:
            for module, mode in modes.items():
                module.training = mode

    def pruned(self) -> Result:
        """The model after pruning."""
        how = self.question
        torch.manual_seed(how.seed)
        if how.method is not None:
            work = Workload(
                self.model, self.data, self.loss, inputs=self.inputs, batches=how.batches, progress=self.progress,
                outputs=self.outputs,
            )  # fmt: skip
            options = {"exclude": tuple(how.exclude)} if how.exclude else {}
            result: Result = METHODS.make({"name": how.method, **options}).apply(
                self.model, self.inputs, self.budget, work
            )
            return result
        latency = None
        if self.budget.latency_ms is not None:
            latency = LatencySettings(
                threads=how.threads, round_to=self.budget.round_to, approximate=how.approximate,
                backend=self.budget.backend,
            )  # fmt: skip
        return prune(
            self.model, self.inputs, self.budget, data=self.data, loss=self.loss, criterion=how.criterion,
            strategy=how.strategy, repair=how.repair, exclude=list(how.exclude), outputs=self.outputs,
            approximate=how.approximate, latency=latency, batches=how.batches, progress=self.progress,
        )  # fmt: skip

    def tuned(self, model: nn.Module, checkpoints: Path) -> list[dict[str, float]]:
        """Fine-tune a model in place; a row an epoch."""
        from accelerate import Accelerator

        from secateur.lab.training.loop import fit

        how = self.question
        torch.manual_seed(how.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=how.lr)
        assert self.data is not None
        return fit(
            model, optimizer, self.data, epochs=how.finetune, loss_fn=self.loss, schedule="one_cycle",
            checkpoint_dir=checkpoints, accelerator=Accelerator(cpu=self.device.type == "cpu"), progress=self.progress,
        )  # fmt: skip


def answer(question: Question, out: Path, *, fresh: bool, progress: bool, say: Say) -> dict[str, Any]:
    """Prune, fine-tune and save, from where an earlier call was interrupted.

    Args:
        question: what is asked.
        out: the folder that the model is saved in.
        fresh: replace what is there.
        progress: show how far it is.
        say: is told what is done.

    Returns:
        What is also saved beside the model: counts before and after, evaluations, remarks.

    Raises:
        SecateurError: what is asked for cannot be done, which is told before anything is written; the folder holds
            something else.
    """
    work = out.with_name(f"{out.name}.unfinished")
    source = question.source
    asked: dict[str, Any] = {"question": question.as_data(), "versions": versions()}
    if source.weights is not None and source.weights.is_file():
        asked["weights"] = checksum(source.weights)
    _check_place(source, out, work)
    done = None if fresh or _begun(work) == asked else _earlier(out, asked)
    if done is not None:
        say(f"{out}: this is done (--fresh does it again)")
        return done
    missing = [folder for folder in work.parents if not folder.exists()]
    with threads_set(question.threads):
        ready = Answering(question, progress=progress, say=say)
        _ = ready.model, ready.inputs
        with held(work):
            try:
                return _answered(ready, out, work, asked, fresh=fresh)
            except (NothingToPrune, SecateurError) as error:
                if not isinstance(error, BadFile) and not (work / PRUNED).exists():
                    _cleared(work)
                    for folder in missing:
                        with suppress(OSError):
                            folder.rmdir()
                raise


def _check_place(source: Source, out: Path, work: Path) -> None:
    """Raise if something of others is where the answer, or what comes before it, is to be."""
    if out.exists() and not out.is_dir():
        raise SecateurError(f"--out {out}: it is a file; give a folder")
    if source.saved and out.exists() and out.resolve() == Path(source.model).resolve():
        raise SecateurError(f"--out {out}: the model is read from there; give another folder")
    if work.exists() and not (work.is_dir() and ((work / FILE).exists() or not any(work.iterdir()))):
        raise SecateurError(
            f"{work}: this is somebody else's, and what is unfinished is to be there; give another --out"
        )


def _begun(work: Path) -> Any:
    """What was asked of what is unfinished, if anything is."""
    try:
        return json.loads((work / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _cleared(work: Path) -> None:
    """Remove what is unfinished, and nothing else."""
    for folder in (work / PRUNED, work / CHECKPOINTS):
        shutil.rmtree(folder, ignore_errors=True)
    (work / FILE).unlink(missing_ok=True)
    with suppress(OSError):
        work.rmdir()


def _answered(ready: Answering, out: Path, work: Path, asked: Mapping[str, Any], *, fresh: bool) -> dict[str, Any]:
    question, say = ready.question, ready.say
    _check_same(work, asked, fresh=fresh)
    build = question.source.original
    if (work / PRUNED / store.FILE).exists():
        model = store.load(work / PRUNED, build).to(ready.device)
        facts = store.read_head(work / PRUNED)["notes"]
        say(f"{work}: goes on after pruning")
    else:
        before = ready.measured(ready.model)
        result = ready.pruned()
        model, facts = result.model, facts_of(ready, result)
        facts["evaluated"] = {"before": before, "pruned": ready.measured(model)} if ready.evaluate is not None else {}
        for remark in (*facts["facts"].get("notices", ()), *facts["facts"].get("remarks", ())):
            say(remark)
        store.save(model, work / PRUNED, notes=facts)
    if question.finetune:
        facts["history"] = ready.tuned(model, work / CHECKPOINTS)
        if ready.evaluate is not None:
            facts["evaluated"]["tuned"] = ready.measured(model)
    noted = described(ready.inputs)
    store.save(model, out, notes={**facts, **asked, **({} if noted is None else {INPUT: noted})})
    write_page(page_of_answer(facts | asked), out / REPORT)
    _cleared(work)
    return dict(store.read_head(out)["notes"])


def facts_of(ready: Answering, result: Result) -> dict[str, Any]:
    """What is kept of a result, as JSON holds it."""
    kept = {}
    if result.graph is not None and result.plan is not None:
        each = zip(result.graph.groups, result.graph.kept(result.plan).tolist(), strict=True)
        kept = {group.name: [len(group), width] for group, width in each}
    bytes_ = {"before": file_size(ready.model), "after": file_size(result.model)}
    return {**result.as_data(), "bytes": bytes_, "widths": kept}


def _earlier(out: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier call found, if the folder is its answer; None if there is none.

    Raises:
        SecateurError: the folder is something else.
    """
    if not out.exists():
        return None
    if not (out / store.FILE).exists():
        if any(out.iterdir()):
            raise SecateurError(f"--out {out}: it holds other files; give a new folder, or --fresh")
        return None
    notes = store.read_head(out)["notes"]
    if all(notes.get(key) == value for key, value in asked.items() if key != "versions"):
        return dict(notes)
    raise SecateurError(f"--out {out}: it holds a model that was made otherwise; give another folder, or --fresh")


def _check_same(work: Path, asked: Mapping[str, Any], *, fresh: bool) -> None:
    """Raise if what is there meanwhile was begun by another command; note this one."""
    path = work / FILE
    if path.exists() and not fresh:
        try:
            begun = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BadFile(f"{path} is damaged ({error}): --fresh begins anew") from error
        if begun != dict(asked):
            raise SecateurError(f"{work}: another command, or another version, began this; --fresh begins anew")
    elif path.exists():
        for entry in (work / PRUNED, work / CHECKPOINTS):
            shutil.rmtree(entry, ignore_errors=True)
    make_folder(work)
    write_json(path, asked)


def as_text(facts: Mapping[str, Any]) -> str:
    """The table before and after."""
    rows = [("", "before", "after", "kept")]
    for unit in ("macs", "params", "channels"):
        one, other = facts["before"].get(unit), facts["after"].get(unit)
        if one is not None and other is not None:
            rows.append((unit, f"{one:,}", f"{other:,}", f"{other / max(one, 1):.1%}"))
    one, other = facts["bytes"]["before"], facts["bytes"]["after"]
    rows.append(("bytes", f"{one:,}", f"{other:,}", f"{other / one:.1%}"))
    time = facts["facts"].get("latency_ms")
    if time:
        rows.append(("ms", f"{time['before']:.4g}", f"{time['after']:.4g}", f"{time['after'] / time['before']:.1%}"))
    evaluated = facts.get("evaluated", {})
    last = "tuned" if "tuned" in evaluated else "pruned"
    for name, value in evaluated.get("before", {}).items():
        between = f"({_number(evaluated['pruned'].get(name))} before fine-tuning)" if last == "tuned" else ""
        rows.append((name, _number(value), _number(evaluated[last].get(name)), between))
    rows += [(name, f"{of:,}", f"{kept:,}", f"{kept / of:.1%}") for name, (of, kept) in facts["widths"].items()]
    wide = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = (
        f"{name.ljust(wide[0])}  {'  '.join(cell.rjust(w) for cell, w in zip(cells, wide[1:], strict=True))}".rstrip()
        for name, *cells in rows
    )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"
