r"""The damage that is left after the readers of what goes have been fitted again: a Schur complement.

A linear or a convolution that reads a group has a weight ``W`` (a row for each output), second moments ``A`` of what
its columns see, and a Fisher ``G`` of its outputs (:mod:`secateur.curvature.kronecker`). If the columns ``S`` go and
all others are fitted anew, the loss rises, to second order, by::

    1/2 tr(G W_S (A_SS - A_Sr A_rr^-1 A_rS) W_S^T) = 1/2 tr(G W_S [(A^-1)_SS]^-1 W_S^T)

Channels go one after the other, each time the one whose loss costs least, with ``A^-1`` and ``W`` kept current::

    W <- W - W_S [(A^-1)_SS]^-1 (A^-1)_S:        A^-1 <- A^-1 - (A^-1)_:S [(A^-1)_SS]^-1 (A^-1)_S:

so that the rises of all steps add up to that of the whole set. A channel's score is the rise at its turn; a group with
several readers adds up theirs. Optimal brain surgery of weights (arXiv 2208.11580) and of structures (arXiv 2302.04089)
has ``G = I``; the repair ``"refit"`` does what is assumed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateur._internal.checks import check_count, check_nonnegative
from secateur._internal.errors import CannotMeasure
from secateur._internal.workload import Workload
from secateur.curvature.damped_inverse import inverse
from secateur.curvature.kronecker import Curvature, Factors, factors_of
from secateur.curvature.layers import reads_by, why_not
from secateur.curvature.projections import projections
from secateur.curvature.readers import POSITIONS, layer_of, readers
from secateur.scoring.contract import CRITERIA, Scores
from secateur.scoring.hessian import DAMPING, SecondOrder
from secateur.tracing.graph import ChannelGraph, ChannelGroup

STEPS = 512
"""A group's channels go in so many steps, at most."""


@CRITERIA.register("schur")
@dataclass(frozen=True)
class Schur(SecondOrder):
    """The rise of the loss that is left after the readers of a channel have been fitted again.

    Attributes:
        fisher: ``"sampled"``, ``"exact"``, ``"empirical"``, or ``"outputs"``: what rises is then half the squared
            distance of the outputs, which needs neither loss nor labels.
        samples: how many targets are drawn for each example.
        batches: use at most so many batches.
        seed: of the drawn targets.
        damping: what is added to the inputs' second moments before they are inverted, in units of their mean
            eigenvalue.
        positions: use so many positions of each batch, spread over all of it.
    """

    damping: float = DAMPING
    positions: int | None = POSITIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nonnegative("damping", self.damping)
        check_count("positions", self.positions, optional=True)

    def scores(self, graph: ChannelGraph, work: Workload) -> Scores:
        """One number a channel."""
        with projections(work.model):
            return self._scores(graph, work)

    def _scores(self, graph: ChannelGraph, work: Workload) -> Scores:
        reading, names = readers(work.model, graph)
        if not names:
            raise CannotMeasure("no channel is read by a linear or a convolution: use 'magnitude', for instance")
        factors = factors_of(work, self.targets(), form="full", layers=names, positions=self.positions)
        found = Scores()
        for group in work.tracked(graph.groups, "schur, groups", len(graph.groups)):
            own = reading[group.name]
            if why := self._why_not(work.model, group, own, factors):
                found.skipped[group.name] = why
                continue
            reads = [Reader(factors[path], columns, self.damping) for path, columns in own.items()]
            order, rises = eliminated(reads, len(group))
            found[group.name] = grown(order, rises)
            found.rises[group.name] = torch.tensor([0.0, *rises], dtype=torch.float64).cumsum(0)
        return found

    def _why_not(
        self, model: nn.Module, group: ChannelGroup, reading: Mapping[str, np.ndarray], factors: Curvature
    ) -> str:
        """Why nothing is known of a group, if that is so; what reads it and is not measured would seem to be free."""
        for axis in group.consumers:
            path = layer_of(axis)
            if path in factors.skipped:
                return f"{path}: {factors.skipped[path]}"
            if path not in factors or axis.dim != reads_by(model.get_submodule(path)):
                return ": ".join(why_not(model, axis.name, factors.skipped))
            if reading[path].shape != (len(group), reading[path].size // len(group)):
                return f"{path}: it reads some of its channels at more places than others"
        return "" if reading else "no linear or convolution reads it"


class Reader:
    """A layer that reads the channels of a group.

    Args:
        factors: of the layer.
        positions: of every channel among its inputs, [channels, positions].
        damping: see :class:`Schur`.
    """

    def __init__(self, factors: Factors, positions: np.ndarray, damping: float) -> None:
        table = factors.layer.table().double().squeeze(2)
        taps = factors.layer.module.weight[0, 0].numel()
        columns = torch.from_numpy(positions)[..., None] * taps + torch.arange(taps)
        self.channels, self.size = len(positions), columns[0].numel()
        own = columns.flatten()
        rest = torch.ones(table.shape[-1], dtype=torch.bool)  # what is no channel's: the bias, what stays anyway
        rest[own] = False
        order = torch.cat([own, rest.nonzero().flatten()])
        values, vectors = torch.linalg.eigh(factors.g.double())
        root = vectors * values.clamp(min=0).sqrt()[:, None]
        self.weight = (root.mT @ table)[..., order]
        self.inverse = inverse(factors.a, damping)[:, order][..., order]

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """Of the channels [groups, channels]: their columns of the weight and of the inverse, [rows or size, size]."""
        n = self.channels * self.size
        weight = self.weight[..., :n].unflatten(-1, (self.channels, self.size)).movedim(2, 1)
        square = self.inverse[:, :n, :n].unflatten(2, (self.channels, self.size)).unflatten(1, (self.channels, -1))
        return weight, square.diagonal(dim1=1, dim2=3).movedim(-1, 1)

    def rise(self) -> Tensor:
        """By how much the loss rises with each channel, [channels]."""
        weight, square = self._blocks()
        return 0.5 * (weight * torch.linalg.solve(square, weight.mT).mT).sum((0, 2, 3)).cpu()

    def remove(self, channels: Sequence[int]) -> float:
        """Let channels go, and what stays make up for them; gives by how much the loss rises."""
        at = (torch.tensor(channels)[:, None] * self.size + torch.arange(self.size)).flatten().to(self.inverse.device)
        rows, own = self.inverse[:, at], self.weight[..., at]
        square = rows[..., at]
        step = torch.linalg.solve(square, rows)
        rise = 0.5 * float((own * torch.linalg.solve(square, own.mT).mT).sum())
        self.weight -= own @ step
        self.inverse -= rows.mT @ step
        self.weight[..., at] = 0
        self.inverse[:, at] = 0
        self.inverse[..., at] = 0
        self.inverse[:, at, at] = 1
        return rise


def eliminated(readers: Sequence[Reader], channels: int, steps: int = STEPS) -> tuple[list[int], list[float]]:
    """Channels in the order in which they go, and by how much the loss rises with each.

    Args:
        readers: of the group.
        channels: how many it has.
        steps: of more channels than this, several go at a time; each is then given its part of what all of them cost.
    """
    order, rises, gone = list[int](), list[float](), torch.zeros(channels, dtype=torch.bool)
    while len(order) < channels:
        rise = sum((reader.rise() for reader in readers), torch.zeros(channels, dtype=torch.float64))
        number = min(-(-channels // steps), channels - len(order))
        some = rise.masked_fill(gone, torch.inf).argsort(stable=True)[:number]
        taken: list[int] = some.tolist()
        order += taken
        gone[some] = True
        cost = sum(reader.remove(taken) for reader in readers)
        rises += [cost / number] * number
    return order, rises


def grown(order: list[int], rises: list[float]) -> Tensor:
    """Scores that sort channels as they went, and are the rises where these grow."""
    sorted_scores = np.maximum.accumulate(np.maximum(rises, 0.0))
    sorted_scores += 1e-12 * np.arange(len(rises)) * max(rises, default=0)
    scores = torch.empty(len(order), dtype=torch.float64)
    scores[torch.tensor(order)] = torch.from_numpy(sorted_scores)
    return scores
