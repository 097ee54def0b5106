r"""Queries and keys of fewer numbers, whose products are as near to the original's as can be.

Channels that two layers write, ``q`` and ``k``, and that no weight reads may be summed over in a product: they are if
the model's outputs stay what they are when ``q`` is multiplied by any invertible ``R`` and ``k`` by ``R^-T``, for each
head its own, which is tried. What is left need not be some of the original's channels then. Of all ``q A`` and ``k B``
of ``r`` numbers, with second moments ``C``, those nearest (the singular value decomposition's, by whitening) have::

    min E |q k^T - q A B^T k^T|^2        A B^T = C_q^-1/2 [C_q^1/2 C_k^1/2]_r C_k^-1/2

``[.]_r`` keeps the ``r`` largest singular values. The layers are then fitted to give ``q A`` and ``k B``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._internal.batches import call_model, copied, tensors_in
from secateur._internal.distributed import all_reduce_
from secateur._internal.state import preserved
from secateur._internal.workload import Workload
from secateur.plan import Plan
from secateur.repair.examples import Part
from secateur.repair.pairs import Pair, Scale
from secateur.tracing.graph import ChannelGroup

DAMPING = 1e-6
"""In units of a moment's mean eigenvalue."""
SAME = 1e-3
"""Outputs that differ by no more than this, in units of their norm, are the same."""


def turns(
    model: nn.Module, plan: Plan, pairs: Sequence[Pair], outputs: Mapping[str, Mapping[Any, Tensor]],
    parts: Sequence[Part], work: Workload,
) -> dict[str, Tensor]:  # fmt: skip
    """By what the outputs of queries and keys that lose numbers are multiplied, by the paths of their layers.

    Args:
        model: the original.
        plan: what goes; of one without a graph nothing is known.
        pairs: the layers that can be fitted.
        outputs: samples of the original's outputs, [1, samples, rows], by layer.
        parts: examples.
        work: the processes; all get the same.

    Returns:
        float64 [rows, rows that are left] for each of these layers.
    """
    plain = {
        pair.one.parameter("weight"): pair
        for pair in pairs
        if len(pair.ones) == 1 and pair.last is None and not pair.of_bottleneck and not isinstance(pair.one, Scale)
        if pair.one.groups == 1 and not pair.one.kernel
    }
    found: dict[str, Tensor] = {}
    for name, gone in plan.removed.items() if plan.graph is not None else ():
        assert plan.graph is not None
        group = plan.graph.group(name)
        both = _written_by_two(group, plain)
        if both is None or any(pair.name in found for pair, _ in both):
            continue
        same = work.together(lambda both=both: _is_summed_over(model, both, parts[:1]))  # type: ignore[misc]
        proven = torch.tensor(int(same), device=work.device)
        if int(all_reduce_(proven, work.group)) < work.processes:
            continue
        q, k = (_moments(pair, at, outputs.get(pair.name, {}), work) for pair, at in both)
        left = [i for i in range(len(group)) if i not in set(gone)]
        for (pair, at), matrices in zip(both, _nearest(q, k, len(left)), strict=True):
            found[pair.name] = _turn(len(pair.one.table()[0]), at, left, matrices, plan, pair)
    return found


def _written_by_two(group: ChannelGroup, plain: Mapping[str, Pair]) -> list[tuple[Pair, np.ndarray]] | None:
    """The two layers that alone write a group that no weight reads, and the rows of every channel [channels, heads]."""
    axes = {axis.name: axis for axis in group.producers}
    pairs = [(plain[name], axis) for name, axis in axes.items() if name in plain]
    names = {pair.one.parameter(what) for pair, _ in pairs for what in ("weight", "bias")}
    if group.consumers or len(pairs) != 2 or not axes.keys() <= names:
        return None
    found = []
    for pair, axis in pairs:
        at = np.flatnonzero(np.isin(axis.channels, group.channels))
        heads, rest = divmod(len(at), len(group))
        rows = at[np.argsort(np.searchsorted(np.sort(group.channels), axis.channels[at]), kind="stable")]
        if rest or not heads or axis.dim != int(pair.one.transposed):
            return None
        found.append((pair, rows.reshape(len(group), heads)[np.argsort(np.argsort(group.channels))]))
    fewer, more = sorted(at.shape[1] for _, at in found)
    return found if more % fewer == 0 else None


def _is_summed_over(model: nn.Module, both: Sequence[tuple[Pair, np.ndarray]], parts: Sequence[Part]) -> bool:
    """Whether products of both are all that the model makes of these channels."""
    generator = torch.Generator().manual_seed(0)
    channels, heads = len(both[0][1]), min(at.shape[1] for _, at in both)
    basis = torch.linalg.qr(torch.randn(heads, channels, channels, generator=generator, dtype=torch.float64))[0]
    sizes = torch.empty(heads, 1, channels, dtype=torch.float64).uniform_(0.7, 1.4, generator=generator)
    with preserved(model, fast_path=False):
        for part in parts:
            before = tensors_in(call_model(model, copied(part.inputs)))
            with _multiplied(both[0], basis * sizes), _multiplied(both[1], basis / sizes):
                after = tensors_in(call_model(model, copied(part.inputs)))
            for one, other in zip(before, after, strict=True):
                if one.is_floating_point() and not float((one - other).norm()) <= SAME * float(one.norm()):
                    return False
    return True


@contextmanager
def _multiplied(of: tuple[Pair, np.ndarray], matrices: Tensor) -> Iterator[None]:
    """A layer's outputs in these rows multiplied, head by head, by matrices [heads or fewer, channels, channels]."""
    pair, at = of
    rows = torch.from_numpy(at.T.copy())  # [heads, channels]
    each = matrices.repeat_interleave(len(rows) // len(matrices), 0)

    def hook(_: Any, __: Any, y: Tensor) -> Tensor:
        y = y.clone()
        y[..., rows] = torch.einsum("...hc,hcd->...hd", y[..., rows], each.to(y))
        return y

    handle = pair.one.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _moments(pair: Pair, at: np.ndarray, outputs: Mapping[Any, Tensor], work: Workload) -> Tensor:
    """Second moments of each head's outputs, [heads, channels, channels]."""
    rows = torch.from_numpy(at.T.copy())
    total = torch.zeros(len(rows), rows.shape[1], rows.shape[1], dtype=torch.float64, device=work.device)
    for y in outputs.values():
        heads = y[0][:, rows].double().transpose(0, 1)
        total += heads.mT @ heads
    return all_reduce_(total, work.group)


def _nearest(q: Tensor, k: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of each head, [heads, channels, left], from the second moments of its queries and keys.

    Where several heads of the one go with one head of the other, they are multiplied alike.
    """
    fewer = min(len(q), len(k))
    roots, backs = [], []
    for moments in (q, k):
        pooled = moments.unflatten(0, (fewer, -1)).sum(1)
        mean = pooled.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
        pooled.diagonal(dim1=1, dim2=2).add_(DAMPING * mean[:, None])
        values, vectors = torch.linalg.eigh(pooled)
        root = values.clamp(min=1e-300).sqrt()[:, None]
        roots.append((vectors * root) @ vectors.mT)
        backs.append((vectors / root) @ vectors.mT)
    u, s, vh = torch.linalg.svd(roots[0] @ roots[1])
    some = s[:, None, :left].sqrt()
    a, b = backs[0] @ (u[..., :left] * some), backs[1] @ (vh.mT[..., :left] * some)
    return a.repeat_interleave(len(q) // fewer, 0), b.repeat_interleave(len(k) // fewer, 0)


def _turn(rows: int, at: np.ndarray, left: Sequence[int], matrices: Tensor, plan: Plan, pair: Pair) -> Tensor:
    """The matrices of all heads, where the rows of what is left are, as one [rows, rows that are left]."""
    gone = plan.slices.get(pair.one.parameter("weight"), {}).get(int(pair.one.transposed), [])
    stay = [row for row in range(rows) if row not in set(gone)]
    place = {row: number for number, row in enumerate(stay)}
    whole = torch.zeros(rows, len(stay), dtype=torch.float64, device=matrices.device)
    whole[stay, range(len(stay))] = 1.0
    for head, matrix in enumerate(matrices):
        of = torch.from_numpy(at[:, head].copy())
        columns = torch.tensor([place[row] for row in of[list(left)].tolist()])
        whole[of[:, None], columns] = matrix
    return whole
