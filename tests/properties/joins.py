"""Blocks on maps [n, c, *space] that join and part channels: shortcuts, concatenations, slices, shuffles, padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Do, Draw, activation, block, conv, divisible, norm, ones, space

# ------------------------------------------------------------------------------------- shortcuts and concatenation


@block("map")
def residual(d: Draw, x: Tensor) -> Do:
    c = x.size(1)
    inner = conv(x, c, d.width(), 3)
    width = inner.out_channels
    parts = {"a": inner, "norm": norm(d, x, width), "act": activation(d, width), "b": conv(x, width, c, d.of(1, 3))}
    if d.flag():
        return Do(lambda m, x: m.b(m.act(m.norm(m.a(x)))).add_(x).relu_(), **parts)
    return Do(lambda m, x: F.relu(x + m.b(m.act(m.norm(m.a(x))))), **parts)


@block("map")
def projected_residual(d: Draw, x: Tensor) -> Do:
    c, width, out = x.size(1), d.width(), d.width()
    stride = 2 if min(x.shape[2:]) >= 4 and d.flag() else 1
    down = nn.Sequential(conv(x, c, out, stride=stride, bias=False), norm(d, x, out))
    body = nn.Sequential(conv(x, c, width, 3, stride=stride), nn.ReLU(), conv(x, width, out, 3))
    return Do(lambda m, x: F.relu(m.down(x) + m.body(x)), down=down, body=body)


@block("map")
def shortcut_a(d: Draw, x: Tensor) -> Do:
    """ResNet's option A: strided identity, zeros for the new channels."""
    c, grow = x.size(1), d.of(2, 1, 4)
    stride = 2 if min(x.shape[2:]) >= 4 else 1

    def forward(m: Do, x: Tensor) -> Tensor:
        index = (slice(None), slice(None), *(slice(None, None, m.stride),) * space(x))
        return F.pad(x[index], (0, 0) * space(x) + (m.before, m.after)) + m.conv(x)

    before = grow // 2 if d.flag() else 0
    layer = conv(x, c, c + grow, 3, stride=stride)
    return Do(forward, conv=layer, stride=stride, before=before, after=grow - before)


@block("map")
def layer_scale(d: Draw, x: Tensor) -> Do:
    scale = nn.Parameter(torch.empty(x.size(1), *(ones(x) if d.flag() else ())))
    return Do(
        lambda m, x: x + m.scale.view(-1, *ones(x)) * m.conv(x), scale=scale, conv=conv(x, x.size(1), x.size(1), 3)
    )


def _fitting(x: Tensor, y: Tensor) -> Tensor:
    """``y`` at the resolution of ``x``."""
    return y if y.shape[2:] == x.shape[2:] else F.interpolate(y, size=x.shape[2:], mode="nearest")


def _same_space(x: Tensor) -> object:
    return lambda y: y.ndim == x.ndim


@block("map")
def add_values(d: Draw, x: Tensor) -> Do:
    y = d.other("map", lambda y: y.ndim == x.ndim)
    if y is None:
        return Do(lambda m, x: x + m.conv(x), conv=conv(x, x.size(1), x.size(1)))
    if y.size(1) == x.size(1) and not d.of(False, False, True):
        return d.of(
            Do(lambda m, x, y: x + _fitting(x, y)),
            Do(lambda m, x, y: x - 0.5 * _fitting(x, y)),
            Do(lambda m, x, y: torch.add(x, _fitting(x, y), alpha=2)),
            Do(lambda m, x, y: torch.lerp(x, _fitting(x, y), 0.3)),
            Do(lambda m, x, y: torch.stack([x, _fitting(x, y)]).sum(0)),
        )
    return Do(lambda m, x, y: x + m.conv(_fitting(x, y)), conv=conv(x, y.size(1), x.size(1), bias=d.flag()))


@block("map")
def combine_values(d: Draw, x: Tensor) -> Do:
    y = d.other("map", lambda y: y.shape == x.shape)
    function = d.of(
        lambda m, x, y: x * y,
        lambda m, x, y: torch.maximum(x, y),
        lambda m, x, y: torch.where(y > 0, x, y),
        lambda m, x, y: x / (1 + y * y),
        lambda m, x, y: torch.addcmul(x, y, torch.tanh(y)),
        lambda m, x, y: x * torch.sigmoid(y),
        lambda m, x, y: torch.sigmoid(x) * torch.sigmoid(y),
        lambda m, x, y: torch.minimum(x, torch.exp(-y * y)),
        lambda m, x, y: torch.stack([x, y], 2).flatten(1, 2),
        lambda m, x, y: torch.stack([x, y], 1).flatten(1, 2),
        lambda m, x, y: torch.hypot(x + 3, y),
    )
    if y is None:
        return Do(lambda m, x: m.f(m, x, m.conv(x)), f=function, conv=conv(x, x.size(1), x.size(1)))
    return Do(function)


@block("map")
def concat_values(d: Draw, x: Tensor) -> Do:
    y = d.other("map", lambda y: y.ndim == x.ndim and y.size(1) + x.size(1) <= 24)
    if y is None:
        return Do(lambda m, x: torch.cat([x, m.conv(x)], 1), conv=conv(x, x.size(1), d.width()))
    return Do(lambda m, x, y: torch.cat([x, _fitting(x, y)], 1))


@block("map")
def dense_layer(d: Draw, x: Tensor) -> Do:
    c, width, grow = x.size(1), d.width(), d.of(2, 3, 4)
    return Do(
        lambda m, x: torch.cat([x, m.b(m.n2(m.a(m.n1(x)).relu()))], 1),
        n1=norm(d, x, c), a=conv(x, c, width), n2=norm(d, x, width), b=conv(x, width, grow, 3),
    )  # fmt: skip


@block("map")
def ghost(d: Draw, x: Tensor) -> Do:
    width = d.of(4, 3, 2)
    layer = conv(x, width, width, 3, groups=width)
    return Do(
        lambda m, x: torch.cat([y := m.main(x).relu(), m.cheap(y)], 1)[:, : m.outputs],
        main=conv(x, x.size(1), width), cheap=layer, outputs=2 * width - d.below(2),
    )  # fmt: skip


@block("map")
def self_concat(d: Draw, x: Tensor) -> Do:
    return Do(d.of(lambda m, x: torch.cat([x, x.relu()], 1), lambda m, x: torch.cat([x, -x], 1).relu()))


# -------------------------------------------------------------------------------------- slices, shuffles, padding


@block("map")
def slices(d: Draw, x: Tensor) -> Do:
    c = x.size(1)
    if c < 2:
        return Do(lambda m, x: x[:, :1])
    k = 1 + d.below(c - 1)
    function = d.of(
        lambda m, x: x[:, : m.k],
        lambda m, x: x[:, m.k :],
        lambda m, x: x[:, x.size(1) // 2 :],
        lambda m, x: x[:, : x.size(1) // 2],
        lambda m, x: x.narrow(1, 1, m.k),
        lambda m, x: torch.cat([x[:, m.k :], x[:, : m.k]], 1),
        lambda m, x: torch.cat(x.split([m.k, m.c - m.k], 1)[::-1], 1),
        lambda m, x: torch.cat(x.split([m.k, x.size(1) - m.k], 1)[::-1], 1),
        lambda m, x: x[:, ::2],
        lambda m, x: x[:, -m.k :],
        lambda m, x: x[:, 0].unsqueeze(1),
        lambda m, x: torch.cat([x[:, :1], x[:, m.k :] * 2], 1),
        lambda m, x: x.split(m.k, 1)[0],
        lambda m, x: torch.tensor_split(x, 2, 1)[1],
        lambda m, x: x.unbind(1)[m.k].unsqueeze(1) * x,
        lambda m, x: x[:, : m.k].sum(1, keepdim=True) + x[:, m.k :],
    )
    return Do(function, k=k, c=c)


@block("map")
def halves(d: Draw, x: Tensor) -> Do:
    """Equal parts of something whose width is even."""
    layer = conv(x, x.size(1), 2 * d.of(3, 2, 4), d.of(1, 3))
    function = d.of(
        lambda m, x: torch.mul(*m.conv(x).chunk(2, 1)),
        lambda m, x: torch.add(*m.conv(x).chunk(2, dim=1)),
        lambda m, x: torch.cat([(y := m.conv(x).chunk(2, 1))[0], y[1].relu() + y[0]], 1),
        lambda m, x: torch.cat(m.conv(x).chunk(2, 1)[::-1], 1),
        lambda m, x: torch.maximum(*m.conv(x).split(m.conv.out_channels // 2, 1)),
        lambda m, x: F.glu(m.conv(x), dim=1),
        lambda m, x: m.conv(x).unflatten(1, (2, -1)).amax(1),
        lambda m, x: m.conv(x).unflatten(1, (-1, 2)).amax(2),
        lambda m, x: m.conv(x).unflatten(1, (2, -1)).mean(1),
        lambda m, x: (y := m.conv(x))[:, ::2] + y[:, 1::2],
        lambda m, x: (y := m.conv(x).chunk(2, 1))[0] * torch.sigmoid(y[1]),
        lambda m, x: m.conv(x).unfold(1, 2, 2).amax(-1),
    )
    return Do(function, conv=layer)


@block("map")
def res2net(d: Draw, x: Tensor) -> Do:
    scale, width = d.of(2, 3), d.of(2, 3)

    def forward(m: Do, x: Tensor) -> Tensor:
        parts = m.enter(x).chunk(m.scale, 1)
        out = [parts[0]]
        for part, layer in zip(parts[1:], m.layers, strict=True):
            out.append(layer(part + out[-1]).relu())
        return torch.cat(out, 1)

    layers = nn.ModuleList(conv(x, width, width, 3) for _ in range(scale - 1))
    return Do(forward, scale=scale, enter=conv(x, x.size(1), scale * width), layers=layers)


@block("map")
def channel_shuffle(d: Draw, x: Tensor) -> Do:
    enter, c = divisible(d, x)
    groups = d.divisor(c)

    def by_shape(m: Do, x: Tensor) -> Tensor:
        n, c, *size = (x := m.enter(x)).shape
        return x.reshape(n, m.groups, c // m.groups, *size).transpose(1, 2).reshape(n, c, *size)

    def by_number(m: Do, x: Tensor) -> Tensor:
        n, _, *size = (x := m.enter(x)).shape
        return x.reshape(n, m.groups, m.inside, *size).transpose(1, 2).contiguous().view(n, m.groups * m.inside, *size)

    parts = {"enter": enter, "groups": groups, "inside": c // groups}
    return d.of(
        Do(by_shape, **parts), Do(by_number, **parts),
        Do(lambda m, x: m.shuffle(m.enter(x)), shuffle=nn.ChannelShuffle(groups), **parts),
        Do(lambda m, x: m.enter(x).unflatten(1, (-1, m.groups)).transpose(1, 2).flatten(1, 2), **parts),
    )  # fmt: skip


@block("map")
def shuffle_unit(d: Draw, x: Tensor) -> Do:
    c = x.size(1) // 2 * 2
    if c == 0:
        return Do(lambda m, x: x.relu())
    half = c // 2
    body = nn.Sequential(conv(x, half, half), nn.ReLU(), conv(x, half, half, 3, groups=half), nn.BatchNorm2d(half))
    body[-1] = norm(d, x, half)

    def forward(m: Do, x: Tensor) -> Tensor:
        a, b = x[:, : m.even].chunk(2, 1)
        y = torch.cat([a, m.body(b)], 1)
        return y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    return Do(forward, body=body, even=c)


@block("map")
def pixel_shuffle(d: Draw, x: Tensor) -> Do:
    if space(x) != 2:
        return Do(lambda m, x: m.conv(x).unflatten(1, (-1, 2)).movedim(2, 3).flatten(2, 3), conv=conv(x, x.size(1), 6))
    if all(s % 2 == 0 for s in x.shape[2:]) and d.of(False, True, True):
        return Do(lambda m, x: m.conv(F.pixel_unshuffle(x, 2)), conv=conv(x, 4 * x.size(1), d.width()))
    layer = conv(x, x.size(1), 4 * d.of(2, 3))
    return d.of(
        Do(lambda m, x: m.shuffle(m.conv(x)), shuffle=nn.PixelShuffle(2), conv=layer),
        Do(lambda m, x: m.conv(F.pixel_unshuffle(F.pixel_shuffle(m.conv(x), 2), 2)), conv=conv(x, 4, 4))
        if x.size(1) == 4
        else Do(lambda m, x: F.max_pool2d(F.pixel_shuffle(m.conv(x), 2), 2), conv=layer),
    )


@block("map")
def pad(d: Draw, x: Tensor) -> Do:
    s = space(x)
    return d.of(
        Do(lambda m, x: F.pad(x, (1, 0) * s)),
        Do(lambda m, x: F.pad(x, (1, 1) * s, value=1.0)),
        Do(lambda m, x: F.pad(x, (0, 0) * s + (1, 2))),
        Do(lambda m, x: F.pad(x, (0, 0) * s + (0, 1), value=0.5)),
        Do(lambda m, x: F.pad(x, (0, 1) * s, mode="replicate")),
        Do(lambda m, x: torch.cat([x, x.new_zeros(x.size(0), 2, *x.shape[2:])], 1)),
        Do(lambda m, x: torch.cat([torch.ones_like(x[:, :1]), x], 1)),
        Do(lambda m, x: F.pad(x, (0, 0) * s + (0, -1)) if x.size(1) > 1 else x),
    )


@block("map")
def repeats(d: Draw, x: Tensor) -> Do:
    return Do(
        d.of(
            lambda m, x: x.repeat(1, 2, *ones(x)),
            lambda m, x: x.repeat_interleave(2, 1),
            lambda m, x: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]).flatten(1, 2),
            lambda m, x: x.unsqueeze(2).expand(x.size(0), x.size(1), 2, *x.shape[2:]).flatten(1, 2),
            lambda m, x: torch.cat([x] * 2, 1),
            lambda m, x: torch.stack([x, x.tanh()], 2).flatten(1, 2),
        )
    )


@block("map")
def in_place(d: Draw, x: Tensor) -> Do:
    c = x.size(1)
    k = 1 + d.below(c)

    def part_plus(m: Do, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[:, : m.k] += m.part(x)
        return y

    def placed(m: Do, x: Tensor) -> Tensor:
        y = x.new_zeros(x.size(0), x.size(1) + 1, *x.shape[2:])
        y[:, : x.size(1)] = m.conv(x)
        return y

    def doubled(m: Do, x: Tensor) -> Tensor:
        y = m.conv(x)
        y.mul_(2).add_(x)
        return y.relu_()

    def shifted(m: Do, x: Tensor) -> Tensor:
        y = m.conv(x)
        y += 1
        return y.clamp_(-3, 3)

    def through_view(m: Do, x: Tensor) -> Tensor:
        y = m.conv(x)
        y.flatten(2).relu_()
        return y

    def filled(m: Do, x: Tensor) -> Tensor:
        y = m.conv(x).clone()
        y[:, m.k - 1] = 0.5
        return y

    def shift_of_channels(m: Do, x: Tensor) -> Tensor:  # temporal shift of TSM, along the first spatial dim
        y = torch.zeros_like(x)
        y[:, : m.k, 1:] = x[:, : m.k, :-1]
        y[:, m.k :] = x[:, m.k :]
        return y

    function = d.of(part_plus, placed, doubled, shifted, through_view, filled, shift_of_channels)
    return Do(function, conv=conv(x, c, c), part=conv(x, c, k), k=k)
