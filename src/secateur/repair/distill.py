r"""The smaller model trained for a few steps to compute what the original computes: no label is needed.

On each batch the original's outputs ``t`` are the targets of the smaller model's ``y``, in one of two ways::

    mse    sum over outputs of |y - t|^2 / |t - mean t|^2
    kl     T^2 KL(softmax(t / T) || softmax(y / T)), over the last axis              (arXiv 1503.02531, section 2)

Batch norms use the batch's statistics, and their running ones follow; all else is as in eval mode. The learning rate
rises over the first steps and falls to zero as a cosine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur._internal.batches import Batch, call_without_cache, copied, tensors_in
from secateur._internal.checks import check_choice, check_count, check_nonnegative, check_positive, check_seed
from secateur._internal.distributed import Group, all_reduce_, rank
from secateur._internal.errors import BadBatch, BadFile, SecateurError
from secateur._internal.files import file_at
from secateur._internal.losses import outputs_of
from secateur._internal.serial import digest_of, read, write
from secateur._internal.state import check_differentiable, fork_rng_of, preserved
from secateur._internal.workload import Needs, Workload
from secateur.plan import Plan
from secateur.repair.contract import REPAIRS, Facts
from secateur.repair.recalibrate import has_statistics, statistics_of
from secateur.surgery.channels import check_plan

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer for parameters."""
OBJECTIVES = ("mse", "kl")
WARM_UP = 0.05
"""For so much of the steps the learning rate rises."""
SECONDS_BETWEEN_SAVES = 30.0


def distill(
    model: nn.Module,
    small: nn.Module,
    plan: Plan | None,
    data: Iterable[Any],
    *,
    steps: int = 200,
    group: Group = None,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Change the smaller model in place: train it to compute what the original computes.

    Args:
        model: the original; it is left untouched.
        small: the smaller one; if this fails, it is as before.
        plan: what was removed; ``None`` for what did not come from a plan alone, as a result of
            :func:`secateur.hybrid` (its ``result.plan`` is none).
        data: batches; targets are not looked at. They are gone through again until all steps are done.
        steps: how many; each takes one batch.
        group: the processes, each with its shard of the data; gradients are averaged.
        progress: show how far it is.
        settings: see :class:`Distill`.

    Returns:
        ``"distill"``: the objective before the first step and after the last one, on the batches of the first and last
        tenth of the steps.
    """
    if plan is not None:
        check_plan(model, plan)
    work = Workload(model, data, group=group, progress=progress)
    return Distill(steps=steps, **settings).apply(model, small, plan, work)


@REPAIRS.register("distill")
@dataclass(frozen=True)
class Distill:
    """Train the smaller model for a few steps to compute what the original computes.

    Attributes:
        steps: how many; each takes one batch, and data are gone through again until all are done.
        objective: ``"mse"`` (outputs, each in units of its variance over the batch's targets) or ``"kl"`` (the last
            axis holds the logits of classes).
        temperature: of ``"kl"``.
        lr: the largest learning rate.
        optimizer: makes another optimizer than Adam: called with the parameters; ``lr`` is then not used, and its own
            rates follow the same schedule.
        seed: of the order of the batches, where a loader draws it from PyTorch's random state.
        checkpoint: a file; what was interrupted goes on from it, and ends with the same model.
    """

    needs: ClassVar[Needs] = Needs(data=True)
    steps: int = 200
    objective: str = "mse"
    temperature: float = 4.0
    lr: float = 1e-3
    optimizer: Optimizers | None = None
    seed: int = 0
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_choice("objective", self.objective, OBJECTIVES)
        check_positive("temperature", self.temperature)
        check_nonnegative("lr", self.lr)
        check_seed(self.seed)
        file_at(self.checkpoint)
        if self.optimizer is not None and not callable(self.optimizer):
            raise SecateurError(
                f"optimizer={self.optimizer!r}: what makes an optimizer of parameters is expected, such as "
                "functools.partial(torch.optim.SGD, lr=0.01)"
            )

    def apply(self, original: nn.Module, small: nn.Module, plan: Plan | None, work: Workload) -> Facts:
        """See :func:`distill`; the plan is not looked at."""
        return {"distill": _Training(self, original, small, work).run()}

    def difference(self, outputs: Any, targets: Any) -> Tensor:
        """How far a model's outputs are from the original's, one number."""
        ys, ts = ([t for t in tensors_in(given) if t.is_floating_point()] for given in (outputs, targets))
        if not ts or [y.shape for y in ys] != [t.shape for t in ts]:
            raise SecateurError("distill: both models must give tensors of floating-point numbers, of the same shapes")
        pairs = list(zip(ys, ts, strict=True))
        each = self._kl if self.objective == "kl" else _relative
        return torch.stack([each(y, t) for y, t in pairs]).sum()

    def _kl(self, y: Tensor, t: Tensor) -> Tensor:
        y, t = (F.log_softmax(x.float() / self.temperature, -1).flatten(0, -2) for x in (y, t))
        return self.temperature**2 * F.kl_div(y, t, reduction="batchmean", log_target=True)


def _relative(y: Tensor, t: Tensor) -> Tensor:
    y, t = y.float(), t.float()
    return (y - t).square().mean() / (t - t.mean()).square().mean().clamp(min=1e-12)


class _Training:
    """The steps of one call.

    Args:
        settings: of it.
        original: the teacher.
        small: what is trained.
        work: the table.
    """

    def __init__(self, settings: Distill, original: nn.Module, small: nn.Module, work: Workload) -> None:
        self.settings, self.original, self.small, self.work = settings, original, small, work
        for model in (original, small):
            check_differentiable(model)
        self.parameters = [p for p in small.parameters() if p.requires_grad]
        if not self.parameters:
            raise SecateurError("distill: no parameter of the smaller model wants a gradient")
        make = settings.optimizer or partial(torch.optim.Adam, lr=settings.lr)
        self.optimizer = make(self.parameters)
        self.norms = [m for m in small.modules() if has_statistics(m)]
        self.state: list[Tensor] = [*self.parameters, *(t for norm in self.norms for t in statistics_of(norm))]
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.file = file_at(work.agree(None if settings.checkpoint is None else str(settings.checkpoint)))
        self.losses: list[float] = []
        self.first = ""  # what tells the first batch from others
        self.begun = [digest_of([list(m.state_dict().values()) for m in (small, original)]).hex()] if self.file else []

    def run(self) -> dict[str, Any]:
        """All steps; if one fails, the smaller model is as before."""
        found = [t.detach().clone() for t in self.state]  # what they are if anything fails
        try:
            with torch.inference_mode(False), preserved(self.original, gradients=False):
                found = self._trained()
        finally:
            _write(self.state, found)
        tenth = max(1, len(self.losses) // 10)
        first, last = self.losses[:tenth], self.losses[-tenth:]
        return {"steps": self.settings.steps, "before": sum(first) / tenth, "after": sum(last) / tenth}

    def _trained(self) -> list[Tensor]:
        """What is trained, and what follows, after all steps; all else of the smaller model comes back."""
        with preserved(self.small):
            for norm in self.norms:
                norm.train()
            kept = self._kept()
            done = self._resumed(kept)
            torch.manual_seed(self.settings.seed)
            saved = time.monotonic()
            for number, batch in enumerate(self._batches()):
                if number == 0 and self.file is not None:
                    self.first = self.work.agree(digest_of(batch.inputs).hex())
                    if done and kept["first"] != self.first:
                        raise SecateurError(
                            f"checkpoint {self.file} is of other data (its first batch is another): delete it, or give "
                            "another file"
                        )
                if number < done:
                    continue
                self._step(number, batch)
                if self.file is not None and self._due(saved, number):
                    self.work.together(partial(self._save, number + 1))
                    saved = time.monotonic()
            found = [t.detach().clone() for t in self.state]
        return [self._averaged(t) for t in found]

    def _due(self, saved: float, number: int) -> bool:
        """Whether to write the checkpoint after a step."""
        late = time.monotonic() - saved >= SECONDS_BETWEEN_SAVES
        return number + 1 == self.settings.steps or bool(self.work.agree(late))

    def _averaged(self, tensor: Tensor) -> Tensor:
        """Over processes, whose batch norms saw different batches."""
        if self.work.processes == 1 or not tensor.is_floating_point():
            return tensor
        return all_reduce_(tensor, self.work.group) / self.work.processes

    def _batches(self) -> Iterator[Batch]:
        """One a step; the data begin again where they end."""

        def endless() -> Iterator[Batch]:
            while True:
                yield from self.work.batches()

        numbers = self.work.tracked(range(self.settings.steps), "distill", self.settings.steps)
        batches = endless()
        for _ in numbers:
            yield self.work.together(lambda: next(batches))

    def _step(self, number: int, batch: Batch) -> None:
        """One step of the optimizer, with gradients averaged over the processes."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * _schedule(number, self.settings.steps)
        with fork_rng_of(self.parameters):  # what a forward draws must not change the order of the batches to come
            torch.manual_seed(self.settings.seed + number)
            loss = self.work.together(lambda: self._backward(batch))
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.copy_(all_reduce_(p.grad, self.work.group) / self.work.processes)
        self.optimizer.step()
        total = torch.tensor([loss], dtype=torch.float64, device=self.work.device)
        self.losses.append(float(all_reduce_(total, self.work.group)) / self.work.processes)

    def _backward(self, batch: Batch) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            kept = replace(batch, inputs=copied(batch.inputs))
            targets = outputs_of(partial(call_without_cache, self.original), kept)
        with torch.enable_grad():
            outputs = outputs_of(partial(call_without_cache, self.small), batch)
            loss = self.settings.difference(outputs, targets)
            if not loss.isfinite():
                raise BadBatch(
                    f"distill: on batch {batch.number} the models are {float(loss.detach())} apart: check the data, or "
                    f"give a lower rate than lr={self.settings.lr!r}"
                )
            loss.backward()
        return float(loss.detach())

    # ----------------------------------------------------------------------------------------------- its checkpoint

    def _kept(self) -> Any:
        """What a checkpoint holds; nothing if there is none."""
        file = self.file
        if file is None or not self.work.agree(rank(self.work.group) == 0 and file.exists()):
            return {}
        kept = self.work.together(lambda: read(file))
        if not isinstance(kept, dict) or kept.get("of") != self._key():
            raise SecateurError(
                f"checkpoint {file} is of other settings or another model: delete it, or give another file"
            )
        return kept

    def _resumed(self, kept: Any) -> int:
        """How many steps a checkpoint has done; what it holds is put in place."""
        if not kept:
            return 0
        try:
            _write(self.state, kept["state"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.losses, self.first = list(kept["losses"]), str(kept["first"])
            return int(kept["done"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise BadFile(f"checkpoint {self.file} is damaged ({error}): delete it to begin anew") from error

    def _key(self) -> list[Any]:
        """What makes it another training, beside the data."""
        own, kind = self.settings, type(self.optimizer).__name__
        return [own.steps, own.objective, own.temperature, self.rates, own.seed, kind, *self.begun]

    def _save(self, done: int) -> None:
        if self.file is not None and rank(self.work.group) == 0:
            kept = {"of": self._key(), "done": done, "first": self.first, "losses": self.losses, "state": self.state}
            write(self.file, kept | {"optimizer": self.optimizer.state_dict()})


def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _schedule(number: int, steps: int) -> float:
    """Which part of the rate a step has."""
    warm = max(1, round(WARM_UP * steps))
    if number < warm:
        return (number + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (number - warm) / max(steps - warm, 1)))
