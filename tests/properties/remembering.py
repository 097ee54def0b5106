"""Blocks that share heads, route, keep what they computed, write in place, or have more than parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .blocks import Do, Draw, block, conv, ones


@block("seq")
def grouped_attention(d: Draw, x: Tensor) -> Do:
    """Each head of keys and values serves several of queries."""
    c, pairs, times, size = x.size(-1), d.of(2, 1, 3), d.of(2, 1), d.of(2, 4)

    def heads(m: Do, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(f(x).unflatten(-1, (-1, m.size)).transpose(1, 2) for f in (m.q, m.k, m.v))  # type: ignore[return-value]

    def repeated(m: Do, x: Tensor) -> Tensor:
        q, k, v = heads(m, x)
        return F.scaled_dot_product_attention(q, k.repeat_interleave(m.times, 1), v.repeat_interleave(m.times, 1))

    def expanded(m: Do, x: Tensor) -> Tensor:
        q, k, v = heads(m, x)
        k, v = (t[:, :, None].expand(-1, -1, m.times, -1, -1).flatten(1, 2) for t in (k, v))
        return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v

    def enabled(m: Do, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*heads(m, x), enable_gqa=True)

    attend = d.of(repeated, expanded, enabled)
    return Do(
        lambda m, x: x + m.out(attend(m, x).transpose(1, 2).flatten(2)),
        size=size, times=times, q=nn.Linear(c, pairs * times * size), k=nn.Linear(c, pairs * size),
        v=nn.Linear(c, pairs * size), out=nn.Linear(pairs * times * size, c),
    )  # fmt: skip


@block("seq")
def relative_attention(d: Draw, x: Tensor) -> Do:
    """A table of biases by distance, one column a head."""
    c, t, heads, size = x.size(-1), x.size(1), d.of(2, 3), d.of(2, 3)
    distance = torch.arange(t)[:, None] - torch.arange(t)[None] + t - 1

    def forward(m: Do, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, -1, size).transpose(1, 2) for f in (m.q, m.k, m.v))
        table = m.table(m.distance).permute(2, 0, 1) if m.lookup else m.table.weight[m.distance.flatten()].view(
            t, t, -1).permute(2, 0, 1)  # fmt: skip
        y = (q @ k.transpose(-1, -2) + table).softmax(-1) @ v
        return x + m.out(y.transpose(1, 2).reshape(n, t, -1))

    layers = {name: nn.Linear(c, heads * size) for name in "qkv"}
    return Do(forward, lookup=d.flag(), table=nn.Embedding(2 * t - 1, heads), distance=nn.Buffer(distance),
              out=nn.Linear(heads * size, c), **layers)  # fmt: skip


@block("vec")
def batched_experts(d: Draw, x: Tensor) -> Do:
    """The weights of all experts in one tensor, of which examples take theirs."""
    c, width, count = x.size(1), d.width(), 3

    def dense(m: Do, x: Tensor) -> Tensor:
        y = torch.einsum("nc,ecw->new", x, m.up)
        return torch.einsum("new,ewc,ne->nc", y.relu(), m.down, m.gate(x).softmax(-1))

    def taken(m: Do, x: Tensor) -> Tensor:
        which = torch.arange(len(x)) % count
        y = torch.bmm(x[:, None], m.up[which]).relu()
        return torch.bmm(y, m.down[which])[:, 0] * m.gate(x).softmax(-1)[:, :1]

    parts = {"up": nn.Parameter(torch.empty(count, c, width)), "down": nn.Parameter(torch.empty(count, width, c))}
    return Do(d.of(dense, taken), gate=nn.Linear(c, count), **parts)


@block("map")
def written_in_place(d: Draw, x: Tensor) -> Do:
    """What is written through a view, or into a tensor of zeros."""
    out = d.width()

    def view(m: Do, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, :, :1] *= 0.5
        return y + 1e-3 * y.flip(2)

    def zeros(m: Do, x: Tensor) -> Tensor:
        y = m.a(x)
        z = torch.zeros_like(y)
        z[:, :, ::2] = y[:, :, ::2]
        z.add_(y, alpha=0.5)
        return z

    def copied(m: Do, x: Tensor) -> Tensor:
        y = m.a(x)
        z = y.new_zeros(y.shape)
        z.copy_(y.relu())
        return z.mul_(2).clamp_(max=5.0)

    return Do(d.of(view, zeros, copied), a=conv(x, x.size(1), out))


@block("map")
def caching(d: Draw, x: Tensor) -> Do:
    """What a forward computed once is kept: in a dict, on the module, in a buffer that is not saved."""

    def in_dict(m: Do, x: Tensor) -> Tensor:
        if x.shape not in m.kept:
            m.kept[x.shape] = torch.linspace(0.5, 1, x.shape[2], dtype=x.dtype).view(1, 1, -1, *ones(x)[1:])
        return m.a(x * m.kept[x.shape].to(x))

    def lazily(m: Do, x: Tensor) -> Tensor:
        if m.scale is None:
            m.scale = torch.ones(x.shape[1:], dtype=x.dtype) * 0.7
        return m.a(x * m.scale.to(x))

    def in_buffer(m: Do, x: Tensor) -> Tensor:
        if m.grid.shape != x.shape[2:]:
            m.grid = torch.full(x.shape[2:], 0.9, dtype=x.dtype)
        return m.a(x) * m.grid.to(x)

    grid = nn.Buffer(torch.ones(1, dtype=torch.float64), persistent=False)
    return Do(d.of(in_dict, lazily, in_buffer), kept={}, scale=None, grid=grid, a=conv(x, x.size(1), d.width()))


@block("map")
def frozen_norm(d: Draw, x: Tensor) -> Do:
    """A batch norm all of whose tensors are buffers, as in detectors' backbones; or a shift that is none of a norm."""
    c = x.size(1)

    def normed(m: Do, x: Tensor) -> Tensor:
        scale = m.weight / (m.var.abs() + 1e-2).sqrt()
        return x * scale.view(1, -1, *ones(x)) + (m.bias - m.mean * scale).view(1, -1, *ones(x))

    def shifted(m: Do, x: Tensor) -> Tensor:
        return x + m.bias.view(1, -1, *ones(x))

    steps = torch.linspace(0.3, 1.7, c, dtype=torch.float64)
    buffers = {name: nn.Buffer(steps.roll(i)) for i, name in enumerate(("weight", "bias", "mean", "var"))}
    return Do(d.of(normed, shifted), **buffers)


@block("map")
def weight_normed(d: Draw, x: Tensor) -> Do:
    dim = d.of(0, 1)
    return Do(lambda m, x: m.a(x).relu(), a=weight_norm(conv(x, x.size(1), d.width(), d.of(1, 3)), dim=dim))


@block("seq")
def messages(d: Draw, x: Tensor) -> Do:
    """Tokens send messages along edges, whose sum is what a token gets."""
    c = x.size(-1)
    edges = torch.stack([torch.arange(x.size(1)), (torch.arange(x.size(1)) * 2 + 1) % x.size(1)])

    def added(m: Do, x: Tensor) -> Tensor:
        sent = m.a(x)[:, m.edges[0]]
        return x + torch.zeros_like(x).index_add(1, m.edges[1], sent).relu()

    def scattered(m: Do, x: Tensor) -> Tensor:
        sent = m.a(x)[:, m.edges[0]]
        return x + x.new_zeros(x.shape).scatter_add(1, m.edges[1][None, :, None].expand_as(sent), sent)

    def gathered(m: Do, x: Tensor) -> Tensor:
        sent = m.a(x)
        return x + sent.gather(1, m.edges[1][None, :, None].expand(len(x), -1, sent.shape[-1])).relu()

    return Do(d.of(added, scattered, gathered), a=nn.Linear(c, c), edges=nn.Buffer(edges))


@block("vec")
def branch(d: Draw, x: Tensor) -> Do:
    """A path that a value steers, and that no example takes; what it might read must stay."""

    def forward(m: Do, x: Tensor) -> Tensor:
        return m.never(x) if float(x.detach().abs().amax()) < -1 else m.a(x).relu()

    c, out = x.size(1), d.width()
    return Do(forward, a=nn.Linear(c, out), never=nn.Linear(c, out))
