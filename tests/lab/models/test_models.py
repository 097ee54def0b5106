"""The built-in networks have the published sizes, take the stated input, and refuse nonsense."""

import pytest
import torch
from torch import nn

from secateur._internal.errors import SecateurError
from secateur.lab.models.registry import MODELS, build, example_input


def residual(n: int, widths: tuple[int, int, int]) -> int:
    """Parameters of a CIFAR ResNet with 1x1 convolutions as shortcuts, counted by hand."""
    total = 3 * 9 * widths[0] + 2 * widths[0] + 10 * widths[2] + 10
    inner = widths[0]
    for outer in widths:
        total += 9 * outer * inner + 9 * outer * outer * (2 * n - 1) + 2 * 2 * n * outer
        total += inner * outer + 2 * outer if inner != outer else 0
        inner = outer
    return total


COUNTS = [
    ("lenet_300_100", {}, 784 * 300 + 300 + 300 * 100 + 100 + 1000 + 10),
    ("lenet5", {}, 431_080),  # Caffe's
    ("digits_cnn", {}, 9 * 32 + 64 + 9 * 32 * 64 + 128 + 9 * 64 * 64 + 128 + 650),
    ("small_vit", {}, 17 * 64 + 49 * 64 + 3 * (12 * 64 * 64 + 13 * 64) + 2 * 64 + 650),
    ("vgg16_bn", {}, 14_724_042),  # 13 convolutions without bias, batch norms, 512-10
    ("vgg19_bn", {}, 20_035_018),
    ("resnet8", {}, residual(1, (16, 32, 64))),
    ("resnet20", {}, 272_474),
    ("resnet20", {}, residual(3, (16, 32, 64))),
    ("resnet32", {"width": 4}, residual(5, (64, 128, 256))),
    ("resnet56", {}, residual(9, (16, 32, 64))),
    ("resnet8", {"width": 0.5}, residual(1, (8, 16, 32))),
]


@pytest.mark.parametrize(("name", "options", "count"), COUNTS)
def test_parameter_counts(name, options, count):
    assert sum(p.numel() for p in build(name, **options).parameters()) == count


def test_wide_resnet_is_the_published_one():
    model = build("wrn_28_10")
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(p.numel() for p in model.parameters()) == 36_479_194  # arXiv 1605.07146: 36.5 M
    assert len(convolutions) == 25 + 3


@pytest.mark.parametrize("name", sorted(MODELS))
def test_output_shape_on_the_example_input(name):
    options = {"classes": 7} | ({"width": 0.25} if "lenet" not in name else {})
    model = build(name, **options).eval()
    with torch.no_grad():
        out = model(torch.randn(example_input(name)).expand(2, -1, -1, -1))
    assert out.shape == (2, 7)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet5", "digits_cnn", "small_vit", "vgg16_bn", "resnet8"])
def test_input_channels_are_an_option(name):
    shape = example_input(name, in_channels=2)
    assert shape[1] == 2
    assert build(name, in_channels=2).eval()(torch.zeros(shape)).shape == (1, 10)


def test_same_seed_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build("digits_cnn").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_kaiming_keeps_the_scale_of_activations():
    torch.manual_seed(0)
    convolution = build("resnet20").stages[2][1].conv1
    assert convolution.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert build("lenet5").conv1.bias.eq(0).all()


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("resnet_20", {}, "did you mean 'resnet20'"),
        ("resnet20", {"widht": 2}, "did you mean 'width'"),
        ("resnet20", {"width": 0}, "positive number"),
        ("resnet20", {"width": float("nan")}, "positive number"),
        ("resnet20", {"classes": 2.5}, "positive integer"),
        ("lenet5", {"width": 2}, "unknown option"),
        ("builtins:dict", {}, "returned a dict"),
    ],
)
def test_bad_names_and_options(name, options, told):
    with pytest.raises(SecateurError, match=told):
        build(name, **options)


def test_own_factory():
    assert isinstance(build("torch.nn:Linear", in_features=3, out_features=2), nn.Linear)
    with pytest.raises(SecateurError, match="give example inputs"):
        example_input("torch.nn:Linear")
