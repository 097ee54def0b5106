"""Blocks that mix the channels of a map in ways that few rules know: they may freeze, never break exactness."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Do, Draw, block, conv, ones


@block("map")
def odd_orders(d: Draw, x: Tensor) -> Do:
    """Channels sorted, moved and looked up."""
    c = x.size(1)
    order = torch.arange(c).flip(0).roll(1)
    return d.of(
        Do(lambda m, x: x.cumsum(1)),
        Do(lambda m, x: x.sort(1).values),
        Do(lambda m, x: x.topk((x.size(1) + 1) // 2, 1).values),
        Do(lambda m, x: x * (x.argmax(1, True) == torch.arange(x.size(1)).view(-1, *ones(x)))),
        Do(lambda m, x: x[:, m.order], order=nn.Buffer(order)),
        Do(lambda m, x: x.index_select(1, m.order), order=nn.Buffer(order[: (c + 1) // 2].clone())),
        Do(lambda m, x: x[:, [0, -1]]),
        Do(lambda m, x: x.roll(1, 1)),
        Do(lambda m, x: x.flip(1)),
        Do(lambda m, x: x.gather(1, x.argmax(1, True).expand(-1, 2, *x.shape[2:]))),
        Do(lambda m, x: x.unfold(1, 2, 1).sum(-1) if x.size(1) > 1 else x),
        Do(lambda m, x: x.diff(dim=1) if x.size(1) > 1 else x),
    )


@block("map")
def odd_sums(d: Draw, x: Tensor) -> Do:
    """Sums, means and softmaxes over the channels."""
    return d.of(
        Do(lambda m, x: x.sum(1, keepdim=True)),
        Do(lambda m, x: x.mean(1, keepdim=True)),
        Do(lambda m, x: x + x.mean(1, keepdim=True)),
        Do(lambda m, x: x + x.sum(1, keepdim=True)),
        Do(lambda m, x: x.softmax(1)),
        Do(lambda m, x: F.softmax(x, 1) * x),
        Do(lambda m, x: F.normalize(x, dim=1, eps=1e-2)),
        Do(lambda m, x: x / (1 + x.norm(dim=1, keepdim=True))),
        Do(lambda m, x: x - x.amax(1, keepdim=True)),
        Do(lambda m, x: x * x.var(1, keepdim=True, unbiased=False)),
        Do(lambda m, x: x.movedim(1, -1).logsumexp(-1, keepdim=True).movedim(-1, 1)),
        Do(lambda m, x: x * (x.std(1, keepdim=True, unbiased=False) > 0.5)),
        Do(lambda m, x: x.prod(1, keepdim=True).tanh() + x),
        Do(lambda m, x: F.local_response_norm(x, 2)),
    )


@block("map")
def odd_products(d: Draw, x: Tensor) -> Do:
    """Contractions that are not layers.

    Einsum multiplies where a width is 1, which PyTorch's counter does not count: widths are doubled there.
    """
    c = x.size(1)
    square, twice = nn.Parameter(torch.empty(c, c)), (1, 2, *ones(x))
    return d.of(
        Do(lambda m, x: torch.einsum("oc,nc...->no...", m.weight.repeat(2, 2), x.repeat(twice)), weight=square),
        Do(lambda m, x: torch.einsum("nc...,oc->no...", x.repeat(twice), m.weight.repeat(2, 2)).relu(), weight=square),
        Do(lambda m, x: torch.tensordot(x.movedim(1, -1), m.weight, 1).movedim(-1, 1), weight=square),
        Do(lambda m, x: m.conv(x), conv=nn.utils.parametrizations.weight_norm(conv(x, c, 4))),
        Do(lambda m, x: torch.fft.fft(x, dim=1).real),
        Do(lambda m, x: x * torch.einsum("nc...,nc...->n...", x.repeat(twice), x.repeat(twice)).unsqueeze(1).tanh()),
        Do(lambda m, x: (x.flatten(2) @ x.flatten(2).mT).mean(-1).view(*x.shape[:2], *ones(x)) * x),
        Do(lambda m, x: F.conv1d(x.flatten(2), m.weight.unsqueeze(-1)).view_as(x).relu(), weight=square),
    )
