"""Blocks on maps [n, c, *space]: convolutions, norms, gates and pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import (
    CONV_TRANSPOSE,
    F_CONV,
    F_CONV_TRANSPOSE,
    Do,
    Draw,
    activation,
    block,
    conv,
    divisible,
    norm,
    ones,
    space,
)

DROPOUT = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

# ------------------------------------------------------------------------------------------------- convolutions


def _options(d: Draw, x: Tensor) -> dict[str, object]:
    """Stride, dilation, padding mode and bias, whatever the map is large enough for."""
    large = min(x.shape[2:]) >= 4
    options: dict[str, object] = {"bias": not d.of(False, True), "stride": 2 if large and d.below(4) == 1 else 1}
    if large and d.below(6) == 1:
        options["dilation"] = 2
    elif large and d.below(6) == 1:
        options["padding_mode"] = d.of("reflect", "circular", "replicate")
    return options


@block("map")
def conv_norm_act(d: Draw, x: Tensor) -> Do:
    width = d.width()
    layer = conv(x, x.size(1), width, d.of(3, 1), **_options(d, x))
    return Do(
        lambda m, x: m.act(m.norm(m.conv(x))),
        conv=layer,
        norm=norm(d, layer.double()(x), width),
        act=activation(d, width),
    )


@block("map")
def convolution(d: Draw, x: Tensor) -> Do:
    return Do(lambda m, x: m.conv(x), conv=conv(x, x.size(1), d.width(), d.of(1, 3), **_options(d, x)))


@block("map")
def grouped_conv(d: Draw, x: Tensor) -> Do:
    enter, c = divisible(d, x)
    groups = d.divisor(c)
    layer = conv(x, c, groups * d.of(2, 1, 3), d.of(1, 3), groups=groups, **_options(d, x))
    return Do(lambda m, x: m.act(m.conv(m.enter(x))), enter=enter, conv=layer, act=activation(d, layer.out_channels))


@block("map")
def depthwise_conv(d: Draw, x: Tensor) -> Do:
    c = x.size(1)
    layer = conv(x, c, c * d.of(1, 1, 2, 3), 3, groups=c, **_options(d, x))
    return Do(lambda m, x: m.act(m.conv(x)), conv=layer, act=activation(d, layer.out_channels))


@block("map")
def transposed_conv(d: Draw, x: Tensor) -> Do:
    c = x.size(1)
    groups = d.of(1, d.divisor(c), c)
    stride = 2 if max(x.shape[2:]) < 4 and d.flag() else 1
    layer = CONV_TRANSPOSE[space(x) - 1](
        c, groups * d.of(2, 1, 3), stride + 1, stride, padding=d.below(2) * (stride - 1), groups=groups, bias=d.flag()
    )
    return Do(lambda m, x: m.act(m.conv(x)), conv=layer, act=activation(d, layer.out_channels))


@block("map")
def functional_conv(d: Draw, x: Tensor) -> Do:
    out = d.width()
    weight, bias = nn.Parameter(torch.empty(out, x.size(1), *(3,) * space(x))), nn.Parameter(torch.empty(out))
    return Do(
        lambda m, x: m.conv(x, m.weight, m.bias, padding=1).relu(), conv=F_CONV[space(x) - 1], weight=weight, bias=bias
    )


@block("map")
def standardised_conv(d: Draw, x: Tensor) -> Do:
    def forward(m: Do, x: Tensor) -> Tensor:
        w = m.conv.weight
        dims = tuple(range(1, w.ndim))
        w = (w - w.mean(dims, keepdim=True)) / (w.var(dims, keepdim=True, unbiased=False) + 1e-3).sqrt()
        return m.function_of(x, w, m.conv.bias, padding=1).relu()

    return Do(forward, conv=conv(x, x.size(1), d.width(), 3), function_of=F_CONV[space(x) - 1])


@block("map")
def scaled_weight_conv(d: Draw, x: Tensor) -> Do:
    out, dims = d.width(), space(x)
    scale = d.of(
        nn.Parameter(torch.empty(out, 1, *(1,) * dims)),
        nn.Parameter(torch.empty(1, x.size(1), *(1,) * dims)),
        nn.Parameter(torch.empty(1)),
        nn.Buffer((torch.arange(out * x.size(1)).view(out, x.size(1), *(1,) * dims) % 3 > 0).double()),
    )
    layer = conv(x, x.size(1), out, 1, bias=d.flag())
    return Do(
        lambda m, x: m.function_of(x, m.conv.weight * m.scale, m.conv.bias),
        conv=layer, scale=scale, function_of=F_CONV[dims - 1],
    )  # fmt: skip


@block("map")
def tied_module(d: Draw, x: Tensor) -> Do:
    c = x.size(1)
    layer, act = conv(x, c, c, d.of(3, 1)), activation(d, c)
    return Do(lambda m, x: m.conv(m.act(m.conv(x))), conv=layer, act=act)


@block("map")
def tied_parameter(d: Draw, x: Tensor) -> Do:
    c, width = x.size(1), d.width()
    enter, first, second = conv(x, c, width), conv(x, width, width, 3), conv(x, width, width, 3)
    second.weight = first.weight
    return Do(lambda m, x: m.second(F.relu(m.first(m.enter(x)))), enter=enter, first=first, second=second)


@block("map")
def tied_transpose(d: Draw, x: Tensor) -> Do:
    layer = conv(x, x.size(1), d.width(), 3)
    up = F_CONV_TRANSPOSE[space(x) - 1]
    return Do(lambda m, x: m.up(F.relu(m.conv(x)), m.conv.weight, padding=1), conv=layer, up=up)


@block("map")
def inception(d: Draw, x: Tensor) -> Do:
    c = x.size(1)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[space(x) - 1]
    return Do(
        lambda m, x: torch.cat([m.one(x), m.two(F.relu(m.mid(x))), m.three(m.pool(x, 3, 1, 1))], 1),
        one=conv(x, c, d.width()), mid=conv(x, c, 4), two=conv(x, 4, d.width(), 3), three=conv(x, c, 2), pool=pool,
    )  # fmt: skip


@block("map")
def inverted_residual(d: Draw, x: Tensor) -> Do:
    c, width = x.size(1), x.size(1) * 2
    return Do(
        lambda m, x: x + m.project(m.act(m.norm(m.depth(m.act(m.expand(x)))))),
        expand=conv(x, c, width), depth=conv(x, width, width, 3, groups=width), norm=norm(d, x, width),
        project=conv(x, width, c, bias=False), act=d.of(nn.ReLU6(), nn.SiLU(), nn.Hardswish()),
    )  # fmt: skip


@block("map")
def unfolded_conv(d: Draw, x: Tensor) -> Do:
    out = d.width()
    if space(x) != 2:
        layer = nn.Linear(x.size(1), out)
        return Do(lambda m, x: m.linear(x.movedim(1, -1)).movedim(-1, 1), linear=layer)
    weight = nn.Parameter(torch.empty(out, x.size(1) * 9))
    return Do(lambda m, x: (m.weight @ F.unfold(x, 3, padding=1)).unflatten(2, x.shape[2:]).relu(), weight=weight)


# -------------------------------------------------------------------------------------------------------- norms


@block("map")
def normalise(d: Draw, x: Tensor) -> Do:
    return Do(lambda m, x: m.norm(x), norm=norm(d, x, x.size(1)))


@block("map")
def group_norm(d: Draw, x: Tensor) -> Do:
    enter, c = divisible(d, x)
    return Do(lambda m, x: m.norm(m.enter(x)), enter=enter, norm=nn.GroupNorm(d.divisor(c), c, affine=not d.flag()))


@block("map")
def layer_norm_of_map(d: Draw, x: Tensor) -> Do:
    layer = nn.LayerNorm(x.size(1), elementwise_affine=not d.flag())
    return Do(lambda m, x: m.norm(x.movedim(1, -1)).movedim(-1, 1), norm=layer)


@block("map")
def norm_by_hand(d: Draw, x: Tensor) -> Do:
    def forward(m: Do, x: Tensor) -> Tensor:
        y = (x - x.mean(m.dims, keepdim=True)) / (x.var(m.dims, keepdim=True, unbiased=False) + 1e-2).sqrt()
        return y * m.weight.view(1, -1, *ones(x)) + m.bias.view(1, -1, *ones(x))

    dims = d.of(1, tuple(range(2, x.ndim)), (0, *range(2, x.ndim)))
    c = x.size(1)
    return Do(forward, dims=dims, weight=nn.Parameter(torch.empty(c)), bias=nn.Parameter(torch.empty(c)))


@block("map")
def functional_batch_norm(d: Draw, x: Tensor) -> Do:
    c = x.size(1)
    return Do(
        lambda m, x: F.batch_norm(x, m.mean, m.running_var, m.weight, m.bias),
        mean=nn.Buffer(torch.empty(c)), running_var=nn.Buffer(torch.empty(c)),
        weight=None if d.flag() else nn.Parameter(torch.empty(c)),
        bias=None if d.flag() else nn.Parameter(torch.empty(c)),
    )  # fmt: skip


@block("map")
def act(d: Draw, x: Tensor) -> Do:
    return Do(lambda m, x: m.act(x), act=activation(d, x.size(1), fresh=False))


# ---------------------------------------------------------------------------------------------- gates and pooling


@block("map")
def squeeze_excite(d: Draw, x: Tensor) -> Do:
    c, width = x.size(1), d.of(2, 3, 4)
    if d.flag():

        def forward(m: Do, x: Tensor) -> Tensor:
            gate = m.gate(m.b(F.relu(m.a(x.flatten(2).mean(-1)))))
            return x * gate.view(*gate.shape, *ones(x))

        return Do(forward, a=nn.Linear(c, width), b=nn.Linear(width, c), gate=d.of(nn.Sigmoid(), nn.Hardsigmoid()))
    dims = tuple(range(2, x.ndim))
    return Do(
        lambda m, x: m.gate(m.b(F.silu(m.a(x.mean(dims, keepdim=True))))) * x,
        a=conv(x, c, width), b=conv(x, width, c), gate=d.of(nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh()),
    )  # fmt: skip


@block("map")
def channel_gate_1d(d: Draw, x: Tensor) -> Do:
    """ECA-Net's: a convolution along the channels, which therefore cannot move."""
    layer = nn.Conv1d(1, 1, 3, padding=1, bias=d.flag())
    return Do(
        lambda m, x: x * torch.sigmoid(m.conv(x.flatten(2).mean(-1).unsqueeze(1))).view(*x.shape[:2], *ones(x)),
        conv=layer,
    )


@block("map")
def spatial_attention(d: Draw, x: Tensor) -> Do:
    layer = conv(x, x.size(1), 1, d.of(1, 3))
    return d.of(
        Do(lambda m, x: x * torch.sigmoid(m.conv(x)), conv=layer),
        Do(lambda m, x: x * torch.sigmoid(m.conv(x)).expand_as(x), conv=layer),
        Do(
            lambda m, x: x * torch.sigmoid(m.conv(torch.cat([x.mean(1, True), x.amax(1, True)], 1))),
            conv=conv(x, 2, 1, 3),
        ),
        Do(lambda m, x: x + (x * m.conv(x).flatten(2).softmax(-1).view_as(m.conv(x))).sum((-1,), True), conv=layer),
    )


@block("map")
def non_local(d: Draw, x: Tensor) -> Do:
    c, width = x.size(1), d.of(3, 2, 4)

    def forward(m: Do, x: Tensor) -> Tensor:
        q, k, v = m.q(x).flatten(2), m.k(x).flatten(2), m.v(x).flatten(2)
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        return x + m.out((v @ weights.transpose(1, 2)).view(x.size(0), -1, *x.shape[2:]))

    return Do(forward, q=conv(x, c, width), k=conv(x, c, width), v=conv(x, c, 3), out=conv(x, 3, c))


@block("map")
def pool(d: Draw, x: Tensor) -> Do:
    s = space(x) - 1
    large = min(x.shape[2:]) >= 2
    functions = {
        "max": (F.max_pool1d, F.max_pool2d, F.max_pool3d)[s],
        "avg": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[s],
        "adaptive": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[s],
        "adaptive_max": (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[s],
    }
    kind = d.of(*functions)
    return Do(lambda m, x: m.pool(x, m.size), pool=functions[kind], size=2 if large or "ada" in kind else 1)


@block("map")
def upsample(d: Draw, x: Tensor) -> Do:
    if max(x.shape[2:]) > 4:
        return Do(lambda m, x: F.interpolate(x, size=(3,) * space(x)))
    smooth = ("linear", "bilinear", "trilinear")[space(x) - 1]
    return d.of(
        Do(lambda m, x: F.interpolate(x, scale_factor=2)),
        Do(lambda m, x: F.interpolate(x, scale_factor=2, mode=smooth, align_corners=False)),
    )


@block("map")
def dropout(d: Draw, x: Tensor) -> Do:
    return Do(lambda m, x: m.drop(x), drop=d.of(nn.Dropout(0.3), DROPOUT[space(x) - 1](0.3)))


@block("map")
def constants(d: Draw, x: Tensor) -> Do:
    shape = (x.size(1), *ones(x))
    values = torch.linspace(0.5, 1.5, x.size(1), dtype=torch.float64).view(shape)
    return d.of(
        Do(lambda m, x: x + 1),
        Do(lambda m, x: 2 * x),
        Do(lambda m, x: 1 - x),
        Do(lambda m, x: x * m.scale, scale=nn.Buffer(values)),
        Do(lambda m, x: (x - m.mean) / m.var, mean=nn.Buffer(values), var=nn.Buffer(values + 1)),
        Do(lambda m, x: x * m.hidden.to(x), hidden=values),
        Do(lambda m, x: x + m.hidden.to(x), hidden=values),
        Do(lambda m, x: x + torch.arange(x.size(1), dtype=x.dtype).view(-1, *ones(x))),
        Do(lambda m, x: x * torch.ones(x.size(1), dtype=x.dtype).view(-1, *ones(x))),
        Do(lambda m, x: x + m.bias, bias=nn.Parameter(torch.empty(shape))),
        Do(
            lambda m, x: x * m.scale + m.bias,
            scale=nn.Parameter(torch.empty(shape)),
            bias=nn.Parameter(torch.empty(shape)),
        ),
        Do(lambda m, x: x * x.size(1)),
        Do(lambda m, x: x / x.size(1) ** 0.5),
        Do(lambda m, x: x * m.scalar + m.scalar, scalar=nn.Parameter(torch.empty(()))),
        Do(lambda m, x: x.new_full((1,), 0.7) * x),
    )
