"""``nn.MultiheadAttention`` that can lose heads.

PyTorch's takes the size of a head for the input's width divided by the number of heads, so neither can change alone.
:class:`HeadAttention` computes the same from the size that it remembers; it is traced, and a cut model has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IN_PROJECTION = "in_proj"
"""The part that computes queries, keys and values of one input, where somebody wants to look at it."""


class HeadAttention(nn.MultiheadAttention):
    """Multi-head attention with heads of a fixed size, as many as its weights have; :func:`free_heads` makes it.

    It has the parameters of ``nn.MultiheadAttention`` by the same names, and its forward takes and returns the same.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As for ``nn.MultiheadAttention``.

        Args:
            query: float [targets, examples, width], or [examples, targets, width] if ``batch_first``, or
                [targets, width].
            key: the same with sources.
            value: the same with sources.
            key_padding_mask: bool or float [examples, sources]: which keys are left out, or what is added.
            need_weights: whether to return the weights.
            attn_mask: bool or float [targets, sources] or [examples * heads, targets, sources].
            average_attn_weights: whether to return their mean over the heads.
            is_causal: whether the mask is the causal one.

        Returns:
            The output, like the query, and the weights, [examples, targets, sources] (with heads: [examples, heads,
            targets, sources]), or None.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "is_causal needs an attn_mask (nn.Transformer.generate_square_subsequent_mask makes one)"
            )
        batched, turn = query.dim() == 3, query.dim() == 3 and not self.batch_first
        if turn:
            query, key, value = _each(lambda t: t.transpose(0, 1), query, key, value)
        elif not batched:
            query, key, value = _each(lambda t: t.unsqueeze(0), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)

        q, k, v = self._projected(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        heads = [t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v)]

        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _mask(attn_mask, key_padding_mask, heads[0], heads[1].shape[2])
        y, weights = self._attend(heads, mask, causal=causal, need_weights=need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y.transpose(0, 1) if turn else y, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values, [examples, length, heads * size]."""
        seen = self._modules.get(IN_PROJECTION)
        if seen is not None:
            whole = _each(seen, query, key, value)
            return [part.chunk(3, -1)[which] for which, part in enumerate(whole)]
        if self._qkv_same_embed_dim and query is key and key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        if self._qkv_same_embed_dim:
            weights: Iterable[Any] = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Iterable[Any] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _attend(
        self, heads: Sequence[Tensor], mask: Tensor | None, *, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What is attended to, [examples, heads, targets, size], and the weights if they are wanted."""
        q, k, v = heads
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, dropout) if dropout else weights
        return weights @ v, weights

    def extra_repr(self) -> str:
        """What ``repr`` shows of it."""
        return f"heads of {self.head_dim}"


def _each(do: Callable[[Tensor], Tensor], *tensors: Tensor) -> list[Tensor]:
    """What is done to each tensor, once; what was one tensor stays one."""
    done = {id(t): do(t) for t in {id(t): t for t in tensors}.values()}
    return [done[id(t)] for t in tensors]


def _mask(attention: Tensor | None, padding: Tensor | None, q: Tensor, sources: int) -> Tensor | None:
    """Both masks as one that is added to scores [examples, heads, targets, sources]; for new keys nothing is added."""

    def added(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
        return F.pad(mask, (0, sources - mask.shape[-1]))

    masks = []
    if attention is not None:
        mask = added(attention)
        masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (q.shape[0], -1)))
    if padding is not None:
        masks.append(added(padding)[:, None, None])
    return sum(masks[1:], masks[0]) if masks else None


def attentions_of(model: nn.Module) -> tuple[str, ...]:
    """The paths of the modules that must become :class:`HeadAttention` to lose channels."""
    kinds = (nn.MultiheadAttention, HeadAttention)  # another class may have another forward
    return tuple(path for path, part in model.named_modules() if type(part) in kinds)


def free_heads(model: nn.Module, paths: Iterable[str]) -> None:
    """Let modules be :class:`HeadAttention`, in place, so that whoever holds one holds that."""
    changed = set(paths)
    for path in changed:
        model.get_submodule(path).__class__ = HeadAttention
    for path, part in model.named_modules():
        if isinstance(part, nn.TransformerEncoderLayer) and f"{path}.self_attn".lstrip(".") in changed:
            without_fused_kernel(part)
        if isinstance(part, nn.TransformerEncoder) and any(name.startswith(f"{path}.".lstrip(".")) for name in changed):
            part.use_nested_tensor = False


def without_fused_kernel(layer: nn.TransformerEncoderLayer) -> None:
    """Let a layer say that PyTorch's fused kernel, with its own attention and norms, does not fit."""
    layer.activation_relu_or_gelu = 0
