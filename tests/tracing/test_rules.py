"""Operations one by one, between two layers: what passes is cut exactly, what does not is frozen, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import secateur as sc
from secateur._internal.errors import NothingToPrune

Map = Callable[[Tensor], Tensor]


def windows(x: Tensor) -> Tensor:
    columns = F.unfold(x, 3, padding=1, stride=3)
    return F.fold(columns * 2, x.shape[-2:], 3, padding=1, stride=3)


def pooled_and_back(x: Tensor) -> Tensor:
    small, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(small, places, 2)


def sampled(x: Tensor) -> Tensor:
    grid = torch.linspace(-1, 1, 6, dtype=x.dtype)
    return F.grid_sample(x, torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).expand(len(x), -1, -1, -1),
                         align_corners=False)  # fmt: skip


def masked_positions(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[0], x.shape[2], x.shape[3], dtype=torch.bool)
    mask[0, 1:3] = False
    y = torch.zeros_like(x.movedim(1, -1))
    y[mask] = x.movedim(1, -1)[mask] * 2
    return y.movedim(-1, 1)


PASSES: dict[str, Map] = {
    "lerp": lambda x: torch.lerp(x, x.abs(), 0.3), "addcmul": lambda x: torch.addcmul(x, x, x.sigmoid(), value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.exp() + 1), "rrelu": F.rrelu,
    "hypot": lambda x: torch.hypot(x, 2 * x), "copysign": lambda x: x * torch.copysign(x, x - 1),
    "sort of places": lambda x: x.sort(-1).values, "topk of places": lambda x: x.topk(3, -2).values.mean(-2, True) + x,
    "cumsum of places": lambda x: x.cumsum(-1), "cummax of places": lambda x: x.cummax(-1).values,
    "kthvalue of places": lambda x: x.kthvalue(2, -1, keepdim=True).values + x,
    "fold": windows, "unpooled": pooled_and_back, "grid_sample": sampled,
    "windows of a dim": lambda x: x.unfold(2, 2, 2).sum(-1).unfold(3, 2, 2).amax(-1),
    "frequencies": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]),
    "a turn": lambda x: x.rot90(1, (2, 3)), "half a turn": lambda x: torch.rot90(x, 2, (-2, -1)),
    "triangle of places": lambda x: x.tril() + x.triu(1), "diagonal": lambda x: x.diagonal(0, 2, 3)[..., None] + x,
    "normalised over channels": lambda x: F.normalize(x, dim=1), "norm 3": lambda x: x / (1 + x.norm(3, 1, True)),
    "nansum": lambda x: x * (1 + x.nansum((2, 3), keepdim=True)),
    "index_fill": lambda x: x.index_fill(2, torch.tensor([1]), 0),
    "index_copy": lambda x: x.index_copy(3, torch.tensor([0, 2]), x[..., :2] * 3),
    "mask of several dims": masked_positions,
    "complex numbers": lambda x: torch.view_as_real(torch.view_as_complex(torch.stack([x, x * 2], -1)) ** 1).sum(-1),
    "polar": lambda x: torch.polar(x.abs(), x).abs(),
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([0.0, 1.0]).to(x)),
    "the shape of a slice": lambda x: x + torch.zeros_like(x[:, :1]).expand_as(x),
}  # fmt: skip

FREEZES: dict[str, tuple[Map, str]] = {
    "sort of channels": (lambda x: x.sort(1).values, "is put in order"),
    "cumsum of channels": (lambda x: x.cumsum(1), "is put in order"),
    "frequencies of channels": (lambda x: torch.fft.fft(x, dim=1).abs(), "is transformed to frequencies"),
    "windows of channels": (lambda x: x.unfold(1, 2, 2).sum(-1).repeat(1, 2, 1, 1), "is seen in windows"),
    "diagonal of channels": (lambda x: x + x.diagonal(0, 1, 2).mean((1, 2), True)[..., None], "on a diagonal"),
    "renormalised": (lambda x: x.renorm(2, 1, 1.0), "no rule knows the operation renorm"),
}


class Between(nn.Module):
    def __init__(self, function: Map, width: int = 8):
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, width, 1), nn.Conv2d(width, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:.*ComplexHalf")
@pytest.mark.parametrize("name", PASSES)
def test_channels_pass(name: str):
    torch.manual_seed(0)
    model = Between(PASSES[name]).double().eval()
    graph = sc.trace(model, X)
    assert [(len(g), g.exact) for g in graph.groups] == [(8, True)], graph.summary()
    for gone in ([0, 5], [1, 2, 3, 7], list(range(8 - graph.groups[0].least))):
        plan = sc.make_plan(graph, {"a": gone})
        assert sc.check(model, sc.cut(model, plan), plan, X) < 1e-12


@pytest.mark.parametrize("name", FREEZES)
def test_channels_stay_and_the_reason_is_told(name: str):
    function, words = FREEZES[name]
    with pytest.raises(NothingToPrune, match=words):
        sc.trace(Between(function).double().eval(), X)


class Standardised(nn.Module):
    """A weight minus its mean, over its standard deviation, through a batch norm of the weight seen as a row."""

    def forward(self, weight: Tensor) -> Tensor:
        rows = F.batch_norm(weight.reshape(1, len(weight), -1), None, None, training=True, momentum=0.0)
        return rows.reshape_as(weight)


def test_standardised_weights():
    model = Between(torch.relu)
    register_parametrization(model.b, "weight", Standardised())
    exact = {g.name: (g.exact, g.reason) for g in sc.trace(model.double(), X).groups}
    assert exact == {"a": (False, "batch norm takes its statistics over it")}
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
    register_parametrization(model[0], "weight", Standardised())
    graph = sc.trace(model, X)
    plan = sc.make_plan(graph, {g.name: [0, 3] for g in graph.groups})
    assert len(plan) == 2 and sc.check(model, sc.cut(model, plan), plan, X) < 1e-12


class Table(nn.Module):
    def __init__(self, bag: bool):
        super().__init__()
        self.table = nn.EmbeddingBag(20, 8, mode="mean") if bag else nn.Embedding(20, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.relu(self.table(ids)))


@pytest.mark.parametrize("bag", [True, False])
def test_tables(bag: bool):
    model, ids = Table(bag).double(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    plan = sc.make_plan(sc.trace(model, ids), {"table": [0, 3]})
    small = sc.cut(model, plan)
    assert small.table.embedding_dim == 6 and sc.check(model, small, plan, ids) < 1e-12


class Prototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.points, self.out = nn.Linear(5, 8), nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.exp(-torch.cdist(self.a(x), self.points)))


def test_distances():
    model, x = Prototypes().double(), torch.randn(4, 5, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = sc.make_plan(graph, {"a": [0, 3]})
    assert sc.check(model, sc.cut(model, plan), plan, x) < 1e-12
    assert not next(g for g in graph.groups if g.name == "points").exact  # the distance of nothing is not nothing
