"""Scores that need no data: norms of the producers' rows, scales of the norms, chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur._internal.errors import SecateurError
from secateur.scoring.sums import by_group, channel_sums, producers
from secateur.tracing.graph import Axis, ChannelGraph


def magnitude(
    model: nn.Module, graph: ChannelGraph, data: Any = None, loss_fn: Any = None, *, p: int = 2, normalize: bool = True
) -> dict[str, Tensor]:
    r"""The norm of each filter that writes a channel, over its layer's mean, summed over the channel's producers.

    ``score[c] = sum_producers ||w_c||_p / mean_c ||w_c||_p`` (arXiv 1608.08710 has p = 1 and no mean: layers differ
    in scale
    for reasons that have nothing to do with importance). Producers with one dim (biases, norms) count only where there
    is no other.

    Args:
        model: the model.
        graph: its graph.
        data: not used.
        loss_fn: not used.
        p: 1 or 2.
        normalize: divide by the layer's mean.
    """
    if p not in {1, 2}:
        raise SecateurError(f"magnitude(p={p!r}): 1 or 2 is expected")
    tensors = dict(model.named_parameters())
    axes = producers(graph)

    def norm(axis: Axis) -> Tensor:
        tensor = tensors[axis.name].detach()
        others = [d for d in range(tensor.ndim) if d != axis.dim]
        value = torch.linalg.vector_norm(tensor, ord=p, dim=others) if others else tensor.abs()
        return value / value.mean().clamp_min(1e-30) if normalize else value

    filters = [a for a in axes if tensors[a.name].ndim > 1]
    total = channel_sums(graph, filters, norm)
    written = channel_sums(graph, filters, lambda a: torch.ones(len(a.channels))) > 0
    total = torch.where(written, total, channel_sums(graph, [a for a in axes if a not in filters], norm))
    return by_group(graph, total)


def bn_scale(model: nn.Module, graph: ChannelGraph, data: Any = None, loss_fn: Any = None) -> dict[str, Tensor]:
    """The sum of absolute scales of the norms that write a channel (arXiv 1708.06519).

    Groups without a norm get no score.
    """
    tensors = dict(model.named_parameters())
    norms = {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules()
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm))
    }
    scales = [a for a in producers(graph) if a.name in norms]
    total = channel_sums(graph, scales, lambda a: tensors[a.name].abs())
    with_norm = [g for g in graph.groups if any(a.name in norms for a in g.producers)]
    if not with_norm:
        raise SecateurError(
            "bn_scale: no group has a norm with a scale; use another criterion, for instance 'magnitude'"
        )
    scores = by_group(graph, total)
    return {g.name: scores[g.name] for g in with_norm}


def random(
    model: nn.Module, graph: ChannelGraph, data: Any = None, loss_fn: Any = None, *, seed: int = 0
) -> dict[str, Tensor]:
    """Uniform chance, the baseline that every criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(len(g), generator=generator, dtype=torch.float64) for g in graph.groups}
