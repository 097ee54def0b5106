r"""Structured directional pruning for a trained network, at once (arXiv 2107.05328).

With ``theta_g`` all that writes channel ``g``, ``u_g = theta_g / ||theta_g||`` and ``P_0`` the projector on the flat
directions of the loss::

    s_g = <u_g, (P_0 u)_g>                    how much of the way to zero is flat; may be negative
    theta_g(lambda) = max(0, 1 - lambda * s_g / ||theta_g||) * theta_g

A channel is zero from ``lambda = ||theta_g|| / s_g`` on, and never where ``s_g <= 0``: that ``lambda`` is its score.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur._internal.errors import SecateurError
from secateur._internal.workload import Needs, Workload
from secateur.curvature.layers import why_not, wide
from secateur.curvature.null_space import NullSpace, NullSpaceProjector, projector_of
from secateur.scoring.contract import CRITERIA, Scores
from secateur.scoring.sums import by_group, channel_sums, rows
from secateur.tracing.channel_rows import along, producer_axes
from secateur.tracing.graph import Axis, ChannelGraph


class Directions:
    """The unit vectors of all channels, and where the flat valley lets them go.

    Args:
        model: a trained model.
        graph: its graph.
        flat: its projector.

    Attributes:
        axes: what writes channels, in parameters that the projector knows; one dim each.
        norm: ``||theta_g||`` by channel id.
        unit: ``u``, one tensor for each parameter of ``axes``.
        eta: ``P_0 u``, one tensor for each parameter that the projector knows.
        score: ``s_g`` by channel id.
        left_out: groups without a score -> why.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, flat: NullSpaceProjector) -> None:
        flat.check_model(model)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        names = {p: name for name, p in model.named_parameters()}
        self.axes = [
            Axis(names[p], dim, ids.numpy())
            for p, (dim, ids) in producer_axes(model, graph).items()
            if names[p] in flat.shapes
        ]
        if not self.axes:
            raise SecateurError("no exact group is written by a parameter that the projector knows: graph.summary()")
        known = {a.name for a in self.axes}
        skipped = flat.facts.get("skipped", {})
        self.left_out: dict[str, str] = {}
        for group in graph.groups:
            filters = [a.name for a in group.producers if a.name in parameters and parameters[a.name].ndim > 1]
            unknown = [name for name in filters if name not in known]
            if not group.exact:
                self.left_out[group.name] = f"not exact: {group.reason}"
            elif unknown:  # its scores would be too low
                self.left_out[group.name] = ": ".join(why_not(model, unknown[0], skipped))
        self.norm = channel_sums(graph, self.axes, lambda a: rows(parameters[a.name].double().square(), a.dim)).sqrt()
        self.unit = {a.name: self.scaled(a, wide(parameters[a.name]), self._inverse()) for a in self.axes}
        self.eta = flat.project(self.unit)
        products = {a.name: self.unit[a.name] * self.eta[a.name] for a in self.axes}
        self.score = channel_sums(graph, self.axes, lambda a: rows(products[a.name], a.dim))
        self.score[0] = 0

    def _inverse(self) -> Tensor:
        inverse = torch.where(self.norm > 0, 1 / self.norm, torch.zeros_like(self.norm))
        inverse[0] = 0  # no channel
        return inverse

    @staticmethod
    def scaled(axis: Axis, tensor: Tensor, factor: Tensor) -> Tensor:
        """A parameter with every channel's rows times its factor."""
        return tensor * along(factor[torch.from_numpy(axis.channels)].to(tensor.dtype), axis.dim, tensor)

    def strength(self) -> Tensor:
        """The least lambda at which a channel is zero, by channel id; infinite where there is none."""
        ratio = torch.where(self.score > 0, self.norm / self.score, torch.full_like(self.norm, torch.inf))
        return torch.where(self.norm > 0, ratio, torch.zeros_like(ratio))


def directional_scores(model: nn.Module, graph: ChannelGraph, flat: NullSpaceProjector) -> dict[str, Tensor]:
    """``s_g`` of every channel, in ``[(1 - sqrt(G))/2, (1 + sqrt(G))/2]`` for G channels; their sum is ``||P_0 u||^2``.

    Args:
        model: a trained model.
        graph: its graph.
        flat: its projector, from :func:`secateur.null_space_projector`.

    Returns:
        Group name -> float64, one value a channel. Not what goes first: that is small and flat, see ``"directional"``.
    """
    found = Directions(model, graph, flat)
    return {name: s for name, s in by_group(graph, found.score).items() if name not in found.left_out}


@CRITERIA.register("directional")
@dataclass(frozen=True)
class Directional(NullSpace):
    """The strength ``lambda`` at which structured directional pruning takes a channel; settings of :class:`NullSpace`.

    The repair ``"directed"`` with the same settings moves what stays along the valley.
    """

    needs: ClassVar[Needs] = Needs(data=True, loss=True)

    def scores(self, graph: ChannelGraph, work: Workload) -> Scores:
        """One number a channel; infinite where no strength takes it."""
        flat = projector_of(work, null_space_of(self))
        found = Directions(work.model, graph, flat)
        values = by_group(graph, found.strength())
        return Scores({name: v for name, v in values.items() if name not in found.left_out}, found.left_out)


def null_space_of(settings: NullSpace) -> NullSpace:
    """The settings of the projector alone, so that criterion and repair find the same one."""
    return NullSpace(**{f.name: getattr(settings, f.name) for f in fields(NullSpace)})
