"""The loop trains, resumes bit for bit, and stops with a clear word where it must."""

import gc
import math
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateur._internal.errors import SecateurError
from secateur.lab.data.loader import Loader
from secateur.lab.data.registry import load
from secateur.lab.models.registry import build
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy

torch.manual_seed(0)
IMAGES, LABELS = torch.randn(50, 1, 4, 4), torch.randint(3, (50,))
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
}


class Net(nn.Module):
    """Convolution, batch norm, and dropout, so that buffers and the global random state matter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten())
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Average:
    """A handle with a state of its own: a running sum of the head's bias."""

    def __init__(self, model: Net) -> None:
        self.model, self.sum, self.calls = model, torch.zeros(3), 0

    def step(self) -> None:
        self.sum, self.calls = self.sum + self.model.head.bias.detach(), self.calls + 1

    def state_dict(self):
        return {"sum": self.sum, "calls": self.calls}

    def load_state_dict(self, state) -> None:
        self.sum, self.calls = state["sum"], state["calls"]


class Bomb:
    """Breaks the run after a number of steps."""

    def __init__(self, after: float) -> None:
        self.left = after

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def training(make, seed=7, **options):
    """A fresh run: (start it, everything that must be equal at its end)."""
    torch.manual_seed(seed)
    model = Net()
    optimizer, handle = make(model.parameters()), Average(model)
    loader = Loader(IMAGES, LABELS, 8, shuffle=True, augment=True, seed=3)

    def run(bomb=math.inf):
        settings = {"epochs": 3, "schedule": "one_cycle", "every": 0, "progress": False} | options
        history = fit(model, optimizer, loader, after_step=[handle, Bomb(bomb)], **settings)
        state = optimizer.state_dict()["state"]
        flat = [value for entry in state.values() for value in entry.values()]
        return [*model.state_dict().values(), *flat, handle.sum, handle.calls, torch.rand(2)], history

    return run


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("steps", [(1,), (6, 0, 5), (7,), (13, 1, 2, 3)])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, name, steps, channels_last):
    options = {"channels_last": channels_last}
    expected, rows = training(OPTIMIZERS[name], **options)()
    for turn, count in enumerate(steps):  # only the first run may begin from the seed of the uninterrupted one
        run = training(OPTIMIZERS[name], seed=7 + turn, checkpoint_dir=tmp_path, **options)
        with pytest.raises(KeyboardInterrupt):
            run(bomb=count)
    result, resumed = training(OPTIMIZERS[name], seed=99, checkpoint_dir=tmp_path, **options)()
    assert same(result, expected)
    keep = ("epoch", "loss", "lr")
    assert [[row[key] for key in keep] for row in resumed] == [[row[key] for key in keep] for row in rows]
    again, _ = training(OPTIMIZERS[name], seed=98, checkpoint_dir=tmp_path, **options)()
    assert same(again, expected), "a run that is complete was trained further"


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    expected, _ = training(OPTIMIZERS["sgd"])()
    with pytest.raises(KeyboardInterrupt):
        training(OPTIMIZERS["sgd"], checkpoint_dir=tmp_path)(bomb=9)
    latest = max(tmp_path.iterdir())
    latest.write_bytes(latest.read_bytes()[:-10])
    result, _ = training(OPTIMIZERS["sgd"], seed=1, checkpoint_dir=tmp_path)()
    assert same(result, expected)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"epochs": 4}, "epochs 3, now 4"), ({"schedule": "cosine"}, "schedule 'one_cycle', now 'cosine'")],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, told):
    training(OPTIMIZERS["sgd"], checkpoint_dir=tmp_path)()
    with pytest.raises(SecateurError, match=told):
        training(OPTIMIZERS["sgd"], checkpoint_dir=tmp_path, **change)()
    with pytest.raises(SecateurError, match="optimizer 'SGD', now 'Adam'"):
        training(OPTIMIZERS["adam"], checkpoint_dir=tmp_path)()


def plain(**options):
    """A small run without dropout: (model, history)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    settings = {"epochs": 2, "progress": False} | options
    optimizer = settings.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=0.1)
    loader = settings.pop("loader", Loader(IMAGES, LABELS, 10))
    return model, fit(model, optimizer, loader, **settings)


def test_it_is_the_loop_anyone_would_write():
    model, history = plain(schedule=lambda progress: 1 - progress)
    torch.manual_seed(1)
    expected = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    for step in range(10):
        rows = slice(step % 5 * 10, step % 5 * 10 + 10)
        loss = nn.functional.cross_entropy(expected(IMAGES[rows]), LABELS[rows])
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
            parameter.data -= 0.1 * (1 - step / 10) * gradient
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    assert [row["epoch"] for row in history] == [1, 2]
    assert [row["lr"] for row in history] == pytest.approx([0.06, 0.01])


def test_loss_is_the_mean_over_images_and_rows_take_more():
    loader = Loader(IMAGES, LABELS, 15)  # 15, 15, 15 and 5
    _, history = plain(loader=loader, schedule=lambda _: 0.0, after_epoch=lambda: {"validation": torch.tensor(0.5)})
    torch.manual_seed(1)
    whole = nn.functional.cross_entropy(nn.Sequential(nn.Flatten(), nn.Linear(16, 3))(IMAGES), LABELS).item()
    assert [row["loss"] for row in history] == pytest.approx([whole, whole], rel=1e-6)
    assert [row["validation"] for row in history] == [0.5, 0.5]


def test_learning_rates_modes_and_the_forward_are_as_before():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)).eval()
    model[1].train()
    groups = [{"params": model[1].parameters()}, {"params": model[2].parameters(), "lr": 0.3}]
    optimizer, seen = torch.optim.SGD(groups, lr=0.1), []
    note = lambda: seen.append([group["lr"] for group in optimizer.param_groups])  # noqa: E731
    fit(model, optimizer, Loader(IMAGES, LABELS, 25), epochs=2, schedule="steps", after_step=[note], progress=False)
    assert [rates[0] for rates in seen] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert [rates[1] for rates in seen] == pytest.approx([0.3, 0.3, 0.03, 0.003])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]
    assert [m.training for m in model.modules()] == [False, False, True, False]
    assert "forward" not in vars(model)


def test_the_accelerator_does_not_keep_what_it_trained():
    accelerator = Accelerator(cpu=True)
    model, _ = plain(accelerator=accelerator)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_torch_loaders_work():
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=10)
    ours, theirs = plain(), plain(loader=loader)
    assert same(list(ours[0].parameters()), list(theirs[0].parameters()))


def test_digits_are_learned_in_seconds():
    torch.manual_seed(0)
    data = load("digits")
    model = build("digits_cnn", width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    fit(model, optimizer, data.loader("train", 64, shuffle=True), epochs=8, schedule="one_cycle", progress=True)
    assert accuracy(model, data.loader("validation")) > 0.95


class Wrong(nn.Module):
    """A network that gives what it is told to."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight, self.value, self.calls = nn.Parameter(torch.ones(3)), value, 0

    def forward(self, x):
        self.calls += 1
        return self.weight * (self.value if self.calls > 7 else 1.0) * x.flatten(1)[:, :3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(tmp_path, value):
    model = Wrong(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SecateurError, match=r"epoch 2, step 3 of 5 .*learning rate"):
        fit(model, optimizer, Loader(IMAGES, LABELS, 10), epochs=3, progress=False, checkpoint_dir=tmp_path, every=0)
    assert model.weight.isfinite().all()
    assert optimizer.param_groups[0]["lr"] == 0.1


WIDE = Loader(torch.zeros(8, 1, 5, 5), torch.zeros(8, dtype=torch.int64), 4)
MANY = Loader(IMAGES, LABELS + 3, 10)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"every": math.nan}, "every=nan"),
        ({"loader": []}, "it is empty"),
        ({"loader": iter([1])}, "has no length"),
        ({"loader": WIDE}, r"cannot take its first batch, x \[4, 1, 5, 5\]"),
        ({"loader": MANY}, r"cannot take its first batch, .* y \[10\]"),
        ({"schedule": "one_circle"}, "did you mean 'one_cycle'"),
    ],
)
def test_bad_input(change, told):
    with pytest.raises(SecateurError, match=told):
        plain(**change)


def test_a_loader_shorter_than_it_says():
    class Short(list):
        def __len__(self):
            return 3

    with pytest.raises(SecateurError, match="ended after 1 batches, but its length is 3"):
        plain(loader=Short([(IMAGES, LABELS)]))


def test_losses_are_those_of_pruning_too() -> None:
    """A module that sums is a mean over the batch, and of a tuple the first tensor counts; dicts with labels fit."""

    def small() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x):
            return self.net(x), x

    torch.manual_seed(0)
    one, other = small(), Two()
    other.net.load_state_dict(one.state_dict())
    loader = Loader(IMAGES, LABELS, 25)
    histories = [
        fit(one, torch.optim.SGD(one.parameters(), 0.1), loader, epochs=2, progress=False),
        fit(
            other, torch.optim.SGD(other.parameters(), 0.1), loader, epochs=2, progress=False,
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        ),
    ]  # fmt: skip
    assert [row["loss"] for row in histories[0]] == pytest.approx([row["loss"] for row in histories[1]], rel=1e-4)
