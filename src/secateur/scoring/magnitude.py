"""Scores that need no data: norms of the producers' rows, scales of the norms, chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur._internal.checks import check_flag, check_seed
from secateur._internal.errors import SecateurError
from secateur._internal.workload import Needs, Workload
from secateur.curvature.layers import wide
from secateur.scoring.contract import CRITERIA, Scores
from secateur.scoring.sums import by_group, channel_sums, producers
from secateur.tracing.graph import Axis, ChannelGraph

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def filter_norms(model: nn.Module, graph: ChannelGraph, p: int = 2, *, normalize: bool = True) -> dict[str, Tensor]:
    r"""The norm of each filter that writes a channel, over its layer's mean, summed over the channel's producers.

    ``score[c] = sum_producers ||w_c||_p / mean_c ||w_c||_p`` (arXiv 1608.08710 has p = 1 and no mean: layers differ in
    scale for reasons that have nothing to do with importance). Producers with one dim (biases, norms) count only where
    there is no other.

    Args:
        model: the model.
        graph: its graph.
        p: 1 or 2.
        normalize: divide by the layer's mean.
    """
    tensors = dict(model.named_parameters())
    axes = producers(graph)

    def norm(axis: Axis) -> Tensor:
        tensor = wide(tensors[axis.name].detach())
        others = [d for d in range(tensor.ndim) if d != axis.dim]
        value = torch.linalg.vector_norm(tensor, ord=p, dim=others) if others else tensor.abs()
        return value / value.mean().clamp_min(1e-30) if normalize else value

    filters = [a for a in axes if tensors[a.name].ndim > 1]
    total = channel_sums(graph, filters, norm)
    written = channel_sums(graph, filters, lambda a: torch.ones(len(a.channels))) > 0
    total = torch.where(written, total, channel_sums(graph, [a for a in axes if a not in filters], norm))
    return by_group(graph, total)


@CRITERIA.register("magnitude")
@dataclass(frozen=True)
class Magnitude:
    """Norms of the filters that write a channel (:func:`filter_norms`); needs nothing but weights.

    Attributes:
        p: 1 or 2.
        normalize: divide by the layer's mean.
    """

    needs: ClassVar[Needs] = Needs()
    p: int = 2
    normalize: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or self.p not in (1, 2):
            raise SecateurError(f"p={self.p!r}: 1 or 2 is expected")
        check_flag("normalize", self.normalize)

    def scores(self, graph: ChannelGraph, work: Workload) -> Scores:
        """The norms."""
        return Scores(filter_norms(work.model, graph, self.p, normalize=self.normalize))


@CRITERIA.register("bn_scale")
@dataclass(frozen=True)
class BNScale:
    """The sum of absolute scales of the norms that write a channel (arXiv 1708.06519)."""

    needs: ClassVar[Needs] = Needs()

    def scores(self, graph: ChannelGraph, work: Workload) -> Scores:
        """The scales; groups without a norm get none."""
        tensors = dict(work.model.named_parameters())
        norms = {
            f"{path}.weight" if path else "weight"
            for path, module in work.model.named_modules()
            if isinstance(module, NORMS)
        }
        scales = [a for a in producers(graph) if a.name in norms]
        total = by_group(graph, channel_sums(graph, scales, lambda a: wide(tensors[a.name].detach()).abs()))
        with_norm = {g.name for g in graph.groups if any(a.name in norms for a in g.producers)}
        if not with_norm:
            raise SecateurError(
                "bn_scale: no group has a norm with a scale; use another criterion, for instance 'magnitude'"
            )
        without = {g.name: "no norm with a scale writes it" for g in graph.groups if g.name not in with_norm}
        return Scores({name: scores for name, scores in total.items() if name in with_norm}, without)


@CRITERIA.register("random")
@dataclass(frozen=True)
class Random:
    """Uniform chance, the baseline that every criterion must beat."""

    needs: ClassVar[Needs] = Needs()
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def scores(self, graph: ChannelGraph, work: Workload) -> Scores:
        """Numbers in [0, 1)."""
        generator = torch.Generator().manual_seed(self.seed)
        return Scores({g.name: torch.rand(len(g), generator=generator, dtype=torch.float64) for g in graph.groups})
