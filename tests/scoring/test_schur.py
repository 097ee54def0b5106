"""The predicted rise of the loss is the one that is measured after the readers have been fitted again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.workload import Workload
from secateur.curvature.kronecker import kronecker_factors
from secateur.curvature.readers import readers
from secateur.scoring.schur import Reader, Schur, eliminated, grown

DOUBLE = torch.float64


class Two(nn.Module):
    """Two layers read a group, with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 4, bias=False)

    def forward(self, x):
        x = self.stem(x).relu()
        return torch.cat([self.one(x), self.two(x)], 1)


class Map(nn.Module):
    """A grouped convolution reads a group, with kernels and a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2)

    def forward(self, x):
        return self.one(self.stem(x).relu())


class Flat(nn.Module):
    """A linear reads several places of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(2, 5, 3), nn.Linear(20, 3)

    def forward(self, x):
        return self.one(self.stem(x).relu().flatten(1))


class Up(nn.Module):
    """A transposed convolution reads a group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(2, 5, 3), nn.ConvTranspose2d(5, 3, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x):
        return self.one(self.stem(x).relu())


def of_unit_weights(layer, a):
    """What each weight of a transposed convolution adds to an output, [1, samples, inputs * taps]."""
    taps = layer.weight[0, 0].numel()
    units = torch.eye(layer.weight.shape[0] * taps, dtype=DOUBLE).reshape(-1, layer.weight.shape[0], 1, 3, 3)
    ways = [nn.functional.conv_transpose2d(a, u, None, layer.stride, layer.padding, 1) for u in units]
    return torch.stack([way.flatten() for way in ways], 1)[None]


CASES = {
    "two readers": (Two, (5,)),
    "a convolution": (Map, (2, 7, 7)),
    "flattened": (Flat, (2, 4, 4)),
    "transposed": (Up, (2, 5, 5)),
}


def case(name):
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = make().double().eval()
    x = torch.randn(60, *shape, dtype=DOUBLE)
    graph = sc.trace(model, x[:2])
    (group,) = [g for g in graph.groups if g.exact]
    return model, graph, group, x


def fitted(model, group, gone, x):
    """Half the mean squared error of the outputs, summed over them, once the readers are fitted to what stays."""
    inside = {}
    layers = [m for n, m in model.named_modules() if n in ("one", "two")]
    handles = [m.register_forward_hook(lambda m, a, y: inside.__setitem__(m, (a[0], y))) for m in layers]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    total = 0.0
    for layer in layers:
        a, y = inside[layer]
        if isinstance(layer, nn.ConvTranspose2d):
            columns, wanted, n = of_unit_weights(layer, a), y.transpose(0, 1).flatten(1).mT[None], len(a)
            block, units = 9, len(group)
        elif isinstance(layer, nn.Conv2d):
            columns = torch.nn.functional.unfold(a, 3, padding=1, stride=2)  # [n, channels * 9, places]
            n, _, places = columns.shape
            columns = columns.unflatten(1, (2, -1)).permute(1, 0, 3, 2).reshape(2, n * places, -1)
            wanted = y.flatten(2).unflatten(1, (2, -1)).permute(1, 0, 3, 2).reshape(2, n * places, -1)
            block, units = 9, columns.shape[-1] // 9
        else:
            columns, wanted, n = a[None], y[None], len(a)
            block, units = columns.shape[-1] // len(group), len(group)
        stay = [c * block + i for c in range(units) for i in range(block) if c not in gone]
        seen = columns[..., stay]
        if layer.bias is not None:
            seen = torch.cat([seen, torch.ones_like(columns[..., :1])], -1)
        left = wanted - seen @ torch.linalg.lstsq(seen, wanted).solution
        total += 0.5 * float(left.square().sum()) / n
    return total


@pytest.mark.parametrize("name", CASES)
def test_the_predicted_rise_is_the_measured_one_for_every_width(name):
    model, graph, group, x = case(name)
    reading = readers(model, graph)[0][group.name]
    factors = kronecker_factors(model, [x], "mse", form="full", fisher="exact", layers=list(reading))
    order, found = eliminated([Reader(factors[p], columns, 0.0) for p, columns in reading.items()], len(group))
    assert sorted(order) == list(range(len(group)))
    for number in range(1, len(group)):
        measured = fitted(model, group, order[:number], x)
        assert sum(found[:number]) == pytest.approx(measured, abs=1e-8, rel=1e-8)
    # each step is the best one, given those before
    for number in range(len(group)):
        others = [fitted(model, group, [*order[:number], c], x) for c in order[number:]]
        assert sum(found[: number + 1]) == pytest.approx(min(others), abs=1e-8, rel=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_channels_are_sorted_as_they_went(name):
    model, graph, group, x = case(name)
    scores = Schur(fisher="exact", damping=0.0, positions=None).scores(graph, Workload(model, [x], "mse"))[group.name]
    reading = readers(model, graph)[0][group.name]
    factors = kronecker_factors(model, [x], "mse", form="full", fisher="exact", layers=list(reading))
    order, found = eliminated([Reader(factors[p], columns, 0.0) for p, columns in reading.items()], len(group))
    assert scores.argsort().tolist() == order
    assert torch.allclose(scores[order].cumsum(0), torch.tensor(np.maximum.accumulate(found)).cumsum(0), rtol=1e-9)


def test_scores_are_as_large_as_the_largest_before():
    scores = grown([2, 0, 1], [1.0, 0.5, 2.0])
    assert scores[2] < scores[0] < scores[1]
    assert scores.tolist() == pytest.approx([1.0, 2.0, 1.0])


def test_the_distance_of_the_outputs_is_that_of_the_squared_error_and_needs_no_loss():
    model, graph, group, x = case("two readers")
    drawn = Schur(fisher="outputs", samples=200, damping=0.0, positions=None, seed=1)
    assert not drawn.needs.loss and Schur().needs.loss and Schur.needs.loss
    found = drawn.scores(graph, Workload(model, [x])).rises[group.name]
    exact = Schur(fisher="exact", damping=0.0, positions=None).scores(graph, Workload(model, [x], "mse"))
    ratio = found[1:] / exact.rises[group.name][1:]
    torch.testing.assert_close(ratio / ratio[-1], torch.ones(len(group), dtype=DOUBLE), rtol=0.15, atol=0)
