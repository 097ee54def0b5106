"""Which Fisher: where the targets come from whose gradients are squared (arXiv 1905.12558 tells them apart)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur._internal.batches import Batch, tensors_in
from secateur._internal.checks import check_count, check_seed
from secateur._internal.errors import BadBatch, CannotMeasure, SecateurError
from secateur._internal.losses import LOSSES, Loss
from secateur._internal.workload import Workload

FISHERS = ("sampled", "exact", "empirical", "outputs")


def quiet_kind(loss: Loss) -> str:
    """The kind for those who did not choose one: what the loss can do, so that nobody is warned."""
    return "sampled" if loss.draw is not None else "empirical"


@dataclass(frozen=True)
class Fisher:
    """How targets are found in a pass over the data.

    Attributes:
        kind: ``"sampled"``: targets are drawn from the model's own distribution (the true Fisher); ``"exact"``: the
            mean over all that could be drawn, a backward pass a class (cross-entropy) or output (mse);
            ``"empirical"``: the data's; ``"outputs"``: no loss and no targets, but half the squared distance by which
            the outputs move, of which random projections are differentiated; of several tensors each in units of its
            root mean square over the batch.
        samples: how many targets are drawn for each example.
        batches: use at most so many batches.
        seed: for the drawn targets.

    Raises:
        SecateurError: no way to get targets.
    """

    kind: str = "sampled"
    samples: int = 1
    batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in FISHERS:
            raise SecateurError(
                f"fisher={self.kind!r}: 'sampled' (the model draws targets), 'exact' (the mean over all draws), "
                "'empirical' (the data's targets) or 'outputs' (how far the outputs move)"
            )
        check_count("samples", self.samples)
        if self.kind not in ("sampled", "outputs") and self.samples != 1:
            raise SecateurError(f"samples={self.samples}: fisher={self.kind!r} draws nothing; leave samples at 1")
        check_count("batches", self.batches, optional=True)
        check_seed(self.seed)

    def of(self, work: Workload) -> Fisher:
        """This one; or the empirical one, which is told, where the loss cannot draw targets."""
        if self.kind != "sampled" or work.loss.draw is not None:
            return self
        work.note(
            f"the loss {work.loss.name!r} cannot draw targets from the model's own distribution, so the empirical "
            "Fisher is used (the data's targets); give a loss with a method sample(outputs, generator), or "
            "fisher='empirical' to ask for it"
        )
        return Fisher("empirical", 1, self.batches, self.seed)


def projected(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A random projection of the outputs: the mean of its squared gradients is ``J^T J``.

    Raises:
        CannotMeasure: there are no outputs.
    """
    if not outputs:
        raise CannotMeasure(
            "fisher='outputs': the forward returns no tensor of real numbers, to say how far it moves; give a loss and "
            "another fisher="
        )
    total = outputs[0].new_zeros(())
    for tensor in outputs:
        drawn = torch.randn(tensor.shape, generator=generator, device=tensor.device).to(tensor.dtype)
        if len(outputs) > 1:
            drawn = drawn / tensor.detach().square().mean().sqrt().clamp(min=1e-12)
        total = total + (tensor * drawn).sum()
    return total


def _check_outputs(outputs: Any, batch: Batch) -> None:
    if any(t.isnan().any() for t in tensors_in(outputs)):
        raise BadBatch(f"the outputs of batch {batch.number} are nan: check the data and the model's weights")


def draws(loss: Loss | None, outputs: Any, batch: Batch, generator: torch.Generator, how: Fisher) -> Iterator[Tensor]:
    """The losses of one batch whose squared gradients add up to ``how.samples`` times the Fisher.

    ``"outputs"`` needs no loss, and gets the tensors that matter.
    """
    if how.kind == "outputs":
        _check_outputs(outputs, batch)
        for _ in range(how.samples):
            yield projected(outputs, generator)
        return
    assert loss is not None
    if how.kind == "empirical":
        if batch.targets is None and not loss.of_model:
            raise SecateurError(f"fisher='empirical' needs targets, and batch {batch.number} has none: give pairs")
        yield loss.total(outputs, batch.targets, batch.examples)
    elif how.kind == "sampled":
        assert loss.draw is not None
        _check_outputs(outputs, batch)
        for _ in range(how.samples):
            drawn = loss.draw(outputs, batch.targets, generator)
            yield loss.total(outputs, drawn, batch.examples)
    elif loss.each is not None:
        yield from loss.each(outputs, batch.targets)
    else:
        known = ", ".join(name for name, known in LOSSES.items() if known.each is not None)
        raise SecateurError(f"fisher='exact' is known for {known}; draw targets instead (fisher='sampled')")
