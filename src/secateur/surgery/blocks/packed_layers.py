r"""Packed layers: a linear or a convolution of dense blocks, from plain PyTorch operations.

Each block reads some of the columns and writes some of the rows::

    y[rows_b] = W_b x[columns_b] + bias[rows_b]                 for each block b, rows of all blocks side by side

Block by block, these are small linears and convolutions; at once, a batched product or a grouped convolution. Where a
block's columns lie side by side in the input it reads them there, otherwise it gathers them; where the blocks' rows do
not follow each other in the output, one index at the end puts them in their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur._internal.errors import SecateurError

CONVOLVE: Mapping[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Layout:
    """What a packed layer is made of, as data.

    Attributes:
        blocks: how many.
        rows: of a block, those of zeros at the end of the last one among them.
        columns: of a block.
        at_once: whether all blocks are computed by one operation.
        starts: where in the input each block's columns begin, if they lie side by side; otherwise they are gathered.
        ordered: whether the rows follow each other in the output; otherwise an index puts them in their places.
    """

    blocks: int
    rows: int
    columns: int
    at_once: bool
    starts: tuple[int, ...] | None
    ordered: bool

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Layout:
        """What :meth:`to_dict` gave.

        Raises:
            SecateurError: damaged data.
        """
        try:
            starts = None if data["starts"] is None else tuple(int(start) for start in data["starts"])
            found = Layout(
                int(data["blocks"]), int(data["rows"]), int(data["columns"]), bool(data["at_once"]), starts,
                bool(data["ordered"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise SecateurError(f"the layout is damaged ({type(error).__name__}: {error})") from error
        if min(found.blocks, found.rows, found.columns) < 1 or (
            starts is not None and (len(starts) != found.blocks or min(starts) < 0)
        ):
            raise SecateurError("the layout is damaged: its sizes do not fit")
        return found


class Packed(nn.Module):
    """What packed linears and convolutions share.

    Attributes:
        weight: of a linear [blocks, rows, columns], of a convolution [blocks * rows, columns, *kernel].
        bias: [blocks * rows], or ``None``.
        index: the column of the input that each block's columns are, int64 [blocks, columns], where they are gathered.
        in_turn: whether the blocks' columns follow each other and are all there are.
        order: the computed row that each row of the output is, int64 [out], where they are put in their places.
    """

    index: Tensor | None
    order: Tensor | None

    def __init__(self, out: int, columns: int, layout: Layout, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out, self.layout = out, layout
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        gathers, each = layout.starts is None, layout.columns
        self.in_turn = layout.starts == tuple(range(0, columns, each)) and layout.blocks * each == columns
        shape, device = (layout.blocks, layout.columns), weight.device
        self.register_buffer("index", torch.zeros(shape, dtype=torch.int64, device=device) if gathers else None)
        self.register_buffer("order", None if layout.ordered else torch.zeros(out, dtype=torch.int64, device=device))
        beyond = layout.columns > columns or (
            layout.starts is not None and max(layout.starts) + layout.columns > columns
        )
        if beyond or not 0 <= layout.blocks * layout.rows - out < layout.rows:
            raise SecateurError("the layout is damaged: its blocks do not fit the layer")

    def parts(self, x: Tensor, dim: int) -> list[Tensor]:
        """What each block reads."""
        if self.layout.starts is not None:
            return [x.narrow(dim, start, self.layout.columns) for start in self.layout.starts]
        assert self.index is not None
        return [x.index_select(dim, index) for index in self.index.unbind()]

    def together(self, x: Tensor, dim: int) -> Tensor:
        """What all blocks read, side by side."""
        if self.index is not None:
            return x.index_select(dim, self.index.flatten())
        assert self.layout.starts is not None
        return x if self.in_turn else self.joined(self.parts(x, dim), dim)

    @staticmethod
    def joined(parts: list[Tensor], dim: int) -> Tensor:
        """What belongs to all blocks, side by side."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def placed(self, y: Tensor, dim: int) -> Tensor:
        """Every computed row in its place; rows of zeros are left out."""
        if self.order is not None:
            return y.index_select(dim, self.order)
        return y if y.shape[dim] == self.out else y.narrow(dim, 0, self.out)

    def extra_repr(self) -> str:
        """What it is made of."""
        how = "at once" if self.layout.at_once else "block by block"
        gathered = "" if self.layout.starts is not None else ", gathered"
        return f"{self.layout.blocks} blocks of {self.layout.rows} x {self.layout.columns}, {how}{gathered}"


class PackedLinear(Packed):
    """A linear of dense blocks: [..., columns] to [..., rows]."""

    def __init__(self, in_features: int, out_features: int, layout: Layout, *, bias: bool, **plain: Any) -> None:
        b, r, c = layout.blocks, layout.rows, layout.columns
        weight = torch.zeros((b, r, c), **plain)
        super().__init__(out_features, in_features, layout, weight, torch.zeros(b * r, **plain) if bias else None)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        shape, b, r, c = input.shape[:-1], self.layout.blocks, self.layout.rows, self.layout.columns
        if not self.layout.at_once:
            biases = [None] * b if self.bias is None else self.bias.view(b, r).unbind()
            pieces = map(F.linear, self.parts(input, -1), self.weight.unbind(), biases)
            return self.placed(self.joined(list(pieces), -1), -1)
        one = input.numel() == self.in_features  # a single vector, with which another product is the fast one
        x = self.together(input, -1)
        # one: [b, 1, c] [b, c, r]; many: [b, r, c] [b, c, many], weight times input being the faster way round
        x = x.reshape(b, 1, c) if one else x.reshape(-1, b, c).permute(1, 2, 0)
        left, right = (x, self.weight.mT) if one else (self.weight, x)
        if self.bias is None:
            y = left @ right
        else:
            y = torch.baddbmm(self.bias.view((b, 1, r) if one else (b, r, 1)), left, right)
        return self.placed((y if one else y.permute(2, 0, 1)).reshape(*shape, b * r), -1)


class PackedConvolution(Packed):
    """A convolution of dense blocks, of one to three dimensions: [n, columns, *space] to [n, rows, *space]."""

    def __init__(
        self, in_channels: int, out_channels: int, layout: Layout, *, kernel_size: tuple[int, ...], stride: Any,
        padding: Any, dilation: Any, bias: bool, **plain: Any,
    ) -> None:  # fmt: skip
        b, r, c = layout.blocks, layout.rows, layout.columns
        weight = torch.zeros((b * r, c, *kernel_size), **plain)
        super().__init__(out_channels, in_channels, layout, weight, torch.zeros(b * r, **plain) if bias else None)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def forward(self, input: Tensor) -> Tensor:
        """[n, in_channels, *space] or [in_channels, *space], and likewise with out_channels."""
        x = input
        layout, dim = self.layout, -1 - len(self.kernel_size)
        convolve = CONVOLVE[len(self.kernel_size)]
        geometry = (self.stride, self.padding, self.dilation)
        if layout.at_once:
            x = self.together(x, dim)
            return self.placed(convolve(x, self.weight, self.bias, *geometry, layout.blocks), dim)
        biases = [None] * layout.blocks if self.bias is None else self.bias.split(layout.rows)
        pairs = zip(self.parts(x, dim), self.weight.split(layout.rows), biases, strict=True)
        parts = [convolve(part, weight, bias, *geometry) for part, weight, bias in pairs]
        return self.placed(self.joined(parts, dim), dim)


def hollow(layer: Any, layout: Layout) -> Packed:
    """A packed layer in the place of a linear or a convolution, its numbers not set."""
    plain: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    made: Packed
    if isinstance(layer, nn.Linear):
        made = PackedLinear(layer.in_features, layer.out_features, layout, bias=bias, **plain)
    else:
        geometry = {k: getattr(layer, k) for k in ("kernel_size", "stride", "padding", "dilation")}
        made = PackedConvolution(layer.in_channels, layer.out_channels, layout, bias=bias, **geometry, **plain)
    if layer.weight.ndim == 4 and layer.weight.is_contiguous(memory_format=torch.channels_last):
        made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, p in made.named_parameters():
        p.requires_grad_(getattr(layer, name).requires_grad)
    return made.train(layer.training)
