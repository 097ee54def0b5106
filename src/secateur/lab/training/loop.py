"""One training loop: CPU, one GPU, mixed precision, data parallel; an interrupted run ends as if it had not been.

A checkpoint holds the model, the optimizer, the handles, all random states, the place in the epoch and the history.
With a loader whose batches depend on ``(seed, epoch)`` alone (``secateur.lab.data.Loader``), a resumed run on the CPU
has the same weights, bit for bit.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from secateur._internal.batches import read_batch
from secateur._internal.errors import SecateurError
from secateur._internal.extras import extra
from secateur._internal.losses import Loss, batch_loss, read_loss
from secateur.lab.training import checkpoint
from secateur.lab.training.schedule import Schedule, named

with extra("lab", "training"):
    from accelerate import Accelerator
    from accelerate.utils import broadcast, gather_object

History = list[dict[str, float]]


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Any],
    *,
    epochs: int,
    loss_fn: Any = F.cross_entropy,
    schedule: str | Schedule = "constant",
    checkpoint_dir: str | Path | None = None,
    every: float = 60.0,
    after_step: Sequence[Any] = (),
    after_epoch: Callable[[], Mapping[str, float]] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    channels_last: bool = False,
    compile: bool = False,
) -> History:
    """Train a model in place.

    Args:
        model: moved to the accelerator's device; its mode is as before afterwards.
        optimizer: of the model's parameters; its learning rates are as before afterwards.
        loader: sized batches, ``(x, y)`` or whatever :func:`secateur.prune` takes. ``secateur.lab.data.Loader`` is
            sharded over the ranks and resumes inside an epoch; for any other, exact resumption needs an order that does
            not change from epoch to epoch.
        epochs: how often to pass over the data.
        loss_fn: mean loss of ``(output, y)``, or whatever :func:`secateur.prune` takes for a loss.
        schedule: a name in ``SCHEDULES``, or a function of progress in [0, 1) that gives a factor of the learning rate.
        checkpoint_dir: where to keep checkpoints and to resume from; begins anew if it is empty or not there.
        every: seconds between two checkpoints inside an epoch; 0 writes one after every step. Each epoch ends with one.
        after_step: objects whose ``step()`` is called after the optimizer's (or functions); those with ``state_dict``
            and ``load_state_dict`` are kept in the checkpoints.
        after_epoch: numbers to add to each epoch's row, such as the validation accuracy.
        accelerator: of Hugging Face accelerate; without one, its defaults (a GPU if there is one).
        progress: show a bar with the time left; where there is no terminal, a line an epoch.
        channels_last: run in that memory format (faster for convolutions on most machines).
        compile: run the forward through ``torch.compile``.

    Returns:
        One row an epoch: ``epoch`` (from 1), mean ``loss``, the last step's ``lr``, ``seconds``.

    Raises:
        SecateurError: an empty loader, a first batch that the model cannot take, a loss that is not finite, checkpoints
            that are damaged or belong to another run.
    """
    _check(loader, epochs, every)
    accelerator = accelerator or Accelerator()
    modes = {module: module.training for module in model.modules()}
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    run = _Run(
        model,
        optimizer,
        loader,
        epochs=epochs,
        loss_fn=loss_fn,
        schedule=named(schedule),
        handles=after_step,
        accelerator=accelerator,
        channels_last=channels_last,
        compile=compile,
    )
    folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
    try:
        if folder is not None:
            run.resume(folder)
        with _shown(progress and accelerator.is_main_process, run) as (advance, tell):
            while run.epoch < epochs:
                run.pass_once(folder, every, advance)
                run.end_epoch(after_epoch)
                tell(run.history[-1])
                if folder is not None:
                    run.save(folder)
    finally:
        run.unwrap()
        for module, mode in modes.items():
            module.training = mode
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return run.history


class _Run:
    """Where a training run stands, and how it moves on."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Any,
        *,
        epochs: int,
        loss_fn: Any,
        schedule: Schedule,
        handles: Sequence[Any],
        accelerator: Accelerator,
        channels_last: bool,
        compile: bool,
    ) -> None:
        self.model, self.optimizer, self.epochs, self.loss_fn = model, optimizer, epochs, loss_fn
        self.schedule, self.handles, self.accelerator = schedule, handles, accelerator
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        plain = (bool, int, float, str)
        self.settings = [{k: v for k, v in g.items() if isinstance(v, plain)} for g in optimizer.param_groups]
        self.epoch = self.step = 0
        self.total, self.seen, self.seconds, self.lr = 0.0, 0, 0.0, 0.0
        self.history: History = []
        self.read: Loss | None = None
        world = accelerator.num_processes
        if hasattr(loader, "shard"):
            self.loader = loader.shard(accelerator.process_index, world)
        else:
            self.loader = accelerator.prepare_data_loader(loader) if world > 1 else loader
        model.to(accelerator.device)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.had_forward = "forward" in vars(model)
        self.wrapped = accelerator.prepare_model(model)
        self.forward = torch.compile(self.wrapped) if compile else self.wrapped
        self.stepper = accelerator.prepare_optimizer(optimizer)

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return len(self.loader)

    def pass_once(self, folder: Path | None, every: float, advance: Callable[[int], None]) -> None:
        """Train from where the run stands to the end of the epoch."""
        self.model.train()
        written = started = time.monotonic()
        before = self.seconds
        often = 1 if self.accelerator.device.type == "cpu" else 32  # reading a loss makes a GPU wait
        losses: list[tuple[Tensor, int]] = []
        for raw in _batches(self.loader, self.epoch, self.step):
            losses.append(self.train_step(raw, check=often == 1))
            self.step += 1
            self.seconds = before + time.monotonic() - started
            last = self.step == self.steps
            due = folder is not None and not last and self.agree(time.monotonic() - written >= every)
            if len(losses) >= often or due or last:
                self.add(losses)
                losses = []
                advance(self.epoch * self.steps + self.step)
            if due and folder is not None:
                self.save(folder)
                written = time.monotonic()
        if self.step != self.steps:
            raise SecateurError(f"the loader ended after {self.step} batches, but its length is {self.steps}")

    def train_step(self, raw: Any, check: bool) -> tuple[Tensor, int]:
        """One step; the mean loss of the batch (still on its device) and the number of examples."""
        world = self.accelerator.num_processes
        factor = self.schedule((self.epoch * self.steps + self.step) / (self.epochs * self.steps))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.lr = self.rates[0] * factor
        self.stepper.zero_grad()
        loss, count = self.loss(raw)
        if check:
            self.finite(loss.detach(), self.step)
        # ranks average their gradients; shares of unequal size must count by their images
        share = count * world / self.loader.size(self.step) if world > 1 and hasattr(self.loader, "size") else 1.0
        self.accelerator.backward(loss if share == 1 else loss * share)
        self.stepper.step()
        for handle in self.handles:
            getattr(handle, "step", handle)()
        return loss.detach(), count

    def loss(self, raw: Any) -> tuple[Tensor, int]:
        """The mean loss of a batch, and its number of examples."""
        device = self.accelerator.device
        pair = isinstance(raw, (tuple, list)) and len(raw) == 2 and all(isinstance(part, Tensor) for part in raw)
        if pair and callable(self.loss_fn) and not isinstance(self.loss_fn, nn.Module):
            x, y = (part.to(device, non_blocking=True) for part in raw)
            x = x.contiguous(memory_format=self.format) if x.dim() == 4 else x
            return self.loss_of_pair(x, y), len(x)
        batch = read_batch(raw, self.step, device)
        if isinstance(batch.inputs, Tensor) and batch.inputs.dim() == 4:
            batch = replace(batch, inputs=batch.inputs.contiguous(memory_format=self.format))
        self.read = self.read or read_loss(self.loss_fn, batch)
        with self.accelerator.autocast():
            return batch_loss(self.forward, batch, self.read), batch.examples

    def loss_of_pair(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss; an error of the very first forward is told with the batch's shapes."""
        try:
            with self.accelerator.autocast():
                mean: Tensor = self.loss_fn(self.forward(x), y)
                return mean
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if self.epoch or self.step or isinstance(error, (SecateurError, torch.OutOfMemoryError)):
                raise
            raise SecateurError(
                f"loader: the model or the loss cannot take its first batch, x {list(x.shape)} {x.dtype} and "
                f"y {list(y.shape)} {y.dtype}: {error}"
            ) from error

    def finite(self, loss: Tensor, step: int) -> None:
        """Stop at a loss that is NaN or infinite."""
        value = float(loss)
        if not math.isfinite(value):
            raise SecateurError(
                f"the loss is {value} in epoch {self.epoch + 1}, step {step + 1} of {self.steps} (lr {self.lr:g}): "
                "use a smaller learning rate, a warm-up (schedule='one_cycle'), or look for bad values in the data"
            )

    def add(self, losses: list[tuple[Tensor, int]]) -> None:
        """Add steps that are done to the epoch's mean loss."""
        for back, (loss, count) in enumerate(reversed(losses), start=1):
            self.finite(loss, self.step - back)
            self.total += float(loss) * count
            self.seen += count

    def end_epoch(self, after_epoch: Callable[[], Mapping[str, float]] | None) -> None:
        """Write the epoch's row and go to the next."""
        sums = torch.tensor([self.total, self.seen], dtype=torch.float64)
        total, seen = self.accelerator.reduce(sums.to(self.accelerator.device)).tolist()
        row = {"epoch": self.epoch + 1, "loss": total / seen, "lr": self.lr, "seconds": self.seconds}
        self.share_buffers()
        more = after_epoch() if after_epoch is not None else {}
        self.history.append({**row, **{name: float(value) for name, value in more.items()}})
        self.epoch, self.step, self.total, self.seen, self.seconds = self.epoch + 1, 0, 0.0, 0, 0.0

    def agree(self, mine: bool) -> bool:
        """What rank 0 says: clocks differ, but a checkpoint takes all ranks."""
        if self.accelerator.num_processes == 1:
            return mine
        return bool(broadcast(torch.tensor(int(mine), device=self.accelerator.device)))

    def share_buffers(self) -> None:
        """Give all ranks the buffers of rank 0: each has seen its own share of the last batch."""
        if self.accelerator.num_processes > 1:
            for buffer in self.model.buffers():
                buffer.copy_(broadcast(buffer))

    def unwrap(self) -> None:
        """Take away what accelerate put around the model."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        for held, ours in (("_models", self.wrapped), ("_optimizers", self.stepper)):
            kept = getattr(self.accelerator, held, [])  # else it keeps every model that it ever trained
            kept[:] = [item for item in kept if item is not ours]
        if not self.had_forward:
            vars(self.model).pop("forward", None)
            vars(self.model).pop("_original_forward", None)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this run."""
        tensors = {name: list(tensor.shape) for name, tensor in self.model.state_dict().items()}
        return {
            "epochs": self.epochs,
            "steps an epoch": self.steps,
            "batch size": getattr(self.loader, "batch_size", None),
            "seed": getattr(self.loader, "seed", None),
            "optimizer": type(self.optimizer).__name__,
            "optimizer settings": self.settings,
            "handles": [getattr(h, "__name__", type(h).__name__) for h in self.handles],
            "schedule": getattr(self.schedule, "__name__", type(self.schedule).__name__),
            "processes": self.accelerator.num_processes,
            "model": tensors,
        }

    def save(self, folder: Path) -> None:
        """Write a checkpoint (rank 0 does, for all)."""
        states = gather_object([checkpoint.random_states()])
        if not self.accelerator.is_main_process:
            return
        place = {"epoch": self.epoch, "step": self.step, "total": self.total, "seen": self.seen, "lr": self.lr}
        state = {
            "run": self.identity(),
            "place": {**place, "seconds": self.seconds, "history": self.history},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "handles": [h.state_dict() if hasattr(h, "state_dict") else None for h in self.handles],
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "random": states,
        }
        checkpoint.save(folder, self.epoch * self.steps + self.step, state)

    def resume(self, folder: Path) -> None:
        """Go on from the newest readable checkpoint, if there is one."""
        state = checkpoint.newest(folder)
        if state is None:
            return
        ours, theirs = self.identity(), state["run"]
        if ours != theirs:
            what = ", ".join(
                f"{key} {theirs.get(key)!r}, now {ours[key]!r}"
                for key in ours
                if key != "model"
                if ours[key] != theirs.get(key)
            )
            raise SecateurError(
                f"checkpoint_dir={folder}: it holds another run ({what or 'of another model'}): "
                "use the same settings, another folder, or empty this one"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for handle, saved in zip(self.handles, state["handles"], strict=True):
            if saved is not None:
                handle.load_state_dict(saved)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, value in state["place"].items():
            setattr(self, name, value)
        checkpoint.set_random_states(state["random"][self.accelerator.process_index])


def _check(loader: Any, epochs: int, every: float) -> None:
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise SecateurError(f"epochs={epochs!r}: a positive integer is expected")
    if not every >= 0:
        raise SecateurError(f"every={every!r}: seconds between checkpoints, 0 or more, are expected")
    if not hasattr(loader, "__len__"):
        raise SecateurError(
            f"loader: a {type(loader).__name__} has no length: use secateur.lab.data.Loader or a DataLoader"
        )
    if len(loader) == 0:
        raise SecateurError("loader: it is empty: there is nothing to train on")


def _batches(loader: Any, epoch: int, start: int) -> Iterator[Any]:
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    if hasattr(loader, "batches"):
        yield from loader.batches(start)
    else:
        yield from itertools.islice(loader, start, None)


@contextmanager
def _shown(on: bool, run: _Run) -> Iterator[tuple[Callable[[int], None], Callable[[Mapping[str, float]], None]]]:
    """Show how far training is, on stderr: on a terminal a bar over all steps, elsewhere a line an epoch.

    Args:
        on: whether anything is shown.
        run: that is shown.

    Yields:
        What is told how many steps are done, and what is told an epoch's row.
    """
    console = Console(stderr=True)
    bar = on and console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) if bar else nullcontext() as drawn:
        start = run.epoch * run.steps + run.step
        task = None if drawn is None else drawn.add_task("training", total=run.epochs * run.steps, completed=start)

        def advance(done: int) -> None:
            if drawn is not None and task is not None:
                mean = run.total / max(run.seen, 1)
                drawn.update(task, completed=done, description=f"epoch {run.epoch + 1}/{run.epochs} loss {mean:.3f}")

        def tell(row: Mapping[str, float]) -> None:
            if on and drawn is None:
                console.print(_line(row, run.epochs), soft_wrap=True, markup=False, highlight=False)

        yield advance, tell


def _line(row: Mapping[str, float], epochs: int) -> str:
    """An epoch's row in words: its loss, what else was measured, and the time."""
    told = {"loss": row["loss"]} | {k: v for k, v in row.items() if k not in {"epoch", "loss", "lr", "seconds"}}
    numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in told.items())
    return f"epoch {row['epoch']:.0f}/{epochs}: {numbers}, {row['seconds']:.1f} s"
