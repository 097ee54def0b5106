"""What a model costs, counted by running it: what was packed or rewritten counts as it is.

PyTorch's own counter knows matrix products, convolutions and the attention kernels of GPUs. What it passes over is
added here: products with vectors, attention on the CPU, and recurrent layers that run as one kernel. A multiply-add is
one MAC. :meth:`secateur.ChannelGraph.macs` gives the same numbers without running anything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from secateur._internal.batches import Inputs, call_model, tensors_in
from secateur._internal.errors import SecateurError
from secateur._internal.state import preserved, without_einsum_paths

Shape = tuple[int, ...]
aten = torch.ops.aten


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward in eval mode; all of the model's state comes back.

    ``torch.einsum`` is counted from left to right: with ``opt_einsum`` it may take another order, depending on widths.

    Args:
        model: any module, on the device of the inputs.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; they are not written to.

    Raises:
        SecateurError: the forward fails on the inputs.
    """
    with counting(model, inputs) as (run, total):
        run()
    return total()


@contextmanager
def counting(model: nn.Module, inputs: Inputs) -> Iterator[tuple[Callable[[], Any], Callable[[], int]]]:
    """What runs the forward once, as :func:`count_macs` does, and what says how much was counted so far."""
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    copied = pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, inputs)
    counter = _Counter(display=False, custom_mapping=dict(_FORMULAS))

    def run() -> Any:
        try:
            with counter:
                return call_model(model, copied)
        except Exception as error:
            shapes = ", ".join(str(list(t.shape)) for t in tensors_in(inputs))
            raise SecateurError(
                f"{type(model).__name__} fails on the example inputs ({shapes}): {type(error).__name__}: {error}"
            ) from error

    with (
        torch.inference_mode(any(p.is_inference() for p in model.parameters())),  # which others cannot handle
        preserved(model, gradients=False, fast_path=False),
        without_einsum_paths(),
        torch.no_grad(),
    ):
        yield run, lambda: counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """Number of parameters, shared ones once; buffers are not counted."""
    return sum(p.numel() for p in model.parameters())


def counted(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Both, as ``{"macs": ..., "params": ...}``."""
    return {"macs": count_macs(model, inputs), "params": count_params(model)}


class _Counter(FlopCounterMode):
    """PyTorch's counter without its sums by module, whose hooks would see the forwards of other threads too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mod_tracker = _Everything()  # type: ignore[assignment]

    def __enter__(self) -> _Counter:
        super().__enter__()
        assert self.mode is not None
        self.mode.__exit__(None, None, None)
        self.mode = _Uncompiled(self)
        self.mode.__enter__()
        return self


class _Uncompiled(_FlopCounterMode):
    """PyTorch's mode without the compiler, which is loaded only to be told to leave it alone: that takes a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    __torch_dispatch__ = inspect.unwrap(_FlopCounterMode.__torch_dispatch__)


class _Everything:
    """Says that all operations belong to the model as a whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


# ------------------------------------------------------------------------------------- floating-point operations, twice


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """``softmax(Q K^T) V`` of queries [..., L, E], keys [..., S, E] and values [..., S, V]: L S (E + V) MACs each."""
    *batch, length, depth = query
    return 2 * prod(batch) * length * key[-2] * (depth + value[-1])


def _matrix_vector(matrix: Shape, _: Shape, **__: Any) -> int:
    return 2 * prod(matrix)


def _add_matrix_vector(_: Shape, matrix: Shape, __: Shape, **___: Any) -> int:
    return 2 * prod(matrix)


def _trilinear(first: Shape, weight: Shape, second: Shape, *expanded: list[int], **__: Any) -> int:
    """``nn.Bilinear``: every product of two inputs and a weight is summed once."""
    whole = [list(shape) for shape in (first, weight, second)]
    for shape, dims in zip(whole, expanded, strict=False):  # the fourth list says what is summed over
        for d in sorted(dims):
            shape.insert(d, 1)
    return 2 * prod(map(max, *whole))


def _recurrent(data: Shape, weights: list[Shape]) -> int:
    """Every matrix is multiplied once with each step of each sequence, ``data`` [..., features]."""
    return 2 * prod(data[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _mkldnn_layer(data: Shape, inner: Shape, hidden: Shape, *_: Any, **__: Any) -> int:
    return _recurrent(data, [inner, hidden])


def _fused_recurrent(data: Shape, weights: list[Shape], *_: Any, **__: Any) -> int:
    return _recurrent(data, weights)


_FORMULAS: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten.mv: _matrix_vector,
    aten.dot: _matrix_vector,
    aten.vdot: _matrix_vector,
    aten.addmv: _add_matrix_vector,
    aten._trilinear: _trilinear,
    aten.mkldnn_rnn_layer: _mkldnn_layer,
    aten._cudnn_rnn: _fused_recurrent,
    aten.miopen_rnn: _fused_recurrent,
}
