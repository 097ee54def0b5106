"""Blocks on token sequences [n, tokens, c] and on vectors [n, c], and the ways between them and maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import CONV, Do, Draw, activation, block, conv

# ---------------------------------------------------------------------------------------------------- sequences


@block("seq")
def token_linear(d: Draw, x: Tensor) -> Do:
    act = d.of(nn.GELU(), nn.ReLU(), nn.Sigmoid(), nn.Identity())
    return Do(lambda m, x: m.act(m.linear(x)), linear=nn.Linear(x.size(-1), d.width(), bias=not d.flag()), act=act)


def _norm(d: Draw, width: int) -> nn.Module:
    return d.of(nn.LayerNorm(width), nn.LayerNorm(width, elementwise_affine=False), nn.RMSNorm(width, eps=1e-3))


@block("seq")
def token_norm(d: Draw, x: Tensor) -> Do:
    c = x.size(-1)
    if d.flag():
        return Do(
            lambda m, x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-2).rsqrt() * m.weight,
            weight=nn.Parameter(torch.empty(c)),
        )
    return Do(lambda m, x: m.norm(x), norm=_norm(d, c))


@block("seq")
def token_batch_norm(d: Draw, x: Tensor) -> Do:
    layer = nn.BatchNorm1d(x.size(-1))
    return Do(lambda m, x: m.norm(x.transpose(1, 2)).transpose(1, 2), norm=layer)


@block("seq")
def feed_forward(d: Draw, x: Tensor) -> Do:
    c, width = x.size(-1), d.width()
    return Do(
        lambda m, x: x + m.down(m.act(m.up(m.norm(x)))),
        norm=_norm(d, c), up=nn.Linear(c, width), act=d.of(nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Softplus()),
        down=nn.Linear(width, c),
    )  # fmt: skip


@block("seq")
def gated_feed_forward(d: Draw, x: Tensor) -> Do:
    c, width = x.size(-1), d.width()
    if d.flag():
        both = nn.Linear(c, 2 * width)
        gate = d.of(F.glu, lambda y: y.chunk(2, -1)[0] * F.gelu(y.chunk(2, dim=-1)[1]))
        return Do(lambda m, x: x + m.down(m.glu(m.both(x))), glu=gate, both=both, down=nn.Linear(width, c))
    return Do(
        lambda m, x: x + m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(c, width), up=nn.Linear(c, width, bias=False), down=nn.Linear(width, c),
    )  # fmt: skip


@block("seq")
def token_mixer(d: Draw, x: Tensor) -> Do:
    tokens, width = x.size(1), d.width()
    return Do(
        lambda m, x: x + m.b(F.gelu(m.a(m.norm(x).transpose(1, 2)))).transpose(1, 2),
        norm=_norm(d, x.size(-1)), a=nn.Linear(tokens, width), b=nn.Linear(width, tokens),
    )  # fmt: skip


@block("seq")
def positions(d: Draw, x: Tensor) -> Do:
    return d.of(
        Do(lambda m, x: x + m.position, position=nn.Parameter(torch.empty(1, *x.shape[1:]))),
        Do(
            lambda m, x: x + m.position[:, : x.size(1)], position=nn.Parameter(torch.empty(1, x.size(1) + 2, x.size(2)))
        ),
        Do(
            lambda m, x: x + m.position(torch.arange(x.size(1))),
            position=nn.Embedding(x.size(1), x.size(2)),
        ),
        Do(lambda m, x: x + m.position, position=nn.Buffer(torch.full((1, *x.shape[1:]), 0.5))),
    )


@block("seq")
def class_token(d: Draw, x: Tensor) -> Do:
    return Do(
        lambda m, x: torch.cat([m.token.expand(x.size(0), -1, -1), x], 1),
        token=nn.Parameter(torch.empty(1, 1, x.size(2))),
    )


@block("seq")
def attention(d: Draw, x: Tensor) -> Do:
    c, heads, depth = x.size(-1), d.of(1, 2), d.of(2, 3)
    width = heads * depth

    def by_hand(m: Do, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, heads, -1).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        return x + m.out(y.transpose(1, 2).reshape(n, t, -1))

    def scaled(m: Do, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, m.heads, m.depth).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return x + m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def packed(m: Do, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = m.qkv(x).view(n, t, 3, m.heads, m.depth).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) / m.depth**0.5).softmax(-1) @ v
        return x + m.out(y.transpose(1, 2).reshape(n, t, m.heads * m.depth))

    def single(m: Do, x: Tensor) -> Tensor:
        weights = (m.q(x) @ m.k(x).transpose(1, 2) / m.q(x).size(-1) ** 0.5).softmax(-1)
        return x + m.out(weights @ m.v(x))

    function = d.of(by_hand, scaled, packed, single)
    parts = {name: nn.Linear(c, width) for name in "qkv"}
    if function is packed:
        parts = {"qkv": nn.Linear(c, 3 * width)}
    return Do(function, heads=heads, depth=depth, out=nn.Linear(width, c), **parts)


@block("seq")
def attention_module(d: Draw, x: Tensor) -> Do:
    c = x.size(-1)
    heads = 2 if c % 2 == 0 else 1
    if d.flag():
        layer = nn.TransformerEncoderLayer(c, heads, d.width(), dropout=0.0, batch_first=True, norm_first=d.flag())
        return Do(lambda m, x: m.layer(x), layer=layer)
    return Do(lambda m, x: x + m.mha(x, x, x)[0], mha=nn.MultiheadAttention(c, heads, batch_first=True))


@block("seq")
def recurrent(d: Draw, x: Tensor) -> Do:
    make = d.of(nn.GRU, nn.LSTM, nn.RNN)
    return Do(lambda m, x: m.rnn(x)[0], rnn=make(x.size(-1), d.of(3, 2), batch_first=True))


@block("seq")
def token_conv(d: Draw, x: Tensor) -> Do:
    layer = CONV[0](x.size(-1), d.width(), 3, padding=1)
    return Do(lambda m, x: m.conv(x.transpose(1, 2)).relu().transpose(1, 2), conv=layer)


@block("seq")
def token_merge(d: Draw, x: Tensor) -> Do:
    if x.size(1) % 2:
        return Do(lambda m, x: m.linear(x.flip(1)), linear=nn.Linear(x.size(-1), d.width()))
    layer = nn.Linear(2 * x.size(-1), d.width(), bias=False)
    return d.of(
        Do(lambda m, x: m.linear(torch.cat([x[:, 0::2], x[:, 1::2]], -1)), linear=layer),
        Do(lambda m, x: m.linear(x.reshape(x.size(0), x.size(1) // 2, -1)), linear=layer),
    )


@block("seq")
def token_scale(d: Draw, x: Tensor) -> Do:
    layer = nn.Linear(x.size(-1), x.size(-1))
    return Do(lambda m, x: x + m.scale * m.linear(x), scale=nn.Parameter(torch.empty(x.size(-1))), linear=layer)


@block("seq")
def add_tokens(d: Draw, x: Tensor) -> Do:
    y = d.other("seq", lambda y: y.shape == x.shape)
    if y is None:
        return Do(lambda m, x: x + x.mean(1, keepdim=True))
    return d.of(
        Do(lambda m, x, y: x + y), Do(lambda m, x, y: torch.cat([x, y], -1)), Do(lambda m, x, y: x * y.sigmoid())
    )


@block("seq")
def odd_tokens(d: Draw, x: Tensor) -> Do:
    c = x.size(-1)
    return d.of(
        Do(lambda m, x: x.softmax(-1)),
        Do(lambda m, x: x.cumsum(1)),
        Do(
            lambda m, x: torch.einsum("ntc,oc->nto", x.repeat(1, 1, 2), m.weight),
            weight=nn.Parameter(torch.empty(3, 2 * c)),
        ),
        Do(lambda m, x: x @ x.transpose(1, 2) @ x),
        Do(lambda m, x: x - x.mean(-1, keepdim=True)),
        Do(lambda m, x: x.roll(1, -1)),
        Do(lambda m, x: torch.cdist(x, x)),
        Do(lambda m, x: F.cosine_similarity(x.unsqueeze(1), x.unsqueeze(2), dim=-1, eps=1e-2)),
        Do(lambda m, x: x[..., : (x.size(-1) + 1) // 2]),
    )


# ------------------------------------------------------------------------------------------------------ vectors


@block("vec")
def linear(d: Draw, x: Tensor) -> Do:
    layer = nn.Linear(x.size(-1), width := d.width(), bias=not d.of(False, True))
    return Do(lambda m, x: m.act(m.linear(x)), linear=layer, act=activation(d, width))


@block("vec")
def perceptron(d: Draw, x: Tensor) -> Do:
    width, out = d.width(), d.width()
    middle = d.of(nn.BatchNorm1d(width), nn.LayerNorm(width), nn.Identity(), nn.Dropout(0.2))
    layers = [nn.Linear(x.size(-1), width), middle, activation(d, width), nn.Linear(width, out)]
    return Do(lambda m, x: m.layers(x), layers=nn.Sequential(*layers))


@block("vec")
def batch_norm_vector(d: Draw, x: Tensor) -> Do:
    layer = nn.BatchNorm1d(x.size(-1), affine=not d.flag(), track_running_stats=not d.flag())
    return Do(lambda m, x: m.norm(x), norm=layer)


@block("vec")
def residual_vector(d: Draw, x: Tensor) -> Do:
    c, width = x.size(-1), d.width()
    return Do(
        lambda m, x: x + m.b(m.act(m.a(x))), a=nn.Linear(c, width), act=activation(d, width), b=nn.Linear(width, c)
    )


@block("vec")
def functional_linear(d: Draw, x: Tensor) -> Do:
    weight, bias = nn.Parameter(torch.empty(d.width(), x.size(-1))), nn.Parameter(torch.empty(1))
    return d.of(
        Do(lambda m, x: F.linear(x, m.weight).relu(), weight=weight),
        Do(lambda m, x: x @ m.weight.t() + m.bias, weight=weight, bias=bias),
        Do(lambda m, x: torch.relu(torch.mm(x, m.weight.T * m.bias)), weight=weight, bias=bias),
        Do(lambda m, x: F.linear(x, F.normalize(m.weight, dim=1, eps=1e-2)), weight=weight),
        Do(lambda m, x: F.linear(x, m.weight.tanh()), weight=weight),
    )


@block("vec")
def autoencoder(d: Draw, x: Tensor) -> Do:
    weight = nn.Parameter(torch.empty(d.width(), x.size(-1)))
    return Do(lambda m, x: F.linear(F.relu(F.linear(x, m.weight)), m.weight.t()), weight=weight)


@block("vec")
def tied_linear(d: Draw, x: Tensor) -> Do:
    enter, layer = nn.Linear(x.size(-1), width := d.width()), nn.Linear(width, width)
    return Do(lambda m, x: m.layer(F.relu(m.layer(F.relu(m.enter(x))))), enter=enter, layer=layer)


@block("vec")
def experts(d: Draw, x: Tensor) -> Do:
    c, out = x.size(-1), d.width()

    def forward(m: Do, x: Tensor) -> Tensor:
        gate = m.gate(x).softmax(-1)
        return gate[:, :1] * m.a(x) + gate[:, 1:] * m.b(x)

    return Do(forward, gate=nn.Linear(c, 2), a=nn.Linear(c, out), b=nn.Linear(c, out))


@block("vec")
def bilinear(d: Draw, x: Tensor) -> Do:
    y = d.other("vec")
    out = d.of(3, 2)
    if y is None:
        return Do(lambda m, x: (x.unsqueeze(2) * m.a(x).unsqueeze(1)).flatten(1), a=nn.Linear(x.size(-1), out))
    return d.of(
        Do(lambda m, x, y: m.both(x, y), both=nn.Bilinear(x.size(-1), y.size(-1), out)),
        Do(lambda m, x, y: m.a(x) * m.b(y), a=nn.Linear(x.size(-1), out), b=nn.Linear(y.size(-1), out)),
        Do(lambda m, x, y: torch.cat([x, y], 1)),
        Do(
            lambda m, x, y: (m.a(x) * m.b(y)).sum(1, keepdim=True),
            a=nn.Linear(x.size(-1), out),
            b=nn.Linear(y.size(-1), out),
        ),
    )


@block("vec")
def slices_of_vector(d: Draw, x: Tensor) -> Do:
    c = x.size(-1)
    layer = nn.Linear(c, 2 * d.of(3, 2, 4))
    return d.of(
        Do(lambda m, x: (y := m.linear(x))[:, ::2] * y[:, 1::2], linear=layer),
        Do(lambda m, x: F.glu(m.linear(x)), linear=layer),
        Do(lambda m, x: m.linear(x)[:, m.k :], linear=layer, k=d.of(1, 2)),
        Do(lambda m, x: m.linear(x).view(x.size(0), -1, 2).amax(-1), linear=layer),
        Do(
            lambda m, x: m.mu(x) + torch.exp(0.3 * m.linear(x).tanh()),
            mu=nn.Linear(c, layer.out_features),
            linear=layer,
        ),
        Do(lambda m, x: m.linear(x).unflatten(1, (m.heads, -1)).norm(dim=-1), linear=layer, heads=2),
    )


# ---------------------------------------------------------------------------------------------- from kind to kind


@block("map", "vec")
def map_to_vector(d: Draw, x: Tensor) -> Do:
    dims = tuple(range(2, x.ndim))
    adaptive = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[x.ndim - 3]
    averages = [
        Do(lambda m, x: x.flatten(2).mean(-1)),
        Do(lambda m, x: torch.flatten(m.pool(x, 1), 1), pool=adaptive),
        Do(lambda m, x: x.mean(dims)),
        Do(lambda m, x: x.flatten(2).amax(-1)),
        Do(lambda m, x: x.sum(dims)),
    ]
    if x[0].numel() > 64:
        return d.of(*averages)
    return d.of(
        *averages,
        Do(lambda m, x: x.flatten(1)),
        Do(lambda m, x: x.contiguous().view(x.size(0), -1)),
        Do(lambda m, x: x.movedim(1, -1).reshape(x.size(0), -1)),
    )


@block("map", "seq")
def map_to_sequence(d: Draw, x: Tensor) -> Do:
    return d.of(
        Do(lambda m, x: x.flatten(2).transpose(1, 2)),
        Do(lambda m, x: x.movedim(1, -1).reshape(x.size(0), -1, x.size(1))),
        Do(lambda m, x: x.flatten(2)),
        Do(lambda m, x: m.embed(x).flatten(2).mT, embed=conv(x, x.size(1), d.width())),
    )


@block("seq", "vec")
def sequence_to_vector(d: Draw, x: Tensor) -> Do:
    small = x[0].numel() <= 64
    return d.of(
        Do(lambda m, x: x.mean(1)),
        Do(lambda m, x: x[:, 0]),
        Do(lambda m, x: x.flatten(1) if small else x.sum(1)),
        Do(lambda m, x: x.amax(1)),
        Do(lambda m, x: (m.score(x).softmax(1) * x).sum(1), score=nn.Linear(x.size(-1), 1)),
        Do(lambda m, x: x[:, -1]),
    )


@block("seq", "map")
def sequence_to_map(d: Draw, x: Tensor) -> Do:
    t = x.size(1)
    if t % 2 == 0:
        return Do(lambda m, x: x.transpose(1, 2).unflatten(2, (2, t // 2)))
    return Do(lambda m, x: x.transpose(1, 2))


@block("vec", "map")
def vector_to_map(d: Draw, x: Tensor) -> Do:
    width = d.of(2, 3, 4)
    s = d.of(2, 1, 3)
    layer = nn.Linear(x.size(-1), width * 2**s)
    return d.of(
        Do(lambda m, x: m.linear(x).unflatten(1, (-1, *(2,) * s)), linear=layer),
        Do(lambda m, x: m.linear(x).view(-1, m.width, *(2,) * s).relu(), linear=layer, width=width),
        Do(lambda m, x: x.view(*x.shape, *(1,) * s).expand(-1, -1, *(2,) * s)),
    )


@block("vec", "seq")
def vector_to_sequence(d: Draw, x: Tensor) -> Do:
    width = d.of(3, 2, 4)
    return d.of(
        Do(lambda m, x: m.linear(x).unflatten(1, (2, -1)), linear=nn.Linear(x.size(-1), 2 * width)),
        Do(lambda m, x: x.unsqueeze(1).expand(-1, 3, -1)),
        Do(lambda m, x: m.linear(x).view(x.size(0), -1, m.width), linear=nn.Linear(x.size(-1), 3 * width), width=width),
    )


# ------------------------------------------------------------------------------------------------------ entrances


@block("tokens", "seq")
def embedding(d: Draw, x: Tensor) -> Do:
    table = nn.Embedding(7, d.width())
    return d.of(
        Do(lambda m, x: m.table(x), table=table),
        Do(
            lambda m, x: m.table(x) + m.position,
            table=table,
            position=nn.Parameter(torch.empty(x.size(1), table.embedding_dim)),
        ),
        Do(lambda m, x: (h := m.table(x)) + torch.tanh(h @ m.table.weight.t()) @ m.table.weight, table=table),
        Do(lambda m, x: F.embedding(x, m.weight * 2), weight=nn.Parameter(torch.empty(7, d.width()))),
        Do(lambda m, x: F.one_hot(x, 7).to(m.weight) @ m.weight, weight=nn.Parameter(torch.empty(7, d.width()))),
    )
