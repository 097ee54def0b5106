"""Vision transformers as people write them by hand: with einops, nn.MultiheadAttention, nn.TransformerEncoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import secateur as sc

D, HEADS = 24, 4
Attention = Callable[[], nn.Module]


class Einops(nn.Module):
    """``qkv`` in one, heads by ``rearrange``; the scale is remembered."""

    def __init__(self, size: int = 6):
        super().__init__()
        self.heads, self.scale = HEADS, size**-0.5
        self.qkv, self.out = nn.Linear(D, 3 * HEADS * size, bias=False), nn.Linear(HEADS * size, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.out(rearrange(weights @ v, "b h n d -> b n (h d)"))


class Einsum(nn.Module):
    """Separate projections, ``einsum``, a learnt bias for each head and a logit scale."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.bias, self.scale = nn.Parameter(torch.randn(HEADS, 17, 17)), nn.Parameter(torch.randn(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(f(x), "b n (h d) -> b h n d", d=D // HEADS) for f in (self.q, self.k, self.v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale.exp() + self.bias
        return self.out(rearrange(torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v), "b h n d -> b n (h d)"))


class Timm(nn.Module):
    """``(3, heads, size)`` in one view, and the fused kernel."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm, self.k_norm = nn.LayerNorm(D // HEADS), nn.LayerNorm(D // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))


class Module(nn.Module):
    """PyTorch's own, with the weights that nobody looks at."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.turn = not batch_first
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turn else x
        x = self.attention(x, x, x)[0]
        return x.transpose(0, 1) if self.turn else x


class Block(nn.Module):
    def __init__(self, attention: Attention):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(D), nn.LayerNorm(D), attention()
        self.mlp = nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    def __init__(self, blocks: nn.Module):
        super().__init__()
        self.patches = nn.Sequential(Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4), nn.LayerNorm(48),
                                     nn.Linear(48, D))  # fmt: skip
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 17, D))
        self.blocks, self.head = blocks, nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = torch.cat([repeat(self.token, "1 1 d -> b 1 d", b=len(x)), x], 1) + self.positions
        return self.head(self.blocks(x)[:, 0])


class Decoder(nn.Module):
    """Learnt queries that look at the patches."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(D, HEADS, 32, 0.0, batch_first=True)
        self.queries, self.layers = nn.Parameter(torch.randn(3, D)), nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.queries.expand(len(x), -1, -1), x)


def stack(attention: Attention) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(Block(attention), Block(attention))


def encoder(**options: object) -> Callable[[], nn.Module]:
    layer = nn.TransformerEncoderLayer(D, HEADS, 32, 0.0, batch_first=True, **options)
    return lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "einops": stack(Einops), "einsum": stack(Einsum), "timm": stack(Timm),
    "nn.MultiheadAttention": stack(lambda: Module(batch_first=True)),
    "nn.MultiheadAttention, sequence first": stack(lambda: Module(batch_first=False)),
    "nn.TransformerEncoder": encoder(),
    "nn.TransformerEncoder, norm first": encoder(norm_first=True, activation="gelu"),
    "nn.TransformerDecoder": Decoder,
}  # fmt: skip
X = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=BLOCKS)
def network(request):
    torch.manual_seed(0)
    model = Network(BLOCKS[request.param]()).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model, sc.trace(model, X)


def test_half_of_everything_goes_exactly(network):
    model, graph = network
    heads = [g for g in graph.groups if len(g) == HEADS]
    assert len(heads) >= 2 and all(g.exact for g in graph.groups)
    plan = sc.make_plan(graph, {g.name: list(range(0, len(g), 2)) for g in graph.groups})
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, X) < 1e-10
    second = sc.trace(small, X)
    more = sc.make_plan(second, {g.name: [0] for g in second.groups if len(g) > g.least})
    assert more.removed and sc.check(small, sc.cut(small, more), more, X) < 1e-10


def test_little_must_stay(network):
    _, graph = network
    for unit in ("macs", "params"):
        least, most = graph.feasible()[unit]
        assert least / most < 0.13  # of the smallest: a head's table of 17 x 17 places is much of it


def test_training_goes_on_as_in_the_masked_network(network):
    model, graph = network
    plan = sc.make_plan(graph, {g.name: [0] for g in graph.groups})
    small, whole = sc.cut(model, plan).train(), sc.masked(model, plan).train()
    a, b = small(X), whole(X)
    assert torch.allclose(a, b, atol=1e-10, rtol=0)
    a.square().sum().backward()
    b.square().sum().backward()
    name, weight = "head.1.weight", small.head[1].weight
    gone = plan.slices[name][1]
    kept = [i for i in range(D) if i not in gone]
    assert torch.allclose(weight.grad, whole.head[1].weight.grad[:, kept], atol=1e-10, rtol=0)
