"""A cut in the middle of training: what was sliced by hand goes on in the same way, bit for bit."""

from __future__ import annotations

import collections
import copy
import itertools
import types

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur as sc
from secateur.tracing.copying import within

BATCHES = [
    (torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, 4, (8,), generator=g))
    for g in [torch.Generator().manual_seed(0)]
    for _ in range(20)
]


class Net(nn.Module):
    """Convolutions with norms, a residual, attention: all that a state follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.inner, self.outer = nn.Conv2d(12, 20, 3, padding=1), nn.Conv2d(20, 12, 1)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 4)
        self.seen = [self.head.weight]

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = (x + self.outer(self.inner(x).relu())).flatten(2).mT
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}


class Loop:
    """A user's training loop: optimizer, schedule, scaler, average."""

    def __init__(self, model, optimizer, compiled=False):
        self.model, self.optimizer = model, OPTIMIZERS[optimizer](model.parameters())
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 0.02, total_steps=60, cycle_momentum=optimizer != "adagrad"
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=7)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
        self.run = torch.compile(model, backend="eager") if compiled else model

    def steps(self):
        for x, y in BATCHES:
            self.optimizer.zero_grad()
            self.scaler.scale(nn.functional.cross_entropy(self.run(x), y)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.average.update_parameters(self.model)

    def all(self):
        """Everything that a checkpoint would hold."""
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if not callable(v)},
            "scaler": self.scaler.state_dict(), "average": self.average.state_dict(),
        }  # fmt: skip


def plan_for(model):
    graph = sc.trace(model, BATCHES[0][0])
    scores = sc.score(model, graph, "magnitude")
    return sc.allocate(graph, scores, sc.Budget(params=0.5, round_to=1))


def by_hand(tensor, dims):
    """A tensor without some positions, in the plainest way."""
    for dim, gone in dims.items():
        kept = [i for i in range(tensor.shape[dim]) if i not in gone]
        tensor = torch.stack([tensor.select(dim, i) for i in kept], dim)
    return tensor


def sliced_loop(loop, plan, optimizer):
    """The loop of the cut model, made from sliced state by hand."""
    small = sc.cut(copy.deepcopy(loop.model), plan)
    own = Loop(small, optimizer)
    names = [name for name, _ in loop.model.named_parameters()]
    state = copy.deepcopy(loop.optimizer.state_dict())
    for number, name in enumerate(names):
        shape = loop.model.get_parameter(name).shape
        for key, value in state["state"][number].items():
            if isinstance(value, torch.Tensor) and value.shape == shape:
                state["state"][number][key] = by_hand(value, plan.slices.get(name, {}))
    own.optimizer.load_state_dict(state)
    own.scheduler.load_state_dict(loop.scheduler.state_dict())
    own.scaler.load_state_dict(loop.scaler.state_dict())
    average = loop.average.state_dict()
    sliced = {k: by_hand(v, plan.slices.get(k.removeprefix("module."), {})) for k, v in average.items()}
    own.average.load_state_dict(sliced)
    return own


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(("optimizer", "in_place"), list(itertools.product(OPTIMIZERS, [False, True])))
def test_training_goes_on_as_from_state_that_was_sliced_by_hand(optimizer, in_place):
    torch.manual_seed(0)
    loop = Loop(Net(), optimizer)
    loop.steps()
    plan = plan_for(loop.model)
    reference = sliced_loop(loop, plan, optimizer)
    whole = loop.model
    loop.model = loop.run = sc.cut(
        whole, plan, optimizer=loop.optimizer, averaged=loop.average, in_place=in_place
    )  # fmt: skip
    assert (loop.model is whole) == in_place
    assert same(loop.all(), reference.all())
    for one in (loop, reference):
        one.steps()
    assert same(loop.all(), reference.all())
    assert int(loop.average.n_averaged) == 40
    assert loop.scheduler.last_epoch == 40


def test_what_compiles_follows_a_cut_in_place():
    torch.manual_seed(0)
    loop, plain = Loop(Net(), "sgd", compiled=True), None
    loop.steps()
    plan = plan_for(loop.model)
    plain = sliced_loop(loop, plan, "sgd")
    sc.cut(loop.model, plan, optimizer=loop.optimizer, averaged=loop.average, in_place=True)
    for one in (loop, plain):
        one.steps()
    assert same(loop.all(), plain.all())


def test_in_place_every_module_stays_the_object_that_it_is():
    torch.manual_seed(0)
    model = Net().eval()
    modules, calls = dict(model.named_modules()), []
    model.inner.register_forward_hook(lambda *_: calls.append(1))
    plan = plan_for(model)
    small = sc.cut(model, plan)
    again = sc.cut(model, plan, in_place=True)
    assert again is model
    assert all(modules[name] is module for name, module in model.named_modules())
    assert model.seen[0] is model.head.weight
    assert same(model.state_dict(), small.state_dict())
    x = BATCHES[0][0]
    with torch.no_grad():
        assert torch.equal(model(x), small(x))
    assert calls
    assert sc.record(model) == sc.record(small)
    assert model.inner.out_channels == small.inner.out_channels


def test_what_is_refused_changes_nothing():
    torch.manual_seed(0)
    loop = Loop(Net(), "sgd")
    loop.steps()
    plan, before = plan_for(loop.model), copy.deepcopy(loop.all())
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    for wrong in ({"optimizer": other}, {"averaged": loop.model}, {"averaged": AveragedModel(nn.Linear(2, 2))}):
        with pytest.raises(sc.SecateurError):
            sc.cut(loop.model, plan, **{"optimizer": loop.optimizer, "in_place": True, **wrong})
        assert same(loop.all(), before)


Pair = collections.namedtuple("Pair", ["one", "other"])
HOLDERS = {
    "ordered": lambda w: collections.OrderedDict(w=w),
    "default": lambda w: collections.defaultdict(list, w=[w]),
    "namespace": lambda w: types.SimpleNamespace(w=w, more={"deep": [w]}),
    "named": lambda w: Pair(1, [w]),
    "nested": lambda w: ([w], {"a": (w, 2)}),
    "deque": lambda w: collections.deque([w]),
}


def held(value):
    """All tensors in a holder."""
    return [t for t in within(value) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", HOLDERS)
def test_whatever_holds_a_tensor_holds_the_new_one(name):
    torch.manual_seed(0)
    model = Net()
    model.held = HOLDERS[name](model.inner.weight)
    model.loop = [model.stem.weight]
    model.loop.append(model.loop)  # which holds itself
    plan = plan_for(model)
    small = sc.cut(model, plan)
    sc.cut(model, plan, in_place=True)
    assert len(held(model.held)) == len(held(small.held)) > 0
    assert all(t is model.inner.weight for t in held(model.held))
    assert model.loop[0] is model.stem.weight
    assert model.loop[1] is model.loop
    assert type(model.held) is type(small.held)


def test_what_is_noted_of_parameters_stays_and_lost_hooks_are_told():
    torch.manual_seed(0)
    model = Net()
    model.inner.weight.decay = False
    model.stem.weight.register_hook(lambda grad: grad)
    plan = plan_for(model)
    assert sc.cut(model, plan).inner.weight.decay is False
    with pytest.warns(sc.SecateurWarning, match=r"hooks of stem\.weight are those of old tensors"):
        sc.cut(model, plan, in_place=True)
    assert model.inner.weight.decay is False
