"""Accuracy and loss are means over images, and measuring leaves no trace."""

import pytest
import torch
from torch import nn

from secateur._internal.errors import SecateurError
from secateur._internal.state import eval_mode
from secateur.lab.data.loader import Loader
from secateur.measure.accuracy import accuracy, loss


def test_counts_exactly():
    outputs = torch.eye(4).repeat(3, 1)[:10]
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 0, 0])  # the last three: 7 -> 3, 9 -> 1 are wrong
    assert accuracy(nn.Identity(), (outputs, labels)) == 0.8


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_batches_of_any_size_give_the_same_mean(batch):
    torch.manual_seed(0)
    images, labels = torch.randn(20, 1, 3, 3, dtype=torch.float64), torch.randint(4, (20,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).double()
    whole = nn.functional.cross_entropy(model(images), labels).item()
    loader = Loader(images, labels, batch)
    assert loss(model, loader) == pytest.approx(whole, abs=1e-12)
    assert accuracy(model, loader) == accuracy(model, (images, labels))


def test_modes_and_statistics_stay():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(9), nn.Dropout(), nn.Linear(9, 4))
    model.train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    accuracy(model, (torch.randn(8, 1, 3, 3), torch.randint(4, (8,))))
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError), eval_mode(model):
        raise RuntimeError
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "the loader is empty"), ((torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), "no example to measure on")],
)
def test_no_image(data, message):
    with pytest.raises(SecateurError, match=message):
        accuracy(nn.Identity(), data)


def test_labels_of_another_shape_are_no_silent_square():
    outputs, labels = torch.eye(4), torch.arange(4)
    for wrong in (labels[:, None], torch.eye(4)):
        with pytest.raises(SecateurError, match=r"outputs of shape \[4, 4\] are for labels of shape \[4\], not \[4, "):
            accuracy(nn.Identity(), (outputs, wrong))
    maps = torch.randn(2, 3, 5, 5)  # of every place one
    assert accuracy(nn.Identity(), (maps, maps.argmax(1))) == 1
