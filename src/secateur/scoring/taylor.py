r"""First-order Taylor scores: how much the loss moves, to first order, if a channel is scaled away (arXiv 1906.10771).

With ``w`` all weights that write channel ``c``::

    score[c] = mean over batches of |sum_w w * dL/dw|

which is the derivative with respect to one common scale. Batch norms use the batch's statistics here: a filter before a
norm has no derivative along itself then, so that nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur._internal.batches import Batch
from secateur._internal.checks import check_count
from secateur._internal.distributed import all_reduce_
from secateur._internal.errors import BadBatch
from secateur._internal.state import check_differentiable, preserved
from secateur._internal.workload import Needs, Workload
from secateur.curvature.layers import wide
from secateur.scoring.contract import CRITERIA, Scores
from secateur.scoring.sums import by_group, channel_sums, producers, rows
from secateur.tracing.graph import Axis, ChannelGraph


@CRITERIA.register("taylor")
@dataclass(frozen=True)
class Taylor:
    """First-order Taylor scores.

    Attributes:
        batches: use at most so many batches.
    """

    needs: ClassVar[Needs] = Needs(data=True, loss=True)
    batches: int | None = None

    def __post_init__(self) -> None:
        check_count("batches", self.batches, optional=True)

    def scores(self, graph: ChannelGraph, work: Workload) -> Scores:
        """One number a channel, float64; the mean over the batches of all processes."""
        parameters = dict(work.model.named_parameters())
        axes = producers(graph)
        names = list(dict.fromkeys(a.name for a in axes))
        needed = [parameters[name] for name in names]
        check_differentiable(work.model)

        def own() -> tuple[Tensor, int]:
            total, seen = torch.zeros((), dtype=torch.float64), 0
            for batch in work.batches(self.batches, "Taylor scores"):
                gradients = _gradients(work, needed, batch)
                moved = {n: wide(p.detach()) * wide(g) for n, p, g in zip(names, needed, gradients, strict=True)}

                def along(axis: Axis, moved: dict[str, Tensor] = moved) -> Tensor:
                    return rows(moved[axis.name], axis.dim)

                total = total + channel_sums(graph, axes, along).abs()
                seen += 1
            return total, seen

        with torch.inference_mode(False), preserved(work.model, "batch_statistics"):
            for p in needed:
                p.requires_grad_(True)
            total, seen = work.together(own)
        total = all_reduce_(total.to(work.device), work.group).cpu()
        count = int(all_reduce_(torch.tensor(seen, device=work.device), work.group))
        return Scores(by_group(graph, total / count))


def _gradients(work: Workload, needed: Sequence[nn.Parameter], batch: Batch) -> list[Tensor]:
    with torch.enable_grad():
        loss = work.loss_of(batch)
        try:
            found = torch.autograd.grad(loss, needed, allow_unused=True)
        except RuntimeError as error:
            raise BadBatch(f"no gradient of batch {batch.number} can be found: {error}") from error
    return [torch.zeros_like(p) if g is None else g for p, g in zip(needed, found, strict=True)]
