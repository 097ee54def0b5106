"""The grammar of random networks: a choice of numbers, a block of a network, and the table of all blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORM = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
F_CONV = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)
F_CONV_TRANSPOSE = (
    nn.functional.conv_transpose1d,
    nn.functional.conv_transpose2d,
    nn.functional.conv_transpose3d,
)
WIDTHS = (3, 4, 6, 8, 2, 12, 5)


class Do(nn.Module):
    """One block: a function of itself and its inputs. Keyword arguments become parameters, modules or attributes."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Draw:
    """Numbers of one record of a network's specification, used up one by one; zero when there are no more.

    Attributes:
        last: index of the value that the block reads.
        values: what the network has computed so far on the example inputs.
        kinds: ``map`` [n, c, *space], ``seq`` [n, tokens, c] or ``vec`` [n, c] of each value.
        used: indices of other values that the block wants as further arguments.
    """

    def __init__(self, numbers: tuple[int, ...], values: list[Tensor], kinds: list[str], last: int) -> None:
        self._numbers = list(reversed(numbers))
        self.values, self.kinds, self.last = values, kinds, last
        self.used: list[int] = []

    def below(self, n: int) -> int:
        return (self._numbers.pop() if self._numbers else 0) % n

    def of(self, *options: T) -> T:
        return options[self.below(len(options))]

    def flag(self) -> bool:
        return self.below(2) == 1

    def width(self) -> int:
        return self.of(*WIDTHS)

    def divisor(self, n: int) -> int:
        """Any divisor of n, the largest below n first."""
        return self.of(*[k for k in range(max(n // 2, 1), 0, -1) if n % k == 0], n)

    def other(self, kind: str, like: Callable[[Tensor], bool] = lambda _: True) -> Tensor | None:
        """Another value of this kind, passed to the block as a further argument; None if there is none."""
        found = [i for i, value in enumerate(self.values) if i != self.last and self.kinds[i] == kind and like(value)]
        if not found:
            return None
        self.used.append(found[-1 - self.below(len(found))])
        return self.values[self.used[-1]]


Block = Callable[[Draw, Tensor], Do]
BLOCKS: dict[str, tuple[str, str, Block]] = {}  # name -> kind it reads, kind it returns, block


def block(reads: str, returns: str = "") -> Callable[[Block], Block]:
    """Enter a block into the table, by its function's name."""

    def enter(function: Block) -> Block:
        BLOCKS[function.__name__] = (reads, returns or reads, function)
        return function

    return enter


def space(x: Tensor) -> int:
    """Spatial dims of a map."""
    return x.ndim - 2


def ones(x: Tensor) -> tuple[int, ...]:
    """As many ones as there are spatial dims: a per-channel tensor is viewed as ``(1, -1, *ones)``."""
    return (1,) * space(x)


def conv(x: Tensor, inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Module:
    """A convolution of as many dims as the map ``x``, keeping its size unless ``options`` say otherwise."""
    d = space(x)
    options.setdefault("padding", kernel // 2 * options.get("dilation", 1))
    return CONV[d - 1](inputs, outputs, kernel, **options)


def divisible(d: Draw, x: Tensor) -> tuple[nn.Module, int]:
    """Something that gives the map a width with proper divisors, and that width."""
    if x.size(1) in {4, 6, 8, 9, 10, 12} and not d.flag():
        return nn.Identity(), x.size(1)
    width = d.of(4, 6, 8, 12)
    return conv(x, x.size(1), width), width


def norm(d: Draw, x: Tensor, width: int) -> nn.Module:
    """Some normalisation of a map of that width."""
    affine = not d.of(False, False, True)
    groups = d.divisor(width)
    several = all(s > 1 for s in x.shape[2:])
    options: list[nn.Module] = [
        BATCH_NORM[space(x) - 1](width),
        BATCH_NORM[space(x) - 1](width, affine=affine),
        BATCH_NORM[space(x) - 1](width, affine=affine, track_running_stats=False),
        nn.GroupNorm(groups if several else 1, width, affine=affine),
        INSTANCE_NORM[space(x) - 1](width, affine=affine) if several else nn.Identity(),
        INSTANCE_NORM[space(x) - 1](width, affine=True, track_running_stats=True) if several else nn.Identity(),
    ]
    return d.of(options[0], *options)


class Apply(nn.Module):
    """An activation that is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def activation(d: Draw, width: int, *, fresh: bool = True) -> nn.Module:
    """Some activation; ``width`` is that of dim 1, for slopes per channel; ``fresh``: its input may be overwritten."""
    options: list[Callable[[], nn.Module]] = [
        lambda: nn.ReLU(inplace=fresh and d.flag()),
        nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.Hardswish, nn.ELU, nn.Mish, nn.ReLU6, nn.Hardtanh,
        nn.Sigmoid, nn.Softplus, nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign, nn.CELU, nn.Hardshrink, nn.Tanhshrink,
        lambda: nn.PReLU(width), nn.PReLU, lambda: nn.Threshold(0.1, 0.3),
        lambda: nn.SiLU(inplace=fresh),
        lambda: Apply(lambda x: x.clamp(-1, 2)), lambda: Apply(lambda x: x.clamp(min=0.3)),
        lambda: Apply(lambda x: torch.exp(-x * x)), lambda: Apply(lambda x: x.clamp(max=2).exp()),
        lambda: Apply(torch.sin), lambda: Apply(torch.cos), lambda: Apply(lambda x: x.square()),
        lambda: Apply(lambda x: (x * x + 1).rsqrt()), lambda: Apply(lambda x: x.abs().log1p()),
        lambda: Apply(lambda x: (x.abs() + 0.1).sqrt()), lambda: Apply(torch.erf), lambda: Apply(lambda x: x.pow(3)),
        lambda: Apply(lambda x: x * torch.sigmoid(1.702 * x)), lambda: Apply(lambda x: torch.where(x > 0, x, 0.1 * x)),
        lambda: Apply(lambda x: torch.where(x > 0.2, x, torch.ones_like(x))),
        lambda: Apply(lambda x: x.masked_fill(x < 0, 0.0)), lambda: Apply(lambda x: x.masked_fill(x < 0, 0.7)),
        lambda: Apply(lambda x: (x > 0).to(x.dtype) * x), lambda: Apply(lambda x: 1 / (1 + x * x)),
    ]  # fmt: skip
    kind = d.below(3)
    return d.of(*options[:4])() if kind < 2 else d.of(*options)()
