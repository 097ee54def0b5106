"""EigenDamage meets and uses a budget on ten networks, in parameters, in MACs and in both, as PyTorch counts them."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur._internal.workload import Workload
from secateur.allocation.rank_allocation import choice_of
from secateur.curvature.eigenbasis import sorted_by_damage
from secateur.lab.models.registry import build, example_input
from secateur.methods.eigendamage import EigenDamage


class Attention(nn.Module):
    """One block of a transformer, its projections plain linears."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x.mean(1))


def along_a_line():
    return nn.Sequential(
        nn.Conv1d(4, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 24, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 7, 4),
    )  # fmt: skip


def in_space():
    return nn.Sequential(
        nn.Conv3d(2, 12, 3, padding=1), nn.ReLU(), nn.Conv3d(12, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 8, 4)
    )


NETWORKS = {
    **{name: (lambda name=name: build(name), example_input(name)[1:]) for name in ("lenet_300_100", "lenet5")},
    "digits_cnn": (lambda: build("digits_cnn"), (1, 8, 8)),
    "resnet8": (lambda: build("resnet8"), (3, 16, 16)),
    "resnet20": (lambda: build("resnet20"), (3, 16, 16)),
    "vgg16_bn, an eighth as wide": (lambda: build("vgg16_bn", width=0.125), (3, 32, 32)),
    "wide resnet8": (lambda: build("resnet8", width=2), (3, 16, 16)),
    "attention": (Attention, (6, 16)),
    "1-D": (along_a_line, (4, 16)),
    "3-D": (in_space, (2, 4, 4, 4)),
}


def counts(model, x):
    """MACs and parameters, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


@cache
def measured(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(16, *shape)
    method, work = EigenDamage(), Workload(model, [x], "cross_entropy", inputs=x[:1])
    method.apply(model, x[:1], sc.Budget(params=0.99), work)  # measured once for all budgets
    candidates = method._begin(model, x[:1], sc.Budget(params=0.99))[0].candidates
    bases, _ = work.once(method._key(candidates), lambda: pytest.fail("it is measured again"))
    choices = [choice_of(c, sorted_by_damage(bases[c.name])) for c in candidates if c.name in bases]
    return model, x[:1], method, work, choices


@pytest.mark.parametrize("limits", [{"params": 0.4}, {"macs": 0.5}, {"params": 0.5, "macs": 0.6}], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_budget_is_met_and_used(name, limits):
    model, x, method, work, choices = measured(name)
    small = method.apply(model, x, sc.Budget(**{"round_to": 1} | limits), work).model
    full, now = (dict(zip(("macs", "params"), counts(m, x), strict=True)) for m in (model, small))
    room = {unit: int(fraction * full[unit] + 1e-9) - now[unit] for unit, fraction in limits.items()}
    assert all(left >= 0 for left in room.values())
    boxes = json.loads(sc.record(small)[-1]["eigendamage"])["layers"]
    assert boxes
    for choice in choices:
        if choice.name not in boxes:
            continue
        rows, columns = boxes[choice.name]
        larger = [None, (rows + 1, columns), (rows, columns + 1)]
        for more in larger:
            if more is None or all(n <= most for n, most in zip(more, choice.damage.shape, strict=True)):
                extra = {u: choice.costs(u, more) - choice.costs(u, (rows, columns)) for u in limits}
                assert any(extra[u] > room[u] for u in limits), f"{choice.name} could be {more or 'whole'}"
